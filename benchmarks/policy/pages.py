# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that a process really has: those that KSM could look at, present and anonymous.

Source: Documentation/admin-guide/mm/pagemap.rst (bit 63 present, bit 61 file page or shared anonymous, bits 0 to 54
the frame; in kpageflags bit 24 ZERO_PAGE); include/uapi/linux/kernel-page-flags.h;
proc_pid_maps(5), proc_pid_mem(5). It takes root.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGE", "ZERO", "Mapping", "anonymous_pages", "mappings", "present", "processes_below"]

PAGE = mmap.PAGESIZE
ZERO = bytes(PAGE)

_PRESENT, _FILE = 1 << 63, 1 << 61
_FRAME = (1 << 55) - 1
_ZERO_PAGE = 1 << 24
_RUN_PAGES = 1024


@dataclass(frozen=True, slots=True)
class Mapping:
    """One private mapping of a process.

    :ivar mergeable: marked for KSM
    """

    start: int
    end: int
    writable: bool
    mergeable: bool

    @property
    def bytes(self) -> int:
        return self.end - self.start


def mappings(pid: int) -> list[Mapping]:
    """The private mappings of a process, from /proc/PID/smaps."""
    found: list[Mapping] = []
    head: tuple[int, int, str] | None = None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            start, end = (int(part, 16) for part in words[0].split("-"))
            head = start, end, words[1]
        elif words[0] == "VmFlags:" and head is not None and head[2].endswith("p"):
            found.append(Mapping(head[0], head[1], "w" in head[2], "mg" in words))
    return found


def present(pid: int, ranges: Iterable[Mapping]) -> Iterator[bytes]:
    """The content of each anonymous page that is present in these ranges.

    What was only ever read shows the kernel's zero page, or a huge one: that is nobody's memory, and left out.
    """
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    kpageflags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in ranges:
            entries = array("Q", os.pread(pagemap, mapping.bytes // PAGE * 8, mapping.start // PAGE * 8))
            for first, last in _runs(entries):
                data = os.pread(memory, (last - first) * PAGE, mapping.start + first * PAGE)
                for number, offset in enumerate(range(0, len(data), PAGE), first):
                    page = data[offset : offset + PAGE]
                    if page != ZERO or not _zero_page(kpageflags, entries[number]):
                        yield page
    finally:
        os.close(kpageflags)
        os.close(memory)
        os.close(pagemap)


def _zero_page(kpageflags: int, entry: int) -> bool:
    flags: int = struct.unpack("Q", os.pread(kpageflags, 8, (entry & _FRAME) * 8))[0]
    return bool(flags & _ZERO_PAGE)


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
