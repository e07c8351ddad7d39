# SPDX-License-Identifier: GPL-2.0-or-later
"""Un-merges pages of other processes, each onto a chosen node, without touching their contents.

Each page goes to the node asked for, or to its range's home. `ksmd_ctl.kernel.break_ksm` has the call and what it may
be used on. For that

- pages are looked at just before the call, and pagemap is read again after it: that alone tells what came of a page;
- the caller's memory policy is set for each run, since a copy comes from where that says;
- the room on the node, on the host and in every memory cgroup above the process is looked at before each batch;
- mappings that are not writable or that userfaultfd watches are left alone. A mapping may become either between the
  look and the call: so this runs in a child process that can be killed at a deadline, whatever it waits for.

The counters of KSM follow only when ksmd passes next.
"""

from __future__ import annotations

import bisect
import itertools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import (
    Denied,
    KsmdError,
    NoSuchProcess,
    ReadError,
    Rejected,
    Unmapped,
)
from ksmd_ctl.host.memory import Range, Topology
from ksmd_ctl.host.operation import Progress, Unshare, UnsharedPart, UnsharePart, UnshareResult
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.break_ksm import MAXIMUM_RUN_PAGES, Breaker
from ksmd_ctl.kernel.detection import GAP_PAGES, PageReader, State, Window
from ksmd_ctl.kernel.headroom import Headroom, MemoryPressure
from ksmd_ctl.kernel.kpageflags import runs
from ksmd_ctl.kernel.libnuma import Policy, PolicyMode
from ksmd_ctl.kernel.migrate import BatchSizer, select
from ksmd_ctl.kernel.pagemap import (
    EXCLUSIVE,
    FILE,
    FRAME,
    PRESENT,
    SWAPPED,
    WRITE_PROTECTED,
    Pagemap,
    anonymous_nodes,
    frames_of,
)
from ksmd_ctl.kernel.proc_pid import Held
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import numa_ranges, range_home, read_ranges, read_surroundings
from ksmd_ctl.kernel.topology import FrameMap, need_memory, read_frame_map, read_topology

_TRIES = 3
# Flags of mappings are read again after so long, and where reading them takes long, as it walks all page tables of a
# process, so seldom that it gets this share of the time.
_RANGES_SECONDS = 1.0
_RANGES_SHARE = 0.1
NOT_WRITABLE = "its mapping is not writable: only the process itself, or run=2, can un-merge it"
WATCHED = "userfaultfd watches its mapping: the call would wait for a handler"
UNDECIDED = "this kernel does not tell whether it is merged, or shared by fork alone"
GONE = "gone: nothing is mapped there any more"
STILL = "still merged after the call"
AGAIN = "merged again at once: ksmd is running"
ELSEWHERE = "un-merged, on another node: that of its mapping's own policy, or the node asked for is full"


