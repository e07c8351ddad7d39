# SPDX-License-Identifier: GPL-2.0-or-later
"""How often a process maps the zero page, and how many of these pages splits of huge pages gave back.

Since 6.12 a split of a huge page of any size, by ksmd or another, maps its subpages of zeroes to the zero page
(mm/migrate.c:try_to_map_unused_to_zeropage), whatever use_zero_pages is. No counter has them, nor has Rss. A page table
entry does not say who made it: reading memory that was never written makes the same one (mm/memory.c:
do_anonymous_page), and so does ksmd with use_zero_pages, but for a bit that no file shows (include/linux/ksm.h:
is_ksm_zero_pte). So what splits gave back is all zero pages, less those that are known to be something else.

A split leaves the subpages of locked memory (VmFlags lo) as they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ksmd_ctl.errors import Absent, Denied, HostError
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.pagemap import IS_HUGE, IS_ZERO_PAGE, PRESENT, SOFT_DIRTY, Pagemap, zero_frame
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings

#: VmFlags of mappings that have no huge pages (madvise(MADV_NOHUGEPAGE), VM_NOHUGEPAGE).
NO_HUGE_PAGES = "nh"
_LOCKED = "lo"

# Entries of pagemap that are read together where the kernel does not scan by itself.
_WINDOW_PAGES = 4096
#: A huge page of the largest size that ksmd splits (a PMD of x86-64).
HUGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class ZeroPages:
    """How often mappings of a process map the zero page; the huge zero page is left out.

    :ivar mapped: in all of them
    :ivar unsplit: of these, in mappings without huge pages: ksmd replaced them, or they were only read
    :ivar by_range: in each mapping that maps it, by its start
    """

    mapped: int = 0
    unsplit: int = 0
    by_range: Mapping[int, int] = field(default_factory=dict, compare=False)

    def freed_by_splits(self, replaced: int | None) -> int:
        """Pages that splits of huge pages gave back, and that have not been written since.

        Too many where other memory is read that was never written, in blocks of a huge page's size that are not one; in
        forks, each of which maps what was freed once; and where another than ksmd splits (memory pressure, swapping).
        Too few where ksmd replaced pages of zeroes in mappings without huge pages: it isn't known where they are.

        :param replaced: pages of the process that ksmd replaced by the zero page (ksm_zero_pages in its ksm_stat, since
            6.6); None where the kernel doesn't count them
        """
        return max(0, self.mapped - self.unsplit - max(0, replaced or 0))


def count_zero_pages(pagemap: Pagemap, ranges: Iterable[Range], most_pages: int) -> ZeroPages:
    """Count them in these mappings, those without huge pages apart.

    The kernel finds them by itself since 6.7; before, the frame of every page is compared with the zero page's.

    :param most_pages: that are looked at one by one
    :raises NoSuchProcess: it exited
    :raises Absent: this kernel can't find them by itself, and there are more pages than that
    :raises Denied: nor does it show frames: that needs CAP_SYS_ADMIN
    """
    ranges = list(ranges)
    try:
        found = [(item, _scanned(pagemap, item)) for item in ranges]
    except Absent as error:
        pages = sum(item.end - item.start for item in ranges) // PAGE_SIZE
        if pages > most_pages:
            raise Absent(
                error.what,
                f"{pages:,} pages would have to be looked at one by one to find zero pages, at most {most_pages:,} are",
                path=error.path,
                errno=error.errno,
            ) from error
        frame = zero_frame()
        if not frame:
            raise Denied(
                error.what,
                "pagemap does not show which frame is the zero page",
                hint="needs CAP_SYS_ADMIN",
                path=error.path,
            ) from error
        found = [(item, _compared(pagemap, item, frame)) for item in ranges]
    if ranges:
        # A process without memory any more has no zero pages, and doesn't say that it is gone.
        pagemap.read(ranges[0].start, 1)
    return ZeroPages(
        mapped=sum(count for _, count in found),
        unsplit=sum(count for item, count in found if NO_HUGE_PAGES in item.flags),
        by_range={item.start: count for item, count in found if count},
    )


def _scanned(pagemap: Pagemap, item: Range) -> int:
    size = 0
    for begins, ends in pagemap.scan(item.start, item.end, wanted=IS_ZERO_PAGE, unwanted=IS_HUGE):
        size += sum(ends) - sum(begins)
    return size // PAGE_SIZE


def _compared(pagemap: Pagemap, item: Range, frame: int) -> int:
    found = 0
    for start in range(item.start, item.end, _WINDOW_PAGES * PAGE_SIZE):
        entries = pagemap.read(start, min(_WINDOW_PAGES, (item.end - start) // PAGE_SIZE))
        # As quick as this language is: such an entry has no other bits.
        found += entries.count(PRESENT | frame) + entries.count(PRESENT | SOFT_DIRTY | frame)
    return found


def splits_free_zeroes() -> bool | None:
    """Whether a split of a huge page gives its subpages of zeroes back: tried once, on a page of one's own.

    Nothing but one page of it is written; advising that a part of a huge page is cold splits it (mm/madvise.c:
    madvise_cold_or_pageout_pte_range, since 5.4).

    :return: None where it can't be tried: no huge page was to be had, or all memory of this process is locked
    """
    try:
        return _tried_split()
    except (OSError, HostError):
        return None


@functools.cache
def _tried_split() -> bool:
    """
    :raises OSError, HostError: it can't be tried now
    """
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
    memory = syscalls.mmap(0, 2 * HUGE_BYTES, syscalls.PROT_READ | syscalls.PROT_WRITE, flags)
    try:
        start = -(-memory // HUGE_BYTES) * HUGE_BYTES
        syscalls.madvise(start, HUGE_BYTES, syscalls.MADV_HUGEPAGE)
        syscalls.store(start, b"x")
        before = _mapping(start)
        syscalls.madvise(start, PAGE_SIZE, syscalls.MADV_COLD)
        after = _mapping(start)
    finally:
        syscalls.munmap(memory, 2 * HUGE_BYTES)
    freed = after.resident_pages < before.resident_pages
    # Of smaller ones than these (mTHP) smaps doesn't tell that they were split.
    if _LOCKED in after.flags or not (freed or after.huge_bytes < before.huge_bytes):
        raise Absent("splitting a huge page", "no huge page was to be had, or it is locked")
    return freed


def _mapping(address: int) -> Range:
    own = os.getpid()
    for item in mappings(own):
        if item.start <= address < item.end:
            return item
    raise Absent(f"mappings of process {own}", "the one that was just made is not among them")
