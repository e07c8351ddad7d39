# SPDX-License-Identifier: GPL-2.0-or-later
"""Un-merges chosen pages of another process without touching their contents, each onto a chosen node.

**The primitive** (`break_run`): process_vm_writev(2) to the page, from a local buffer that can't be read. The kernel
first takes the remote pages for writing, which gives the process a copy of each merged one, and then fails to read
what it should write: EFAULT, and not one byte is written (mm/process_vm_access.c: process_vm_rw_single_vec pins with
FOLL_WRITE before copy_page_from_iter). Seen on 5.10, 6.1, 6.12 and 6.18 (docs/findings.md: F7,
F8, F15). What follows from it:

- EFAULT is the only success, and says nothing about any page: pagemap is read again afterwards.
- It is used on pages that are KSM pages at that moment, and on pages between these that are the process's own (mapped
  once, anonymous, present), which it leaves as they are. On no others: an untouched page would be allocated, a swapped
  one read in, and what fork shares would be copied.
- One contiguous run a call, at most 1024 pages, one remote range: of more the kernel does the first only.
- A copy comes from where the mapping's policy says, else from where the *caller's* policy and cpuset say; the
  process's own task policy and cpuset are not asked. So the caller's policy is set for each run.
- A copy is charged to the process's memory cgroup, which may kill it on a host with memory to spare: the room in
  every cgroup above it is looked at before each batch.
- A mapping that is not writable refuses. A mapping that userfaultfd watches would make the call wait for a handler:
  it is skipped. A mapping may become either between the look and the call: so this runs in a child process that can
  be killed at a deadline, whatever it waits for.
- The process's contents never change. That is tried on a page of our own before anything else: before 4.12 what could
  not be read was written as zero (F20). That nothing else is touched is not promised: where the process unmaps and
  maps again under the call, a fresh page may be allocated to it.
- It needs ptrace access to the process (CAP_SYS_PTRACE); Yama's ptrace_scope 3 refuses root as well.

The counters of KSM follow only when ksmd passes next.
"""

from __future__ import annotations

import bisect
import errno
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ksmd_ctl.errors import (
    Absent,
    CheckFailed,
    Denied,
    HostError,
    KsmdError,
    NoSuchProcess,
    ReadError,
    Rejected,
    Unmapped,
    errno_text,
)
from ksmd_ctl.host.memory import Range, Topology
from ksmd_ctl.host.operation import Progress, Unshare, UnsharedPart, UnsharePart, UnshareResult
from ksmd_ctl.kernel import libnuma, syscalls
from ksmd_ctl.kernel.detection import GAP_PAGES, PageReader, State, Window
from ksmd_ctl.kernel.headroom import memory_stalled_seconds, rooms, tightest
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
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, Closing
from ksmd_ctl.kernel.ranges import numa_ranges, range_home, read_ranges, read_surroundings
from ksmd_ctl.kernel.topology import FrameMap, node_memory, read_frame_map, read_topology

#: Pages in one call: the kernel would do 1024, and twice as many as this are hardly quicker (findings F15).
MAXIMUM_RUN_PAGES = 512

_TRIES = 3
# What is free is read again after so long, and where a share of it is used up.
_ROOM_SECONDS = 0.05
# Flags of mappings are read again after so long, and where reading them takes long, as it walks all page tables of a
# process, so seldom that it gets this share of the time.
_LOOK_SECONDS = 1.0
_LOOK_SHARE = 0.1
_PRESSURE_SECONDS = 0.5
_PRESSURE_PAUSE_SECONDS = 0.25
#: So long un-merging waits for memory pressure to pass before it gives up.
MAXIMUM_PAUSE_SECONDS = 60.0

