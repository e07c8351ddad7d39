# SPDX-License-Identifier: GPL-2.0-or-later
"""What is mapped at the lab's addresses: frames, their nodes, and which of them are KSM pages.

Between two things that the lab does, nothing changes: so what the second witness needs of a process, which is
expensive, is read once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ksmd_ctl.host.memory import KsmWitness, PageState, ProcessId, Range
from ksmd_ctl.kernel.kpageflags import FrameFlags
from ksmd_ctl.kernel.libnuma import PageMover
from ksmd_ctl.kernel.pseudofile import read_file
from ksmd_ctl.kernel.regions import RegionProcess
from ksmd_ctl.kernel.syscalls import PAGE_SIZE
from ksmd_ctl.kernel.witness import PageReader, State, Window, choose, probe

__all__ = ["LabPages"]

# Test regions lie below this, libraries and stack above (ksmd_ctl.kernel.region_child).
_END = 1 << 38


class LabPages:
    """Looks at pages of the lab's processes.

    :raises Absent, Denied: this kernel doesn't show frames, or these processes may not see them
    """

    def __init__(self) -> None:
        self.witness = choose(probe())
        self._flags = FrameFlags()
        self._mover = PageMover()
        self._reader: PageReader | None = None
        self._ranges: dict[ProcessId, list[Range]] = {}

    def close(self) -> None:
        """Give the descriptors back."""
        self._flags.close()

    def forget(self) -> None:
        """Something may have changed."""
        self._reader = None
        self._ranges.clear()

    def look(self, process: RegionProcess, start: int, pages: int) -> tuple[PageState, ...]:
        """What is mapped at adjacent pages of a process."""
        if self._reader is None:
            self._reader = PageReader(self.witness, page_size=PAGE_SIZE, flags=self._flags, still=True)
        windows = self._windows(self._reader, process.id, start, pages)
        frames = [frame for window in windows for frame in window.frames]
        ksm = [state == State.KSM for window in windows for state in window.states]
        if any(State.UNDECIDED in window.states for window in windows):
            ksm = self._apart(process, start, pages)
        nodes = self._nodes(process.id, start, frames)
        return tuple(
            PageState(frame, node, merged) if frame else PageState(None, None, False)
            for frame, node, merged in zip(frames, nodes, ksm, strict=True)
        )

    def _apart(self, process: RegionProcess, start: int, pages: int) -> list[bool]:
        # What no look from outside decides, the process itself can: a mapping of one page has a count of its own.
        process.split(start, pages, on=True)
        try:
            counts = {found.start: found.ksm_pages for found in _own_ranges(process.id.pid)}
        finally:
            process.split(start, pages, on=False)
        return [bool(counts[start + page * PAGE_SIZE]) for page in range(pages)]

    def _windows(self, reader: PageReader, process: ProcessId, start: int, pages: int) -> Sequence[Window]:
        end = start + pages * PAGE_SIZE
        if self.witness is KsmWitness.KPAGEFLAGS:
            # Bit 21 needs no count of the mapping: any range will do.
            return list(reader.windows(process.pid, [Range(start, end, frozenset())]))
        return list(reader.windows(process.pid, self._mergeable(process), [(start, end)]))

    def _mergeable(self, process: ProcessId) -> list[Range]:
        if process not in self._ranges:
            self._ranges[process] = _own_ranges(process.pid)
        return self._ranges[process]

    def _nodes(self, process: ProcessId, start: int, frames: Sequence[int]) -> list[int | None]:
        there = [index for index, frame in enumerate(frames) if frame]
        found: list[int | None] = [None] * len(frames)
        if there:
            statuses = self._mover.query(process.pid, [start + index * PAGE_SIZE for index in there])
            for index, status in zip(there, statuses, strict=True):
                # The zero page has no node: -EFAULT.
                found[index] = status if status >= 0 else None
        return found


_RANGE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")
_KSM = re.compile(rb"\nKSM: +(\d+) kB")


def _own_ranges(pid: int) -> list[Range]:
    # Where every look costs a smaps, as with the second witness, parsing all of an interpreter's hundred mappings
    # is most of a scenario's time.
    found: list[Range] = []
    for number, part in enumerate(read_file(Path(f"/proc/{pid}/smaps")).split(b"\nVmFlags:")[:-1]):
        # What is before the head of a mapping are the flags of the one before it.
        at = part.find(b"\n") + 1 if number else 0
        head = _RANGE.match(part, at)
        assert head is not None
        start, end = int(head[1], 16), int(head[2], 16)
        if start >= _END:
            break
        count = _KSM.search(part, at)
        found.append(Range(start, end, frozenset({"mg"}), ksm_pages=int(count[1]) * 1024 // PAGE_SIZE if count else 0))
    return found
