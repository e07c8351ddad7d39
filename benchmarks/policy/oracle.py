# SPDX-License-Identifier: GPL-2.0-or-later
"""What could be saved at best: all pages of all tenants grouped by content. Pure.

A tenant's pages are those that it holds (`benchmarks.policy.held`). Traces are filled up with zeroes to whole huge
pages, so they are the same with and without huge pages. The rules are the kernel's:

- A KSM page takes at most max_page_sharing mappings (mm/ksm.c, ``ksm_max_page_sharing``), so a content that n pages
  have takes ceil(n / limit) frames. The runs have merge_across_nodes = 1, so a page's node doesn't matter.
- A page of zeroes takes no frame where a split of a huge page frees it (since 6.12). Where it doesn't, or where tenants
  have no huge pages, it is a page like any other: the runs have use_zero_pages = 0.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from benchmarks.policy.script import Event, Kind, Script

__all__ = ["FEW", "MAX_PAGE_SHARING", "Hold", "HugePages", "huge_pages", "replay", "saving"]

MAX_PAGE_SHARING = 256
#: A huge page with fewer mergeable pages than this is better kept whole.
FEW = 32


def saving(counts: Mapping[int, int], limit: int = MAX_PAGE_SHARING, free: int | None = None) -> int:
    """Frames that can be saved.

    :param counts: how many pages have each content
    :param free: the content that takes no frame at all: the number of that of zeroes, or None
    """
    return sum(number if content == free else number - -(-number // limit) for content, number in counts.items())


@dataclass(frozen=True, slots=True)
class HugePages:
    """Huge pages of the tenants that are there at the end.

    :ivar before: how many they had before KSM split any: as many as their memory has room for
    :ivar end: how many of these are left
    :ivar few_before: of `before`, those with fewer than `FEW` mergeable pages at the end. A page is mergeable if it
        holds zeroes, or if another page of a tenant has the same content then.
    :ivar few_end: how many of these are left
    :ivar few_mergeable: how many mergeable pages `few_before` have: at most so many could be saved there
    """

    before: int = 0
    end: int = 0
    few_before: int = 0
    few_end: int = 0
    few_mergeable: int = 0


def huge_pages(
    contents: Mapping[tuple[int, int], Sequence[int]], end: Set[tuple[int, int]], zero: int, size: int
) -> HugePages:
    """What is left of the huge pages.

    :param contents: of all pages, by the place of a huge page that they are in: process, and address divided by its
        bytes. Where a place has `size` pages there was a huge page
    :param end: places where there is one now
    :param zero: the content of zeroes
    """
    counts: Counter[int] = Counter()
    for pages in contents.values():
        counts.update(pages)
    before = {place for place, pages in contents.items() if len(pages) == size}
    mergeable = {place: sum(page == zero or counts[page] > 1 for page in contents[place]) for place in before}
    few = {place for place, number in mergeable.items() if number < FEW}
    return HugePages(len(before), len(before & end), len(few), len(few & end), sum(mergeable[place] for place in few))


class Hold:
    """What each tenant holds, by content."""

    def __init__(self, traces: Sequence[array[int]], free: int | None = None) -> None:
        self._traces = traces
        self._free = free
        self._counts: Counter[int] = Counter()
        self.tenants: dict[int, array[int]] = {}

    @property
    def pages(self) -> int:
        return sum(map(len, self.tenants.values()))

    def apply(self, event: Event) -> None:
        """Let it happen."""
        if event.kind is Kind.ARRIVE:
            assert event.trace is not None
            self.tenants[event.tenant] = array("I", self._traces[event.trace])
            self._counts.update(self._traces[event.trace])
        elif event.kind is Kind.LEAVE:
            self._counts.subtract(self.tenants.pop(event.tenant))
        else:
            pages = self.tenants[event.tenant]
            for place, content in zip(event.places, event.contents, strict=True):
                self._counts[pages[place]] -= 1
                self._counts[content] += 1
                pages[place] = content

    def saving(self) -> int:
        """Frames that could be saved now."""
        return saving(self._counts, free=self._free)


def replay(script: Script, hold: Hold) -> list[tuple[int, int]]:
    """Let all events happen. After each: pages that the tenants hold, and frames that could be saved."""
    found = []
    for event in script.events:
        hold.apply(event)
        found.append((hold.pages, hold.saving()))
    return found
