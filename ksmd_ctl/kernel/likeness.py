# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of what is mergeable is alike and yet apart, found out by comparing contents.

No counter of any kernel tells it: a page that smart_scan skips for ever (findings F2), a migrated twin (F1) and a
page that has no second one look the same in /sys/kernel/mm/ksm. So contents are read, from /proc/PID/mem, and only
those of pages that are present: nothing is faulted in. A frame is read once, however many map it, so what fork shares
and what is merged already don't count as alike. Digests are compared, and only counts leave this process.

Where there is more than the budget, blocks of address space are drawn by chance. Holes are skipped where the kernel
offers that (6.7); else of a mapping that is mostly holes fewer blocks are drawn, and of no other. A frame that was
drawn with a chance p stands for 1/p frames; one that is mapped more than once had more chances, and stands for itself.
Of those of one content, the ones that stand for most are taken for those that there need be: so the figure is a lower
bound on the average, whatever the chances.
"""

from __future__ import annotations

import errno
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from ksmd_ctl.errors import Absent, Cancelled, Denied, NoSuchProcess, ReadError, errno_text
from ksmd_ctl.host.memory import Likeness, Range
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, PRESENT, SPARSE, Pagemap, frames_of, own_parts, zero_frame
from ksmd_ctl.kernel.proc_pid import read_stat, running_pids
from ksmd_ctl.kernel.processes import read_counts, start_stack
from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.kernel.topology import FrameMap, read_frame_map
from ksmd_ctl.knobs import KNOBS, Knob

__all__ = ["take"]

#: Pages that are drawn together.
_BLOCK_PAGES = 512


@dataclass(frozen=True, slots=True)
class _Memory:
    """A process's mergeable mappings that hold pages."""

    pid: int
    ranges: tuple[Range, ...]
    stack: int


@dataclass(slots=True)
class _Places:
    """Where forks of one another map the frames that several map, and which of these others map as well.

    What fork shares lies at the same address in all of them. So a frame that is mapped at two places, or by one that
    is no relative, was merged, and each place beyond the first is a page saved.

    :ivar families: stacks that several processes have (`ksmd_ctl.kernel.processes.count_relatives`)
    :ivar related: by frame, the places: family and address
    """

    families: Set[int]
    related: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)

    def seen(self, stack: int, address: int, frame: int) -> None:
        """Take a mapping in."""
        if stack in self.families:
            self.related.setdefault(frame, set()).add((stack, address))
        elif self.families:
            self.others.add(frame)

    def count(self) -> int:
        """How many places there are of frames that were merged."""
        return sum(len(places) for frame, places in self.related.items() if len(places) > 1 or frame in self.others)


@dataclass(slots=True)
class _Group:
    """Frames with one content: how many each stands for, and how many mappings were seen of them."""

    frames: dict[int, float] = field(default_factory=dict)
    mappings: float = 0.0


def take(
    budget_frames: int,
    *,
    root: Path = Path("/"),
    page_size: int = 4096,
    stop: Callable[[], bool] = lambda: False,
    chance: random.Random | None = None,
    compared: Callable[[int], bool] = lambda _: True,
) -> Likeness:
    """Compare the contents of at most about so many pages' frames.

    :param compared: whether a process, by its pid, takes part
    :raises Denied: of all processes with mergeable memory not one could be looked at
    :raises Cancelled: `stop` said so
    """
    began = time.process_time()
    knobs = _Knobs.read(root)
    found, families, denied, unread = _mergeable(root, page_size, compared)
    ranges = [item for memory in found for item in memory.ranges]
    pages = sum(item.anonymous_pages for item in ranges)
    share = min(1.0, budget_frames / max(1, pages))
    frames = read_frame_map(root, page_size)
    job = _Job(knobs, share, frames, root, page_size, chance or random.Random(), _Places(families))
    for memory in found:
        if stop():
            raise Cancelled("comparing contents", "stopped before it was done")
        try:
            job.look(memory)
        except NoSuchProcess:
            continue
        except Absent:
            raise
        except (Denied, ReadError) as error:
            unread += 1
            denied = error if isinstance(error, Denied) else denied
    if denied is not None and not job.groups:
        raise denied
    complete, spent = job.complete and not unread, time.process_time() - began
    return Likeness(pages, len(job.seen), job.apart(), complete, spent, job.places.count(), unread)


def _mergeable(
    root: Path, page_size: int, compared: Callable[[int], bool]
) -> tuple[list[_Memory], Set[int], Denied | None, int]:
    """What there is, stacks that several have, a refusal if there was one, and how many could not be seen."""
    found, denied, unread = [], None, 0
    stacks: Counter[int] = Counter()
    for pid in running_pids(root):
        try:
            if read_counts(pid, root).mergeable is False or not compared(pid):
                continue
            stack = start_stack(read_stat(pid, root)[1])
            ranges = tuple(
                item for item in read_ranges(pid, root, page_size) if item.mergeable and item.anonymous_pages
            )
        except NoSuchProcess:
            continue
        except (Denied, ReadError) as error:
            # One that keeps its readers waiting hides nobody else, and is counted.
            unread += 1
            denied = error if isinstance(error, Denied) else denied
            continue
        if ranges:
            found.append(_Memory(pid, ranges, stack))
            stacks[stack] += 1
    return found, {stack for stack, count in stacks.items() if stack and count > 1}, denied, unread