NOT_WRITABLE = "its mapping is not writable: only the process itself, or run=2, can un-merge it"
WATCHED = "userfaultfd watches its mapping: the call would wait for a handler"
UNDECIDED = "this kernel does not tell whether it is merged, or shared by fork alone"
GONE = "gone: nothing is mapped there any more"
STILL = "still merged after the call"
AGAIN = "merged again at once: ksmd is running"
ELSEWHERE = "un-merged, on another node: that of its mapping's own policy, or the node asked for is full"
STOPPED = "it was asked to stop"


class Breaker(Closing):
    """The primitive, with the buffer that can't be read."""

    def __init__(self) -> None:
        self._length = MAXIMUM_RUN_PAGES * PAGE_SIZE
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
        self._buffer = syscalls.mmap(0, self._length, syscalls.PROT_NONE, flags)
        try:
            self._prove_harmless()
        except BaseException:
            self.close()
            raise

    def _prove_harmless(self) -> None:
        protection = syscalls.PROT_READ | syscalls.PROT_WRITE
        page = syscalls.mmap(0, PAGE_SIZE, protection, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS)
        content = b"\xa5" * PAGE_SIZE
        try:
            syscalls.store(page, content)
            self.break_run(os.getpid(), page, 1)
            if syscalls.load(page, PAGE_SIZE) != content:
                raise Absent(
                    "un-merging pages of a process from outside",
                    "a write that fails changes memory on this kernel",
                    hint="kernels since 4.12 do it right; here only run=2 un-merges",
                    path="process_vm_writev",
                )
        finally:
            syscalls.munmap(page, PAGE_SIZE)

    def break_run(self, pid: int, start: int, pages: int) -> None:
        """Give a process a copy of its own of each of these pages, where they are merged.

        :param pages: adjacent pages that are all KSM pages now, at most `MAXIMUM_RUN_PAGES`
        :raises NoSuchProcess: it is gone
        :raises Denied: no ptrace access to it
        :raises CheckFailed: the call did something else than fail with EFAULT
        """
        length = pages * PAGE_SIZE
        if not 0 < length <= self._length:
            raise ValueError(f"{pages} pages are not between 1 and {MAXIMUM_RUN_PAGES}")
        what = f"un-merging {pages} pages of process {pid} at {start:#x}"
        try:
            written = syscalls.process_vm_writev(pid, self._buffer, start, length)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return
            if error.errno == errno.ESRCH:
                raise NoSuchProcess(what, "it is gone", errno=error.errno) from error
            if error.errno in (errno.EPERM, errno.EACCES):
                raise Denied(
                    what,
                    f"no access to its memory, by Yama or for lack of CAP_SYS_PTRACE: {errno_text(error.errno)}",
                    hint="needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3",
                    path="process_vm_writev",
                    errno=error.errno,
                ) from error
            raise Rejected(what, errno_text(error.errno or 0), path="process_vm_writev", errno=error.errno) from error
        # Nothing in the kernel lets this happen: then none of the above is true here, and nothing more is tried.
        raise CheckFailed(what, f"the kernel read {written} bytes from a buffer that can't be read")

    def close(self) -> None:
        if self._buffer:
            syscalls.munmap(self._buffer, self._length)
            self._buffer = 0


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
        _need_target(node, "un-merging pages", root)
    around = _Surroundings(
        request=request,
        reader=reader,
        topology=read_topology(root, numa=numa),
        frames=read_frame_map(root),
        root=root,
        progress=progress,
        stop=stop,
        clock=clock,
        sleep=sleep,
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
                job = _Job(part, around, breaker)
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
    if first is not None and not stopped and not any(part.unshared for part in done) and len(done) == 1:
        raise first
    return UnshareResult(tuple(done), stopped)


def _need_target(node: int, what: str, root: Path) -> None:
    try:
        memory = node_memory(node, root).total_bytes
    except HostError as error:
        raise Rejected(what, f"there is no node {node}", hint="see `ksmd-ctl nodes`", value=node) from error
    if not memory:
        raise Rejected(what, f"node {node} has no memory", hint="see `ksmd-ctl nodes`", value=node)


class _Stopped(Exception):
    """Un-merging ends before all is done; the text says why."""


@dataclass(slots=True)
class _Surroundings:
    """What all parts of a request have in common."""

    request: Unshare
    reader: PageReader
    topology: Topology
    frames: FrameMap
    root: Path
    progress: Callable[[Progress], None]
    stop: Callable[[], bool]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    sizer: BatchSizer
    total: int
    done: int = 0
    preferred: int | None = None
    # Time, and time that tasks had waited for memory until then, when that was last read; and the share since before.
    stalled: tuple[float, float] | None = None
    pressure: float = 0.0

    @property
    def several_nodes(self) -> bool:
        return len(self.topology.with_memory()) > 1

    def tell(self) -> None:
        self.progress(Progress(self.done, max(self.total, self.done), "pages"))

    def breathe(self) -> None:
        """Between two calls: tell how far it is, and wait while memory is under pressure.

        :raises _Stopped: it is to end
        """
        self.tell()
        waited = 0.0
        while True:
            if self.stop():
                raise _Stopped(STOPPED)
            self._look_at_pressure()
            if self.pressure <= self.request.max_pressure:
                return
            if waited >= MAXIMUM_PAUSE_SECONDS:
                raise _Stopped(f"tasks wait for memory, for {MAXIMUM_PAUSE_SECONDS:g} s")
            self.sleep(_PRESSURE_PAUSE_SECONDS)
            waited += _PRESSURE_PAUSE_SECONDS

    def _look_at_pressure(self) -> None:
        """Find out in which share of the time some task waited for memory, where half a second has passed since."""
        if self.request.max_pressure >= 1:
            return
        now = self.clock()
        if self.stalled is not None and now - self.stalled[0] < _PRESSURE_SECONDS:
            return
        before, self.stalled = self.stalled, (now, memory_stalled_seconds(self.root))
        if before is not None:
            self.pressure = (self.stalled[1] - before[1]) / (now - before[0])

    def prefer(self, node: int | None, *, needed: bool) -> None:
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


@dataclass(slots=True)
class _Job:
    """One part."""

    part: UnsharePart
    around: _Surroundings
    breaker: Breaker
    unshared: int = 0
    left: Counter[str] = field(default_factory=Counter)
    ended: bool = False
    full: str = ""
    # Pages that may be taken before what is free is read again, by node, and when it was read.
    room: dict[int | None, tuple[int, float]] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)
    # When the flags of mappings are to be read again.
    look_due: float = 0.0

    @property
    def pid(self) -> int:
        return self.part.process.pid

    @property
    def what(self) -> str:
        return f"un-merging pages of process {self.pid}"

    def run(self) -> None:
        around = self.around
        with Held(self.part.process, around.root) as held:
            self.look()
            parts = self.parts()
            holding = [item for item in self.ranges if item.mergeable and item.ksm_pages != 0]
            if not self.part.pages:
                around.total += sum(item.ksm_pages or 0 for item in holding)
            if not parts:
                return
            homes = self.homes(holding)
            # Each call needs the process's mmap_lock anyway, and is itself in a child that can be killed.
            with Pagemap(self.pid, around.root, killable=False) as pagemap:
                for window in around.reader.windows(self.pid, holding, parts, self.ranges):
                    held.verify()
                    self.window(pagemap, window, homes[window.mapping.start])
        around.tell()

    def parts(self) -> list[tuple[int, int]]:
        """What is mapped of the ranges that are asked for: some may have been given back meanwhile.

        :raises Unmapped: all were
        """
        wanted = self.part.ranges
        try:
            return select(self.ranges, wanted, everything=False, what=self.what)[0]
        except Unmapped:
            mapped = tuple(
                (start, end) for start, end in wanted if any(i.start < end and start < i.end for i in self.ranges)
            )
            if not mapped:
                raise
            return select(self.ranges, mapped, everything=False, what=self.what)[0]

    def homes(self, holding: list[Range]) -> dict[int, int | None]:
        if self.part.to is not None or not self.around.several_nodes:
            return dict.fromkeys((item.start for item in holding), self.part.to)
        surroundings = read_surroundings(self.pid, self.around.topology, self.around.root)
        numa = numa_ranges(self.pid, self.around.root)
        found = {}
        for item in holding:
            # Which pages are merged isn't known yet; where most are, where they lie says nothing.
            mostly_plain = item.ksm_pages is not None and 2 * item.ksm_pages < item.anonymous_pages
            pages: Mapping[int, int] = {}
            if mostly_plain and item.start in numa:
                around = self.around
                pages = anonymous_nodes(self.pid, item, numa[item.start], around.frames, around.root)
            found[item.start] = range_home(item, pages, surroundings)
        return found

    # -- what is there ---------------------------------------------------------------------------------------

    def look(self) -> None:
        begin = self.around.clock()
        self.ranges = list(read_ranges(self.pid, self.around.root))
        now = self.around.clock()
        self.look_due = now + max(_LOOK_SECONDS, (now - begin) / _LOOK_SHARE)

    def obstacle(self, start: int, end: int) -> str:
        """Why these pages must be left alone, by the flags of their mappings."""
        if self.around.clock() > self.look_due:
            self.look()
        at = max(0, bisect.bisect_right(self.ranges, start, key=lambda item: item.start) - 1)
        for index in range(at, len(self.ranges)):
            item = self.ranges[index]
            if item.start >= end:
                break
            if start < item.end:
                if item.flags & {"um", "uw"}:
                    return WATCHED
                if "wr" not in item.flags:
                    return NOT_WRITABLE
        return ""

    def window(self, pagemap: Pagemap, window: Window, home: int | None) -> None:
        undecided = window.states.count(State.UNDECIDED)
        if undecided:
            self.leave(UNDECIDED, undecided)
        kinds = page_kinds(window)
        for found in _SPAN.finditer(kinds):
            first, last = found.span()
            for begin, end, node in self.by_node(window, first, last, home):
                self.span(pagemap, window, kinds, begin, end, node)

    def by_node(self, window: Window, first: int, last: int, home: int | None) -> Iterator[tuple[int, int, int | None]]:
        """A span in parts that go to one node each: without a home, a page stays on the node where it is."""
        if home is not None or not self.around.several_nodes:
            yield first, last, home
            return
        begin, goal = first, None
        for index in window.merged(first, last):
            node = self.around.frames.node(window.frames[index])
            if goal is not None and node != goal:
                yield begin, index, goal
                begin = index
            goal = node
        yield begin, last, goal

    def span(self, pagemap: Pagemap, window: Window, kinds: bytes, at: int, last: int, node: int | None) -> None:
        """Un-merge the merged pages from `at` on, up to `last`; pages of the process's own lie between them."""
        around = self.around
        while at < last:
            around.breathe()
            if self.full:
                self.leave(self.full, kinds.count(KSM, at, last))
                return
            end = min(last, at + around.sizer.size, at + MAXIMUM_RUN_PAGES)
            # From a merged page to a merged page.
            end = kinds.rfind(KSM, at, end) + 1
            merged = kinds.count(KSM, at, end)
            room = self.take_room(node, merged)
            if not room:
                continue
            if room < merged:
                end, merged = _after(kinds, at, room), room
            start = window.start + at * PAGE_SIZE
            cause = self.obstacle(start, start + (end - at) * PAGE_SIZE)
            if cause:
                self.leave(cause, merged)
            else:
                self.break_pages(pagemap, window, at, end, node)
            at = kinds.find(KSM, end, last)
            if at < 0:
                return

    # -- one call --------------------------------------------------------------------------------------------

    def break_pages(self, pagemap: Pagemap, window: Window, at: int, end: int, node: int | None) -> None:
        around = self.around
        start = window.start + at * PAGE_SIZE
        around.prefer(node, needed=self.part.to is not None)
        begin = around.clock()
        self.breaker.break_run(self.pid, start, end - at)
        around.sizer.measured(end - at, around.clock() - begin)
        frames = window.frames
        entries = pagemap.read(start, end - at)
        indices = window.merged(at, at + len(entries))
        self.leave(GONE, window.states.count(State.KSM, at + len(entries), end))
        # A frame of its own that no one else maps: un-merged, and no look at its flags is needed.
        unexpected = [
            index
            for index in indices
            if entries[index - at] & _OWN_MASK != _OWN or entries[index - at] & FRAME == frames[index]
        ]
        good = len(indices) - len(unexpected)
        if self.part.to is not None and around.several_nodes:
            surprising = frozenset(unexpected)
            elsewhere = sum(
                around.frames.node(entries[index - at] & FRAME) != node for index in indices if index not in surprising
            )
            # Its mapping's policy, and a node that ran full, have the last word on where a page is.
            self.leave(ELSEWHERE, elsewhere)
            good -= elsewhere
        self.unshared += good
        around.done += good
        if unexpected:
            self.again(pagemap, window, unexpected, node)

    def again(self, pagemap: Pagemap, window: Window, indices: list[int], node: int | None) -> None:
        """Pages that are not as they should be after a call: those that are merged still are tried again."""
        around = self.around
        now: dict[int, int] = {}
        for attempt in range(_TRIES):
            now = {index: self.frame(pagemap, window, index) for index in indices}
            # A page that still has the frame of a KSM page is one: such a frame never becomes anything else
            # while it is mapped. What has another one was written to, or unmapped, and is none of ours.
            still = [index for index in indices if now[index] == window.frames[index]]
            if not still or attempt == _TRIES - 1:
                break
            self.look_due = 0.0
            for first, length in _adjacent(still):
                start = window.start + first * PAGE_SIZE
                if not self.obstacle(start, start + length * PAGE_SIZE):
                    self.breaker.break_run(self.pid, start, length)
        reader = around.reader
        flags = reader.flags.at({frame for index, frame in now.items() if frame and frame != window.frames[index]})
        for index, frame in now.items():
            around.done += 1
            if not frame:
                self.left[GONE] += 1
            elif frame == window.frames[index]:
                start = window.start + index * PAGE_SIZE
                self.left[self.obstacle(start, start + PAGE_SIZE) or STILL] += 1
            elif reader.may_be_merged(flags[frame]):
                self.left[AGAIN] += 1
            elif self.part.to is not None and around.frames.node(frame) != node:
                self.left[ELSEWHERE] += 1
            else:
                self.unshared += 1

    def frame(self, pagemap: Pagemap, window: Window, index: int) -> int:
        found = frames_of(pagemap.read(window.start + index * PAGE_SIZE, 1))
        return found[0] if found else 0

    def leave(self, cause: str, pages: int) -> None:
        if pages:
            self.left[cause] += pages
            self.around.done += pages

    # -- room ------------------------------------------------------------------------------------------------

    def take_room(self, node: int | None, pages: int) -> int:
        """For how many of so many pages there is room; where there is none at all, `full` says so."""
        now = self.around.clock()
        allowed, looked = self.room.get(node, (0, -1.0))
        if allowed < pages or now - looked > _ROOM_SECONDS:
            request = self.around.request
            nodes = frozenset() if node is None else frozenset({node})
            found = tightest(rooms(self.pid, nodes, request.floor_bytes, self.around.root, grows=True))
            free = found.free_bytes // PAGE_SIZE
            if not free:
                self.full = f"no memory {found.where} above {found.reserve}"
                return 0
            pages = min(pages, free)
            allowed = max(pages, int(free * request.headroom_share))
            looked = now
        self.room[node] = allowed - pages, looked
        return pages


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


def _adjacent(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers: the first, and how many."""
    first = previous = -2
    for index in indices:
        if index != previous + 1:
            if first >= 0:
                yield first, previous - first + 1
            first = index
        previous = index
    if first >= 0:
        yield first, previous - first + 1
