# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import itertools
import tempfile
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent
from ksmd_ctl.kernel.kpageflags import Bit, FrameFlags, candidate, count_candidates, count_ksm, merged, runs, spans

BITS = list(Bit)
# Any flags, and such that differ in what is looked at, and in what lies beside it.
FLAGS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sets(st.sampled_from([*BITS, 0, 63, 20, 22])).map(lambda bits: sum(1 << bit for bit in bits)),
)


@given(st.lists(FLAGS, max_size=100))
def test_counting_many_at_once_is_counting_each(flags: list[int]) -> None:
    raw = array("Q", flags).tobytes()
    assert count_ksm(raw) == sum(map(merged, flags))
    assert count_candidates(raw) == sum(map(candidate, flags))


def test_a_whole_block_is_counted() -> None:
    word = 1 << Bit.ANON | 1 << Bit.MMAP | 1 << Bit.DIRTY | 1 << Bit.KSM
    raw = array("Q", [word]).tobytes() * 32768
    assert count_ksm(raw) == count_candidates(raw) == 32768


def _flags(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


@pytest.mark.parametrize(
    ("bits", "may_be"),
    [
        # As seen on 6.12.107 and 6.18: a KSM page, a fresh page, a page that fork shares, a fresh one of a child.
        ((2, 3, 4, 5, 11, 12, 14, 21), True),
        ((3, 6, 11, 12, 14, 21, 34), False),
        ((3, 5, 11, 12, 14, 21), False),
        ((3, 5, 11, 12, 14, 21, 34), False),
        # In the swap cache and written; part of a huge page; a page of a file.
        ((3, 5, 11, 12, 13, 14, 21), True),
        ((3, 4, 5, 11, 12, 14, 15, 21), False),
        ((3, 4, 5, 11, 12, 14, 16, 21), False),
        ((3, 4, 5, 11), False),
        ((4, 7, 12, 21), False),
        ((4, 7, 11, 12, 21), False),
    ],
)
def test_what_may_be_a_ksm_page(bits: tuple[int, ...], may_be: bool) -> None:
    assert candidate(_flags(*bits)) is may_be


@pytest.mark.parametrize(
    ("bits", "is_"),
    [
        ((2, 3, 4, 5, 11, 12, 14, 21), True),
        ((3, 11, 12, 14, 34), False),
        # Pages of the slab allocator, as seen on 6.18.
        ((7, 12, 21), False),
        ((7, 12, 15, 21), False),
        ((7, 12, 16, 21), False),
    ],
)
def test_what_is_a_ksm_page_by_its_bit(bits: tuple[int, ...], is_: bool) -> None:
    assert merged(_flags(*bits)) is is_
    assert count_ksm(array("Q", [_flags(*bits), 0]).tobytes()) == is_


@given(st.sets(st.integers(0, 2000)), st.integers(1, 40))
def test_runs_cover_all_frames_and_no_larger_hole(frames: set[int], gap: int) -> None:
    found = runs(frames, gap)
    covered = {frame for first, last in found for frame in range(first, last)}
    assert frames <= covered
    assert {first for first, _ in found} | {last - 1 for _, last in found} <= frames
    assert all(later[0] - earlier[1] + 1 > gap for earlier, later in itertools.pairwise(found))


@given(st.lists(FLAGS, min_size=1, max_size=300), st.data())
def test_flags_of_frames_wherever_they_lie(flags: list[int], data: st.DataObject) -> None:
    frames = data.draw(st.sets(st.integers(0, len(flags) + 50)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "proc").mkdir()
        (Path(folder) / "proc/kpageflags").write_bytes(array("Q", flags).tobytes())
        with FrameFlags(Path(folder)) as reader:
            found = reader.at(frames)
    assert {frame: found[frame] for frame in frames} == {
        frame: flags[frame] if frame < len(flags) else 0 for frame in frames
    }


def test_a_kernel_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="kpageflags"):
        FrameFlags(tmp_path)


@given(st.sets(st.integers(0, 300), max_size=80), st.integers(0, 64))
def test_a_word_for_each_frame_is_what_single_looks_give(frames: set[int], gap: int) -> None:
    words = array("Q", [7 * frame + 1 for frame in range(250)])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "proc").mkdir()
        (Path(folder) / "proc/kpageflags").write_bytes(words.tobytes())
        with FrameFlags(Path(folder)) as flags:
            ascending = sorted(frames)
            assert spans(ascending, gap) == runs(frames, gap)
            # Beyond the end of memory there is nothing.
            assert list(flags.each(ascending, spans(ascending, gap))) == [
                words[frame] if frame < 250 else 0 for frame in ascending
            ]