def unshare(
    request: Unshare,
    *,
    reader: PageReader,
    root: Path = Path("/"),
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> UnshareResult:
    """Un-merge pages of processes. It may block, and sets the calling thread's memory policy: run it in a child.

    Each page goes to its part's `to`; without one to its range's home (`ksmd_ctl.kernel.ranges`), and where that is no
    single node it stays on the node where it is. A process that ends meanwhile, or is not ours to write to, does not
    keep the others from being un-merged. What was done when `stop` said so, or when memory was under pressure for
    too long, is in the result.

    :raises NoSuchProcess, Denied, Unmapped, Rejected, ReadError: the only part came to nothing: the process is gone, a
        privilege is missing, nothing is mapped in any of its ranges, or it can't be read
    :raises Rejected: no such node, or no memory on it
    :raises Absent: a node is asked for where there is no NUMA
    """
    numa = libnuma.available()
    for node in sorted({part.to for part in request.parts if part.to is not None}):
        need_memory(node, f"un-merging pages onto node {node}", root)
    common = _Common(
        request=request,
        reader=reader,
        topology=read_topology(root, numa=numa),
        frames=read_frame_map(root),
        root=root,
        progress=progress,
        stop=stop,
        clock=clock,
        pressure=MemoryPressure(request.max_pressure, root, clock, sleep),
        sizer=BatchSizer(request.latency_seconds, first=16, maximum=MAXIMUM_RUN_PAGES),
        total=sum(part.pages for part in request.parts),
    )
    before = libnuma.get_mempolicy() if numa else None
    done: list[UnsharedPart] = []
    first: KsmdError | None = None
    stopped = ""
    try:
        with Breaker() as breaker:
            for part in request.parts:
                job = _Job(part, common, breaker)
                try:
                    job.run()
                except (NoSuchProcess, Unmapped) as error:
                    first = first or error
                    job.ended = True
                except (Denied, Rejected, ReadError) as error:
                    first = first or error
                    job.leave(error.why, max(1, part.pages - job.unshared - job.left.total()))
                except _Stopped as why:
                    stopped = str(why)
                done.append(UnsharedPart(job.unshared, dict(sorted(job.left.items())), job.ended))
                if stopped:
                    break
    finally:
        if before is not None:
            libnuma.set_mempolicy(before)
    if first is not None and not stopped and len(done) == 1 and not done[0].unshared:
        raise first
    return UnshareResult(tuple(done), stopped)


class _Stopped(Exception):
    """Un-merging ends before all is done; the text says why."""


@dataclass(slots=True)
class _Common:
    """What all parts of a request have in common."""

    request: Unshare
    reader: PageReader
    topology: Topology
    frames: FrameMap
    root: Path
    progress: Callable[[Progress], None]
    stop: Callable[[], bool]
    clock: Callable[[], float]
    pressure: MemoryPressure
    sizer: BatchSizer
    total: int
    done: int = 0
    preferred: int | None = None

    @property
    def several_nodes(self) -> bool:
        return len(self.topology.with_memory()) > 1

    def report(self) -> None:
        self.progress(Progress(self.done, max(self.total, self.done), "pages"))

    def pause(self) -> None:
        """Between two calls: report progress, and wait while memory is under pressure.

        :raises _Stopped: it is to end
        """
        self.report()
        why = self.pressure.wait(self.stop)
        if why:
            raise _Stopped(why)

    def prefer(self, node: int | None, *, needed: bool) -> None:
        """Have copies come from a node.

        :raises Rejected: nobody can, and it is `needed`
        """
        # Preferred, not bound: a bound caller that finds the node full would bring on the OOM killer.
        if node is None or node == self.preferred:
            return
        if not self.topology.numa:
            if needed:
                why = "without libnuma no node can be chosen"
                raise Rejected("un-merging pages", why, hint="install the package libnuma1")
            return
        libnuma.set_mempolicy(Policy(PolicyMode.PREFERRED, frozenset({node})))
        self.preferred = node


class _Job:
    """One part: the pages of a process that go to one node, or to their homes.

    :ivar unshared: pages that are un-merged, and where they should be
    :ivar left: pages that are not, by cause
    :ivar ended: the process is gone, or nothing of the part is mapped any more
    """

    def __init__(self, part: UnsharePart, common: _Common, breaker: Breaker) -> None:
        self.part = part
        self.pid = part.process.pid
        self.common = common
        self.breaker = breaker
        self.unshared = 0
        self.left: Counter[str] = Counter()
        self.ended = False
        request = common.request
        self.headroom = Headroom(
            self.pid,
            request.floor_bytes,
            common.root,
            grows=True,
            share=request.headroom_share,
            clock=common.clock,
        )
        self.ranges: list[Range] = []
        # When the flags of mappings are to be read again.
        self.ranges_due = 0.0

    def run(self) -> None:
        common = self.common
        with Held(self.part.process, common.root) as held:
            self.read_ranges()
            parts = self.mapped_parts()
            holding = [item for item in self.ranges if item.mergeable and item.ksm_pages != 0]
            if not self.part.pages:
                common.total += sum(item.ksm_pages or 0 for item in holding)
            if not parts:
                return
            homes = self.homes(holding)
            # Each call needs the process's mmap_lock anyway, and is itself in a child that can be killed.
            with Pagemap(self.pid, common.root, killable=False) as pagemap:
                for window in common.reader.windows(self.pid, holding, parts, self.ranges):
                    held.verify()
                    self.window(pagemap, window, homes[window.mapping.start])
        common.report()

    def mapped_parts(self) -> list[tuple[int, int]]:
        """What is mapped of the ranges that are asked for: some may have been given back meanwhile.

        :raises Unmapped: all were
        """
        wanted = self.part.ranges
        mapped = [(start, end) for start, end in wanted if any(i.start < end and start < i.end for i in self.ranges)]
        what = f"un-merging pages of process {self.pid}"
        return select(self.ranges, tuple(mapped) or wanted, everything=False, what=what)[0]

    def homes(self, holding: list[Range]) -> dict[int, int | None]:
        """Where the pages of each mapping go, by its start; None for where they are."""
        common = self.common
        if self.part.to is not None or not common.several_nodes:
            return dict.fromkeys((item.start for item in holding), self.part.to)
        surroundings = read_surroundings(self.pid, common.topology, common.root)
        numa = numa_ranges(self.pid, common.root)
        found = {}
        for item in holding:
            pages: Mapping[int, int] = {}
            # Which pages are merged isn't known yet; where most are, where they lie says nothing.
            if item.ksm_pages is not None and 2 * item.ksm_pages < item.anonymous_pages and item.start in numa:
                pages = anonymous_nodes(self.pid, item, numa[item.start], common.frames, common.root)
            found[item.start] = range_home(item, pages, surroundings)
        return found

    def read_ranges(self) -> None:
        begin = self.common.clock()
        self.ranges = list(read_ranges(self.pid, self.common.root))
        now = self.common.clock()
        self.ranges_due = now + max(_RANGES_SECONDS, (now - begin) / _RANGES_SHARE)

    def obstacle(self, start: int, pages: int) -> str:
        """Why these pages must be left alone, by the flags of their mappings; empty for no reason."""
        if self.common.clock() > self.ranges_due:
            self.read_ranges()
        end = start + pages * PAGE_SIZE
        at = max(0, bisect.bisect_right(self.ranges, start, key=lambda item: item.start) - 1)
        for item in itertools.islice(self.ranges, at, None):
            if item.start >= end:
                break
            if start < item.end:
                if item.flags & {"um", "uw"}:
                    return WATCHED
                if "wr" not in item.flags:
                    return NOT_WRITABLE
        return ""

    def leave(self, cause: str, pages: int) -> None:
        if pages:
            self.left[cause] += pages
            self.common.done += pages

    # -- from a window to single calls -----------------------------------------------------------------------

    def window(self, pagemap: Pagemap, window: Window, home: int | None) -> None:
        self.leave(UNDECIDED, window.states.count(State.UNDECIDED))
        kinds = self.without_kept(window, page_kinds(window))
        for found in _SPAN.finditer(kinds):
            for first, last, node in self.by_node(window, *found.span(), home):
                self.span(pagemap, window, kinds, first, last, node)

    def without_kept(self, window: Window, kinds: bytes) -> bytes:
        """The same, with merged pages that are to stay so as other pages."""
        if not self.part.keep:
            return kinds
        found, node_of = bytearray(kinds), self.common.frames.node
        for index in window.merged():
            if node_of(window.frames[index]) in self.part.keep:
                found[index] = OTHER_PAGE[0]
        return bytes(found)

    def by_node(self, window: Window, first: int, last: int, home: int | None) -> Iterator[tuple[int, int, int | None]]:
        """A span in parts that go to one node each: without a home, a page stays on the node where it is."""
        if home is not None or not self.common.several_nodes:
            yield first, last, home
            return
        begin, goal = first, None
        for index in window.merged(first, last):
            node = self.common.frames.node(window.frames[index])
            if goal is not None and node != goal:
                yield begin, index, goal
                begin = index
            goal = node
        yield begin, last, goal

    def span(self, pagemap: Pagemap, window: Window, kinds: bytes, at: int, last: int, node: int | None) -> None:
        """Un-merge the merged pages from `at` on, up to `last`; pages of the process's own lie between them."""
        common = self.common
        while 0 <= at < last:
            common.pause()
            # From a merged page to a merged page.
            end = kinds.rfind(KSM, at, min(last, at + common.sizer.size)) + 1
            merged = kinds.count(KSM, at, end)
            room = self.headroom.take(merged, node)
            if not room:
                self.leave(self.headroom.full, kinds.count(KSM, at, last))
                return
            if room < merged:
                end, merged = _after(kinds, at, room), room
            cause = self.obstacle(window.start + at * PAGE_SIZE, end - at)
            if cause:
                self.leave(cause, merged)
            else:
                self.break_pages(pagemap, window, at, end, node)
            at = kinds.find(KSM, end, last)

    def break_pages(self, pagemap: Pagemap, window: Window, at: int, end: int, node: int | None) -> None:
        """One call, and what came of it: most pages have a frame of their own then, and are done."""
        common, frames = self.common, window.frames
        start = window.start + at * PAGE_SIZE
        common.prefer(node, needed=self.part.to is not None)
        begin = common.clock()
        self.breaker.break_run(self.pid, start, end - at)
        common.sizer.measured(end - at, common.clock() - begin)
        entries = pagemap.read(start, end - at)
        self.leave(GONE, window.states.count(State.KSM, at + len(entries), end))
        good, unexpected = [], []
        for index in window.merged(at, at + len(entries)):
            entry = entries[index - at]
            # Of a page that nobody else maps no look at its flags is needed.
            if entry & _OWN_MASK == _OWN and entry & FRAME != frames[index]:
                good.append(entry & FRAME)
            else:
                unexpected.append(index)
        if self.part.to is not None and common.several_nodes:
            # Its mapping's policy, and a node that ran full, have the last word on where a page is.
            there = [frame for frame in good if common.frames.node(frame) == node]
            self.leave(ELSEWHERE, len(good) - len(there))
            good = there
        self.unshared += len(good)
        common.done += len(good)
        if unexpected:
            self.again(pagemap, window, unexpected, node)

    def again(self, pagemap: Pagemap, window: Window, indices: list[int], node: int | None) -> None:
        """Pages that are not as they should be after a call: those that are merged still are tried again."""
        common, frames = self.common, window.frames
        now: dict[int, int] = {}
        for attempt in range(_TRIES):
            now = {index: self.frame(pagemap, window, index) for index in indices}
            # A page that still has the frame of a KSM page is one: such a frame never becomes anything else
            # while it is mapped. What has another one was written to, or unmapped, and is none of ours.
            still = [index for index in indices if now[index] == frames[index]]
            if not still or attempt == _TRIES - 1:
                break
            self.ranges_due = 0.0
            for first, last in runs(still, 1):
                start = window.start + first * PAGE_SIZE
                if not self.obstacle(start, last - first):
                    self.breaker.break_run(self.pid, start, last - first)
        flags = common.reader.flags.at({frame for index, frame in now.items() if frame and frame != frames[index]})
        for index, frame in now.items():
            if not frame:
                self.leave(GONE, 1)
            elif frame == frames[index]:
                self.leave(self.obstacle(window.start + index * PAGE_SIZE, 1) or STILL, 1)
            elif common.reader.may_be_merged(flags[frame]):
                self.leave(AGAIN, 1)
            elif self.part.to is not None and common.frames.node(frame) != node:
                self.leave(ELSEWHERE, 1)
            else:
                self.unshared += 1
                common.done += 1

    def frame(self, pagemap: Pagemap, window: Window, index: int) -> int:
        found = frames_of(pagemap.read(window.start + index * PAGE_SIZE, 1))
        return found[0] if found else 0


#: What a page is to whoever un-merges: merged; the process's own, so that writing to it changes nothing; or neither.
KSM, OTHER_PAGE, OWN_PAGE = b"K", b".", b"o"
# An entry of pagemap for a page of the process's own. All of these bits are in the highest byte.
_OWN = PRESENT | EXCLUSIVE
_OWN_MASK = _OWN | SWAPPED | FILE | WRITE_PROTECTED
_KINDS = bytes(OWN_PAGE[0] if byte << 56 & _OWN_MASK == _OWN else OTHER_PAGE[0] for byte in range(256))
_DECIDED = bytes(0xFF if state else 0 for state in range(256))
_MARKS = bytes([0, KSM[0]] + [OTHER_PAGE[0]] * 254)
_SPAN = re.compile(rb"K(?:o{0,%d}K)*" % GAP_PAGES)
_HIGH_BYTE = 7 if sys.byteorder == "little" else 0


def page_kinds(window: Window) -> bytes:
    """What each page of a window is: `KSM`, `OWN_PAGE` or `OTHER_PAGE`."""
    own = int.from_bytes(window.entries.tobytes()[_HIGH_BYTE::8].translate(_KINDS), "big")
    # As big numbers: a loop over pages would take longer than to un-merge them.
    decided = int.from_bytes(window.states.translate(_DECIDED), "big")
    marks = int.from_bytes(window.states.translate(_MARKS), "big")
    return (own & ~decided | marks).to_bytes(len(window.states), "big")


def _after(kinds: bytes, at: int, merged: int) -> int:
    """Past the last of so many merged pages from `at` on."""
    for _ in range(merged):
        at = kinds.index(KSM, at) + 1
    return at
