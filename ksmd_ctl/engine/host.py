# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated host, behind the interface that the running kernel has too."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, TypeVar

from ksmd_ctl.engine import inspect
from ksmd_ctl.engine.base import EngineBase
from ksmd_ctl.engine.demo import Demo
from ksmd_ctl.engine.machine import Machine, Process
from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, ZERO_CONTENT, Page, SwapEntry, ZeroPte
from ksmd_ctl.engine.mm import Vma
from ksmd_ctl.engine.profile import CURRENT, profile
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.engine.survey import describe, find_duplicate_ksm_pages, find_duplicates, inventory, survey_demands
from ksmd_ctl.errors import KsmdError, NoSuchProcess, Rejected, Unmapped, errno_text
from ksmd_ctl.host.duplicates import DuplicateKsmPages, DuplicatePages
from ksmd_ctl.host.memory import (
    Census,
    Inventory,
    KsmDetection,
    Losses,
    PageState,
    ProcessId,
    ProcessList,
    Range,
    Survey,
)
from ksmd_ctl.host.memory import Process as HostProcess
from ksmd_ctl.host.operation import (
    Move,
    MovePlan,
    MoveResult,
    Operation,
    Progress,
    Steps,
    Unshare,
    UnsharedPart,
    UnsharePart,
    UnshareResult,
)

if TYPE_CHECKING:
    from ksmd_ctl.host.interface import Inspect, Lab

P = ParamSpec("P")
T = TypeVar("T")

# Pages that an operation goes through in one step.
_STEP_PAGES: Final = 256
_FULL: Final = "the node is full"


def open_engine_host(
    profile_name: str = CURRENT.name,
    nodes: int = 2,
    *,
    demo: bool = True,
    source: Callable[[], float] | None = time.monotonic,
) -> EngineHost:
    """A simulated host, by default with the demonstration load, its time following a clock.

    :param source: None where time is to pass by `EngineHost.advance` only
    :raises ValueError: there is no such profile
    """
    # More than twice the default configuration's floor, so that there is room for what is merged.
    machine = Machine(nodes, profile(profile_name), node_pages=1 << 17 if demo else 1 << 18)
    return EngineHost(machine, source=source, load=Demo(machine) if demo else None)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Rejected(what, errno_text(error.errno or 0), errno=error.errno) from error


