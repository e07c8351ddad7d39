# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated host, behind the interface that the running kernel has too."""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec, TypeVar

from ksmd_ctl.engine import inspect, operations, survey
from ksmd_ctl.engine.demo import Demo
from ksmd_ctl.engine.machine import Machine, Process
from ksmd_ctl.engine.memory import PAGE_SIZE, ZERO_CONTENT, Page, SwapEntry, ZeroPte
from ksmd_ctl.engine.operations import SteppedOperation, find_process, pass_time, refusals
from ksmd_ctl.engine.profile import CURRENT, profile
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.engine.sysfs import counters, run_store
from ksmd_ctl.errors import Absent, KsmdError, NoSuchProcess, Rejected
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.cpus import parse_cpus
from ksmd_ctl.host.duplicates import DuplicateKsmPages, DuplicatePages
from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.knobs import (
    KNOBS,
    KSMD_KNOBS,
    Knob,
    KnobValue,
    format_value,
    parse_value,
    parse_wanted,
    same_value,
    write_error,
)
from ksmd_ctl.host.memory import (
    Inventory,
    Losses,
    PageState,
    Placements,
    ProcessId,
    ProcessList,
    Range,
    Survey,
    Topology,
)
from ksmd_ctl.host.operation import (
    Collapse,
    CollapsedProcess,
    CollapseResult,
    Move,
    MovePlan,
    MoveResult,
    Operation,
    Progress,
    Steps,
    Unshare,
    UnshareResult,
)
from ksmd_ctl.host.sample import HostIdentity, HostKind, Reading, Sample, Writer
from ksmd_ctl.host.sharing import Sharing
from ksmd_ctl.host.switching import Method, Switch, SwitchResult

if TYPE_CHECKING:
    from ksmd_ctl.host.interface import Inspect, Lab

P = ParamSpec("P")
T = TypeVar("T")

# Pages that ksmd scans in one call at most. With more to do, virtual time falls behind.
_PAGES_PER_CALL: Final = 20_000


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


def _absent(name: str, profile_name: str) -> Absent:
    return Absent(
        f"reading {name}", f"profile {profile_name} of the simulated host does not have it", errno=errno.ENOENT
    )


