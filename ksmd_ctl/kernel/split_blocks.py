# SPDX-License-Identifier: GPL-2.0-or-later
"""Blocks of memory that could be huge pages and are not because of KSM, and how many pages each of them saves.

ksmd splits a huge page where a page of it merges (mm/ksm.c:split_huge_page), and since 6.12 the split frees the pages
of zeroes in it (findings F32). So a block saves its merged pages and its zero pages. No counter tells who split a huge
page: a block of small pages that never was one looks the same once a page of it is merged.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from ksmd_ctl.figures import LOW_YIELD_PAGES
from ksmd_ctl.host.memory import Range, SplitBlocks
from ksmd_ctl.kernel.detection import State, Window
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES, NO_HUGE_PAGES

_BLOCK_PAGES = HUGE_BYTES // PAGE_SIZE


def could_be_huge(item: Range) -> bool:
    """Whether a mapping may have huge pages: by its advice, the host's setting and the process's."""
    return NO_HUGE_PAGES not in item.flags and item.huge_eligible is not False


def whole_blocks(item: Range) -> range:
    """The addresses of the blocks that lie in a mapping as a whole; others can't be huge pages."""
    return range(-(-item.start // HUGE_BYTES) * HUGE_BYTES, item.end // HUGE_BYTES * HUGE_BYTES, HUGE_BYTES)


class BlockPages:
    """How many merged and zero pages each block of a process has.

    :param zero_frame: of the zero page; 0 where zero pages are not to be counted
    """

    def __init__(self, zero_frame: int) -> None:
        self._zero = zero_frame
        self._pages: Counter[int] = Counter()

    def add(self, window: Window, zero_pages: int) -> None:
        """Count those of a part of a mapping.

        :param zero_pages: how many zero pages the mapping has
        """
        blocks = whole_blocks(window.mapping)
        zero = self._zero if zero_pages else 0
        if not (blocks and could_be_huge(window.mapping)) or not (zero or State.KSM in window.states):
            return
        end = min(window.start + len(window.states) * PAGE_SIZE, blocks.stop)
        # A window may begin within a block.
        for block in range(max(blocks.start, window.start // HUGE_BYTES * HUGE_BYTES), end, HUGE_BYTES):
            first = max(0, (block - window.start) // PAGE_SIZE)
            last = (block + HUGE_BYTES - window.start) // PAGE_SIZE
            found = window.states.count(State.KSM, first, last)
            if zero:
                found += list(window.frames[first:last]).count(zero)
            if found:
                self._pages[block] += found

    def figures(self) -> SplitBlocks:
        """Of all blocks."""
        return figures_of(self._pages.values())


def figures_of(blocks: Iterable[int], scale: float = 1.0) -> SplitBlocks:
    """The figures of blocks.

    :param blocks: how many pages each has
    :param scale: for how many blocks each of these stands
    """
    having = [pages for pages in blocks if pages]
    low = [pages for pages in having if pages < LOW_YIELD_PAGES]
    return SplitBlocks(*(round(scale * found) for found in (len(having), sum(having), len(low), sum(low))))


def sampled_zero_blocks(
    pagemap: Pagemap, ranges: Sequence[Range], zero_frame: int, most_pages: int, chance: random.Random
) -> SplitBlocks:
    """Blocks of mappings in which nothing is merged any more: by their zero pages.

    :param most_pages: that are looked at; of more memory a random part is, and the figures are estimates
    """
    spans = [whole_blocks(item) for item in ranges if could_be_huge(item)]
    # A sparse mapping may have millions of blocks: they are numbered, never listed.
    ends = list(accumulate(map(len, spans), initial=0))
    chosen = chance.sample(range(ends[-1]), min(ends[-1], max(8, most_pages // _BLOCK_PAGES)))
    counts = []
    for number in sorted(chosen):
        at = bisect_right(ends, number) - 1
        block = spans[at][number - ends[at]]
        counts.append(frames_of(pagemap.read_frames(block, _BLOCK_PAGES)).count(zero_frame))
    return figures_of(counts, ends[-1] / len(chosen)) if chosen else SplitBlocks()
