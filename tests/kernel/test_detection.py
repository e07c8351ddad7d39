# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import random
import time
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent
from ksmd_ctl.host.memory import KsmDetection
from ksmd_ctl.kernel.detection import PageReader, Probe, State, choose, probe
from ksmd_ctl.kernel.kpageflags import Bit
from ksmd_ctl.kernel.pagemap import PRESENT
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.scenario.regions import RegionProcess, spawn

ANON = 1 << Bit.ANON | 1 << Bit.MMAP
PLAIN = ANON | 1 << Bit.ANON_EXCLUSIVE
FORKED = ANON
# What only the count of the mapping tells from a KSM page.
FORKED_AND_MOVED = ANON | 1 << Bit.DIRTY
MERGED = ANON | 1 << Bit.DIRTY
# On a kernel whose bit 21 lies it says nothing: it is set in all of these.
LIE = 1 << Bit.KSM


@dataclass
class Page:
    frame: int
    flags: int
    merged: bool


def _kinds() -> st.SearchStrategy[tuple[int, bool]]:
    return st.sampled_from([(PLAIN, False), (FORKED, False), (FORKED_AND_MOVED, False), (MERGED, True), (0, False)])


@st.composite
def machines(draw: st.DrawFn) -> list[list[Page]]:
    """Mappings of one process, with frames that are mapped several times."""
    kinds = draw(st.lists(_kinds(), min_size=1, max_size=12))
    frames = [Page(number + 1, flags | LIE, merged) for number, (flags, merged) in enumerate(kinds)]
    return draw(st.lists(st.lists(st.sampled_from(frames), max_size=12), min_size=1, max_size=5))


def _write(root: Path, machine: list[list[Page]]) -> None:
    process = root / "proc/7"
    process.mkdir(parents=True, exist_ok=True)
    smaps, entries = "", array("Q", [0] * 64 * (len(machine) + 1))
    flags = array("Q", [0] * 32)
    for number, pages in enumerate(machine):
        first = 64 * (number + 1) - 32
        merged = sum(page.merged for page in pages)
        start, end = first * 4096, (first + 16) * 4096
        smaps += f"{start:x}-{end:x} rw-p 00000000 00:00 0 \nRss: {len(pages) * 4} kB\nKSM: {merged * 4} kB\n"
        smaps += "VmFlags: rd wr mg \n"
        for index, page in enumerate(pages):
            entries[first + index] = PRESENT | page.frame
            flags[page.frame] = page.flags
    (process / "smaps").write_text(smaps)
    (process / "pagemap").write_bytes(entries.tobytes())
    (root / "proc/kpageflags").write_bytes(flags.tobytes())


@given(machines())
def test_detection_by_pagemap_is_never_wrong_and_undecided_only_where_a_mapping_has_both_kinds(
    tmp_path_factory: pytest.TempPathFactory, machine: list[list[Page]]
) -> None:
    root = tmp_path_factory.getbasetemp() / "machine"
    _write(root, machine)
    with PageReader(KsmDetection.PAGEMAP, root) as reader:
        ranges = read_ranges(7, root)
        reader.learn(7, ranges)
        windows = list(reader.windows(7, ranges))
    assert len(windows) == len(machine)
    for pages, window in zip(machine, windows, strict=True):
        assert list(window.frames[: len(pages)]) == [page.frame for page in pages]
        states = window.states[: len(pages)]
        assert all(
            state == State.UNDECIDED or (state == State.KSM) == page.merged
            for state, page in zip(states, pages, strict=True)
        )
        # There are never fewer candidates than KSM pages.
        assert sum(state != State.PLAIN for state in states) >= sum(page.merged for page in pages)
        alike = any(not page.merged and page.flags == FORKED_AND_MOVED | LIE for page in pages)
        if not alike or not any(page.merged for page in pages):
            assert State.UNDECIDED not in states


def test_what_one_mapping_decides_holds_in_another(tmp_path: Path) -> None:
    forked = Page(1, FORKED_AND_MOVED | LIE, merged=False)
    merged = Page(2, MERGED | LIE, merged=True)
    _write(tmp_path, [[forked, merged], [forked]])
    with PageReader(KsmDetection.PAGEMAP, tmp_path) as reader:
        ranges = read_ranges(7, tmp_path)
        (alone,) = reader.windows(7, ranges[:1])
        assert list(alone.states[:2]) == [State.UNDECIDED, State.UNDECIDED]
        reader.learn(7, ranges)
        (both,) = reader.windows(7, ranges[:1])
        assert list(both.states[:2]) == [State.PLAIN, State.KSM]