class EngineHost:
    """`ksmd_ctl.host.interface.Host`, `Lab` and `Inspect` on a simulated machine. Not for several threads at once.

    :param source: the clock that virtual time follows; without it, time passes by `advance` and by what operations
        and batches cost
    :param load: what happens on the machine as time passes
    """

    def __init__(
        self, machine: Machine, *, source: Callable[[], float] | None = None, load: Demo | None = None
    ) -> None:
        self.machine = machine
        self._load = load
        self._source = source
        self._offset = -source() if source is not None else 0.0
        self._spawned: list[int] = []
        self._ksmd: dict[Knob, KnobValue] = {knob: KNOBS[knob].default for knob in KSMD_KNOBS}
        self._ksmd[Knob.KSMD_CPUS] = self._cpus()
        self._before = {name: machine.show(name) for name in machine.ksm.profile.knobs}
        self._identity = HostIdentity(HostKind.ENGINE, machine.ksm.profile.name, PAGE_SIZE, str(uuid.uuid4()))
        self._catch_up()

    # -- Host: identity, time, knobs, counters -------------------------------------------------------------

    @property
    def identity(self) -> HostIdentity:
        return self._identity

    def clock(self) -> float:
        """Virtual seconds since this host was made."""
        self._catch_up()
        return self.machine.ksm.now_ns / 1e9

    def advance(self, seconds: float) -> None:
        """Let time pass, in addition to its source's."""
        self._offset += seconds
        until = self.machine.ksm.now_ns + round(seconds * 1e9)
        while self.machine.ksm.now_ns < until:
            self._pass(until, 1 << 62)

    # Virtual time follows its source; time for which ksmd can't be simulated is lost.
    def _catch_up(self) -> None:
        if self._source is None:
            self._pass(self.machine.ksm.now_ns, 0)
            return
        until = round((self._source() + self._offset) * 1e9)
        budget = _PAGES_PER_CALL
        while budget > 0 and (self.machine.ksm.now_ns < until):
            budget -= max(1, self._pass(until, budget))
        if self.machine.ksm.now_ns < until:
            self._offset -= (until - self.machine.ksm.now_ns) / 1e9

    # Run to a time or to the next event of the load; how many pages were scanned.
    def _pass(self, until: int, most_pages: int) -> int:
        machine = self.machine
        if self._load is None:
            return machine.run_until(until, most_pages)
        self._load.until(machine.ksm.now_ns / 1e9)
        event = int(self._load.next_event() * 1e9) + 1
        scanned = machine.run_until(min(until, event), most_pages)
        self._load.until(machine.ksm.now_ns / 1e9)
        return scanned

    def sample(self, *, fresh: bool = False) -> Sample:
        now = self.clock()
        machine = self.machine
        seen = counters(machine.ksm)
        nodes = survey.node_memory(self.machine)
        readings: dict[str, Reading] = {
            "mem_total_bytes": sum(node.total_bytes for node in nodes.values()),
            "mem_available_bytes": sum(node.free_bytes for node in nodes.values()),
            "ksmd_cpu_seconds": machine.ksm.cpu_ns / 1e9,
            "nr_anon_pages": sum(node.used for node in self.machine.memory.nodes),
        }
        for field in FIELDS:
            if field.name in KNOBS:
                try:
                    readings[field.name] = self.read(Knob(field.name))
                except Absent as error:
                    readings[field.name] = error
            elif field.name in seen:
                readings[field.name] = seen[field.name]
            elif field.name not in readings:
                readings[field.name] = _absent(field.name, machine.ksm.profile.name)
        return Sample(now, readings, nodes)

    def read(self, knob: Knob) -> KnobValue:
        if knob in KSMD_KNOBS:
            return self._ksmd[knob]
        try:
            return parse_value(knob, self.machine.show(knob))
        except OSError as error:
            raise _absent(knob, self.machine.ksm.profile.name) from error

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> Operation[KnobValue]:
        what = f"writing {format_value(value)} to {knob}"
        return self._operation(what, self._write_steps(knob, value), deadline_seconds)

    def _write_steps(self, knob: Knob, value: KnobValue) -> Steps[KnobValue]:
        found = self.read(knob)
        if same_value(knob, found, value):
            return value
        if knob is Knob.RUN:
            done = 0
            try:
                for pages in run_store(self.machine.ksm, format_value(value), 0):
                    done += pages
                    pass_time(self.machine, pages)
                    yield Progress(done, 0, "pages")
            except OSError as error:
                raise write_error(knob, value, error) from error
        else:
            self.set(knob, value)
        return self.read(knob)

    def set(self, knob: Knob, value: KnobValue) -> None:
        if knob in KSMD_KNOBS:
            # It changes nothing of the simulation, in which ksmd competes with nobody.
            self._ksmd[knob] = self._checked(knob, value)
            return
        try:
            self.machine.store(knob, format_value(value))
        except OSError as error:
            raise write_error(knob, value, error) from error

    # The CPUs of all nodes, also of those that are offline.
    def _cpus(self) -> str:
        return ranges_text(node.nid for node in self.machine.memory.nodes)

    def _checked(self, knob: Knob, value: KnobValue) -> KnobValue:
        what = f"setting {knob} to {value}"
        try:
            value = parse_wanted(knob, value)
        except ValueError as error:
            raise Rejected(what, str(error), value=value, errno=errno.EINVAL) from error
        if knob is Knob.KSMD_CPUS and (missing := parse_cpus(value) - parse_cpus(self._cpus())):
            why = f"this host has no CPU {ranges_text(missing)}: it can have {self._cpus()}"
            raise Rejected(what, why, value=value, errno=errno.EINVAL)
        return value

    def _operation(self, what: str, steps: Steps[T], deadline_seconds: float) -> SteppedOperation[T]:
        return SteppedOperation(what, steps, self.clock, deadline_seconds)

    def writers(self) -> Operation[tuple[Writer, ...]]:
        """Only the kernel's own advisor, where it is on."""
        profile = self.machine.ksm.profile
        on = profile.advisor and self.read(Knob.ADVISOR_MODE) == "scan-time"
        return Operation.done((Writer("advisor"),) if on else ())

    def housekeeping(self) -> Operation[str]:
        """All CPUs: none is isolated, and there are no virtual machines."""
        return Operation.done(self._cpus())

    def topology(self) -> Topology:
        return survey.topology(self.machine)

    def placements(self, processes: Sequence[ProcessId]) -> Operation[Placements]:
        """Every node: there are no cpusets here."""
        nodes = frozenset(node.number for node in self.topology().nodes)
        there = {one.id for one in survey.processes(self.machine)}
        return Operation.done(Placements({one: nodes for one in processes if one in there}, cpusets=False))

    # -- Host: processes and where their pages are ---------------------------------------------------------

    def _process(self, process: ProcessId) -> Process:
        return find_process(self.machine, process)

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
        return Operation.done(ProcessList(survey.processes(self.machine)))

    def ranges(self, process: ProcessId) -> tuple[Range, ...]:
        return tuple(survey.describe_range(self.machine, vma) for vma in self._process(process).mm.vmas)

    def survey(self, budget_cpu_seconds: float) -> Operation[Survey]:
        return Operation.done(survey.survey(self.machine, self.clock()))

    def inventory(self, floor_bytes: int) -> Operation[Inventory]:
        return Operation.done(survey.inventory(self.machine, floor_bytes))

    def duplicate_ksm_pages(self, budget_cpu_seconds: float, most_pages: int) -> Operation[DuplicateKsmPages]:
        return Operation.done(survey.find_duplicate_ksm_pages(self.machine, self.clock(), most_pages))

    def sharing(self, groups: Sequence[Sequence[ProcessId]], budget_cpu_seconds: float) -> Operation[Sharing]:
        return Operation.done(survey.sharing(self.machine, groups, self.clock()))

    def duplicates(self, budget_frames: int) -> Operation[DuplicatePages]:
        return Operation.done(survey.find_duplicates(self.machine))

    def plan(self, request: Move) -> Operation[MovePlan]:
        try:
            return Operation.done(operations.plan(self.machine, request))
        except KsmdError as error:
            return Operation.failed(error)

    def move(self, request: Move, deadline_seconds: float) -> Operation[MoveResult]:
        what = f"moving memory to node {request.to}"
        return self._operation(what, operations.move(self.machine, request), deadline_seconds)

    def unshare(self, request: Unshare, deadline_seconds: float) -> Operation[UnshareResult]:
        return self._operation("un-merging pages", operations.unshare(self.machine, request), deadline_seconds)

    def unit_members(self, unit: str) -> Operation[tuple[ProcessId, ...]]:
        return Operation.done(tuple(one.id for one in survey.processes(self.machine) if one.unit == unit != ""))

    def switch(
        self,
        request: Switch,
        method: Method | None,
        deadline_seconds: float,
        *,
        dry_run: bool = False,
    ) -> Operation[SwitchResult]:
        """By prctl, and madvise for what that leaves: a process of the simulated host has no monitor."""
        try:
            if method is Method.QMP or request.ranges:
                why = "the simulated host has prctl(PR_SET_MEMORY_MERGE) only"
                raise Absent("switching merging", why, hint="leave out --method and --range")
            before, merged = self._switched(request.process), self._merged(request.process)
            if not dry_run:
                self.merge(request.process, on=request.on)
                # What madvise marked is left where prctl was off.
                for item in self.ranges(request.process):
                    if item.mergeable and not request.on:
                        pages = (item.end - item.start) // self.identity.page_size_bytes
                        self.advise(request.process, item.start, pages, mergeable=False)
            after = self._switched(request.process)
        except KsmdError as error:
            return Operation.failed(error)
        pages = sum(one.merged_pages for one in survey.processes(self.machine) if one.id == request.process)
        unmerged = 0 if request.on else merged - self._merged(request.process)
        how = "prctl(PR_SET_MEMORY_MERGE), simulated"
        size = sum(item.end - item.start for item in self.ranges(request.process) if item.mergeable)
        own = request.process, request.on, Method.INJECT, how
        return Operation.done(SwitchResult(*own, before, after, size, pages, 0.0, (), unmerged))

    def _merged(self, process: ProcessId) -> int:
        """Pages that are merged at this moment: counters follow only when ksmd passes next."""
        return sum(sum(one.nodes.values()) for one in survey.processes(self.machine) if one.id == process)

    def _switched(self, process: ProcessId) -> bool:
        return any(item.mergeable for item in self.ranges(process))

    def make_huge(self, request: Collapse, deadline_seconds: float) -> Operation[CollapseResult]:
        # Scenarios have blocks that can be huge pages; processes of the simulated host have none.
        named = [
            one for one in survey.processes(self.machine) if one.id == request.process or one.unit == request.unit != ""
        ]
        why = "the simulated host has no huge pages"
        return Operation.done(CollapseResult(tuple(CollapsedProcess(one.id, one.name, error=why) for one in named)))

    # -- Lab -------------------------------------------------------------------------------------------------

    # A system call of a process; `what` it is, for errors.
    def _call(
        self, process: ProcessId, what: str, call: Callable[Concatenate[int, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        pid = self._process(process).pid
        with refusals(what):
            return call(pid, *args, **kwargs)

    def _new(self, pid: int) -> ProcessId:
        self._spawned.append(pid)
        return ProcessId(pid, self.machine.processes[pid].start_time_ticks)

    def spawn(self, name: str, nodes: frozenset[int] = frozenset()) -> ProcessId:
        first = min(nodes or (node.nid for node in self.machine.memory.nodes if node.online))
        return self._new(self.machine.spawn(name, first, nodes or None))

    def lacks_cpusets(self) -> str:
        return ""

    def fork(self, process: ProcessId, name: str) -> ProcessId:
        return self._new(self.machine.fork(self._process(process).pid, name))

    def exit(self, process: ProcessId) -> None:
        self.machine.exit(self._process(process).pid)

    def exec(self, process: ProcessId) -> None:
        self.machine.exec(self._process(process).pid)

    def map(self, process: ProcessId, pages: int, node: int | None) -> int:
        return self._call(process, f"mapping {pages} pages", self.machine.mmap, pages, node)

    def advise(self, process: ProcessId, start: int, pages: int, *, mergeable: bool) -> None:
        what = f"advising on {pages} pages at {start:#x}"
        self._call(process, what, self.machine.madvise, start, pages, mergeable=mergeable)

    def mremap(self, process: ProcessId, start: int, pages: int) -> int:
        return self._call(process, f"moving {pages} pages at {start:#x}", self.machine.mremap, start, pages)

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

    def swap_out(self, process: ProcessId, start: int, pages: int) -> None:
        self._call(process, f"swapping out {pages} pages at {start:#x}", self.machine.pageout, start, pages)

    def lacks_swap(self) -> str:
        return ""

    def read_pages(self, process: ProcessId, start: int, pages: int) -> None:
        for address in range(start, start + pages * PAGE_SIZE, PAGE_SIZE):
            self._call(process, f"reading {address:#x}", self.machine.read, address)

    def collapse(self, process: ProcessId, start: int, pages: int) -> tuple[bool, ...]:
        what = f"collapsing {pages} pages at {start:#x}"
        return tuple(self._call(process, what, self.machine.collapse, start, pages))

    def lacks_huge_pages(self) -> str:
        return "" if self.machine.ksm.profile.collapse else "this kernel has no MADV_COLLAPSE (it came with 6.1)"

    def discard(self, process: ProcessId, start: int, pages: int) -> None:
        self._call(process, f"discarding {pages} pages at {start:#x}", self.machine.discard, start, pages)

    def unmap(self, process: ProcessId, start: int, pages: int) -> None:
        self._call(process, f"unmapping {pages} pages at {start:#x}", self.machine.munmap, start, pages)

    def move_pages(self, process: ProcessId, addresses: Sequence[int], node: int, *, shared: bool) -> tuple[int, ...]:
        what = f"moving pages to node {node}"
        return tuple(self._call(process, what, self.machine.move_pages, addresses, node, move_all=shared)[1])

    def break_sharing(self, process: ProcessId, start: int, pages: int, *, node: int | None) -> None:
        self._call(process, f"un-merging {pages} pages at {start:#x}", self.machine.break_sharing, start, pages, node)

    def removable_nodes(self) -> frozenset[int]:
        return frozenset([node.nid for node in self.machine.memory.nodes if node.online][1:])

    def offline(self, node: int) -> bool:
        try:
            self.machine.going_offline(node)
            self.machine.offline(node)
        except OSError:
            return False
        self.machine.online(node)
        return True

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def batch(self, pages: int) -> None:
        with refusals("a batch of ksmd"):
            self.machine.batch(pages)

    def pages(self, process: ProcessId, start: int, pages: int, *, ksm: bool = True) -> tuple[PageState, ...]:
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
        self.machine.store("run", 0)
        self.machine.store("run", 2)
        # pages_to_scan after the advisor, which changes it; run last.
        last = ("pages_to_scan", "run")
        for name in (*(name for name in self._before if name not in last), *last):
            text = self._before[name]
            if name == Knob.ADVISOR_MODE:
                text = str(parse_value(Knob.ADVISOR_MODE, text))
            self.machine.store(name, text)

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
