# SPDX-License-Identifier: GPL-2.0-or-later
"""A sample of pages by their contents: which pages are in it, and what a look at a host finds of them.

A content that is sampled is sampled with all of its pages, so the pages of 1 of n contents behave as a host of the n-th
part (Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015, and "Cache modeling and optimization
using miniature simulations", ATC 2017). A content that a large part of all pages has would be in it with all of these,
or not at all. Of such a content 1 of n pages is sampled, whichever its address says.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from ksmd_ctl.host.memory import Process, ProcessId

#: A sample of one of so many at most.
MOST_ONE_IN: Final = 1 << 16
KEY_BYTES: Final = 16
_RANGE: Final = 1 << 64
_MASK: Final = _RANGE - 1
# Odd, with bits that are evenly spread (Knuth, "The Art of Computer Programming", 6.4).
_SPREAD: Final = 0x9E3779B97F4A7C15
# A content of which so many of 1 of n pages are seen is a frequent one.
_FREQUENT: Final = 16
_PAGE_SHIFT: Final = 12


#: Of so many pages at most all contents are counted: that takes about 50 MiB for the time of a look.
MOST_COUNTED: Final = 1 << 19
#: The zero page, in place of a page of zeroes.
ZERO_FRAME: Final = -1


class SampledPage(NamedTuple):
    """A page that is in a sample.

    :ivar number: of its content, equal for equal contents
    :ivar node: of its frame
    :ivar frame: equal for pages that have one frame within a look; 0 for a frame that is mapped once, `ZERO_FRAME` for
        the zero page
    """

    number: int
    node: int
    frame: int = 0


@dataclass(slots=True)
class ProcessPages:
    """What a look found of a process.

    :ivar name: of its program
    :ivar seconds: `Host.clock` when its pages had been read
    :ivar pages: mergeable pages that were read
    :ivar family: equal for forks of one program; 0 where that isn't known
    :ivar merging_pages: its merged pages as the kernel counts them; None where it doesn't tell
    :ivar about: the process, in the first look that finds it; None also where it could not be described
    :ivar sampled: by address
    """

    process: ProcessId
    name: str
    seconds: float
    pages: int = 0
    family: int = 0
    merging_pages: int | None = None
    about: Process | None = None
    sampled: dict[int, SampledPage] = field(default_factory=dict)


class EqualPages(NamedTuple):
    """How many pages there are of which there is an equal one, and how many contents these have."""

    pages: int
    contents: int


def equal_pages(counts: Mapping[int, int]) -> EqualPages:
    """Those of pages that are counted by their contents."""
    several = [count for count in counts.values() if count > 1]
    return EqualPages(sum(several), len(several))


@dataclass(frozen=True, slots=True)
class PageLook:
    """A look at all mergeable pages of a host.

    :ivar began: `Host.clock`, and `ended` likewise
    :ivar cpu_seconds: what it took
    :ivar unread: processes that could not be looked at, by pid, and why
    :ivar equal: how many of all pages have an equal one; None where that was not counted
    """

    began: float
    ended: float
    cpu_seconds: float
    processes: tuple[ProcessPages, ...]
    unread: Mapping[int, str] = field(default_factory=dict)
    equal: EqualPages | None = None

    @property
    def pages(self) -> int:
        return sum(one.pages for one in self.processes)


class ProcessCounts(NamedTuple):
    """Counters of a process, cheap enough for each sample.

    :ivar resident: its pages in memory
    :ivar rmap_items: its pages that ksmd has seen (ksm_rmap_items); None where the kernel doesn't tell
    :ivar merging: its merged pages (ksm_merging_pages); None likewise
    """

    resident: int
    rmap_items: int | None = None
    merging: int | None = None


#: A look in steps of some milliseconds, so that its caller can pause between them.
LookSteps = Generator[None, None, PageLook]


class PageSampler(Protocol):
    """What looks at a host's pages."""

    def look(self, *, zero_pages: bool = False) -> LookSteps:
        """Read all mergeable pages.

        :param zero_pages: where the zero page is mapped, ksmd has put it in place of a page of zeroes
        :raises Denied, Absent: no process can be looked at
        """

    def pages(self) -> int:
        """About how many mergeable pages there are, from counters alone."""

    def counts(self, known: Collection[ProcessId]) -> Mapping[ProcessId, ProcessCounts]:
        """Counters of each of these, and of each process that was started since the last look.

        Of a process that is gone it says nothing. Cheap enough for each sample.
        """


class Selection:
    """Which pages are in the sample.

    A number that is made of a content tells whoever can have numbers made of contents of his own what the content is.
    So it depends on a key: one of this process that nobody can read, or one that is given, where the numbers of two
    recordings are to be compared.

    :ivar one_in: of so many contents one is sampled; 1 for all
    :ivar number: of a content
    """

    def __init__(self, one_in: int = 1, key: bytes | None = None) -> None:
        if not 1 <= one_in <= MOST_ONE_IN:
            raise ValueError(f"{one_in} is not between 1 and {MOST_ONE_IN}")
        self.one_in = one_in
        self._least = _RANGE // one_in
        # Where all are sampled none is left to be frequent. Pages of zeroes always are.
        self._frequent: set[int] = set()
        self._salt = secrets.randbits(64) if key is None else int.from_bytes(key[:8], "big")
        self.number: Callable[[bytes], int] = _own_number if key is None else _keyed(key)
        if one_in > 1:
            self._frequent.add(self.number(bytes(1 << _PAGE_SHIFT)))

    def drawn(self, pid: int, address: int) -> bool:
        """Whether a page is in the sample if its content is a frequent one."""
        place = ((address >> _PAGE_SHIFT) ^ (pid << 40) ^ self._salt) * _SPREAD & _MASK
        return (place ^ place >> 32) * _SPREAD & _MASK < self._least

    def keeps(self, number: int) -> bool:
        """Whether a page is in the sample if its content is not a frequent one."""
        return number < self._least

    def may_keep(self, number: int, pid: int, address: int) -> bool:
        """Whether a page may be in the sample; `settle` decides, once all pages were seen."""
        return number < self._least or self.drawn(pid, address)

    def settle(self, processes: tuple[ProcessPages, ...]) -> None:
        """Find which contents are frequent, and leave the pages that are in the sample."""
        if self.one_in == 1:
            return
        seen: Counter[int] = Counter()
        for one in processes:
            pid = one.process.pid
            seen.update(page.number for address, page in one.sampled.items() if self.drawn(pid, address))
        self._frequent.update(number for number, count in seen.items() if count >= _FREQUENT)
        frequent, least = self._frequent, self._least
        for one in processes:
            pid = one.process.pid
            one.sampled = {
                address: page
                for address, page in one.sampled.items()
                if (self.drawn(pid, address) if page.number in frequent else page.number < least)
            }


def _own_number(content: bytes) -> int:
    # SipHash with a key of this process's own: four times as quick as what hashlib has.
    return hash(content) & _MASK


def _keyed(key: bytes) -> Callable[[bytes], int]:
    def number(content: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "big")

    return number
