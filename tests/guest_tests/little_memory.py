# SPDX-License-Identifier: GPL-2.0-or-later
"""More merged than would fit, on the host and on one node: refused, where by hand something is killed. In a guest:

tests/guest/run --kernel 6.12 --nodes 2 --memory 400,128 -- python -m pytest -s tests/guest_tests/little_memory.py
"""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.guest_tests.tenants import NODES, command, knob, knobs, vmstat
from tests.kernel.test_detection import filled
from tests.service.running import until

pytestmark = pytest.mark.ksm

if len(NODES) < 2:
    pytest.skip(f"needs two nodes with memory, and there is {len(NODES)}", allow_module_level=True)

#: So many pages are there before they are merged.
STEP = 4000
LIMIT_SECONDS = 120.0
FLOOR_BYTES = 16 << 20


def free_bytes(path: str) -> int:
    """MemFree and what page cache gives way, of the host or of a node; an upper bound."""
    lines = [line.replace(":", "").split() for line in Path(path).read_text().splitlines()]
    sizes = {words[-3]: int(words[-2]) for words in lines if words[-1] == "kB"}
    cache = sizes.get("Cached", sizes.get("FilePages", 0))
    return (sizes["MemFree"] + cache) * 1024


def fill_and_merge(ksm: Path, process: RegionProcess, pages: int, node: int | None) -> None:
    """Equal pages, always so few at once that they fit before they are merged."""
    start = process.map(pages, node)
    process.advise(start, pages, mergeable=True)
    merged = knob(ksm, "pages_sharing")
    for first in range(0, pages, STEP):
        count = min(STEP, pages - first)
        process.store(start + first * PAGE_SIZE, [filled(1)] * count)
        # One in 256 is shared by the others.
        wanted = merged + (first + count) * 0.98
        until("these to be merged", lambda wanted=wanted: knob(ksm, "pages_sharing") >= wanted or None, LIMIT_SECONDS)  # type: ignore[misc]


def merging(ksm: Path) -> None:
    knob(ksm, "run", 2)
    knob(ksm, "merge_across_nodes", 1)
    if (ksm / "smart_scan").exists():
        knob(ksm, "smart_scan", 0)
    knob(ksm, "sleep_millisecs", 5)
    knob(ksm, "pages_to_scan", 10_000)
    knob(ksm, "run", 1)


@pytest.mark.parametrize("place", ["host", "node"])
def test_refused_with_figures_where_by_hand_something_is_killed(ksm_host: Path, tmp_path: Path, place: str) -> None:
    node = NODES[-1] if place == "node" else None
    path = "/proc/meminfo" if node is None else f"/sys/devices/system/node/node{node}/meminfo"
    where = "on the host" if node is None else f"on node {node}"
    merging(ksm_host)
    with ExitStack() as stack:
        wanted = int(free_bytes(path) / PAGE_SIZE * 1.3) + 2 * STEP
        tenants = [stack.enter_context(spawn(f"tenant-{number}", node)) for number in range(3)]
        for tenant in tenants:
            fill_and_merge(ksm_host, tenant, wanted // 3, node)
        # Nothing else changes any more.
        knob(ksm_host, "run", 0)
        killed, held, merged = vmstat("oom_kill"), knobs(ksm_host), knob(ksm_host, "pages_sharing")
        print(f"\n{merged} pages merged, and {free_bytes(path) >> 20} MiB there at most {where}")

        for words in (["merge_across_nodes=0"], ["merge_across_nodes=0", "--wait", "3"], ["run=2"]):
            done = command(tmp_path, "set", *words, floor_bytes=FLOOR_BYTES)
            print(f"ksmd-ctl set {' '.join(words)}: {done.returncode}\n{done.stderr}")
            assert done.returncode == 6, done.stderr + done.stdout
            assert f"{where} it takes " in done.stderr
            assert "nothing was changed" in done.stderr
            assert knobs(ksm_host) == held
        assert vmstat("oom_kill") == killed
        assert knob(ksm_host, "pages_sharing") == merged
        assert all(Path(f"/proc/{tenant.id.pid}/stat").read_text().split()[2] != "Z" for tenant in tenants)

        # By hand; the shell that writes is the first to be killed.
        by_hand = subprocess.run(["sh", "-c", f"echo 2 > {ksm_host}/run"], capture_output=True, text=True, check=False)
        kills = vmstat("oom_kill") - killed
        print(f"by hand: {kills} killed, the shell's status {by_hand.returncode}, run {knob(ksm_host, 'run')}")
        assert kills > 0
