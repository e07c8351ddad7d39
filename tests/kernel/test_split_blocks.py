# SPDX-License-Identifier: GPL-2.0-or-later
"""Which blocks could be huge pages and are not because of KSM: from tables of pages, and from memory of its own."""

from __future__ import annotations

import os
import random
from array import array

import pytest

from ksmd_ctl.host.memory import Range, SplitBlocks
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.detection import State, Window
from ksmd_ctl.kernel.pagemap import Pagemap, zero_frame
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.split_blocks import BlockPages, could_be_huge, figures_of, sampled_zero_blocks, whole_blocks
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES

MERGEABLE = frozenset({"rd", "wr", "mg"})
ZERO = 7
START = 8 * HUGE_BYTES
PAGES = 512


def windows(item: Range, states: bytes, frames: list[int], size: int) -> list[Window]:
    """All pages of a mapping, so many at a time."""
    return [
        Window(item, item.start + first * PAGE_SIZE, array("Q"), frames[first : first + size], states[first:][:size])
        for first in range(0, len(states), size)
    ]


def figures(item: Range, merged: dict[int, int], zeroes: dict[int, int], size: int = PAGES) -> SplitBlocks:
    """Of a mapping whose blocks, counted from its begin, have so many merged pages and so many zero pages."""
    count = (item.end - item.start) // PAGE_SIZE
    states, frames = bytearray(count), [100] * count
    for block, pages in merged.items():
        states[block * PAGES : block * PAGES + pages] = bytes([State.KSM]) * pages
    for block, pages in zeroes.items():
        frames[(block + 1) * PAGES - pages : (block + 1) * PAGES] = [ZERO] * pages
    found = BlockPages(ZERO)
    for window in windows(item, bytes(states), frames, size):
        found.add(window, sum(zeroes.values()))
    return found.figures()


def test_merged_and_zero_pages_of_a_block_are_what_it_saves() -> None:
    item = Range(START, START + 4 * HUGE_BYTES, MERGEABLE)
    assert figures(item, {0: 31, 1: 32, 2: 3}, {2: 500}) == SplitBlocks(3, 566, 1, 31)
    assert figures(item, {}, {3: 512}) == SplitBlocks(1, 512)
    assert figures(item, {}, {}) == SplitBlocks()


@pytest.mark.parametrize("size", [1, 100, 511, 512, 2000])
def test_a_window_may_end_within_a_block(size: int) -> None:
    item = Range(START, START + 4 * HUGE_BYTES, MERGEABLE)
    assert figures(item, {0: 20, 2: 40, 3: 1}, {0: 8, 3: 11}, size) == SplitBlocks(3, 80, 2, 40)


def test_a_block_that_is_not_all_in_one_mapping_could_be_no_huge_page() -> None:
    item = Range(START + PAGE_SIZE, START + 2 * HUGE_BYTES + PAGE_SIZE, MERGEABLE)
    assert list(whole_blocks(item)) == [START + HUGE_BYTES]
    # Of the first 600 pages 511 lie before that block, of the others 424 within it and one after it.
    assert figures(item, {0: 512, 1: 88}, {}) == SplitBlocks(1, 600 - 511)
    assert list(whole_blocks(Range(START + PAGE_SIZE, START + HUGE_BYTES, MERGEABLE))) == []


def test_where_huge_pages_are_forbidden_merging_prevents_none() -> None:
    assert could_be_huge(Range(START, START + HUGE_BYTES, MERGEABLE))
    for item in (
        Range(START, START + HUGE_BYTES, MERGEABLE | {"nh"}),
        Range(START, START + HUGE_BYTES, MERGEABLE, huge_eligible=False),
    ):
        assert not could_be_huge(item)
        assert figures(item, {0: 9}, {}) == SplitBlocks()


def test_estimates_are_scaled() -> None:
    assert figures_of([0, 5, 100], 10) == SplitBlocks(20, 1050, 10, 50)
    assert SplitBlocks(1, 2, 3, 4).plus(SplitBlocks(10, 20, 30, 40)) == SplitBlocks(11, 22, 33, 44)


def test_blocks_without_merged_pages_are_told_by_their_zero_pages() -> None:
    if not zero_frame():
        pytest.skip("frames are not shown: needs CAP_SYS_ADMIN")
    size = 4 * HUGE_BYTES
    memory = syscalls.mmap(0, size + HUGE_BYTES, syscalls.PROT_READ | syscalls.PROT_WRITE, syscalls.MAP_PRIVATE)
    try:
        start = -(-memory // HUGE_BYTES) * HUGE_BYTES
        # Reading gives small zero pages only where there are no huge ones.
        syscalls.madvise(start, size, syscalls.MADV_NOHUGEPAGE)
        for page in (0, 1, 512, 1030):
            syscalls.load(start + page * PAGE_SIZE, 1)
        for page in range(1536, 1600):
            syscalls.load(start + page * PAGE_SIZE, 1)
        item = Range(start, start + size, MERGEABLE)
        with Pagemap(os.getpid()) as pagemap:
            found = sampled_zero_blocks(pagemap, [item], zero_frame(), 1 << 18, random.Random(1))
            assert found == SplitBlocks(4, 68, 3, 4)
            assert sampled_zero_blocks(pagemap, [], zero_frame(), 1 << 18, random.Random(1)) == SplitBlocks()
    finally:
        syscalls.munmap(memory, size + HUGE_BYTES)