class EngineHost(EngineBase):
    """`ksmd_ctl.host.interface.Host`, `Lab` and `Inspect` on a simulated machine. Not for several threads at once."""

    # -- Host: processes and where their pages are ---------------------------------------------------------

    def _process(self, process: ProcessId) -> Process:
        found = self.machine.processes.get(process.pid)
        if found is None or found.start_time_ticks != process.start_time_ticks:
            raise NoSuchProcess(f"process {process.pid}", "it is gone", errno=errno.ESRCH)
        return found

    def find(self, pid: int) -> ProcessId:
        found = self.machine.processes.get(pid)
        if found is None:
            raise NoSuchProcess(f"process {pid}", "it is gone", errno=errno.ESRCH)
        return ProcessId(pid, found.start_time_ticks)

    def losses(self, processes: Sequence[ProcessId], cgroups: Sequence[str]) -> Losses:
        """Which of these processes are gone; there is no OOM killer here."""
        there = {pid: found.start_time_ticks for pid, found in self.machine.processes.items()}
        return Losses({"host": 0}, tuple(one for one in processes if there.get(one.pid) != one.start_time_ticks))

    def processes(self) -> Operation[ProcessList]:
        return Operation.done(ProcessList(self._processes()))

    def _processes(self) -> tuple[HostProcess, ...]:
        return tuple(describe(self.machine, process) for process in self.machine.processes.values() if process.mm.vmas)

    def ranges(self, process: ProcessId) -> tuple[Range, ...]:
        return tuple(self._range(vma) for vma in self._process(process).mm.vmas)

    def _range(self, vma: Vma) -> Range:
        pages = [pte for pte in vma.ptes if isinstance(pte, Page)]
        flags = {"rd", "mr", "mw", "me", "ac"}
        flags |= {"wr"} if vma.writable else set()
        flags |= {"mg"} if vma.mergeable else set()
        flags |= set() if vma.compatible else {"sh"}
        return Range(
            vma.start,
            vma.end,
            frozenset(flags),
            policy="default" if vma.policy is None else f"bind:{vma.policy}",
            policy_nodes=frozenset() if vma.policy is None else frozenset({vma.policy}),
            resident_pages=len(pages),
            anonymous_pages=len(pages),
            ksm_pages=sum(map(folio_test_ksm, pages)) if self.machine.ksm.profile.smart_scan else None,
        )

    def _census(self) -> Census:
        nodes = [node for node in self.machine.memory.nodes if node.online]
        pages = {node.nid: sum(map(folio_test_ksm, node.pages())) for node in nodes}
        return Census(self.clock(), pages, pages, pages, True, KsmDetection.ENGINE, 0.0)

    def survey(self, budget_cpu_seconds: float) -> Operation[Survey]:
        began, processes, census = self.clock(), self._processes(), self._census()
        demands = survey_demands(processes, census, self._node_memory())
        return Operation.done(Survey(began, self.topology(), processes, census, "", demands, 0.0))

    def inventory(self, floor_bytes: int) -> Operation[Inventory]:
        return Operation.done(inventory(self.machine, self.topology(), self._node_memory(), floor_bytes))

    def duplicate_ksm_pages(self, budget_cpu_seconds: float, most_pages: int) -> Operation[DuplicateKsmPages]:
        return Operation.done(find_duplicate_ksm_pages(self.machine, self.clock(), most_pages))

    def duplicates(self, budget_frames: int) -> Operation[DuplicatePages]:
        return Operation.done(find_duplicates(self.machine))

    # The present pages of what a request is about, with the VMA and address of each.
    def _requested(
        self, process: Process, ranges: tuple[tuple[int, int], ...], everything: bool
    ) -> list[tuple[Vma, int, Page]]:
        found = []
        for start, end in ranges:
            if not any(vma.start < end and start < vma.end for vma in process.mm.vmas):
                raise Unmapped(f"process {process.pid}", f"nothing is mapped in {start:#x}-{end:#x}", value=start)
        for vma in process.mm.vmas:
            if not (vma.mergeable or everything):
                continue
            for index, pte in enumerate(vma.ptes):
                address = vma.start + (index << PAGE_SHIFT)
                if isinstance(pte, Page) and (not ranges or any(start <= address < end for start, end in ranges)):
                    found.append((vma, address, pte))
        return found

    def plan(self, request: Move) -> Operation[MovePlan]:
        try:
            return Operation.done(self._plan(request))
        except KsmdError as error:
            return Operation.failed(error)

    def _plan(self, request: Move) -> MovePlan:
        process = self._process(request.process)
        with _refusals(f"moving memory to node {request.to}"):
            self.machine.check_node(request.to)
        frames = {page for _vma, _address, page in self._requested(process, request.ranges, request.everything)}
        nodes = Counter(map(page_to_nid, frames))
        already = nodes.pop(request.to, 0)
        shared = sum(page.mapcount > 1 and page_to_nid(page) != request.to for page in frames)
        room = max(0, self._free_bytes(request.to) - request.floor_bytes)
        plan = MovePlan(dict(sorted(nodes.items())), shared, already, {}, f"on node {request.to}", room)
        return plan.within_room(PAGE_SIZE, _FULL)

    def move(self, request: Move, deadline_seconds: float) -> Operation[MoveResult]:
        return self._operation(f"moving memory to node {request.to}", self._move_steps(request), deadline_seconds)

    def _move_steps(self, request: Move) -> Steps[MoveResult]:
        process = self._process(request.process)
        machine, nid = self.machine, request.to
        with _refusals(f"moving memory to node {nid}"):
            machine.check_node(nid)
        frames: dict[Page, int] = {}
        for _vma, address, page in self._requested(process, request.ranges, request.everything):
            frames.setdefault(page, address)
        already = sum(page_to_nid(page) == nid for page in frames)
        todo = [(page, address) for page, address in frames.items() if page_to_nid(page) != nid]
        left: Counter[str] = Counter()
        for done in range(0, len(todo), _STEP_PAGES):
            yield Progress(done, len(todo), "pages")
            part = [(page, address) for page, address in todo[done : done + _STEP_PAGES] if page.mapcount]
            if self._free_bytes(nid) - len(part) * PAGE_SIZE < request.floor_bytes:
                left[_FULL] += len(todo) - done
                break
            machine.move_pages(process.pid, [address for _page, address in part], nid, move_all=True)
            self._cost(len(part))
            left["it can't be moved now"] += sum(page_to_nid(page) != nid for page, _address in part if page.mapcount)
        moved = sum(page_to_nid(page) == nid for page, _address in todo if page.mapcount)
        return MoveResult(moved, already, +left)

    def _free_bytes(self, nid: int) -> int:
        node = self.machine.memory.nodes[nid]
        return (node.capacity - node.used) * PAGE_SIZE

    def unshare(self, request: Unshare, deadline_seconds: float) -> Operation[UnshareResult]:
        return self._operation("un-merging pages", self._unshare_steps(request), deadline_seconds)

    def _unshare_steps(self, request: Unshare) -> Steps[UnshareResult]:
        done = []
        for part in request.parts:
            try:
                done.append((yield from self._unshare_part(part, request.floor_bytes)))
            except (NoSuchProcess, Unmapped):
                if len(request.parts) == 1:
                    raise
                done.append(UnsharedPart(0, {}, ended=True))
        return UnshareResult(tuple(done))

    def _unshare_part(self, part: UnsharePart, floor_bytes: int) -> Steps[UnsharedPart]:
        process = self._process(part.process)
        what = f"un-merging pages of process {process.pid}"
        if self.machine.ksm.profile.unshare_clears:
            raise Rejected(what, "this kernel would clear a byte of every page", errno=errno.EOPNOTSUPP)
        if part.to is not None:
            with _refusals(what):
                self.machine.check_node(part.to)
        todo = [
            (vma, address, page)
            for vma, address, page in self._requested(process, part.ranges, True)
            if folio_test_ksm(page)
        ]
        left: Counter[str] = Counter()
        unshared = 0
        for done, (vma, address, page) in enumerate(todo):
            if done % _STEP_PAGES == 0:
                yield Progress(done, len(todo), "pages")
            if process.mm.page(address) is not page or not folio_test_ksm(page):
                continue
            if not vma.writable:
                left["the mapping can't be written"] += 1
                continue
            target = vma.policy if vma.policy is not None else part.to or 0
            if self._free_bytes(target) - PAGE_SIZE < floor_bytes:
                left[_FULL] += len(todo) - done
                break
            with _refusals(what):
                unshared += self.machine.break_sharing(process.pid, address, 1, part.to)
            self._cost(1)
        return UnsharedPart(unshared, dict(left))

    # -- Lab -------------------------------------------------------------------------------------------------

    # A system call of a process; `what` it is, for errors.
    def _call(
        self, process: ProcessId, what: str, call: Callable[Concatenate[int, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        pid = self._process(process).pid
        with _refusals(what):
            return call(pid, *args, **kwargs)

    def _new(self, pid: int) -> ProcessId:
        self._spawned.append(pid)
        return ProcessId(pid, self.machine.processes[pid].start_time_ticks)

    def spawn(self, name: str) -> ProcessId:
        first = next(node.nid for node in self.machine.memory.nodes if node.online)
        return self._new(self.machine.spawn(name, first))

    def fork(self, process: ProcessId, name: str) -> ProcessId:
        return self._new(self.machine.fork(self._process(process).pid, name))

    def exit(self, process: ProcessId) -> None:
        self.machine.exit(self._process(process).pid)

    def map(self, process: ProcessId, pages: int, node: int | None) -> int:
        return self._call(process, f"mapping {pages} pages", self.machine.mmap, pages, node)

    def advise(self, process: ProcessId, start: int, pages: int, *, mergeable: bool) -> None:
        what = f"advising on {pages} pages at {start:#x}"
        self._call(process, what, self.machine.madvise, start, pages, mergeable=mergeable)

    def protect(self, process: ProcessId, start: int, pages: int, *, writable: bool) -> None:
        what = f"protecting {pages} pages at {start:#x}"
        self._call(process, what, self.machine.mprotect, start, pages, writable=writable)

    def merge(self, process: ProcessId, *, on: bool) -> None:
        self._call(process, "PR_SET_MEMORY_MERGE", self.machine.prctl_merge, on)

    def store(self, process: ProcessId, start: int, contents: Sequence[bytes | None]) -> None:
        for page, content in enumerate(contents):
            if content is not None:
                address = start + page * PAGE_SIZE
                self._call(process, f"writing to {start:#x}", self.machine.write, address, content)

    def discard(self, process: ProcessId, start: int, pages: int) -> None:
        self._call(process, f"discarding {pages} pages at {start:#x}", self.machine.discard, start, pages)

    def unmap(self, process: ProcessId, start: int, pages: int) -> None:
        self._call(process, f"unmapping {pages} pages at {start:#x}", self.machine.munmap, start, pages)

    def move_pages(self, process: ProcessId, addresses: Sequence[int], node: int, *, shared: bool) -> tuple[int, ...]:
        what = f"moving pages to node {node}"
        return tuple(self._call(process, what, self.machine.move_pages, addresses, node, move_all=shared)[1])

    def break_sharing(self, process: ProcessId, start: int, pages: int, *, node: int | None) -> None:
        self._call(process, f"un-merging {pages} pages at {start:#x}", self.machine.break_sharing, start, pages, node)

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def batch(self, pages: int) -> None:
        with _refusals("a batch of ksmd"):
            self.machine.batch(pages)

    def pages(self, process: ProcessId, start: int, pages: int) -> tuple[PageState, ...]:
        """What is mapped there; the zero page has a frame of its own and no node."""
        mm = self._process(process).mm
        return tuple(_page_state(mm.pte(start + page * PAGE_SIZE)) for page in range(pages))

    def load(self, process: ProcessId, start: int, pages: int) -> tuple[bytes, ...]:
        mm = self._process(process).mm
        return tuple(_content(mm.pte(start + page * PAGE_SIZE)) for page in range(pages))

    def close(self) -> None:
        for pid in self._spawned:
            if pid in self.machine.processes:
                self.machine.exit(pid)
        self._spawned.clear()
        self._restore_knobs()

    # -- Inspect -----------------------------------------------------------------------------------------------

    def state(self) -> Mapping[str, object]:
        return inspect.state(self.machine)


# Of no node: those count up from 0.
_ZERO_FRAME = -1


def _page_state(pte: Page | ZeroPte | SwapEntry | None) -> PageState:
    if isinstance(pte, Page):
        return PageState(pte.pfn, page_to_nid(pte), folio_test_ksm(pte))
    return PageState(_ZERO_FRAME if isinstance(pte, ZeroPte) else None, None, False)


def _content(pte: Page | ZeroPte | SwapEntry | None) -> bytes:
    if isinstance(pte, Page | SwapEntry):
        return pte.content
    return ZERO_CONTENT if pte is not None else b""


if TYPE_CHECKING:

    def _is_all_three(host: EngineHost) -> tuple[Lab, Inspect]:
        return host, host
