# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import tempfile
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, PRESENT, SWAPPED, Pagemap, all_have, frame_limits, frames_of
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
