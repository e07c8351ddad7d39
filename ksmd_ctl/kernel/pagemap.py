# SPDX-License-Identifier: GPL-2.0-or-later
"""/proc/PID/pagemap in bulk: which pages of a mapping are the process's own, and where they lie.

Source: Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c (``pagemap_read``, and ``do_pagemap_scan`` since
6.7). Only anonymous pages merge (mm/ksm.c:scan_get_next_rmap_item). A private mapping of a file, as of a virtual
machine that starts from a snapshot, has page cache in it as well: numa_maps counts both by node, and of the anonymous
ones only the sum.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import mmap
import os
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, HostError, NoSuchProcess, errno_text
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel import reading, syscalls
from ksmd_ctl.kernel.proc_pid import process_file_error
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, Closing
from ksmd_ctl.kernel.ranges import NumaRange
from ksmd_ctl.kernel.topology import FrameMap

PRESENT = 1 << 63
SWAPPED = 1 << 62
#: Mapped exactly once. A KSM page whose other mappings went away has it: it says nothing about KSM.
EXCLUSIVE = 1 << 56
SOFT_DIRTY = 1 << 55
#: A page of a file, or shared anonymous memory. The zero page has it not.
FILE = 1 << 61
#: Written to by userfaultfd's leave only.
WRITE_PROTECTED = 1 << 57

_FRAME_BITS = 55
#: Of an entry that is present, the frame.
FRAME = (1 << _FRAME_BITS) - 1
_ENTRY_BYTES = 8
_MASK_ENTRIES = 512
_MASKS: dict[int, int] = {}

# All bits of an entry beside the frame and SOFT_DIRTY, and where they are in memory.
_OWN = (PRESENT | EXCLUSIVE) >> 56
_HIGHEST_BYTE = _ENTRY_BYTES - 1 if sys.byteorder == "little" else 0

# include/uapi/linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), its twelve words.
_PAGEMAP_SCAN = 0xC0606610
_SCAN_ARGUMENT = struct.Struct("=12Q")
#: Categories of pages (PAGE_IS_*). A huge zero page is a zero page on some kernels, and on all of them huge.
IS_FILE, IS_PRESENT, IS_ZERO_PAGE, IS_HUGE = 1 << 2, 1 << 3, 1 << 5, 1 << 6
# Regions that one call gives at most: start, end and categories.
_SCAN_REGIONS = 4096
_REGION_WORDS = 3
# Address space that one call walks at most: the process can't map or unmap anything meanwhile. Of 16 GiB at once its
# longest wait was 221 ms, in such slices 60 on a busy machine where it was 24 with no scan at all.
_SCAN_BYTES = 1 << 30
# What it says where there is no such call, or no such category.
_NO_SCAN = frozenset({errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP})


def frames_of(entries: array[int]) -> list[int]:
    """The frame of each entry, 0 where no page is present. Frame 0 itself is never mapped to a process."""
    return [entry & FRAME if entry >> 63 else 0 for entry in entries]


def _masked(entries: array[int], bits: int) -> Iterator[int]:
    """These bits of so many entries at a time as one big number: a loop over each costs more than to move the pages."""
    if bits not in _MASKS:
        _MASKS[bits] = int.from_bytes(bits.to_bytes(_ENTRY_BYTES, sys.byteorder) * _MASK_ENTRIES, sys.byteorder)
    for first in range(0, len(entries), _MASK_ENTRIES):
        yield int.from_bytes(entries[first : first + _MASK_ENTRIES].tobytes(), sys.byteorder) & _MASKS[bits]


def all_have(entries: array[int], bits: int) -> bool:
    """Whether every entry has all of these bits."""
    left = len(entries) * bits.bit_count()
    for number in _masked(entries, bits):
        found = number.bit_count()
        if found != min(left, bits.bit_count() * _MASK_ENTRIES):
            return False
        left -= found
    return True


def any_has(entries: array[int], bits: int) -> bool:
    """Whether an entry has one of these bits."""
    return any(_masked(entries, bits))


def all_own(entries: array[int]) -> bool:
    """Whether all are pages that are mapped once, and none is a file's, swapped out or watched; False says nothing."""
    return entries.tobytes()[_HIGHEST_BYTE::_ENTRY_BYTES].count(_OWN) == len(entries)


