# SPDX-License-Identifier: GPL-2.0-or-later
"""The service under load: nobody who behaves is kept waiting by those who don't, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.load.clients import CLIENTS, SCRAPES_PER_SECOND, Load
from tests.service.running import healthy_service, metrics, until

_LATE = "ksmd_ctl_tick_lateness_seconds"


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured, from the end of the warm-up to the end.

    :ivar ticks: how many there were
    :ivar late: how many of them came more than 50 ms after their time
    :ivar resident_bytes: of the service, at both ends
    """

    ticks: int
    late: int
    lateness_seconds: float
    cpu_seconds: float
    resident_bytes: tuple[int, int]
    seen: dict[str, int]


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def under_load(folder: Path, host: str, seconds: float, warm_up_seconds: float) -> Figures:
    """Run a service under load, and see that everybody who behaved was served."""

    async def load(pid: int, port: int) -> Figures:
        clients = Load(folder / "socket", port)
        everybody = asyncio.ensure_future(clients.run(warm_up_seconds + seconds))
        await asyncio.sleep(warm_up_seconds)
        first, memory, cpu = await asyncio.to_thread(metrics, port), resident_bytes(pid), cpu_seconds(pid)
        await everybody
        assert clients.wrong == []
        last = metrics(port)
        ticks, within, late = (
            last[f"{_LATE}{name}"] - first[f"{_LATE}{name}"] for name in ("_count", '_bucket{le="0.05"}', "_sum")
        )
        return Figures(
            int(ticks),
            int(ticks - within),
            late,
            cpu_seconds(pid) - cpu,
            (memory, resident_bytes(pid)),
            dict(clients.seen),
        )

    # It reads only: of the kernel, too.
    with healthy_service(folder, "policy = 'observe'\n", host) as service:
        pid = service.process.pid
        before = descriptors(pid)
        figures = asyncio.run(load(pid, service.port))
        until("the last of them to be gone", lambda: descriptors(pid) <= before + 1 or None)
    return figures


@pytest.mark.parametrize("host", ["engine", "kernel"])
def test_everybody_who_behaves_is_served(tmp_path: Path, host: str) -> None:
    if host == "kernel" and not Path("/sys/kernel/mm/ksm").is_dir():
        pytest.skip("this kernel has no KSM (/sys/kernel/mm/ksm)")
    seconds = 8.0
    figures = under_load(tmp_path, host, seconds, 2.0)
    print(figures)
    assert figures.ticks > 0
    kinds = {client.__name__ for _, client in CLIENTS} - {"slow_reader", "poller", "never_reads", "subscriber"}
    assert kinds <= figures.seen.keys(), kinds - figures.seen.keys()
    for what in ("answers", "reports", "slow scrapes", "half requests"):
        assert figures.seen[what] > 0, what
    # Some of them are begun at the very end; on a busy machine fewer are begun.
    assert figures.seen["scrapes"] > 0.5 * (figures.seen["scrapes begun"] - SCRAPES_PER_SECOND)
