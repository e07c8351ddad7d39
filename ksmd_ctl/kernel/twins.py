# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds KSM pages with one content that max_page_sharing does not explain (docs/healing.md).

First all mappings of KSM pages are collected, from pagemap; then the contents of the pages are read, each once, and
only a number made of each is kept. What the figures rest on:

- A page that max_page_sharing mappings or more have can't be part of it (`ksmd_ctl.twins`): it is not looked at.
- Where the kernel counts more mappings of a page than were found (/proc/kpagecount), somebody maps it whom this may
  not look at, or who forked meanwhile: it is not un-merged, for it would only be one more page.
- Two contents may, once in 2**64, give one number, and a page may be written to after it was read. Comparing bytes
  before acting would not be worth it: un-merging never changes a content, and ksmd compares all bytes before it merges.
- Contents are read from /proc/PID/mem. process_vm_readv(2) would un-merge every page that it reads (F22): since 5.19
  who pins a page that is not exclusive gets the process a copy of it (mm/gup.c: gup_must_unshare).
- Where userfaultfd watches a mapping, nothing is read through it: the page might be gone by then, and the call would
  wait for the handler.
- A copy comes from the node that the mapping's own policy names, if it has one; numa_maps doesn't tell that from the
  policy of the thread. Where both are alike it is tried, and the outcome tells.
