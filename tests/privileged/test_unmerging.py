# SPDX-License-Identifier: GPL-2.0-or-later
"""run = 2 for whoever is not root: only where the host and every node have room for all that it un-merges."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ksmd_ctl.errors import Refused
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import LEAST_FLOOR_BYTES, KsmDetection
from ksmd_ctl.kernel import detection
from ksmd_ctl.kernel.kpageflags import Bit
from ksmd_ctl.privileged.requests import Context, WriteKnob
from ksmd_ctl.privileged.unmerging import counted_pages, need_room
from tests.kernel.test_processes import machine_tree, pages, stat
from tests.kernel.trees import node, write_tree, zone

PAGE = 4096
SERVICE = 996
AMPLE = 1000


def host(root: Path, available: int, free: int = AMPLE, *, merged: bool = True) -> Path:
    """A machine with 6 merged pages of 6 frames and 2 zero pages.

    :param available: pages that are free above the floor on the host, and `free` on node 0; node 1 has plenty
    :param merged: its pages are merged still, or only its counters say so
    """
    machine_tree(root)
    if not merged:
        pages(root, 7, {0x100: 10}, dict.fromkeys((10, 11, 1006, 1007, 1100, 1101), 1 << Bit.ANON))
    floor_kib = LEAST_FLOOR_BYTES >> 10
    return write_tree(
        root,
        {
            "proc/7/ksm_merging_pages": "6\n",
            "proc/9/ksm_merging_pages": "0\n",
            "proc/2/ksm_merging_pages": "",
            "proc/meminfo": f"MemTotal: 99999 kB\nMemAvailable: {floor_kib + 4 * available} kB\n",
            "proc/zoneinfo": zone(0, "Normal", 0, 1000) + zone(1, "Normal", 1000, 1000),
            "sys/devices/system/node/online": "0-1\n",
            **node(0, "0", 99999, "10 20", free_kib=floor_kib + 4 * free),
            **node(1, "1", 99999, "20 10", free_kib=floor_kib + 4 * AMPLE),
            "sys/kernel/mm/ksm/run": "0\n",
            "sys/kernel/mm/ksm/pages_sharing": "6\n",
            "sys/kernel/mm/ksm/ksm_zero_pages": "2\n",
            # What a tenant may take is no matter of the host's.
            "sys/fs/cgroup/machine.slice/memory.max": f"{PAGE}\n",
            "sys/fs/cgroup/machine.slice/memory.current": "0\n",
        },
    )


def write(root: Path, uid: int) -> str:
    WriteKnob(Knob.RUN, 2).run(Context(root, uid=uid))
    return (root / "sys/kernel/mm/ksm/run").read_text().strip()


@pytest.fixture(autouse=True)
def told_by_page_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tree shows, whatever the kernel below it has."""
    monkeypatch.setattr(detection, "choose", lambda _: KsmDetection.KPAGEFLAGS)


@pytest.mark.parametrize(("available", "free", "where"), [(1, AMPLE, "the host"), (AMPLE, 1, "node 0")])
def test_what_does_not_fit_is_refused_with_figures(tmp_path: Path, available: int, free: int, where: str) -> None:
    root = host(tmp_path, available, free)
    with pytest.raises(Refused, match=rf"on {where} it takes .* above the floor of 16\.0 MiB") as error:
        write(root, SERVICE)
    assert "as root" in error.value.hint
    assert (root / "sys/kernel/mm/ksm/run").read_text() == "0\n"


def test_root_may_all_the_same(tmp_path: Path) -> None:
    assert write(host(tmp_path, 1), 0) == "2"


def test_what_fits_is_written(tmp_path: Path) -> None:
    assert write(host(tmp_path, 9), SERVICE) == "2"


def test_what_surely_fits_needs_no_look_at_the_processes(tmp_path: Path) -> None:
    root = host(tmp_path, AMPLE)
    # Nobody could look at this.
    (root / "proc/7/smaps").write_text("x")
    assert write(root, SERVICE) == "2"


def test_counters_that_ksmd_has_not_brought_up_to_date_refuse_nothing(tmp_path: Path) -> None:
    assert write(host(tmp_path, 3, merged=False), SERVICE) == "2"


def test_who_can_not_be_looked_at_takes_what_the_kernel_counts(tmp_path: Path) -> None:
    root = host(tmp_path, 3)
    (root / "proc/7/smaps").write_text("x" * (65 << 20))
    with pytest.raises(Refused):
        need_room(root)


def test_without_counters_everything_is_looked_at(tmp_path: Path) -> None:
    root = host(tmp_path, 1)
    for pid in (2, 7, 9):
        (root / f"proc/{pid}/ksm_merging_pages").unlink()
    assert counted_pages(root) is None
    with pytest.raises(Refused):
        need_room(root)


def test_a_fork_counts_as_what_its_parent_had_merged(tmp_path: Path) -> None:
    assert counted_pages(host(tmp_path, 1)) == 6 + 2
    for pid, merged in ((11, 50), (12, 0), (13, 0)):
        line = stat(pid, "fork").split()
        # startstack, field 28 of proc(5).
        line[28 - 1] = "140723412320000"
        write_tree(tmp_path, {f"proc/{pid}/stat": " ".join(line), f"proc/{pid}/ksm_merging_pages": f"{merged}\n"})
    assert counted_pages(tmp_path) == 6 + 2 + 3 * 50


def test_a_host_that_is_full_is_no_obstacle_where_nothing_is_merged(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/meminfo": f"MemTotal: 99999 kB\nMemAvailable: {LEAST_FLOOR_BYTES >> 10} kB\n"})
    need_room(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to write KSM's knobs")
def test_on_this_host(ksm_host: Path) -> None:
    WriteKnob(Knob.RUN, 2).run(Context(Path("/"), uid=SERVICE))
    assert (ksm_host / "run").read_text() == "2\n"