@dataclass(frozen=True, slots=True)
class _Knobs:
    """What decides how many frames of a content there have to be."""

    across_nodes: bool
    limit: int

    @classmethod
    def read(cls, root: Path) -> _Knobs:
        ksm = KsmFs(root)
        try:
            values = []
            for knob in (Knob.MERGE_ACROSS_NODES, Knob.MAX_PAGE_SHARING):
                try:
                    values.append(int(ksm.read(knob)))
                except Absent:
                    # Before 4.13 there was no limit; without NUMA there is one node.
                    values.append(1 if knob is Knob.MERGE_ACROSS_NODES else KNOBS[knob].maximum)
            return cls(values[0] == 1, values[1])
        finally:
            ksm.close()


@dataclass(slots=True)
class _Job:
    knobs: _Knobs
    share: float
    nodes: FrameMap
    root: Path
    page_size: int
    chance: random.Random
    places: _Places
    #: By frame: the group that it is in.
    seen: dict[int, _Group] = field(default_factory=dict)
    groups: dict[tuple[int | None, int], _Group] = field(default_factory=dict)
    complete: bool = True

    def look(self, memory: _Memory) -> None:
        path = self.root / "proc" / str(memory.pid) / "mem"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                raise NoSuchProcess(f"process {memory.pid}", "it is gone", errno=error.errno) from error
            raise Denied(
                f"contents of process {memory.pid}",
                f"{path} can't be opened: {errno_text(error.errno or 0)}",
                hint="needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3",
                path=str(path),
                errno=error.errno,
            ) from error
        try:
            with Pagemap(memory.pid, self.root, self.page_size) as pagemap:
                for item in memory.ranges:
                    parts = own_parts(pagemap, item, self.page_size)
                    share = self._share(item, parts)
                    self.complete = self.complete and share == 1.0
                    for start, count in self._blocks(parts, share):
                        self._block(pagemap, descriptor, start, count, share, memory.stack)
        finally:
            os.close(descriptor)

    def _share(self, item: Range, parts: Sequence[tuple[int, int]]) -> float:
        # Looking for a page costs a small part of what comparing it does: only who has hardly any pays for it.
        walked = sum(end - start for start, end in parts) // self.page_size
        return self.share * min(1.0, SPARSE * item.anonymous_pages / max(1, walked))

    def _blocks(self, parts: Sequence[tuple[int, int]], share: float) -> Iterator[tuple[int, int]]:
        size = _BLOCK_PAGES * self.page_size
        for first, last in parts:
            for start in range(first, last, size):
                if share == 1.0 or self.chance.random() < share:
                    yield start, (min(start + size, last) - start) // self.page_size

    def _block(self, pagemap: Pagemap, descriptor: int, start: int, count: int, share: float, stack: int) -> None:
        entries = pagemap.read(start, count)
        pagemap.need_frames(entries)
        new: list[tuple[int, int]] = []
        several = set()
        zero = zero_frame()
        for index, (entry, frame) in enumerate(zip(entries, frames_of(entries), strict=True)):
            if not entry & PRESENT or entry & FILE or frame in (0, zero):
                continue
            if not entry & EXCLUSIVE:
                several.add(frame)
                self.places.seen(stack, start + index * self.page_size, frame)
            group = self.seen.get(frame)
            if group is None:
                new.append((index, frame))
            else:
                group.mappings += 1 / share
        for index, frames in _runs(new):
            self._read(descriptor, start + index * self.page_size, frames, share, several)

    def _read(self, descriptor: int, address: int, frames: list[int], share: float, several: Collection[int]) -> None:
        size = self.page_size
        try:
            data = os.pread(descriptor, len(frames) * size, address)
        except OSError:
            # It was unmapped meanwhile.
            return
        for index, frame in enumerate(frames[: len(data) // size]):
            node = None if self.knobs.across_nodes else self.nodes.node(frame)
            key = (node, hash(data[index * size : (index + 1) * size]))
            group = self.seen.get(frame) or self.groups.setdefault(key, _Group())
            group.frames.setdefault(frame, 1.0 if frame in several else 1 / share)
            group.mappings += 1 / share
            self.seen[frame] = group

    def apart(self) -> int:
        """Frames that there need not be; a lower bound where only a share was drawn."""
        found = 0.0
        for group in self.groups.values():
            needed = max(1, math.ceil(group.mappings / self.knobs.limit))
            if needed < len(group.frames):
                found += sum(sorted(group.frames.values())[:-needed])
        return round(found)


def _runs(pages: list[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """Adjacent pages together: the first one's index, and the frames."""
    run: list[int] = []
    first = 0
    for index, frame in pages:
        if run and index != first + len(run):
            yield first, run
            run = []
        if not run:
            first = index
        run.append(frame)
    if run:
        yield first, run
