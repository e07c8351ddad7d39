# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose memory an estimate reads, where that lies, and the files that it is read from (`ksmd_ctl.kernel.estimate`)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import NoSuchProcess
from ksmd_ctl.host.memory import Process, Range, Topology
from ksmd_ctl.kernel.content_numbers import numbers_of
from ksmd_ctl.kernel.contents import Contents
from ksmd_ctl.kernel.pagemap import Pagemap
from ksmd_ctl.kernel.proc_pid import LeftOut, read_stat, running_pids, start_time_ticks
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.processes import Surveyor, start_stack
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.reading import killable_reads
from ksmd_ctl.kernel.topology import FrameMap
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES

#: VmFlags of mappings that ksmd leaves alone whatever somebody asks for (mm/ksm.c:vma_ksm_compatible).
_NEVER_MERGED: Final = frozenset({"sh", "ms", "pf", "io", "de", "ht", "mm", "dp"})
#: Of mappings that userfaultfd watches: a page that is gone meanwhile would be asked for.
_WATCHED: Final = frozenset({"um", "uw"})
# Processes whose files are open at a time.
_MOST_OPEN: Final = 128


@dataclass(frozen=True, slots=True)
class Target:
    """A process that is looked at.

    :ivar stack: where its stack begins, to tell forks of one another; 0 where it isn't known
    :ivar ranges: its mappings that may be merged and hold pages, and whether they are marked mergeable
    """

    process: Process
    stack: int
    ranges: tuple[tuple[Range, bool], ...]

    @property
    def pages(self) -> int:
        return sum(item.anonymous_pages for item, _ in self.ranges)


def find_targets(
    wanted: Callable[[Process], bool],
    left_out: LeftOut,
    *,
    more: bool,
    pid: int | None = None,
    root: Path = Path("/"),
    pause: Callable[[], None] = lambda: None,
) -> list[Target]:
    """The processes that have memory that can be merged. This process is none of them.

    :param left_out: gets those that could not be looked at
    :param more: also memory that nobody has marked
    :param pid: the only one that can be wanted
    :param pause: called after each process
    """
    surveyor = Surveyor(Topology((), numa=False), FrameMap(()), None, root=root)
    found = []
    with killable_reads():
        for one in running_pids(root) if pid is None else [pid]:
            if one == os.getpid():
                continue
            pause()
            with left_out.looking_at(one):
                if not more and read_counts(one, root).mergeable is False:
                    continue
                ranges = tuple(
                    (item, item.mergeable)
                    for item in mappings(one, root)
                    if item.anonymous_pages and (item.mergeable or more) and not item.flags & (_NEVER_MERGED | _WATCHED)
                )
                if ranges and wanted(process := surveyor.belongs(one)):
                    found.append(Target(process, start_stack(read_stat(one, root)[1]), ranges))
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """Address space of a process that is looked at."""

    owner: int
    item: Range
    marked: bool
    start: int
    end: int

    @property
    def pages(self) -> int:
        return (self.end - self.start) // PAGE_SIZE


@dataclass(slots=True)
class Files:
    """Pagemap and contents of the processes that were looked at last."""

    targets: Sequence[Target]
    root: Path
    numbers: Callable[[bytes], Iterable[int]] = numbers_of
    _open: OrderedDict[int, tuple[Pagemap, Contents]] = field(default_factory=OrderedDict)

    def of(self, owner: int) -> tuple[Pagemap, Contents]:
        """
        :raises NoSuchProcess, Denied: they can't be read
        """
        if owner in self._open:
            self._open.move_to_end(owner)
            return self._open[owner]
        pid = self.targets[owner].process.id.pid
        pagemap = Pagemap(pid, self.root)
        try:
            contents = Contents(pid, self.root, self.numbers)
            # Both stay with the process that they were opened of, which may be a later one with its pid.
            if self.targets[owner].process.id.start_time_ticks != start_time_ticks(pid, self.root):
                contents.close()
                raise NoSuchProcess(f"process {pid}", "it is gone, and its pid belongs to another process now")
        except BaseException:
            pagemap.close()
            raise
        self._open[owner] = pagemap, contents
        if len(self._open) > _MOST_OPEN:
            for file in self._open.popitem(last=False)[1]:
                file.close()
        return pagemap, contents

    def close(self) -> None:
        for files in self._open.values():
            for file in files:
                file.close()
        self._open.clear()


def blocks(part: Part) -> Iterator[tuple[int, int]]:
    """Its pages in blocks that lie in a huge page each: where each starts, and its pages."""
    start = part.start
    while start < part.end:
        end = min(part.end, (start // HUGE_BYTES + 1) * HUGE_BYTES)
        yield start, (end - start) // PAGE_SIZE
        start = end
