# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process holds in mergeable memory, and which huge pages it has there.

The ruler is frames. A process holds each page that is resident, merged or not, and each that maps the shared zero page.
That page takes no frame: a page of zeroes that a split of a huge page freed, or that ksmd replaced, is saved as a whole
(`ksmd_ctl.kernel.zero_pages`). A huge page is resident as a whole, also where only a part of it was ever touched, so it
holds 512 pages, and zeroes in it can be saved. Memory that was only ever read can't be distinguished from saved zeroes;
neither the tenants here nor QEMU have any.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.policy.pages import THP, ZERO_PAGE, anonymous_pages, has_flags
from ksmd_ctl.errors import NoSuchProcess
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES, count_zero_pages

__all__ = ["Holder"]

_MOST_PAGES = 1 << 24


class Holder:
    """One process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ranges: Sequence[Range] = ()

    def pages(self) -> int:
        """Anonymous pages that it holds; of those that aren't mergeable, all that are resident. 0 when it is gone."""
        try:
            with Pagemap(self._pid, killable=False) as pagemap:
                zero_pages = count_zero_pages(pagemap, self.mergeable(), _MOST_PAGES).mapped
        except NoSuchProcess:
            return 0
        return anonymous_pages(self._pid) + zero_pages

    def huge_pages(self) -> set[int]:
        """The addresses of its huge pages, each divided by their size; none when it is gone."""
        places = [
            place for item in self.mergeable() for place in range(-(-item.start // HUGE_BYTES), item.end // HUGE_BYTES)
        ]
        try:
            with Pagemap(self._pid, killable=False) as pagemap:
                frames = [frames_of(pagemap.read(place * HUGE_BYTES, 1))[0] for place in places]
        except NoSuchProcess:
            return set()
        huge = zip(places, has_flags(frames, THP, without=ZERO_PAGE), strict=True)
        return {place for place, is_huge in huge if is_huge}

    def mergeable(self) -> Sequence[Range]:
        """Its mergeable mappings, looked for until there are some."""
        if not self._ranges:
            try:
                self._ranges = [item for item in mappings(self._pid) if item.mergeable]
            except NoSuchProcess:
                return ()
        return self._ranges
