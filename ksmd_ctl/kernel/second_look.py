# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks a second time at pages of what was found several times: those that changed are left out of an estimate."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Final

from ksmd_ctl.host.estimate import Stability
from ksmd_ctl.host.sampling import EXACTLY_ALL, Remaining, ratio, remaining
from ksmd_ctl.kernel.contents import Contents
from ksmd_ctl.kernel.kept_pages import Again, KeptPages, Row
from ksmd_ctl.kernel.kpageflags import spans
from ksmd_ctl.kernel.pace import Pace
from ksmd_ctl.kernel.pagemap import FILE, PRESENT, Pagemap
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

# Pages between two of which the page table is read in one call: to read the entries of as many takes as long as a call.
_NEAR_PAGES: Final = 32
_MOST_TOGETHER: Final = 512
_ADDRESS: Final = attrgetter("address")
# A process with fewer pages among these is taken to be as all.
_ENOUGH_PAGES: Final = 32


@dataclass(frozen=True, slots=True)
class SecondLook:
    """
    :ivar limit: max_page_sharing
    :ivar at: looks at a process by its number, if it is still there
    """

    kept: KeptPages
    limit: int
    at: Callable[[int, Callable[[Pagemap, Contents], None]], None]
    pace: Pace

    def stability(self, again: Sequence[Again], taken: float, zero_rows: Sequence[Row]) -> Stability:
        """
        :param taken: the share of contents that these are
        :param zero_rows: pages of zeroes that are looked at again
        """
        same = self._unchanged([row for one in again for row in one.rows] + [*zero_rows])
        limit, kinds = self.limit, self.kept.kinds
        # A frame has one row, whoever maps it.
        mapped_by = {frame.row: frame.owners for frame in self.kept.shared.values()}
        found: list[Remaining] = []
        pages: Counter[int] = Counter()
        before: dict[int, float] = {}
        after: dict[int, float] = {}
        for one in again:
            some = one.rows
            count = sum([kinds[kind].places * number for kind, number in one.pages])
            mapped = sum([len(kinds[kind].owners) * number for kind, number in one.pages])
            stay = [row for row in some if row in same]
            share = len(stay) / len(some)
            freed = max(0, count - -(-mapped // limit))
            left = max(0.0, count * share - max(1.0, math.ceil(mapped * share / limit))) if freed else 0.0
            found.append(Remaining(freed, left, 0 if len(some) == one.seen else len(some)))
            pages.update(owner for row in some for owner in mapped_by.get(row, (row.owner,)))
            for rows, part, into in ((some, freed, before), (stay, left, after)):
                for row in rows:
                    owners = mapped_by.get(row, (row.owner,))
                    for owner in owners:
                        into[owner] = into.get(owner, 0.0) + part / len(rows) / len(owners)
        zeroes = len(zero_rows)
        unchanged = sum(row in same for row in zero_rows)
        return Stability(
            remaining(found, taken),
            ratio(unchanged, zeroes, self.kept.zero_pages()) if zeroes else EXACTLY_ALL,
            {
                owner: min(1.0, after.get(owner, 0.0) / before[owner])
                for owner, count in pages.items()
                if count >= _ENOUGH_PAGES and before[owner]
            },
        )

    def _unchanged(self, rows: Iterable[Row]) -> set[Row]:
        by_owner: dict[int, list[Row]] = {}
        for row in sorted(rows, key=_ADDRESS):
            by_owner.setdefault(row.owner, []).append(row)
        found: set[Row] = set()
        for owner, some in by_owner.items():
            for first, last in spans([row.address // PAGE_SIZE for row in some], _NEAR_PAGES):
                for start in range(first * PAGE_SIZE, last * PAGE_SIZE, _MOST_TOGETHER * PAGE_SIZE):
                    end = min(last * PAGE_SIZE, start + _MOST_TOGETHER * PAGE_SIZE)
                    near = some[bisect_left(some, start, key=_ADDRESS) : bisect_left(some, end, key=_ADDRESS)]
                    self.at(owner, partial(_same, near, found))
                self.pace.keep()
        return found


def _same(rows: Sequence[Row], found: set[Row], pagemap: Pagemap, contents: Contents) -> None:
    """Find those of pages of a process that have their content still."""
    first = rows[0].address
    entries = pagemap.read(first, (rows[-1].address - first) // PAGE_SIZE + 1)
    for row in rows:
        place = (row.address - first) // PAGE_SIZE
        there = place < len(entries) and entries[place] & PRESENT and not entries[place] & FILE
        if there and contents.block(row.address, 1) == [row.number]:
            found.add(row)
