# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages of a mapping are the process's own, where they lie, and which of them are the zero page.

Only anonymous pages merge (mm/ksm.c:scan_get_next_rmap_item). A private mapping of a file, as of a virtual machine
that starts from a snapshot, has page cache in it as well: numa_maps counts both by node, and only the sum of the
anonymous ones apart.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, HostError
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.pagemap import FILE, PRESENT, SOFT_DIRTY, Pagemap, frames_of
from ksmd_ctl.kernel.ranges import NumaRange
from ksmd_ctl.kernel.topology import FrameMap

__all__ = ["SPARSE", "anonymous_nodes", "own_parts", "zero_frame", "zero_mappings"]

#: Pages that are read together.
_WINDOW_PAGES = 512
#: Pages of a mapping that are looked at to tell its nodes: a part of a larger one tells as well.
_MOST_PAGES = 1 << 16
#: A mapping with less than one page in so many is looked at without its holes, where the kernel can skip them.
SPARSE = 16


def anonymous_nodes(
    pid: int, item: Range, numa: NumaRange | None, frames: FrameMap, root: Path, page_size: int
) -> Mapping[int, int]:
    """A mapping's anonymous pages by node, counted once a mapping; without a kernel with NUMA they are on node 0.

    Of a mapping that has pages of a file too, frames tell; of a large one those of a part do. Where frames are not
    shown it can't be told, and nothing is.

    :raises NoSuchProcess: it exited
    """
    if not item.anonymous_pages:
        return {}
    if numa is None:
        return {0: item.anonymous_pages}
    if sum(numa.nodes.values()) <= numa.anonymous_pages:
        return dict(numa.nodes)
    try:
        with Pagemap(pid, root, page_size) as pagemap:
            found = _by_frames(pagemap, item, frames, page_size)
    except (Absent, Denied):
        return {}
    seen = found.total()
    return {node: round(pages * item.anonymous_pages / seen) for node, pages in found.items()}


def _by_frames(pagemap: Pagemap, item: Range, frames: FrameMap, page_size: int) -> Counter[int]:
    zero = zero_frame()
    found: Counter[int] = Counter()
    for start, count in _windows(pagemap, item, page_size):
        entries = pagemap.read(start, count)
        pagemap.need_frames(entries)
        for entry, frame in zip(entries, frames_of(entries), strict=True):
            node = None if not frame or entry & FILE or frame == zero else frames.node(frame)
            if node is not None:
                found[node] += 1
    return found


def _windows(pagemap: Pagemap, item: Range, page_size: int) -> Iterator[tuple[int, int]]:
    parts = own_parts(pagemap, item, page_size, sparse=True)
    pages = sum(end - start for start, end in parts) // page_size
    # Every window of a small mapping, and of a large one so many at equal distances.
    step = -(-pages // _MOST_PAGES)
    number = 0
    for first, last in parts:
        for start in range(first, last, _WINDOW_PAGES * page_size):
            if number % step == 0:
                yield start, min(_WINDOW_PAGES, (last - start) // page_size)
            number += 1


def own_parts(
    pagemap: Pagemap, item: Range, page_size: int, *, sparse: bool | None = None
) -> tuple[tuple[int, int], ...]:
    """Parts of a mapping that together have all of its anonymous pages in memory, (start, end) ascending.

    Where the kernel can't skip holes (before 6.7) that is the whole mapping.

    :param sparse: whether to leave holes out; None for where there is little else
    """
    if sparse is None:
        sparse = 0 < item.anonymous_pages * SPARSE * page_size < item.end - item.start
    if sparse:
        try:
            return tuple(pagemap.populated(item.start, item.end, SPARSE * page_size))
        except Absent:
            pass
    return ((item.start, item.end),)


@functools.cache
def zero_frame() -> int:
    """The frame of the zero page; 0 where frames are not shown, which no page has."""
    memory = mmap.mmap(-1, syscalls.PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        syscalls.load(syscalls.address_of(memory), 1)
        with Pagemap(os.getpid(), page_size=syscalls.PAGE_SIZE) as pagemap:
            return frames_of(pagemap.read(syscalls.address_of(memory), 1))[0]
    except HostError:
        return 0
    finally:
        memory.close()


def zero_mappings(pagemap: Pagemap, ranges: Iterable[Range], page_size: int, most_pages: int) -> int | None:
    """How often mappings map the zero page, the huge zero page left out; None where that can't be told.

    :param most_pages: where the kernel can't tell by itself (before 6.7) every page has to be looked at: of more than
        so many it can't be told
    :raises NoSuchProcess: it exited
    """
    ranges = list(ranges)
    try:
        return sum(pagemap.zero_pages(item.start, item.end) for item in ranges)
    except Absent:
        frame = zero_frame()
    if not frame or sum(item.end - item.start for item in ranges) // page_size > most_pages:
        return None
    found = 0
    for item in ranges:
        for start in range(item.start, item.end, _WINDOW_PAGES * page_size):
            entries = pagemap.read(start, min(_WINDOW_PAGES, (item.end - start) // page_size))
            # As quick as this language is: such an entry has no other bits.
            found += entries.count(PRESENT | frame) + entries.count(PRESENT | SOFT_DIRTY | frame)
    return found
