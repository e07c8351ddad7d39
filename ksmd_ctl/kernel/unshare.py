# SPDX-License-Identifier: GPL-2.0-or-later
"""Un-merges chosen pages of another process without touching their contents, each onto a chosen node.

**The primitive** (`break_run`): process_vm_writev(2) to the page, from a local buffer that can't be read. The kernel
first takes the remote pages for writing, which gives the process a copy of each merged one, and then fails to read
what it should write: EFAULT, and not one byte is written (mm/process_vm_access.c: process_vm_rw_single_vec pins with
FOLL_WRITE before copy_page_from_iter). Seen on 5.10, 6.1, 6.12 and 6.18 (docs/findings.md: F7,
F8, F15). What follows from it:

- EFAULT is the only success, and says nothing about any page: pagemap is read again afterwards.
- It is used on pages that are KSM pages at that moment and on no others: an untouched page would be allocated, a
  swapped one read in, and what fork shares would be copied.
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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ksmd_ctl.errors import Absent, Cancelled, CheckFailed, Denied, HostError, NoSuchProcess, Rejected, errno_text
from ksmd_ctl.host.memory import Range, Topology
from ksmd_ctl.host.operation import Progress, Unshare, UnshareResult
from ksmd_ctl.kernel import libnuma, syscalls
from ksmd_ctl.kernel.batches import BatchSizer
from ksmd_ctl.kernel.headroom import rooms, tightest
from ksmd_ctl.kernel.home import range_home, read_surroundings
from ksmd_ctl.kernel.identity import Held
from ksmd_ctl.kernel.kpageflags import FrameFlags, candidate, merged
from ksmd_ctl.kernel.libnuma import Policy, PolicyMode
from ksmd_ctl.kernel.migrate import select
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of
from ksmd_ctl.kernel.ranges import numa_ranges, read_ranges
from ksmd_ctl.kernel.topology import FrameMap, node_memory, read_frame_map, read_topology
from ksmd_ctl.kernel.witness import PageReader, State, Window

__all__ = ["MAXIMUM_RUN_PAGES", "Breaker", "unshare"]

#: Pages in one call: the kernel would do 1024, and twice as many as this are hardly quicker (findings F15).
MAXIMUM_RUN_PAGES = 512

_TRIES = 3

NOT_WRITABLE = "its mapping is not writable: only the process itself, or run=2, can un-merge it"
WATCHED = "userfaultfd watches its mapping: the call would wait for a handler"
UNDECIDED = "this kernel does not tell whether it is merged, or shared by fork alone"
GONE = "gone: nothing is mapped there any more"
STILL = "still merged after the call"
AGAIN = "merged again at once: ksmd is running"
ELSEWHERE = "un-merged, on another node: that of its mapping's own policy, or the node asked for is full"


class Breaker:
    """The primitive, with the buffer that can't be read."""

    def __init__(self, page_size: int = 4096) -> None:
        self._page_size = page_size
        self._length = MAXIMUM_RUN_PAGES * page_size
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
        self._buffer = syscalls.mmap(0, self._length, syscalls.PROT_NONE, flags)
        try:
            self._prove_harmless()
        except BaseException:
            self.close()
            raise

    def _prove_harmless(self) -> None:
        protection = syscalls.PROT_READ | syscalls.PROT_WRITE
        page = syscalls.mmap(0, self._page_size, protection, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS)
        content = b"\xa5" * self._page_size
        try:
            syscalls.store(page, content)
            self.break_run(os.getpid(), page, 1)
            if syscalls.load(page, self._page_size) != content:
                raise Absent(
                    "un-merging pages of a process from outside",
                    "a write that fails changes memory on this kernel",
                    hint="kernels since 4.12 do it right; here only run=2 un-merges",
                    path="process_vm_writev",
                )
        finally:
            syscalls.munmap(page, self._page_size)

    def break_run(self, pid: int, start: int, pages: int) -> None:
        """Give a process a copy of its own of each of these pages, where they are merged.

        :param pages: adjacent pages that are all KSM pages now, at most `MAXIMUM_RUN_PAGES`
        :raises NoSuchProcess: it is gone
        :raises Denied: no ptrace access to it
        :raises CheckFailed: the call did something else than fail with EFAULT
        """
        length = pages * self._page_size
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
        """Give the buffer back."""
        if self._buffer:
            syscalls.munmap(self._buffer, self._length)
            self._buffer = 0

    def __enter__(self) -> Breaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unshare(
    request: Unshare,
    *,
    reader: PageReader,
    flags: FrameFlags,
    root: Path = Path("/"),
    page_size: int = 4096,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> UnshareResult:
    """Un-merge pages of a process. It may block, and sets the calling thread's memory policy: run it in a child.

    Each page goes to `request.to`; without one to its range's home (`ksmd_ctl.kernel.home`), and where that is no
    single node it stays on the node where it is.

    :raises NoSuchProcess: it is gone, or exited half way; the text says how far it was
    :raises Denied: a privilege is missing; the text says which
    :raises Rejected: no such node, no memory on it, or nothing mapped in a range
    :raises Absent: a node is asked for where there is no NUMA
    :raises Cancelled: `stop` said so; the text says how far it was
    """
    what = f"un-merging pages of process {request.process.pid}"
    numa = libnuma.available()
    if request.to is not None:
        _need_target(request.to, what, root)
    with Held(request.process, root) as held, Breaker(page_size) as breaker:
        job = _Job(
            request=request,
            what=what,
            held=held,
            breaker=breaker,
            reader=reader,
            flags=flags,
            topology=read_topology(root, numa=numa),
            frames=read_frame_map(root, page_size),
            root=root,
            page_size=page_size,
            tell=progress,
            stop=stop,
            clock=clock,
            sizer=BatchSizer(request.latency_seconds, first=16, maximum=MAXIMUM_RUN_PAGES),
        )
        before = libnuma.get_mempolicy() if numa else None
        try:
            job.run()
        except NoSuchProcess as error:
            raise NoSuchProcess(
                what, f"it exited half way; {job.unshared} pages had been un-merged", errno=error.errno
            ) from error
        finally:
            if before is not None:
                libnuma.set_mempolicy(before)
    return UnshareResult(job.unshared, dict(sorted(job.left.items())))


def _need_target(node: int, what: str, root: Path) -> None:
    try:
        memory = node_memory(node, root).total_bytes
    except HostError as error:
        raise Rejected(what, f"there is no node {node}", hint="see `ksmd-ctl nodes`", value=node) from error
    if not memory:
        raise Rejected(what, f"node {node} has no memory", hint="see `ksmd-ctl nodes`", value=node)


@dataclass(slots=True)
class _Job:
    request: Unshare
    what: str
    held: Held
    breaker: Breaker
    reader: PageReader
    flags: FrameFlags
    topology: Topology
    frames: FrameMap
    root: Path
    page_size: int
    tell: Callable[[Progress], None]
    stop: Callable[[], bool]
    clock: Callable[[], float]
    sizer: BatchSizer
    unshared: int = 0
    left: Counter[str] = field(default_factory=Counter)
    done: int = 0
    total: int = 0
    full: str = ""
    preferred: int | None = None
    # The mappings as they were last looked at, when that was, and how long it took.
    ranges: list[Range] = field(default_factory=list)
    looked: float = 0.0
    took: float = 0.0

    def run(self) -> None:
        pid = self.request.process.pid
        self.look()
        parts, _ = select(self.ranges, self.request.ranges, everything=False, what=self.what)
        holding = [item for item in self.ranges if item.mergeable and item.ksm_pages != 0]
        self.total = sum(item.ksm_pages or 0 for item in holding)
        if not parts:
            return
        homes = self.homes(holding)
        if not self.reader.exact and self.reader.learn(pid, holding):
            # Some mappings have both merged pages and such as look alike: the others may tell these apart.
            self.reader.learn(pid, self.ranges, deep=True)
        for window in self.reader.windows(pid, holding, parts):
            # A window is of one mapping; the mappings are in order.
            item = holding[bisect.bisect_right(holding, window.start, key=lambda item: item.start) - 1]
            self.window(window, homes[item.start])

    def homes(self, holding: list[Range]) -> dict[int, int | None]:
        if self.request.to is not None:
            return dict.fromkeys((item.start for item in holding), self.request.to)
        pid = self.request.process.pid
        around = read_surroundings(pid, self.topology, self.root)
        numa = numa_ranges(pid, self.root)
        found = {}
        for item in holding:
            # Which pages are merged isn't known yet; where most are, where they lie says nothing.
            mostly_plain = item.ksm_pages is not None and 2 * item.ksm_pages < item.resident_pages
            pages = numa[item.start].nodes if mostly_plain and item.start in numa else {}
            found[item.start] = range_home(item, pages, around)
        return found

    # -- what is there ---------------------------------------------------------------------------------------

    def look(self) -> None:
        begin = self.clock()
        self.ranges = list(read_ranges(self.request.process.pid, self.root, self.page_size))
        self.looked = self.clock()
        self.took = self.looked - begin

    def obstacle(self, start: int, end: int) -> str:
        """Why these pages must be left alone; looked up anew unless that was just done."""
        # Looking walks all page tables of the process: it gets a tenth of the time, and is never older than that.
        if self.clock() - self.looked > max(0.05, 10 * self.took):
            self.look()
        for item in self.ranges:
            if item.start < end and start < item.end:
                if item.flags & {"um", "uw"}:
                    return WATCHED
                if "wr" not in item.flags:
                    return NOT_WRITABLE
        return ""

    def window(self, window: Window, home: int | None) -> None:
        undecided = window.states.count(State.UNDECIDED)
        if undecided:
            self.leave(UNDECIDED, undecided)
        with Pagemap(self.request.process.pid, self.root, self.page_size) as pagemap:
            for first, last, node in self.runs(window, home):
                at = first
                while at < last:
                    at += self.batch(pagemap, window, at, last, node)

    def runs(self, window: Window, home: int | None) -> Iterator[tuple[int, int, int | None]]:
        """Adjacent merged pages that are to go to one node: indices of the first and past the last, and the node."""
        first = -1
        goal: int | None = None
        for index, state in enumerate(window.states):
            wanted = None
            if state == State.KSM:
                wanted = home if home is not None else self.frames.node(window.frames[index])
            if first >= 0 and (state != State.KSM or wanted != goal):
                yield first, index, goal
                first = -1
            if state == State.KSM and first < 0:
                first, goal = index, wanted
        if first >= 0:
            yield first, len(window.states), goal

    # -- one batch -------------------------------------------------------------------------------------------

    def batch(self, pagemap: Pagemap, window: Window, at: int, last: int, node: int | None) -> int:
        """Deal with the first pages of a run; says with how many."""
        if self.stop():
            raise Cancelled(self.what, f"stopped; {self.unshared} pages have been un-merged, and stay so")
        self.held.verify()
        pages = min(self.sizer.size, last - at, self.room(node))
        if self.full:
            self.leave(self.full, last - at)
            return last - at
        start = window.start + at * self.page_size
        cause = self.obstacle(start, start + pages * self.page_size)
        if cause:
            self.leave(cause, pages)
            return pages
        expected = window.frames[at : at + pages]
        for attempt in range(_TRIES):
            now = frames_of(pagemap.read(start, pages))
            # A page that still has the frame of a KSM page is one: such a frame never becomes anything else
            # while it is mapped. What has another one was written to, or unmapped, and is none of ours.
            still = [index for index, (was, is_) in enumerate(zip(expected, now, strict=False)) if was == is_]
            if attempt and not still:
                break
            self.prefer(node)
            begin = self.clock()
            for first, length in _adjacent(still):
                self.breaker.break_run(self.request.process.pid, start + first * self.page_size, length)
            self.sizer.measured(len(still), self.clock() - begin)
        self.judge(pagemap, start, list(expected), node)
        self.tell(Progress(self.done, max(self.total, self.done), "pages"))
        return pages

    def judge(self, pagemap: Pagemap, start: int, expected: list[int], node: int | None) -> None:
        found = frames_of(pagemap.read(start, len(expected)))
        fresh = {frame for frame, was in zip(found, expected, strict=False) if frame and frame != was}
        flags = self.flags.at(fresh)
        test = merged if self.reader.exact else candidate
        # Its mapping's policy, and a node that ran full, have the last word on where a page is.
        for was, frame in zip(expected, found, strict=False):
            self.done += 1
            if not frame:
                self.left[GONE] += 1
            elif frame == was:
                self.left[STILL] += 1
            elif test(flags[frame]):
                self.left[AGAIN] += 1
            elif self.request.to is not None and self.frames.node(frame) != node:
                self.left[ELSEWHERE] += 1
            else:
                self.unshared += 1
        missing = len(expected) - len(found)
        if missing:
            self.leave(GONE, missing)

    def leave(self, cause: str, pages: int) -> None:
        self.left[cause] += pages
        self.done += pages

    def room(self, node: int | None) -> int:
        if self.full:
            return 0
        nodes = frozenset() if node is None else frozenset({node})
        found = tightest(rooms(self.request.process.pid, nodes, self.request.floor_bytes, self.root, grows=True))
        pages = found.free_bytes // self.page_size
        if not pages:
            self.full = f"no memory {found.where} above the floor of {self.request.floor_bytes} bytes"
        return pages

    def prefer(self, node: int | None) -> None:
        # Preferred, not bound: a bound caller that finds the node full would bring on the OOM killer.
        if node is None or node == self.preferred:
            return
        if not self.topology.numa:
            if self.request.to is not None:
                raise Rejected(self.what, "without libnuma no node can be chosen", hint="install the package libnuma1")
            return
        libnuma.set_mempolicy(Policy(PolicyMode.PREFERRED, frozenset({node})))
        self.preferred = node


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
