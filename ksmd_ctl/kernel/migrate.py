# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves a process's memory to a node, with move_pages(2), in batches that are bounded in time.

What move_pages returns, and what it writes for a page, is not what came of it (findings F4): of two addresses of
one page the second reads -EBUSY and moves nevertheless, and a page that fails may have no status at all. So each
frame is asked for once, by one address, and a query afterwards decides.
"""

from __future__ import annotations

import errno
import math
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ksmd_ctl.errors import Cancelled, HostError, NoSuchProcess, Unmapped
from ksmd_ctl.host.memory import Range
from ksmd_ctl.host.operation import Move, MovePlan, MoveResult, Progress
from ksmd_ctl.kernel.headroom import Headroom, rooms, tightest
from ksmd_ctl.kernel.libnuma import NOT_ATTEMPTED, PageMover, status_cause
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, FRAME, PRESENT, Pagemap, all_have, any_has, frame_limits, pieces
from ksmd_ctl.kernel.proc_pid import NO_MEMORY, Held
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.topology import FrameMap, need_memory, read_frame_map

NOT_MERGEABLE = "not mergeable memory, which is moved only on request"
_HUGETLB = "pages of hugetlbfs, which are not moved"

#: How often a busy page is asked for again.
_RETRIES = 3
_BUSY = frozenset({-errno.EBUSY, -errno.EAGAIN, NOT_ATTEMPTED})
#: Where nobody limits the time of a call; else it is a multiple of that time.
_PAUSE_SECONDS = 0.01
_WINDOW_PAGES = 32768
_CAP_SYS_NICE = 23


def can_move_shared(root: Path = Path("/")) -> bool:
    """Whether this process has CAP_SYS_NICE, which MPOL_MF_MOVE_ALL needs."""
    match = re.search(r"^CapEff:\t([0-9a-f]+)$", (root / "proc/self/status").read_text(), re.MULTILINE)
    return bool(match and int(match[1], 16) >> _CAP_SYS_NICE & 1)


def select(
    found: Iterable[Range], wanted: tuple[tuple[int, int], ...], *, everything: bool, what: str
) -> tuple[list[tuple[int, int]], Counter[str]]:
    """The parts of a process's mappings that are meant, and resident pages that are not, by cause.

    :param wanted: (start, end); empty for all
    :raises Unmapped: nothing at all is mapped in one of `wanted`
    """
    found = list(found)
    parts: list[tuple[int, int]] = []
    left: Counter[str] = Counter()
    for start, end in wanted:
        if not any(item.start < end and start < item.end for item in found):
            raise Unmapped(what, f"nothing is mapped in {start:#x}-{end:#x}", hint="see /proc/PID/maps", value=start)
    for item in found:
        inside = [
            (max(item.start, start), min(item.end, end))
            for start, end in wanted or ((item.start, item.end),)
            if item.start < end and start < item.end
        ]
        if not inside or (not item.resident_pages and not item.flags & {"ht"}):
            continue
        if "ht" in item.flags:
            if wanted or everything:
                left[_HUGETLB] += item.resident_pages
        elif everything or item.mergeable:
            parts += inside
        elif wanted:
            left[NOT_MERGEABLE] += item.resident_pages
    # Wanted ranges may overlap; nothing is to be moved or counted twice.
    return _joined(parts), left


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _windows(pagemap: Pagemap, parts: list[tuple[int, int]], *, everything: bool) -> Iterator[tuple[int, array[int]]]:
    for start, count in pieces(parts, _WINDOW_PAGES):
        entries = pagemap.read_frames(start, count)
        if not everything and any_has(entries, FILE):
            # A file's pages in a mergeable mapping never merge, and are not this process's own.
            entries = array("Q", [0 if entry & FILE else entry for entry in entries])
        if any(entries):
            yield start, entries


def plan(request: Move, *, root: Path = Path("/")) -> MovePlan:
    """What `move` would do, with nothing changed.

    :raises KsmdError: as `move`
    """
    need_memory(request.to, _what(request), root)
    pid = request.process.pid
    frame_map = read_frame_map(root)
    there = request.homes
    nodes: Counter[int] = Counter()
    seen: set[int] = set()
    shared = already = 0
    with Held(request.process, root):
        parts, left = select(
            mappings(pid, root),
            request.ranges,
            everything=request.everything,
            what=_what(request),
        )
        with Pagemap(pid, root) as pagemap:
            for _, entries in _windows(pagemap, parts, everything=request.everything):
                for entry in entries:
                    frame = entry & FRAME
                    if not entry & PRESENT or frame in seen:
                        continue
                    node = frame_map.node(frame)
                    if not entry & EXCLUSIVE:
                        seen.add(frame)
                        shared += node not in there
                    if node in there:
                        already += 1
                    elif node is not None:
                        nodes[node] += 1
        room = tightest(rooms(pid, frozenset({request.to}), request.floor_bytes, root, grows=False))
    found = MovePlan(dict(nodes), shared, already, dict(left), room.where, room.free_bytes)
    return found.within_room(PAGE_SIZE, room.full_text)


def _what(request: Move) -> str:
    return f"moving memory of process {request.process.pid} to node {request.to}"


def move(
    request: Move,
    *,
    root: Path = Path("/"),
    shared: bool | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    mover: PageMover | None = None,
) -> MoveResult:
    """Move memory of a process to a node.

    The process is looked at before and after every batch. A pid that is given to another process within one call
    can't be ruled out by any means that the kernel has; it would have pages moved, and nothing worse.

    :param shared: move pages that are mapped more than once too (MPOL_MF_MOVE_ALL), as merged pages are; None for
        where this process may (CAP_SYS_NICE). Where it may not they are left, with the cause.
    :raises NoSuchProcess: it is gone, or exited half way; the text says how far it was
    :raises Denied: a privilege is missing; the text says which
    :raises Rejected: no such node, no memory on it, nothing mapped in a range, or the cpuset forbids the node
    :raises Cancelled: `stop` said so; the text says how far it was
    """
    need_memory(request.to, _what(request), root)
    with Held(request.process, root) as held:
        job = _Job(
            request=request,
            held=held,
            root=root,
            shared=can_move_shared() if shared is None else shared,
            tell=progress,
            stop=stop,
            clock=clock,
            sizer=_sizer(request.latency_seconds),
            mover=mover or PageMover(),
            frames=read_frame_map(root),
            headroom=Headroom(request.process.pid, request.floor_bytes, root, grows=False, clock=clock),
        )
        try:
            job.run()
        except NoSuchProcess as error:
            if error.why == NO_MEMORY and not job.moved:
                raise
            raise NoSuchProcess(
                _what(request),
                f"it exited half way; {job.moved} pages had been moved",
                errno=error.errno,
            ) from error
    return MoveResult(job.moved, job.already, dict(sorted(job.left.items())))


@dataclass(slots=True)
class _Job:
    request: Move
    held: Held
    root: Path
    shared: bool
    tell: Callable[[Progress], None]
    stop: Callable[[], bool]
    clock: Callable[[], float]
    sizer: BatchSizer
    mover: PageMover
    frames: FrameMap
    headroom: Headroom
    moved: int = 0
    already: int = 0
    left: Counter[str] = field(default_factory=Counter)
    # Frames that several addresses map, and that were dealt with at one of them: as they were, and as they are.
    seen: set[int] = field(default_factory=set)
    done: int = 0
    total: int = 0

    def run(self) -> None:
        request, pid = self.request, self.request.process.pid
        ranges = mappings(pid, self.root)
        parts, left = select(ranges, request.ranges, everything=request.everything, what=_what(request))
        self.left.update(left)
        self.total = sum(
            min(item.resident_pages, (min(item.end, end) - max(item.start, start)) // PAGE_SIZE)
            for item in ranges
            for start, end in parts
            if item.start < end and start < item.end
        )
        with Pagemap(pid, self.root) as pagemap:
            for start, entries in _windows(pagemap, parts, everything=request.everything):
                self.window(pagemap, start, entries)

    def window(self, pagemap: Pagemap, start: int, entries: array[int]) -> None:
        addresses, several, aliases = self.addresses(start, entries)
        self.done += aliases
        limits = frame_limits(entries)
        node = self.frames.only_node(*limits) if limits else None
        if node is None:
            addresses = self.elsewhere(addresses)
        elif node in self.request.homes:
            self.already += len(addresses)
            self.done += len(addresses)
            return
        for attempt in range(_RETRIES + 1):
            if not addresses:
                break
            if attempt:
                # Somebody else holds them: most often a batch of LRU pages, or ksmd comparing.
                time.sleep(min(0.1, (self.request.latency_seconds or _PAUSE_SECONDS) * 2**attempt))
            addresses = self.batches(pagemap, addresses, last=attempt == _RETRIES)
        if several:
            self.remember(pagemap, start, len(entries), several)

    def elsewhere(self, addresses: array[int]) -> array[int]:
        """Those of them that are on other nodes than the target, and on none that keeps its pages."""
        before = self.mover.query(self.request.process.pid, addresses)
        kept = self.request.homes
        there = sum(before.count(node) for node in kept)
        self.already += there
        self.done += there
        if not there and min(before, default=0) >= 0:
            return addresses
        # A negative one is the zero page, or went away since: neither is memory of the process.
        self.done += sum(1 for node in before if node < 0)
        return array("Q", [a for a, node in zip(addresses, before, strict=True) if node >= 0 and node not in kept])

    def addresses(self, start: int, entries: array[int]) -> tuple[array[int], list[int], int]:
        # One address a frame; which of these are of frames that may be mapped elsewhere too; and how many further
        # addresses of such frames there are.
        if all_have(entries, PRESENT | EXCLUSIVE):
            return array("Q", range(start, start + len(entries) * PAGE_SIZE, PAGE_SIZE)), [], 0
        found, several = array("Q"), []
        aliases = 0
        for index, entry in enumerate(entries):
            if not entry & PRESENT:
                continue
            if not entry & EXCLUSIVE:
                frame = entry & FRAME
                if frame in self.seen:
                    aliases += 1
                    continue
                self.seen.add(frame)
                several.append(index)
            found.append(start + index * PAGE_SIZE)
        return found, several, aliases

    def remember(self, pagemap: Pagemap, start: int, pages: int, several: list[int]) -> None:
        # Other addresses of these frames show the new frame now: not one that was there before.
        entries = pagemap.read(start, pages)
        self.seen.update(entries[index] & FRAME for index in several if index < len(entries) and entries[index] >> 63)

    def batches(self, pagemap: Pagemap, addresses: array[int], *, last: bool) -> array[int]:
        """Ask for these; gives back the busy ones, unless it is for the last time."""
        again = array("Q")
        at = 0
        while at < len(addresses):
            if self.stop():
                raise Cancelled(
                    _what(self.request),
                    f"stopped; {self.moved} pages have been moved, and stay there",
                )
            self.held.verify()
            pages = self.headroom.take(min(self.sizer.size, len(addresses) - at), self.request.to)
            if not pages:
                self.left[self.headroom.full] += len(addresses) - at
                self.done += len(addresses) - at
                break
            self.batch(pagemap, addresses[at : at + pages], again, last=last)
            at += pages
            self.tell(Progress(self.done, max(self.total, self.done), "pages"))
        return again

    def batch(self, pagemap: Pagemap, addresses: array[int], again: array[int], *, last: bool) -> None:
        pid, target = self.request.process.pid, self.request.to
        begin = self.clock()
        try:
            statuses = self.mover.move(pid, addresses, target, shared=self.shared)
        except HostError as error:
            # The call fails as a whole where the node ran full under it; what moved before that has moved.
            if error.errno != errno.ENOMEM:
                raise
            statuses = array("i", [-errno.ENOMEM]) * len(addresses)
            self.headroom.full = status_cause(-errno.ENOMEM)
        self.sizer.measured(len(addresses), self.clock() - begin)
        if self.all_there(pagemap, addresses):
            self.moved += len(addresses)
            self.done += len(addresses)
            return
        found = self.mover.query(pid, addresses)
        moved = found.count(target)
        self.moved += moved
        self.done += moved
        if moved == len(addresses):
            return
        # One that went away says nothing about its pages.
        self.held.verify()
        for address, status, node in zip(addresses, statuses, found, strict=True):
            if node == target:
                continue
            if node >= 0 and status in _BUSY and not last:
                again.append(address)
                continue
            self.done += 1
            self.left[self.cause(status, node)] += 1

    def all_there(self, pagemap: Pagemap, addresses: array[int]) -> bool:
        """Whether they all are on the target, told by pagemap: quicker than the query where it can tell at all."""
        pages = (addresses[-1] - addresses[0]) // PAGE_SIZE + 1
        if pages != len(addresses):
            return False
        limits = frame_limits(pagemap.read(addresses[0], pages))
        return limits is not None and self.frames.only_node(*limits) == self.request.to

    def cause(self, status: int, node: int) -> str:
        if node < 0:
            return status_cause(node)
        if status >= 0:
            return "it was moved, and is elsewhere again"
        return status_cause(status)


# Measured times vary: aim at less than what is allowed.
_SHARE = 0.7
# At most so much larger than the last batch: the next pages may be dearer (huge, remote, contended).
_GROWTH = 2


def _sizer(latency_seconds: float) -> BatchSizer:
    if latency_seconds:
        return BatchSizer(latency_seconds)
    # Each call first has every CPU give up what it collects for the LRU lists (mm/migrate.c:do_pages_move calls
    # lru_cache_disable): the fewer calls, the better.
    return BatchSizer(math.inf, first=_WINDOW_PAGES, maximum=_WINDOW_PAGES)


class BatchSizer:
    """The size of the next batch, from the time that the last one took.

    :ivar size: pages, always between `minimum` and `maximum`
    """

    def __init__(self, latency_seconds: float, *, first: int = 32, minimum: int = 1, maximum: int = 8192) -> None:
        if not (latency_seconds > 0 and 1 <= minimum <= first <= maximum):
            raise ValueError("a latency above 0, and 1 <= minimum <= first <= maximum")
        self._latency = latency_seconds
        self._minimum = minimum
        self._maximum = maximum
        self.size = first

    def measured(self, pages: int, seconds: float) -> None:
        """A batch of so many pages took so long."""
        if pages < 1:
            return
        allowed = self._latency * _SHARE * pages
        # A clock that hardly moved says: as many as one likes.
        fitting = self._maximum if allowed >= self._maximum * seconds else int(allowed / seconds)
        # A short last batch says little about a long one.
        most = max(self.size, pages) * _GROWTH if pages * _GROWTH > self.size else self.size
        self.size = max(self._minimum, min(self._maximum, fitting, most))
