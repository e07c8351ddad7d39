# SPDX-License-Identifier: GPL-2.0-or-later
"""The inventory that transactions are planned with: homes range by range, and who would take how much room."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.host.memory import HomeRange, KsmDetection, ProcessClass, ProcessId, UnmergeDemand
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.inventory import inventory_of, joined, take
from ksmd_ctl.kernel.processes import Surveyor
from ksmd_ctl.kernel.sparse_walk import seconds_per_gib
from ksmd_ctl.privileged.unmerging import spread_over_nodes
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_processes import FRAMES, TOPOLOGY, machine_tree
from tests.kernel.trees import node, write_tree

PAGE = 4096

LIMIT = 8 << 20


def tree(tmp_path: Path) -> Path:
    root = machine_tree(tmp_path)
    group = "sys/fs/cgroup/machine.slice"
    files = {"proc/meminfo": "MemTotal: 2048 kB\nMemAvailable:    1024 kB\n"}
    files |= node(0, "0", 1024, "10 20", free_kib=512) | node(1, "1", 1024, "20 10", free_kib=256)
    files |= node(2, "", 1024, "20 20 10", free_kib=1024)
    files |= {f"{group}/memory.max": f"{LIMIT}\n", f"{group}/memory.high": "max\n", f"{group}/memory.current": "0\n"}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_each_range_has_its_home_and_each_place_what_would_come_to_it(tmp_path: Path) -> None:
    root = tree(tmp_path)
    with PageReader(KsmDetection.KPAGEFLAGS, root) as reader:
        surveyor = Surveyor(TOPOLOGY, FRAMES, reader, root=root)
        found = inventory_of(surveyor.all(), surveyor, TOPOLOGY, None, 64 << 10, root)
    (memory,) = found.memories
    assert (memory.process, memory.merged_pages) == (ProcessId(7, 500), 6)
    assert (memory.calls, memory.read_only_pages) == (2, 0)
    assert ProcessClass.PINNED in memory.classes
    assert memory.ranges == (
        HomeRange(0x100000, 0x108000, 0, {0: 6, 1: 2}, 4),
        HomeRange(0x400000, 0x408000, 1, {1: 8}, 2),
    )
    places = {item.where: item for item in found.demands}
    # Two zero pages un-merge too; as the machine has no single home, they may come to any node.
    assert places["node 0"] == UnmergeDemand("node 0", (4 + 2) * PAGE, (512 << 10) - (64 << 10))
    assert places["node 1"] == UnmergeDemand("node 1", (2 + 2) * PAGE, (256 << 10) - (64 << 10))
    assert places["host"] == UnmergeDemand("host", 8 * PAGE, (1024 << 10) - (64 << 10))
    # A reserve stays with the cgroup.
    assert places["/machine.slice"] == UnmergeDemand("/machine.slice", 8 * PAGE, LIMIT - (4 << 20))


def test_what_can_not_be_read_is_named_and_takes_its_room(tmp_path: Path) -> None:
    root = tree(tmp_path)
    (root / "proc/7/smaps").write_text("x" * (65 << 20))
    (root / "proc/7/ksm_merging_pages").write_text("6\n")
    surveyor = Surveyor(TOPOLOGY, FRAMES, None, root=root)
    found = inventory_of(surveyor.all(), surveyor, TOPOLOGY, None, 0, root)
    assert found.memories == ()
    assert [(one.pid, one.name) for one in found.skipped] == [(7, "qemu-system-x86")]
    growth = {item.where: item.growth_bytes for item in found.demands}
    assert growth == dict.fromkeys(("host", "node 0", "node 1", "node 2", "/machine.slice"), 6 * PAGE)


def test_without_detection_the_kernels_counts_have_to_do(tmp_path: Path) -> None:
    root = tree(tmp_path)
    surveyor = Surveyor(TOPOLOGY, FRAMES, None, root=root)
    found = inventory_of(surveyor.all(), surveyor, TOPOLOGY, None, 0, root)
    (memory,) = found.memories
    assert [(item.home, item.merged_pages) for item in memory.ranges] == [(0, 4), (1, 2)]


def test_nothing_is_spread_where_no_nodes_are_to_be_seen(tmp_path: Path) -> None:
    assert spread_over_nodes(write_tree(tmp_path, {"proc/meminfo": "MemTotal: 1024 kB\n"})) == frozenset()


def test_mappings_that_touch_each_other_and_have_one_home_are_one() -> None:
    ranges = [HomeRange(0, 2, 0, {0: 1}, 1), HomeRange(2, 3, 0, {1: 1}, 0), HomeRange(3, 4, 1, {1: 1}, 1)]
    apart = HomeRange(8, 9, 1, {1: 1}, 1)
    assert joined([*ranges, apart]) == (HomeRange(0, 3, 0, {0: 1, 1: 1}, 1), ranges[2], apart)


@pytest.mark.parametrize(("homes", "left"), [(1, 1), (2, 1)])
def test_however_many_there_are_an_answer_stays_short(homes: int, left: int) -> None:
    many = [HomeRange(3 * number, 3 * number + 1, number % homes, {0: 1}, 1) for number in range(65_530)]
    found = joined(many)
    assert len(found) == left
    assert (found[0].start, found[-1].end) == (0, many[-1].end)
    assert sum(item.merged_pages for item in found) == 65_530
    assert found[0].home == (0 if homes == 1 else None)


def test_how_fast_empty_address_space_is_walked_is_measured_where_there_is_much() -> None:
    def measured(pages: int) -> float | None:
        with spawn("test-inventory") as process:
            start = process.map(pages)
            process.advise(start, pages, mergeable=True)
            process.store(start + (pages - 1) * PAGE, [b"x" * PAGE])
            return take(16 << 20).sparse_seconds_per_gib

    if take(16 << 20).mapped_bytes < 1 << 29:
        assert measured(1 << 10) is None
    # The same process asks once.
    assert measured(1 << 18) == seconds_per_gib()
