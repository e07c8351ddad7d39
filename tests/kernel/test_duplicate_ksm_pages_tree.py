# SPDX-License-Identifier: GPL-2.0-or-later
"""Twins on two nodes, in fake trees: what may be un-merged, what may not, and why."""

from __future__ import annotations

import errno
import os
from array import array
from pathlib import Path

import pytest

from ksmd_ctl.errors import Denied
from ksmd_ctl.host.duplicates import POLICY, DuplicateKsmPages
from ksmd_ctl.host.memory import KsmDetection, ProcessId
from ksmd_ctl.host.operation import UnsharePart
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.duplicate_ksm_pages import HIDDEN, find_duplicate_ksm_pages
from ksmd_ctl.kernel.kpageflags import Bit
from ksmd_ctl.kernel.pagemap import PRESENT
from ksmd_ctl.kernel.unshare import NOT_WRITABLE, WATCHED
from tests.kernel.trees import write_tree, zone

PAGE = 4096
KSM = 1 << Bit.KSM | 1 << Bit.MMAP | 1 << Bit.ANON
# Frames 0 to 63 are on node 0, 64 to 127 on node 1.
ZONES = zone(0, "Normal", 0, 64) + zone(1, "Normal", 64, 64)


class Tree:
    """Processes whose pages are all merged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.smaps: dict[int, str] = {}
        self.numa: dict[int, str] = {}
        self.entries: dict[int, dict[int, int]] = {}

    def process(self, pid: int, task_policy: str = "default") -> None:
        self.smaps[pid] = "7000000-7010000 rw-p 00000000 00:00 0    [stack]\nRss: 4 kB\nKSM: 0 kB\nVmFlags: rd wr gd\n"
        self.numa[pid] = f"7000000 {task_policy} stack anon=1 N0=1\n"
        self.entries[pid] = {}

    def map(
        self, pid: int, start: int, pages: list[tuple[int, int]], flags: str = "rd wr mg", policy: str = ""
    ) -> None:
        """Frames with their contents at an address."""
        kib = 4 * len(pages)
        end = start + len(pages) * PAGE
        self.smaps[pid] += f"{start:x}-{end:x} rw-p 00000000 00:00 0 \nRss: {kib} kB\nKSM: {kib} kB\nVmFlags: {flags}\n"
        task = self.numa[pid].split()[1]
        self.numa[pid] += f"{start:x} {policy or task} anon={len(pages)}\n"
        for index, (frame, content) in enumerate(pages):
            assert self.contents.setdefault(frame, content) == content
            self.mapped[frame] = self.mapped.get(frame, 0) + 1
            self.entries[pid][start // PAGE + index] = frame

    def find(self, limit: int = 256, across: bool = False, most_pages: int = 1000) -> DuplicateKsmPages:
        for pid, found in self.entries.items():
            folder = self.root / "proc" / str(pid)
            folder.mkdir(parents=True, exist_ok=True)
            fields = ["S", "1"] + ["0"] * 17 + [str(100 * pid)] + ["0"] * 10
            (folder / "stat").write_text(f"{pid} (p) {' '.join(fields)}\n")
            (folder / "smaps").write_text(self.smaps[pid])
            (folder / "numa_maps").write_text(self.numa[pid])
            entries = array("Q", [0] * (max(found, default=0) + 1))
            with (folder / "mem").open("wb") as memory:
                for page, frame in found.items():
                    entries[page] = PRESENT | frame
                    memory.seek(page * PAGE)
                    memory.write(self.contents[frame].to_bytes(8, "little") * (PAGE // 8))
            (folder / "pagemap").write_bytes(entries.tobytes())
        flags, counts = array("Q", [0] * 128), array("Q", [0] * 128)
        for frame, mapped in self.mapped.items():
            flags[frame], counts[frame] = KSM, mapped
        (self.root / "proc/kpageflags").write_bytes(flags.tobytes())
        (self.root / "proc/kpagecount").write_bytes(counts.tobytes())
        knobs = {"merge_across_nodes": int(across), "max_page_sharing": limit}
        write_tree(self.root, {f"sys/kernel/mm/ksm/{knob}": f"{value}\n" for knob, value in knobs.items()})
        write_tree(self.root, {"proc/zoneinfo": ZONES})
        with PageReader(KsmDetection.KPAGEFLAGS, self.root) as reader:
            return find_duplicate_ksm_pages(60.0, most_pages, reader=reader, root=self.root)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    found = Tree(tmp_path)
    found.process(7)
    found.process(8)
    return found


ONE, TWO = ProcessId(7, 700), ProcessId(8, 800)
A, B = 0x100000, 0x200000


def test_only_pages_of_one_content_on_one_node_are_twins(tree: Tree) -> None:
    tree.map(7, A, [(10, 1), (70, 1), (71, 1), (11, 2), (72, 3)])
    tree.map(8, A, [(10, 1), (70, 1), (71, 1), (70, 1), (11, 2)])
    found = tree.find()
    assert (found.frames, found.reclaimable, found.left, found.complete) == (5, 1, {}, True)
    assert found.parts == (
        UnsharePart(ONE, ((A + 2 * PAGE, A + 3 * PAGE),), 1),
        UnsharePart(TWO, ((A + 2 * PAGE, A + 3 * PAGE),), 1),
    )
    assert (found.part_pages, found.part_frames) == (2, 1)


def test_across_nodes_content_alone_counts(tree: Tree) -> None:
    tree.map(7, A, [(10, 1), (70, 1), (71, 1)])
    tree.map(8, A, [(10, 1), (70, 1), (10, 1)])
    found = tree.find(across=True)
    assert (found.reclaimable, found.part_pages, found.part_frames) == (2, 3, 2)
    assert {part.to for part in found.parts} == {1}


def test_full_ones_are_not_even_read(tree: Tree) -> None:
    tree.map(7, A, [(10, 1)] * 3 + [(11, 1)] * 3 + [(12, 1)])
    found = tree.find(limit=3)
    assert (found.frames, found.reclaimable) == (1, 0)


@pytest.mark.parametrize(
    ("flags", "cause"), [("rd mg", NOT_WRITABLE), ("rd wr mg um", WATCHED), ("rd wr mg uw", WATCHED)]
)
def test_mappings_that_can_not_be_un_merged(tree: Tree, flags: str, cause: str) -> None:
    tree.map(7, A, [(10, 1), (11, 1)], flags)
    tree.map(8, A, [(10, 1), (11, 1)])
    found = tree.find()
    assert (found.reclaimable, found.left, found.parts) == (1, {cause: 1}, ())


def test_what_is_only_seen_through_a_watched_mapping_is_not_read(tree: Tree) -> None:
    tree.map(7, A, [(10, 1), (11, 1)], "rd wr mg um")
    assert tree.find().frames == 0


def test_a_page_that_more_map_than_were_found_stays(tree: Tree) -> None:
    tree.map(7, A, [(10, 1), (11, 1)])
    tree.mapped[10] += 1
    found = tree.find()
    assert (found.left, found.parts) == ({}, (UnsharePart(ONE, ((A + PAGE, A + 2 * PAGE),), 0),))
    tree.mapped[11] += 1
    found = tree.find()
    assert (found.reclaimable, found.left, found.parts) == (1, {HIDDEN: 1}, ())


def test_a_policy_of_its_own_that_leads_away(tree: Tree) -> None:
    tree.map(7, A, [(70, 1)], policy="bind:0")
    tree.map(8, A, [(71, 1), (71, 1)], policy="bind:1")
    # The one that fewest map would go to node 0: the other one is taken.
    assert tree.find().parts == (UnsharePart(TWO, ((A, A + 2 * PAGE),), 1),)
    # Where merging goes across nodes it doesn't matter.
    assert tree.find(across=True).parts == (UnsharePart(ONE, ((A, A + PAGE),), 1),)
    tree.map(8, B, [(72, 1)], policy="interleave:0-1")
    found = tree.find()
    assert (found.reclaimable, found.part_frames, found.left) == (2, 1, {POLICY: 1})


def test_the_policy_of_the_thread_is_tried_and_comes_last(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.process(7, task_policy="prefer:0")
    tree.process(8)
    tree.map(7, A, [(70, 1), (71, 1), (71, 1)])
    tree.map(8, A, [(80, 2), (80, 2), (80, 2), (81, 2), (81, 2), (81, 2)])
    assert tree.find(most_pages=3).parts == (UnsharePart(TWO, ((A, A + 3 * PAGE),), 1),)
    found = tree.find()
    assert (found.part_frames, {part.process for part in found.parts}) == (2, {ONE, TWO})


def test_a_process_that_is_gone_half_way_is_left_out(tree: Tree) -> None:
    tree.map(7, A, [(10, 1), (11, 1)])
    tree.map(8, A, [(20, 5), (21, 5)])
    real = os.open

    def gone(path: str | Path, flags: int) -> int:
        if str(path) == str(tree.root / "proc/8/mem"):
            raise ProcessLookupError(errno.ESRCH, "No such process")
        return real(path, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", gone)
        found = tree.find()
    assert (found.frames, found.reclaimable) == (2, 1)


def test_contents_that_are_not_ours_to_read(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root has it without CAP_SYS_PTRACE: smaps and pagemap can be read, and mem can't."""
    tree.map(7, A, [(10, 1), (11, 1)])
    tree.map(8, A, [(20, 5), (21, 5)])
    refused: set[str] = set()
    real = os.open

    def refusing(path: str | Path, flags: int) -> int:
        if str(path) in refused:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags)

    monkeypatch.setattr(os, "open", refusing)
    refused.add(str(tree.root / "proc/8/mem"))
    found = tree.find()
    assert (found.frames, found.reclaimable, found.complete) == (2, 1, False)
    refused.add(str(tree.root / "proc/7/mem"))
    with pytest.raises(Denied, match="Permission denied"):
        tree.find()