"""

from __future__ import annotations

import bisect
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ksmd_ctl.errors import Cancelled, Denied, NoSuchProcess, ReadError, errno_text
from ksmd_ctl.host.memory import ProcessId, Range, Twins
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel.kpagecount import FrameCounts
from ksmd_ctl.kernel.proc_pid import running_pids, start_time_ticks
from ksmd_ctl.kernel.processes import read_counts
from ksmd_ctl.kernel.ranges import NumaRange, join, mappings, numa_ranges
from ksmd_ctl.kernel.topology import FrameMap
from ksmd_ctl.kernel.unshare import NOT_WRITABLE, WATCHED
from ksmd_ctl.kernel.witness import PageReader, State, Window
from ksmd_ctl.twins import TwinFrame, judge, parts_of

__all__ = ["HIDDEN", "NO_LIMIT", "POLICY", "Rules", "find"]

HIDDEN = "somebody maps it who can't be looked at, or forked a moment ago"
POLICY = "its mapping's own policy takes what is un-merged to another node"

#: max_page_sharing of kernels that have none (before 4.13).
NO_LIMIT = 1 << 30

# About 200 bytes each: the privileged part is kept at 128 MiB. It is 1 GiB of merged contents.
_MOST_FRAMES = 1 << 18
_MOST_MAPPINGS = 1 << 21
# Read in one call.
_READ_PAGES = 256
# Of the budget, for finding mappings: without contents they say nothing.
_MAPPINGS_SHARE = 0.5
_SPREADING = frozenset({"interleave", "weighted interleave"})
_ADDRESS_BITS = 45
_CAUSES = ("", HIDDEN, NOT_WRITABLE, WATCHED, POLICY)


@dataclass(frozen=True, slots=True)
class Rules:
    """What ksmd goes by: merge_across_nodes and max_page_sharing."""

    across: bool
    limit: int


def find(
    budget_cpu_seconds: float,
    most_pages: int,
    *,
    rules: Rules,
    reader: PageReader,
    counts: FrameCounts,
    nodes: FrameMap,
    root: Path = Path("/"),
    page_size: int = 4096,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    cpu_clock: Callable[[], float] = time.process_time,
    clock: Callable[[], float] = time.monotonic,
    compared: Callable[[int], bool] = lambda _: True,
) -> Twins:
    """Look at all KSM pages.

    :param budget_cpu_seconds: CPU time of this process that it may cost, about
    :param most_pages: pages that `Twins.parts` may have
    :param clock: `Host.clock`
    :param compared: whether a process, by its pid, takes part
    :raises Denied: somebody's memory could not be looked at, and nobody else's was of any use
    :raises Cancelled: `stop` said so
    """
    job = _Job(budget_cpu_seconds, rules, reader, counts, nodes, root, page_size, progress, stop, compared, cpu_clock)
    began = clock()
    job.collect()
    job.read()
    if job.denied is not None and not job.digests:
        raise job.denied
    return job.result(began, most_pages)


@dataclass(slots=True)
class _Job:
    budget: float
    rules: Rules
    reader: PageReader
    counts: FrameCounts
    nodes: FrameMap
    root: Path
    page_size: int
    tell: Callable[[Progress], None]
    stop: Callable[[], bool]
    compared: Callable[[int], bool]
    cpu_clock: Callable[[], float]
    begin: float = 0.0
    complete: bool = True
    # Why somebody's memory could not be looked at.
    denied: Denied | None = None
    processes: list[ProcessId] = field(default_factory=list)
    # By frame its place in the arrays that follow; -1 for one that doesn't matter.
    places: dict[int, int] = field(default_factory=dict)
    frames: array[int] = field(default_factory=lambda: array("Q"))
    mapped: array[int] = field(default_factory=lambda: array("I"))
    found: array[int] = field(default_factory=lambda: array("I"))
    causes: bytearray = field(default_factory=bytearray)
    doubts: bytearray = field(default_factory=bytearray)
    # A mapping each: the process's number and the page's, the place of its frame, and whether it must not be read.
    where: array[int] = field(default_factory=lambda: array("Q"))
    whose: array[int] = field(default_factory=lambda: array("I"))
    watched: bytearray = field(default_factory=bytearray)
    # By place, for those whose content was read.
    digests: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin = self.cpu_clock()

    def affordable(self, share: float = 1.0) -> bool:
        """Whether there is budget left."""
        if self.stop():
            raise Cancelled("looking for twins", "stopped before it was done")
        return self.cpu_clock() - self.begin < self.budget * share

    # -- mappings --------------------------------------------------------------------------------------------

    def collect(self) -> None:
        running = running_pids(self.root)
        for number, pid in enumerate(running):
            if not self.affordable(_MAPPINGS_SHARE):
                self.complete = False
                break
            self.tell(Progress(number, len(running), "processes"))
            try:
                self.process(pid)
            except Denied as error:
                self.denied = error
            except NoSuchProcess:
                # It ended, or is a kernel thread without memory. What it mapped, the kernel's count shows.
                continue
            except ReadError:
                # One that keeps its readers waiting hides nobody else.
                self.complete = False

    def process(self, pid: int) -> None:
        merged = read_counts(pid, self.root)
        if merged.merging_pages == 0 or merged.mergeable is False or not self.compared(pid):
            return
        owner = ProcessId(pid, start_time_ticks(pid, self.root))
        maps = mappings(pid, self.root)
        numa = numa_ranges(pid, self.root)
        ranges = [
            item
            for item in join(maps, numa, self.page_size)
            if item.mergeable and item.anonymous_pages and item.ksm_pages != 0
        ]
        if not ranges:
            return
        if not self.reader.exact and self.reader.learn(pid, ranges):
            self.reader.learn(pid, join(maps, numa, self.page_size), deep=True)
        # Nobody but the kernel places a stack, so what it shows is the thread's own policy.
        stack = next((numa.get(item.start) for item in maps if item.name == "[stack]"), None)
        self.processes.append(owner)
        for window in self.reader.windows(pid, ranges):
            item = ranges[bisect.bisect_right(ranges, window.start, key=lambda item: item.start) - 1]
            self.window(window, item, _own_policy(item, stack))
            if not self.affordable(_MAPPINGS_SHARE):
                self.complete = False
                return

    def window(self, window: Window, item: Range, own: bool) -> None:
        pages = list(_merged(window.states))
        if not pages:
            return
        mapped = self.counts.at({window.frames[page] for page in pages})
        cause = 0
        watched = bool(item.flags & {"um", "uw"})
        if watched:
            cause = _CAUSES.index(WATCHED)
        elif "wr" not in item.flags:
            cause = _CAUSES.index(NOT_WRITABLE)
        owner = len(self.processes) - 1 << _ADDRESS_BITS
        first = window.start // self.page_size
        for page in pages:
            frame = window.frames[page]
            place = self.places.get(frame)
            if place is None:
                place = self.enter(frame, mapped[frame])
            if place < 0:
                continue
            if len(self.where) >= _MOST_MAPPINGS:
                self.complete = False
                return
            self.found[place] += 1
            self.where.append(owner | first + page)
            self.whose.append(place)
            self.watched.append(watched)
            if cause:
                self.causes[place] = cause
            elif not self.rules.across and _leads_away(item, self.nodes.node(frame)):
                if own:
                    self.causes[place] = self.causes[place] or _CAUSES.index(POLICY)
                else:
                    self.doubts[place] = 1

    def enter(self, frame: int, mapped: int) -> int:
        place = len(self.frames)
        if mapped >= self.rules.limit or self.nodes.node(frame) is None:
            place = -1
        elif place >= _MOST_FRAMES:
            self.complete = False
            return -1
        else:
            self.frames.append(frame)
            self.mapped.append(mapped)
            self.found.append(0)
            self.causes.append(0)
            self.doubts.append(0)
        self.places[frame] = place
        return place

    # -- contents --------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the content of each frame through the first mapping of it that can be read."""
        self.places.clear()
        wanted = bytearray(b"\1") * len(self.frames)
        run: list[int] = []
        start = 0
        with _Contents(self.root, self.page_size) as contents:
            for code, place, watched in zip(self.where, self.whose, self.watched, strict=True):
                if watched or not wanted[place]:
                    continue
                if run and (code != start + len(run) or len(run) == _READ_PAGES):
                    self.take(contents, start, run)
                    run = []
                    self.tell(Progress(len(self.digests), len(self.frames), "pages"))
                    if not self.affordable():
                        self.complete = False
                        return
                if not run:
                    start = code
                run.append(place)
                wanted[place] = 0
            if run:
                self.take(contents, start, run)

    def take(self, contents: _Contents, start: int, run: Sequence[int]) -> None:
        owner = self.processes[start >> _ADDRESS_BITS]
        address = (start & (1 << _ADDRESS_BITS) - 1) * self.page_size
        try:
            for place, digest in zip(run, contents.digests(owner.pid, address, len(run)), strict=False):
                self.digests[place] = digest
        except Denied as error:
            self.denied = error

    # -- what it comes to ------------------------------------------------------------------------------------

    def result(self, began: float, most_pages: int) -> Twins:
        groups: dict[tuple[int, int], list[TwinFrame]] = {}
        for place, digest in self.digests.items():
            node = self.nodes.node(self.frames[place])
            cause = self.causes[place] or (self.found[place] != self.mapped[place])
            frame = TwinFrame(
                place, max(self.found[place], self.mapped[place]), _CAUSES[cause], bool(self.doubts[place])
            )
            groups.setdefault((digest, 0 if self.rules.across or node is None else node), []).append(frame)
        verdict = judge(groups.values(), self.rules.limit, most_pages)
        chosen = set(verdict.chosen)
        parts = parts_of(
            (
                (
                    self.processes[code >> _ADDRESS_BITS],
                    self.nodes.node(self.frames[place]) or 0,
                    _address(code) * self.page_size,
                )
                for code, place in zip(self.where, self.whose, strict=True)
                if place in chosen
            ),
            self.page_size,
        )
        return Twins(
            time_seconds=began,
            frames=len(self.digests),
            unrealised=verdict.unrealised,
            left=verdict.left,
            parts=parts,
            part_pages=verdict.pages,
            part_frames=len(chosen),
            complete=self.complete and self.denied is None,
            witness=self.reader.witness,
            cpu_seconds=self.cpu_clock() - self.begin,
        )


