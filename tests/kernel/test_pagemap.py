# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.pagemap import (
    EXCLUSIVE,
    FILE,
    PRESENT,
    SWAPPED,
    Pagemap,
    all_have,
    any_has,
    frame_limits,
    frames_of,
)
from ksmd_ctl.kernel.regions import spawn
from ksmd_ctl.kernel.syscalls import PAGE_SIZE

FRAMES = st.integers(1, (1 << 55) - 1)


@given(st.lists(st.tuples(st.booleans(), FRAMES, st.integers(0, 63))))
def test_an_entry_has_a_frame_if_it_is_present_whatever_its_other_bits(pages: list[tuple[bool, int, int]]) -> None:
    # A swap slot in the same bits is not a frame; bits 55 to 61 say other things.
    entries = [(PRESENT if there else SWAPPED) | other << 55 | frame for there, frame, other in pages]
    assert frames_of(array("Q", entries)) == [frame if there else 0 for there, frame, _ in pages]


@given(st.integers(0, 1100), st.sets(st.integers(0, 1099), max_size=2), st.sampled_from([PRESENT, PRESENT | EXCLUSIVE]))
def test_whether_all_entries_have_some_bits(count: int, without: set[int], bits: int) -> None:
    entries = array("Q", [PRESENT | EXCLUSIVE | 5]) * count
    for index in without:
        if index < count:
            entries[index] &= ~EXCLUSIVE
    assert all_have(entries, bits) is all(entry & bits == bits for entry in entries)
    assert any_has(entries, EXCLUSIVE) is any(entry & EXCLUSIVE for entry in entries)
    assert not any_has(entries, FILE)


@given(st.lists(st.tuples(st.sampled_from([PRESENT, PRESENT | EXCLUSIVE, SWAPPED]), FRAMES), max_size=6))
def test_limits_of_frames_are_told_only_where_they_are_right(pages: list[tuple[int, int]]) -> None:
    found = frame_limits(array("Q", [bits | frame for bits, frame in pages]))
    if {bits for bits, _ in pages} in ({PRESENT}, {PRESENT | EXCLUSIVE}):
        assert found == (min(frame for _, frame in pages), max(frame for _, frame in pages))
    else:
        assert found is None


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=40), st.data())
def test_any_part_of_a_file_is_read_as_it_stands(words: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(words) - 1))
    count = data.draw(st.integers(0, len(words) + 3))
    with tempfile.TemporaryDirectory() as folder:
        process = Path(folder) / "proc/7"
        process.mkdir(parents=True)
        (process / "pagemap").write_bytes(array("Q", words).tobytes())
        with Pagemap(7, Path(folder)) as pagemap:
            assert list(pagemap.read(first * 4096, count)) == words[first : first + count]


def test_pages_without_frames_mean_a_missing_privilege(tmp_path: Path) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/pagemap").write_bytes(b"")
    with Pagemap(7, tmp_path) as pagemap:
        pagemap.need_frames(array("Q", [0, SWAPPED | 5]))
        pagemap.need_frames(array("Q", [PRESENT, PRESENT | 9]))
        with pytest.raises(Denied, match="without their frames") as caught:
            pagemap.need_frames(array("Q", [0, PRESENT]))
        assert "CAP_SYS_ADMIN" in caught.value.hint


def test_no_process_and_no_pagemap_are_two_things(tmp_path: Path) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    with pytest.raises(Absent, match="no pagemap"):
        Pagemap(7, tmp_path)
    with pytest.raises(NoSuchProcess, match="process 8"):
        Pagemap(8, tmp_path)


def test_a_process_that_exits_under_an_open_file_is_noticed() -> None:
    with spawn("test-pagemap") as process:
        start = process.map(2)
        process.store(start, [b"x" * PAGE_SIZE, None])
        with Pagemap(process.id.pid, page_size=PAGE_SIZE) as pagemap:
            present, absent = pagemap.read(start, 2)
            assert present & PRESENT
            assert not absent & PRESENT
            process.exit()
            with pytest.raises(NoSuchProcess):
                pagemap.read(start, 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_somebody_elses_process_is_not_ours_to_look_at() -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setresuid(65534, 65534, 65534)
            Pagemap(1)
        except Denied as error:
            code = 0 if "CAP_SYS_PTRACE" in error.hint else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_anonymous_pages_and_zero_pages_are_found_among_holes() -> None:
    size = 64 << 30
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
    start = syscalls.mmap(0, size, syscalls.PROT_READ | syscalls.PROT_WRITE, flags)
    try:
        syscalls.madvise(start, size, syscalls.MADV_NOHUGEPAGE)
        for page in (0, 1, 7000, 7020):
            syscalls.store(start + page * PAGE_SIZE, b"x")
        # Read and never written: the zero page.
        for page in (2, 7001, 9000):
            syscalls.load(start + page * PAGE_SIZE, 1)
        with Pagemap(os.getpid(), page_size=PAGE_SIZE) as pagemap:
            try:
                pagemap.zero_pages(start, start + size)
            except Absent as error:
                pytest.skip(str(error))
            found = list(pagemap.populated(start, start + size))
            joined = list(pagemap.populated(start, start + size, 19 * PAGE_SIZE))
            assert pagemap.zero_pages(start, start + size) == 3
            assert pagemap.zero_pages(start, start + 2 * PAGE_SIZE) == 0
    finally:
        syscalls.munmap(start, size)
    pages = [((first - start) // PAGE_SIZE, (last - start) // PAGE_SIZE) for first, last in found]
    assert pages == [(0, 2), (7000, 7001), (7020, 7021)]
    assert [((first - start) // PAGE_SIZE, (last - start) // PAGE_SIZE) for first, last in joined] == [
        (0, 2),
        (7000, 7021),
    ]


def test_more_regions_than_one_call_gives() -> None:
    count = 10_000
    memory = mmap.mmap(-1, 2 * count * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = syscalls.address_of(memory)
    syscalls.madvise(start, len(memory), syscalls.MADV_NOHUGEPAGE)
    for page in range(0, 2 * count, 2):
        syscalls.store(start + page * PAGE_SIZE, b"x")
    with Pagemap(os.getpid(), page_size=PAGE_SIZE) as pagemap:
        try:
            found = list(pagemap.populated(start, start + len(memory)))
        except Absent as error:
            pytest.skip(str(error))
    expected = [start + page * PAGE_SIZE for page in range(0, 2 * count, 2)]
    assert found == [(address, address + PAGE_SIZE) for address in expected]


def test_a_file_that_is_no_pagemap_can_not_be_scanned(tmp_path: Path) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/pagemap").write_bytes(bytes(64))
    with Pagemap(7, tmp_path) as pagemap:
        with pytest.raises(Absent, match="scanned"):
            pagemap.zero_pages(0, 8 * 4096)
        with pytest.raises(Absent, match="scanned"):
            list(pagemap.populated(0, 8 * 4096))