def test_parts_of_mappings(tmp_path: Path) -> None:
    _write(tmp_path, [[Page(1, MERGED | LIE, merged=True)] * 4, [Page(2, PLAIN | LIE, merged=False)]])
    for detection in (KsmDetection.PAGEMAP, KsmDetection.KPAGEFLAGS):
        with PageReader(detection, tmp_path) as reader:
            ranges = read_ranges(7, tmp_path)
            start = ranges[0].start
            (window,) = reader.windows(7, ranges, [(start + 4096, start + 3 * 4096)])
            assert (window.start, list(window.states)) == (start + 4096, [State.KSM] * 2)


@pytest.mark.parametrize(
    ("found", "detection"),
    [
        (Probe(bit_lies=False, exclusive_shows=False, smaps_counts=False), KsmDetection.KPAGEFLAGS),
        (Probe(bit_lies=True, exclusive_shows=True, smaps_counts=True), KsmDetection.PAGEMAP),
    ],
)
def test_which_detection_is_used(found: Probe, detection: KsmDetection) -> None:
    assert choose(found) is detection


@pytest.mark.parametrize("shows", [False, True])
def test_with_neither_there_is_no_answer(shows: bool) -> None:
    with pytest.raises(Absent, match="every anonymous page"):
        choose(Probe(bit_lies=True, exclusive_shows=shows, smaps_counts=not shows))


# -- this machine --------------------------------------------------------------------------------------------


def scan(ksm: Path, times: int) -> None:
    """So many full scans of everything, then stop."""

    def full_scans() -> int:
        return int((ksm / "full_scans").read_text())

    if (ksm / "smart_scan").exists():
        (ksm / "smart_scan").write_text("0")
    (ksm / "pages_to_scan").write_text("1000000")
    (ksm / "run").write_text("1")
    wanted = full_scans() + times
    until = time.monotonic() + 180
    while full_scans() < wanted:
        assert time.monotonic() < until, f"no {times} full scans within 180 s: does somebody else write the knobs?"
        time.sleep(0.01)
    (ksm / "run").write_text("0")


def states(reader: PageReader, process: RegionProcess) -> dict[int, tuple[int, int]]:
    """Frame and state of every present page in the mergeable mappings of a process."""
    ranges = [item for item in read_ranges(process.id.pid) if item.mergeable]
    return {
        window.start + index * PAGE_SIZE: (frame, window.states[index])
        for window in reader.windows(process.id.pid, ranges)
        for index, frame in enumerate(window.frames)
        if frame
    }


def filled(number: int) -> bytes:
    """A page that is like no other number's."""
    return number.to_bytes(8, "little") * (PAGE_SIZE // 8)


@pytest.mark.ksm
def test_both_detections_agree_page_by_page_and_with_the_kernels_count(ksm_host: Path) -> None:
    chance = random.Random(1)
    seen: Counter[int] = Counter()
    try:
        found = probe()
        choose(found)
    except Absent as error:
        pytest.skip(str(error))
    with spawn("test-a") as first, spawn("test-b") as second:
        starts = {}
        for process in (first, second):
            starts[process] = [process.map(128) for _ in range(4)]
            for start in starts[process]:
                process.advise(start, 128, mergeable=True)
                process.store(
                    start, [filled(chance.randrange(100)) if chance.random() < 0.9 else None for _ in range(128)]
                )
        # Contents of their own: shared by fork afterwards, never merged.
        lonely = first.map(64)
        first.store(lonely, [filled(1000 + number) for number in range(64)])
        first.advise(lonely, 64, mergeable=True)
        with first.fork() as child:
            scan(ksm_host, 4)
            # Copies on write, pages whose last mapping but one is gone, and holes.
            for process in (child, second):
                for start in starts[first if process is child else second]:
                    process.store(start, [filled(5000 + n) if chance.random() < 0.3 else None for n in range(128)])
                    process.discard(start + 32 * PAGE_SIZE, 16)
            frames: dict[KsmDetection, set[int]] = {}
            for detection in _usable(found):
                with PageReader(detection) as reader:
                    pages = [states(reader, process) for process in (first, child, second)]
                seen.update(state for process_pages in pages for _, state in process_pages.values())
                frames[detection] = {frame for some in pages for frame, state in some.values() if state == State.KSM}
            # Full scans later every mapping is listed and the stale ones are gone: the counter is exact then.
            scan(ksm_host, 3)
            for detection in _usable(found):
                with PageReader(detection) as reader:
                    pages = [states(reader, process) for process in (first, child, second)]
                merged = {frame for some in pages for frame, state in some.values() if state == State.KSM}
                assert len(merged) == int((ksm_host / "pages_shared").read_text())
    assert len(set(map(frozenset, frames.values()))) == 1
    assert seen[State.KSM] > 500
    assert seen[State.PLAIN] > 100
    assert seen[State.UNDECIDED] == 0


def _usable(found: Probe) -> list[KsmDetection]:
    usable = [] if found.bit_lies else [KsmDetection.KPAGEFLAGS]
    return usable + ([KsmDetection.PAGEMAP] if found.smaps_counts and found.exclusive_shows else [])
