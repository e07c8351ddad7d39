# SPDX-License-Identifier: GPL-2.0-or-later
"""What is equal on this host and not merged, told by contents."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, Cancelled
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.kernel.duplicates import find_duplicates
from ksmd_ctl.kernel.pagemap import PRESENT, Pagemap
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.reading import killable_reads
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.kernel.stuck import stuck_process
from tests.kernel.test_detection import filled, scan
from tests.kernel.test_unshare import mergeable
from tests.kernel.trees import write_tree, zone

pytestmark = pytest.mark.ksm


@pytest.fixture
def processes(ksm_host: Path) -> Iterator[tuple[RegionProcess, RegionProcess]]:
    with spawn("test-alike-1") as one, spawn("test-alike-2") as other:
        yield one, other


def look(budget: int = 1 << 18, **more: object) -> DuplicatePages:
    return find_duplicates(budget, **more)  # type: ignore[arg-type]


def test_before_and_after_merging(ksm_host: Path, processes: tuple[RegionProcess, RegionProcess]) -> None:
    one, other = processes
    mergeable(one, [*(filled(number) for number in range(50)), filled(1), None])
    start = mergeable(other, [filled(number) for number in range(40, 100)])
    found = look()
    # Ten that both have, and one that the first has twice.
    assert (found.mergeable_pages, found.frames, found.pages, found.complete) == (111, 111, 11, True)
    scan(ksm_host, 3)
    found = look()
    assert (found.mergeable_pages, found.frames, found.pages) == (111, 100, 0)
    # Somebody writes: what was one is two, and not alike.
    other.store(start, [filled(200)])
    found = look()
    assert (found.frames, found.pages) == (101, 0)


def test_what_fork_shares_is_not_apart(processes: tuple[RegionProcess, RegionProcess]) -> None:
    one, _ = processes
    mergeable(one, [filled(number) for number in range(30)])
    with one.fork():
        found = look()
    assert (found.mergeable_pages, found.frames, found.pages) == (60, 30, 0)


def test_a_part_of_them_gives_no_more_than_there_are(processes: tuple[RegionProcess, RegionProcess]) -> None:
    one, other = processes
    for process in (one, other):
        mergeable(process, [filled(number) for number in range(8192)])
    found = [look(4096, chance=random.Random(seed)) for seed in range(8)]
    assert not any(one.complete for one in found)
    assert all(one.frames < 16384 for one in found)
    # A lower bound, on the average: of pairs, a quarter of which is drawn, about a quarter.
    assert 0 < sum(one.pages for one in found) / 8 < 8192


def test_a_process_that_keeps_its_readers_waiting_hides_nobody_else_and_is_counted(
    processes: tuple[RegionProcess, RegionProcess], tmp_path: Path
) -> None:
    for process in processes:
        mergeable(process, [filled(1)])
    with stuck_process(tmp_path, "stuck-one", uid=65534), killable_reads(timeout_seconds=0.2):
        found = look()
    assert (found.frames, found.pages, found.complete, found.unread) == (2, 1, False, 1)
    assert (look().complete, look().unread) == (True, 0)


def test_it_can_be_stopped(processes: tuple[RegionProcess, RegionProcess]) -> None:
    mergeable(processes[0], [filled(1)])
    with pytest.raises(Cancelled):
        look(stop=lambda: True)


@pytest.mark.parametrize("skips_holes", [True, False])
def test_a_sparse_mapping_of_one_blinds_nobody(
    processes: tuple[RegionProcess, RegionProcess], skips_holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not skips_holes:
        # As before 6.7.
        def absent(*_: object) -> Iterator[tuple[int, int]]:
            raise Absent("scanning pagemap", "this kernel can't")

        monkeypatch.setattr(Pagemap, "populated", absent)
    for process in processes:
        mergeable(process, [filled(number) for number in range(2000)])
    pages = (64 << 30) // PAGE_SIZE
    with spawn("test-sparse") as sparse:
        start = sparse.map(pages)
        sparse.advise(start, pages, mergeable=True)
        sparse.store(start + (pages - 1) * PAGE_SIZE, [filled(5000)])
        found = look(1 << 13, chance=random.Random(1))
    assert (found.mergeable_pages, found.pages) == (4001, 2000)
    assert found.frames == (4001 if skips_holes else 4000)
    assert found.complete == skips_holes


def test_frames_that_many_map_count_once_however_few_are_drawn(tmp_path: Path) -> None:
    pages, start = 64 * 512, 0x100000
    write_tree(
        tmp_path,
        {
            "proc/7/smaps": (
                f"{start:x}-{start + pages * PAGE_SIZE:x} rw-p 00000000 00:00 0 \n"
                f"Rss: {pages * 4} kB\nAnonymous: {pages * 4} kB\nVmFlags: rd wr mg \n"
            ),
            "proc/7/stat": "7 (p) S 1" + " 0" * 48 + "\n",
            "proc/7/mem": "",
            "sys/kernel/mm/ksm/max_page_sharing": f"{pages}\n",
            "proc/zoneinfo": zone(0, "Normal", 0, 4000),
        },
    )
    # Two frames of one content, half of the pages each: one page could be saved, and no more.
    first = start // PAGE_SIZE
    entries = array("Q", bytes(8 * first)) + array("Q", [PRESENT | 3000, PRESENT | 3001] * (pages // 2))
    (tmp_path / "proc/7/pagemap").write_bytes(entries.tobytes())
    with open(tmp_path / "proc/7/mem", "r+b") as memory:
        memory.truncate(start + pages * PAGE_SIZE)
    found = find_duplicates(pages // 8, root=tmp_path, chance=random.Random(2))
    assert (found.frames, found.pages, found.complete) == (2, 1, False)


def test_what_forks_map_at_one_address_is_one_place(tmp_path: Path) -> None:
    """Two relatives with six pages, and one that is none with one of them."""
    start = 0x100000
    files: dict[str, str] = {
        "sys/kernel/mm/ksm/max_page_sharing": "256\n",
        "proc/zoneinfo": zone(0, "Normal", 0, 4000),
    }
    frames = {
        # Twice each in both (merged), fork's alone (not known to be merged), and one that a stranger has as well.
        7: [3000, 3000, 3001, 3001, 3002, 3003],
        8: [3000, 3000, 3001, 3001, 3002, 3003],
        9: [3003],
    }
    for pid, mapped in frames.items():
        size = len(mapped) * PAGE_SIZE
        files[f"proc/{pid}/smaps"] = (
            f"{start:x}-{start + size:x} rw-p 00000000 00:00 0 \n"
            f"Rss: {size // 1024} kB\nAnonymous: {size // 1024} kB\nVmFlags: rd wr mg \n"
        )
        stack = 0x7FFF0000 if pid != 9 else 0x7FFE0000
        files[f"proc/{pid}/stat"] = f"{pid} (p) S 1" + " 0" * 23 + f" {stack}" + " 0" * 24 + "\n"
        files[f"proc/{pid}/mem"] = ""
    write_tree(tmp_path, files)
    for pid, mapped in frames.items():
        entries = array("Q", bytes(8 * (start // PAGE_SIZE))) + array("Q", [PRESENT | frame for frame in mapped])
        (tmp_path / f"proc/{pid}/pagemap").write_bytes(entries.tobytes())
        with open(tmp_path / f"proc/{pid}/mem", "r+b") as memory:
            memory.truncate(start + len(mapped) * PAGE_SIZE)
    found = find_duplicates(1000, root=tmp_path)
    # 4 of the two that are there twice, and 1 of the stranger's.
    assert found.related_places == 5
