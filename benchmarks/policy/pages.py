# SPDX-License-Identifier: GPL-2.0-or-later
"""The contents of the pages that a process holds in its anonymous memory.

Source: Documentation/admin-guide/mm/pagemap.rst (bit 63 present, bit 61 file page or shared anonymous, bits 0 to 54
the frame; in kpageflags bit 24 ZERO_PAGE, bit 22 THP, which the huge zero page has as well);
include/uapi/linux/kernel-page-flags.h; proc_pid_mem(5). It takes root.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from ksmd_ctl.host.memory import Range

__all__ = ["PAGE", "THP", "ZERO", "ZERO_PAGE", "anonymous_pages", "has_flags", "present", "processes_below"]

PAGE = mmap.PAGESIZE
ZERO = bytes(PAGE)

_PRESENT, _FILE = 1 << 63, 1 << 61
_FRAME = (1 << 55) - 1
THP, ZERO_PAGE = 1 << 22, 1 << 24
_RUN_PAGES = 1024


def present(pid: int, ranges: Iterable[Range], *, zero_pages: bool = False) -> Iterator[tuple[int, bytes]]:
    """Address and content of each anonymous page that is resident in these ranges.

    :param zero_pages: also of each page that maps the shared zero page. The huge zero page is always left out: such
        memory was only ever read.
    """
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    left_out = (ZERO_PAGE, ZERO_PAGE | THP)[zero_pages]
    kpageflags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for item in ranges:
            size = item.end - item.start
            entries = array("Q", os.pread(pagemap, size // PAGE * 8, item.start // PAGE * 8))
            for first, last in _runs(entries):
                data = os.pread(memory, (last - first) * PAGE, item.start + first * PAGE)
                for number, offset in enumerate(range(0, len(data), PAGE), first):
                    page = data[offset : offset + PAGE]
                    if page != ZERO or _flags(kpageflags, entries[number] & _FRAME) & left_out != left_out:
                        yield item.start + number * PAGE, page
    finally:
        os.close(kpageflags)
        os.close(memory)
        os.close(pagemap)


def has_flags(frames: Iterable[int], flag: int, *, without: int) -> list[bool]:
    """For each frame whether /proc/kpageflags has `flag` and not `without`. Frame 0 has neither: no page."""
    kpageflags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [frame != 0 and _flags(kpageflags, frame) & (flag | without) == flag for frame in frames]
    finally:
        os.close(kpageflags)


def _flags(kpageflags: int, frame: int) -> int:
    flags: int = struct.unpack("Q", os.pread(kpageflags, 8, frame * 8))[0]
    return flags


def _runs(entries: array[int]) -> Iterator[tuple[int, int]]:
    first = None
    for number, entry in enumerate(entries):
        if entry & _PRESENT and not entry & _FILE:
            first = number if first is None else first
            if number + 1 - first < _RUN_PAGES:
                continue
            yield first, number + 1
        elif first is not None:
            yield first, number
        first = None
    if first is not None:
        yield first, len(entries)


def anonymous_pages(pid: int) -> int:
    """Anonymous pages that a process has, merged or not; none when it is gone. From /proc/PID/statm."""
    try:
        words = Path(f"/proc/{pid}/statm").read_text().split()
    except FileNotFoundError:
        return 0
    return int(words[1]) - int(words[2])


def processes_below(pid: int) -> list[int]:
    """All processes that this one started, and theirs."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]
