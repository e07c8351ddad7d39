# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at the contents of all mergeable pages of this machine, for a sample of them (`ksmd_ctl.host.page_sample`).

Only pages that are present are read, and a frame that several map is read once a look (`ksmd_ctl.kernel.contents`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.memory import Process, ProcessId, Range
from ksmd_ctl.host.page_sample import (
    MOST_COUNTED,
    ZERO_FRAME,
    LookSteps,
    PageLook,
    ProcessCounts,
    ProcessPages,
    SampledPage,
    Selection,
    equal_pages,
)
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.contents import Contents
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, PRESENT, Pagemap, frames_of, own_parts, pieces, zero_frame
from ksmd_ctl.kernel.proc_pid import START_TIME, LeftOut, read_stat, running_pids
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.processes import Surveyor, start_stack
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.reading import killable_reads
from ksmd_ctl.kernel.topology import FrameMap, read_frame_map, read_topology

# Pages that are read in one step: some milliseconds.
_STEP_PAGES: Final = 1024
# Of the fields that `read_stat` gives: field 24 of proc(5), pages in memory.
_RSS: Final = 21


class KernelPages:
    """`ksmd_ctl.host.page_sample.PageSampler` of this machine."""

    def __init__(self, selection: Selection, root: Path = Path("/")) -> None:
        self._selection = selection
        self._root = root
        # Which pages are merged is not asked, so nothing is needed that tells.
        topology = read_topology(root, numa=libnuma.available())
        # What was there at the last look and has nothing that is mergeable.
        self._seen: set[int] = set()
        self._running: set[int] = set()
        self._known: set[ProcessId] = set()
        self._surveyor = Surveyor(topology, read_frame_map(root), None, root=root)

    def pages(self) -> int:
        left_out, found = LeftOut(), 0
        for pid in running_pids(self._root):
            with left_out.looking_at(pid):
                found += sum(item.anonymous_pages for item in self._mergeable(pid))
        left_out.need(found)
        return found

    def look(self, *, zero_pages: bool = False) -> LookSteps:
        began, cpu = time.monotonic(), time.process_time()
        nodes = read_frame_map(self._root)
        left_out = LeftOut()
        seen: dict[int, tuple[int, int]] = {}
        if zero_pages:
            seen[zero_frame()] = self._selection.number(bytes(PAGE_SIZE)), ZERO_FRAME
        running = running_pids(self._root)
        there: list[tuple[ProcessPages, tuple[Range, ...]]] = []
        found: list[ProcessPages] = []
        with killable_reads():
            for pid in running:
                with left_out.looking_at(pid):
                    if ranges := self._mergeable(pid):
                        there.append((self._introduced(pid), ranges))
                        yield
        pages = sum(item.anonymous_pages for _, ranges in there for item in ranges)
        # In the whole the sample has all of them.
        counts: Counter[int] | None = Counter() if self._selection.one_in > 1 and pages <= MOST_COUNTED else None
        for one, ranges in there:
            pid = one.process.pid
            with left_out.looking_at(pid):
                with Contents(pid, self._root) as contents, Pagemap(pid, self._root) as pagemap:
                    for item in ranges:
                        for start, count in pieces(own_parts(pagemap, item), _STEP_PAGES):
                            self._read(one, pagemap, contents, start, count, nodes, seen, counts)
                            yield
                one.seconds = time.monotonic()
                found.append(one)
        left_out.need(found)
        self._known = {one.process for one in found}
        # What has just been started may not have any yet.
        self._seen = (self._running or set(running)) & set(running) - {one.process.pid for one in found}
        self._running = set(running)
        self._selection.settle(tuple(found))
        errors = {pid: error.why for pid, error in left_out.errors.items()}
        equal = None if counts is None else equal_pages(counts)
        return PageLook(began, time.monotonic(), time.process_time() - cpu, tuple(found), errors, equal)

    def counts(self, known: Collection[ProcessId]) -> Mapping[ProcessId, ProcessCounts]:
        left_out, found = LeftOut(), {}
        for pid in {one.pid for one in known}.union(running_pids(self._root)) - self._seen:
            with left_out.looking_at(pid):
                fields = read_stat(pid, self._root)[1]
                if fields[0] not in (b"Z", b"X"):
                    counts = read_counts(pid, self._root)
                    process = ProcessId(pid, int(fields[START_TIME]))
                    found[process] = ProcessCounts(int(fields[_RSS]), counts.rmap_items, counts.merging_pages)
        return found

    def _introduced(self, pid: int) -> ProcessPages:
        name, fields = read_stat(pid, self._root)
        process = ProcessId(pid, int(fields[START_TIME]))
        one = ProcessPages(process, name, time.monotonic(), family=start_stack(fields))
        one.merging_pages = read_counts(pid, self._root).merging_pages
        if process not in self._known:
            one.about = self._described(process)
        return one

    def _described(self, process: ProcessId) -> Process | None:
        try:
            found = self._surveyor.one(process.pid)
        except KsmdError:
            # It ends just now, or some file of it can't be read: then it has no unit, and its pages stand.
            return None
        return found if found is not None and found.id == process else None

    def _mergeable(self, pid: int) -> tuple[Range, ...]:
        if read_counts(pid, self._root).mergeable is False:
            return ()
        return tuple(item for item in mappings(pid, self._root) if item.mergeable and item.anonymous_pages)

    def _read(
        self,
        one: ProcessPages,
        pagemap: Pagemap,
        contents: Contents,
        start: int,
        count: int,
        nodes: FrameMap,
        seen: dict[int, tuple[int, int]],
        counts: Counter[int] | None,
    ) -> None:
        """Take in a piece of a mapping.

        :param seen: by frame, of those that several map: the number of the content and of the frame
        :param counts: pages by the numbers of their contents
        """
        entries = pagemap.read_frames(start, count)
        frames = frames_of(entries)
        zero, pid, may_keep = zero_frame(), one.process.pid, self._selection.may_keep
        there = [
            index
            for index, (entry, frame) in enumerate(zip(entries, frames, strict=True))
            if entry & PRESENT and not entry & FILE and frame and (frame != zero or zero in seen)
        ]
        one.pages += len(there)
        unseen = [index for index in there if frames[index] not in seen]
        for index, number in contents.numbers(start, unseen, self._selection.number):
            if not entries[index] & EXCLUSIVE:
                if frames[index] not in seen:
                    seen[frames[index]] = number, len(seen) + 1
                continue
            if counts is not None:
                counts[number] += 1
            if may_keep(number, pid, address := start + index * PAGE_SIZE):
                one.sampled[address] = SampledPage(number, nodes.node(frames[index]) or 0)
        for index in there:
            if (known := seen.get(frames[index])) is None:
                continue
            if counts is not None:
                counts[known[0]] += 1
            if may_keep(known[0], pid, address := start + index * PAGE_SIZE):
                one.sampled[address] = SampledPage(known[0], nodes.node(frames[index]) or 0, known[1])