def _address(code: int) -> int:
    return code & (1 << _ADDRESS_BITS) - 1


def _merged(states: bytes) -> Iterator[int]:
    at = states.find(State.KSM)
    while at >= 0:
        yield at
        at = states.find(State.KSM, at + 1)


def _own_policy(item: Range, stack: NumaRange | None) -> bool:
    return stack is None or (item.policy, item.policy_nodes) != (stack.policy, stack.policy_nodes)


def _leads_away(item: Range, node: int | None) -> bool:
    """Whether a policy would take a copy elsewhere than to this node, or may."""
    if item.policy == "default":
        return False
    if item.policy in _SPREADING:
        return item.policy_nodes != {node}
    return node not in item.policy_nodes


class _Contents:
    """Reads pages of one process after the other, and makes a number of each."""

    def __init__(self, root: Path, page_size: int) -> None:
        self._root = root
        self._page_size = page_size
        self._pid = 0
        self._memory = -1

    def digests(self, pid: int, address: int, pages: int) -> Iterator[int]:
        """A number for each page; fewer where one can't be read.

        :raises Denied: nothing of this process can be read
        """
        if pid != self._pid:
            self._open(pid)
        try:
            data = os.pread(self._memory, pages * self._page_size, address)
        except OSError:
            # It is gone, or they are: they are left out.
            return
        for at in range(0, len(data) - self._page_size + 1, self._page_size):
            # SipHash with a key of this process's own: three times as quick as anything of hashlib's, and nobody
            # can make contents that meet.
            yield hash(data[at : at + self._page_size])

    def _open(self, pid: int) -> None:
        self.close()
        self._pid = pid
        path = self._root / "proc" / str(pid) / "mem"
        try:
            self._memory = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise Denied(
                f"contents of process {pid}",
                f"{path} can't be opened: {errno_text(error.errno or 0)}",
                hint="needs CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3",
                path=str(path),
                errno=error.errno,
            ) from error
        except OSError:
            # It is gone: reading tells.
            self._memory = -1

    def close(self) -> None:
        """Give the descriptor back."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        self._pid = 0

    def __enter__(self) -> _Contents:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
