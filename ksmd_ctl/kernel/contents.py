# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the contents of processes' pages, of which only numbers are kept, and says whose may be compared.

- Only pages that are present are to be read, from /proc/PID/mem: nothing is faulted in. process_vm_readv(2) would
  un-merge each KSM page that it reads (F22): since 5.19 pinning a page that is not exclusive gives the process a copy
  (mm/gup.c: gup_must_unshare).
- Only a number made of each page is kept. Two contents may, once in 2**64, give one number, and a page may be written
  to after it was read. Un-merging never changes a content, and ksmd compares all bytes before it merges.

Figures that depend on which pages of different owners are equal are bound by the rules of `Asker`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, NoSuchProcess, ReadError, Refused
from ksmd_ctl.host.duplicates import NO_LIMIT, MergeRules
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ROUND_PAGES
from ksmd_ctl.kernel.content_numbers import READ_PAGES, numbers_of
from ksmd_ctl.kernel.kpageflags import runs
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.proc_pid import process_file_error
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, Closing, read_file

# Real, effective, saved and file system uid.
_UIDS: Final = re.compile(rb"^Uid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Asker:
    """The user who asks, and what that user may learn about equal contents (docs/security.md).

    Who could have a page compared with everybody's could guess at others' contents. So whoever is not root learns
    nothing beyond what merging itself tells the owner of a mergeable page.
    """

    uid: int
    root: Path

    def need_merging(self, what: str) -> None:
        """
        :raises Refused: KSM does not merge, and it is not root that asks
        """
        if self.uid == 0:
            return
        with closing(KsmFs(self.root)) as ksm:
            run = ksm.read(Knob.RUN)
        if run != 1:
            raise Refused(what, f"run is {run}: contents are compared for root only while KSM does not merge")

    def rounded(self, pages: int) -> int:
        """A count of pages as the asker gets it: rounded down, but for root."""
        return pages if self.uid == 0 else pages // ROUND_PAGES * ROUND_PAGES

    def may_compare(self, pid: int) -> bool:
        """Whether a process takes part: it has none of its uids from the asker.

        :raises NoSuchProcess: it is gone
        """
        if self.uid == 0:
            return True
        path = self.root / "proc" / str(pid) / "status"
        try:
            match = _UIDS.search(read_file(path))
        except Absent as error:
            raise NoSuchProcess(f"process {pid}", "it is gone", path=str(path), errno=error.errno) from error
        except ReadError:
            return False
        return match is not None and str(self.uid).encode() not in match.groups()


def merge_rules(root: Path) -> MergeRules:
    """What the knobs say now of how many pages of one content are kept."""
    with closing(KsmFs(root)) as ksm:

        def number(knob: Knob, lacking: int) -> int:
            try:
                return int(ksm.read(knob))
            except Absent:
                return lacking

        # Without NUMA there is one node.
        return MergeRules(number(Knob.MERGE_ACROSS_NODES, 1) != 0, number(Knob.MAX_PAGE_SHARING, NO_LIMIT))


class Contents(Closing):
    """Numbers made of the contents of one process's pages."""

    def __init__(self, pid: int, root: Path, numbers: Callable[[bytes], Iterable[int]] = numbers_of) -> None:
        """
        :param numbers: makes those of a `block`, of pages that lie one after the other
        :raises NoSuchProcess, Denied: they can't be read
        """
        self._numbers = numbers
        path = root / "proc" / str(pid) / "mem"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise process_file_error(pid, path, error) from error

    def numbers(
        self, start: int, pages: Sequence[int], number: Callable[[bytes], int] = hash
    ) -> Iterator[tuple[int, int]]:
        """Each of the pages that is still there, counted from an address, and the number of its content.

        :param number: makes it
        """
        for begin, end in runs(pages, 1):
            for first in range(begin, end, READ_PAGES):
                data = self._part(start + first * PAGE_SIZE, min(end - first, READ_PAGES))
                yield from enumerate(numbers_of(data, number), first)

    def block(self, start: int, pages: int) -> list[int]:
        """The numbers of the contents of pages from an address on; fewer where something is not there any more."""
        found: list[int] = []
        for first in range(0, pages, READ_PAGES):
            count = min(READ_PAGES, pages - first)
            data = self._part(start + first * PAGE_SIZE, count)
            found += self._numbers(data)
            if len(data) < count * PAGE_SIZE:
                break
        return found

    def _part(self, start: int, pages: int) -> bytes:
        try:
            return os.pread(self._fd, pages * PAGE_SIZE, start)
        except OSError:
            # It was unmapped meanwhile.
            return b""

    def close(self) -> None:
        os.close(self._fd)