def frame_limits(entries: array[int]) -> tuple[int, int] | None:
    """The least and the greatest frame of entries, if all are present and alike otherwise; None says nothing."""
    least, greatest = min(entries, default=0), max(entries, default=0)
    if not least & PRESENT or least >> _FRAME_BITS != greatest >> _FRAME_BITS:
        return None
    return least & FRAME, greatest & FRAME


class Pagemap(Closing):
    """One process's pagemap. The descriptor stays with the process, whoever gets its pid later."""

    def __init__(self, pid: int, root: Path = Path("/"), *, killable: bool = True) -> None:
        """
        :param killable: where a child reads (`ksmd_ctl.kernel.reading`), it reads this as well
        :raises NoSuchProcess: there is none
        :raises Denied: it is not ours to look at
        :raises Absent: the kernel has no pagemap (CONFIG_PROC_PAGE_MONITOR)
        """
        self._pid = pid
        # Of itself a process can always read; and to fork a reader would have it share the page that is looked at.
        self._killable = killable and pid != os.getpid()
        self._path = root / "proc" / str(pid) / "pagemap"
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise process_file_error(pid, self._path, error) from error

    def read(self, start: int, pages: int) -> array[int]:
        """The entries of pages from an address on; fewer where the address space ends.

        :raises NoSuchProcess: it exited
        """
        entries = array("Q")
        offset, left = start // PAGE_SIZE * _ENTRY_BYTES, pages * _ENTRY_BYTES
        while left:
            try:
                data = self._part(left, offset)
            except OSError as error:
                raise process_file_error(self._pid, self._path, error) from error
            # The kernel hands out whole entries only, unless the file is a test's.
            data = data[: len(data) // _ENTRY_BYTES * _ENTRY_BYTES]
            if not data:
                # At exit the memory goes first: the file then reads as empty, wherever one reads it.
                self._verify_alive()
                break
            entries.frombytes(data)
            offset += len(data)
            left -= len(data)
        return entries

    def read_frames(self, start: int, pages: int) -> array[int]:
        """As `read`, of entries that are to tell frames: without CAP_SYS_ADMIN the kernel shows 0 for each.

        :raises Denied: pages are present and no frame is shown
        """
        entries = self.read(start, pages)
        if entries and entries[0] & PRESENT and entries[0] & FRAME:
            # As a rule the first tells.
            return entries
        if any_has(entries, PRESENT) and not any(entry & FRAME for entry in entries if entry >> 63):
            raise Denied(
                f"frames of process {self._pid}",
                "its pagemap shows pages without their frames",
                hint="needs CAP_SYS_ADMIN",
                path=str(self._path),
            )
        return entries

    def populated(self, start: int, end: int, join_bytes: int = 0) -> Iterator[tuple[int, int]]:
        """Parts of a mapping with anonymous pages in memory, (start, end) ascending; holes cost nothing.

        :param join_bytes: parts that are so near to one another become one
        :raises NoSuchProcess: it exited, on some kernels; on others there are none then
        :raises Absent: this kernel can't skip holes (before 6.7)
        """
        first = last = 0
        for begins, ends in self.scan(start, end, wanted=IS_PRESENT, unwanted=IS_FILE | IS_ZERO_PAGE):
            for begin, stop in zip(begins, ends, strict=True):
                if last and begin - last <= join_bytes:
                    last = stop
                    continue
                if last:
                    yield first, last
                first, last = begin, stop
        if last:
            yield first, last

    def scan(self, start: int, end: int, *, wanted: int, unwanted: int = 0) -> Iterator[tuple[array[int], array[int]]]:
        """Where runs of pages begin and where they end that are all of `wanted` and none of `unwanted`, some thousand
        runs at a time. Of a process that has exited there are none (6.18), or it says so (6.12).

        :param wanted: IS_PRESENT and so on, one or more together
        :raises NoSuchProcess: it exited
        :raises Absent: this kernel can't (before 6.7)
        """
        most = min(_SCAN_REGIONS, max(1, (end - start) // PAGE_SIZE))
        regions = array("Q", bytes(most * _REGION_WORDS * _ENTRY_BYTES))
        vector, _ = regions.buffer_info()
        while start < end:
            last = min(start + _SCAN_BYTES, end)
            argument = bytearray(
                _SCAN_ARGUMENT.pack(
                    *(_SCAN_ARGUMENT.size, 0, start, last, 0, vector, most, 0),
                    *(unwanted, wanted | unwanted, 0, wanted),
                )
            )
            try:
                count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
            except OSError as error:
                if error.errno not in _NO_SCAN:
                    raise process_file_error(self._pid, self._path, error) from error
                raise Absent(
                    f"pages of process {self._pid}",
                    f"this kernel's pagemap can't be scanned: {errno_text(error.errno or 0)}",
                    path=str(self._path),
                    errno=error.errno,
                ) from error
            found = regions[: count * _REGION_WORDS]
            yield found[::_REGION_WORDS], found[1::_REGION_WORDS]
            # What it says of where its walk ended is not so where it went through more than 512 regions (6.18).
            start = found[-2] if count == most else last

    def _part(self, size: int, offset: int) -> bytes:
        if self._killable and reading.active():
            return reading.read_part(self._path, offset, size)
        return os.pread(self._fd, size, offset)

    def _verify_alive(self) -> None:
        try:
            empty = not self._part(_ENTRY_BYTES, 0)
        except OSError:
            empty = True
        if empty:
            raise NoSuchProcess(f"process {self._pid}", "it is gone, or has no memory any more")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


# -- pages of a mapping --------------------------------------------------------------------------------------

#: Pages that are read together.
_WINDOW_PAGES = 512
#: Pages of a mapping that are looked at to tell its nodes: a part of a larger one tells as well.
_MOST_PAGES = 1 << 16
#: A mapping with less than one page in so many is looked at without its holes, where the kernel can skip them.
SPARSE = 16


def anonymous_nodes(pid: int, item: Range, numa: NumaRange | None, frames: FrameMap, root: Path) -> Mapping[int, int]:
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
        with Pagemap(pid, root) as pagemap:
            found = _by_frames(pagemap, item, frames)
    except (Absent, Denied):
        return {}
    seen = found.total()
    return {node: round(pages * item.anonymous_pages / seen) for node, pages in found.items()}


def _by_frames(pagemap: Pagemap, item: Range, frames: FrameMap) -> Counter[int]:
    zero = zero_frame()
    found: Counter[int] = Counter()
    for start, count in _windows(pagemap, item):
        entries = pagemap.read_frames(start, count)
        for entry, frame in zip(entries, frames_of(entries), strict=True):
            node = None if not frame or entry & FILE or frame == zero else frames.node(frame)
            if node is not None:
                found[node] += 1
    return found


def _windows(pagemap: Pagemap, item: Range) -> Iterator[tuple[int, int]]:
    parts = own_parts(pagemap, item, sparse=True)
    pages = sum(end - start for start, end in parts) // PAGE_SIZE
    # Every window of a small mapping, and of a large one so many at equal distances.
    step = -(-pages // _MOST_PAGES) or None
    return itertools.islice(pieces(parts, _WINDOW_PAGES), 0, None, step)


def pieces(parts: Iterable[tuple[int, int]], pages: int) -> Iterator[tuple[int, int]]:
    """Parts of memory, (start, end), in pieces of at most so many pages: where each starts, and its pages."""
    for first, last in parts:
        for start in range(first, last, pages * PAGE_SIZE):
            yield start, min(pages, (last - start) // PAGE_SIZE)


def own_parts(pagemap: Pagemap, item: Range, *, sparse: bool | None = None) -> tuple[tuple[int, int], ...]:
    """Parts of a mapping that together have all of its anonymous pages in memory, (start, end) ascending.

    Where the kernel can't skip holes (before 6.7) that is the whole mapping.

    :param sparse: whether to leave holes out; None for where there is little else
    """
    if sparse is None:
        sparse = 0 < item.anonymous_pages * SPARSE * PAGE_SIZE < item.end - item.start
    if sparse:
        try:
            return tuple(pagemap.populated(item.start, item.end, SPARSE * PAGE_SIZE))
        except Absent:
            pass
    return ((item.start, item.end),)


@functools.cache
def zero_frame() -> int:
    """The frame of the zero page; 0 where frames are not shown, which no page has."""
    memory = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        syscalls.load(syscalls.address_of(memory), 1)
        with Pagemap(os.getpid()) as pagemap:
            return frames_of(pagemap.read(syscalls.address_of(memory), 1))[0]
    except HostError:
        return 0
    finally:
        memory.close()
