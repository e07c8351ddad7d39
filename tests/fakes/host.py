# SPDX-License-Identifier: GPL-2.0-or-later
"""A host for tests: knobs as in mm/ksm.c, a clock that the test advances, operations that wait when told to."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

from ksmd_ctl.errors import (
    Absent,
    Cancelled,
    Denied,
    KsmdError,
    NoSuchProcess,
    ReadError,
    Rejected,
    TimedOut,
    errno_text,
)
from ksmd_ctl.host.duplicates import DuplicateKsmPages, DuplicatePages
from ksmd_ctl.host.knobs import KNOBS, RUN_OFFLINE, Knob, KnobValue
from ksmd_ctl.host.memory import (
    Census,
    KsmDetection,
    Losses,
    Node,
    Placements,
    Process,
    ProcessClass,
    ProcessId,
    ProcessList,
    Skipped,
    Survey,
    Topology,
    Unmergeable,
    UnmergeDemand,
)
from ksmd_ctl.host.operation import Collapse, CollapseResult, Move, MovePlan, MoveResult, Operation, Progress, Steps
from ksmd_ctl.host.sample import HostIdentity, HostKind, NodeMemory, Reading, Sample, Writer
from ksmd_ctl.host.sharing import Sharing, SharingTally

T = TypeVar("T")


class FakeOperation(Operation[T]):
    """Over at once, or once `release` is called; with a descriptor if it is a slow one."""

    def __init__(self, outcome: T | KsmdError | None = None) -> None:
        self.outcome = outcome
        self.at = Progress()
        self._event = -1 if outcome is not None else os.eventfd(0)
        super().__init__(self._wait(), self._event)

    def _wait(self) -> Steps[T]:
        while self.outcome is None:
            yield self.at
        if self._event >= 0:
            os.close(self._event)
        if isinstance(self.outcome, KsmdError):
            raise self.outcome
        return self.outcome

    @property
    def progress(self) -> Progress:
        return self.at

    def release(self, outcome: T | KsmdError) -> None:
        self.outcome = outcome
        os.eventfd_write(self._event, 1)

    def cancel(self) -> None:
        super().cancel()
        if self.outcome is None:
            self.release(Cancelled("writing", "cancelled"))


def process(pid: int, group: str = "", pages: int = 0, **more: object) -> Process:
    """A process with mergeable memory that belongs on node 0."""
    fields: dict[str, object] = {
        "id": ProcessId(pid, 100 * pid),
        "name": f"p{pid}",
        "group": group or f"p{pid}",
        "unit": "",
        "classes": frozenset({ProcessClass.MERGEABLE}),
        "reason": "for a test",
        "merging_pages": pages,
        "rmap_items": pages,
        "nodes": {0: pages} if pages else {},
        "home": 0,
        "remote_pages": 0,
    }
    return Process(**(fields | more))  # type: ignore[arg-type]


class FakeHost:
    """As much of `ksmd_ctl.host.interface.Host` as the service takes.

    :ivar nodes: two of them, each with a CPU and a GiB
    :ivar running: the processes that have mergeable memory
    :ivar unmergeable: those that have shared or hugetlb memory alone, `alive` the pids of all others
    :ivar skipped: those that can't be read, and `unseen` pids of those that may not be
    :ivar processes_outcome: what looking at processes gives, None for what there is
    :ivar surveys: what each survey was given to spend
    :ivar survey_outcome: what the next survey gives, None for what there is
    :ivar slow_surveys: surveys wait in `waiting_surveys`
    :ivar duplicate_ksm_pages_looks: what each look for twins was given: CPU seconds, and pages that may be un-merged
    :ivar duplicate_ksm_pages_outcomes: what the next ones give; none: there are no twins
    :ivar duplicates_looks, duplicates_outcomes: the same of looks at contents; none: nothing is alike
    :ivar frames: how often processes map frames that all of them share, by pid: a frame each
    :ivar sharing_looks: what each look at who shares frames was given: groups of pids, and CPU seconds
    :ivar sharing_outcomes: what the next ones give; then it is `sharing_outcome`, None for what `frames` says
    :ivar moves: every move that was begun, and the operation of each
    :ivar move_outcomes: what the next moves give; none: they wait

    :ivar knobs: their values; what is missing, this host lacks
    :ivar counters: all other readings
    :ivar broken: readings that fail
    :ivar denied: nobody may write, and `refused` the knobs that nobody may
    :ivar slow: knobs whose writes wait for `finish`
    :ivar stuck: knobs whose writes wait for ksmd until their deadline is over
    :ivar housekeeping_outcome: what looking for housekeeping CPUs gives
    :ivar confined: nodes that a process may allocate on, where these are not all
    :ivar cpusets: whether there is anything that confines processes
    :ivar written: every write that took place, in order
    :ivar now: the clock
    """

    def __init__(self, knobs: dict[Knob, KnobValue] | None = None, lacks: Iterable[Knob] = ()) -> None:
        self.knobs: dict[Knob, KnobValue] = {knob: spec.default for knob, spec in KNOBS.items()}
        self.knobs[Knob.KSMD_CPUS] = "0-1"
        self.knobs.update(knobs or {})
        for knob in lacks:
            del self.knobs[knob]
        self.counters: dict[str, Reading] = {
            "pages_shared": 0,
            "pages_sharing": 0,
            "pages_unshared": 0,
            "pages_volatile": 0,
            "full_scans": 0,
        }
        self.broken: dict[str, ReadError] = {}
        self.others: tuple[Writer, ...] = ()
        self.slow_writers = False
        self.waiting_writers: list[FakeOperation[tuple[Writer, ...]]] = []
        self.denied = False
        self.offline = False
        self.housekeeping_outcome: str | KsmdError = "0"
        self.confined: dict[ProcessId, frozenset[int]] = {}
        self.cpusets = True
        self.refused: set[Knob] = set()
        self.slow: set[Knob] = set()
        self.stuck: set[Knob] = set()
        self.waiting: list[tuple[Knob, KnobValue, FakeOperation[KnobValue]]] = []
        self.written: list[tuple[Knob, KnobValue]] = []
        self.looked_for_writers = 0
        self.now = 1000.0
        self.boot_id = "boot-1"
        self.memory = {0: NodeMemory(2**30, 2**29)}
        self.kind = HostKind.KERNEL
        self.nodes = (
            Node(0, frozenset({0}), 2**30, {0: 10, 1: 20}),
            Node(1, frozenset({1}), 2**30, {0: 20, 1: 10}),
        )
        self.running: list[Process] = []
        self.unmergeable: list[Unmergeable] = []
        self.collapses: list[Collapse] = []
        self.collapse_deadline = 0.0
        self.collapse_outcome: CollapseResult | KsmdError | None = None
        self.skipped: list[Skipped] = []
        self.unseen: list[int] = []
        self.alive: set[int] = set()
        self.oom_kills: dict[str, int] = {"host": 7}
        self.gone: set[ProcessId] = set()
        self.processes_outcome: KsmdError | None = None
        self.surveys: list[float] = []
        self.survey_outcome: Survey | KsmdError | None = None
        self.slow_surveys = False
        self.waiting_surveys: list[FakeOperation[Survey]] = []
        self.duplicate_ksm_pages_looks: list[tuple[float, int]] = []
        self.duplicate_ksm_pages_outcomes: list[DuplicateKsmPages | KsmdError] = []
        self.duplicates_looks: list[int] = []
        self.duplicates_outcomes: list[DuplicatePages | KsmdError] = []
        self.frames: list[dict[int, int]] = []
        self.sharing_looks: list[tuple[list[list[int]], float]] = []
        self.sharing_outcomes: list[Sharing | KsmdError] = []
        self.sharing_outcome: Sharing | KsmdError | None = None
        self.moves: list[tuple[Move, FakeOperation[MoveResult]]] = []
        self.move_outcomes: list[MoveResult | KsmdError] = []

    @property
    def identity(self) -> HostIdentity:
        return HostIdentity(self.kind, "6.12-fake", 4096, self.boot_id)

    def clock(self) -> float:
        return self.now

    def sample(self, *, fresh: bool = False) -> Sample:
        readings: dict[str, Reading] = {knob.value: self._reading(knob) for knob in Knob}
        readings.update(self.counters)
        readings.update(self.broken)
        return Sample(self.now, readings, self.memory)

    def _reading(self, knob: Knob) -> Reading:
        if knob not in self.knobs:
            return Absent(f"reading {knob}", "this kernel does not have it")
        value = self.knobs[knob]
        if knob is Knob.RUN and self.offline:
            assert isinstance(value, int)
            return value | RUN_OFFLINE
        return value

    def read(self, knob: Knob) -> KnobValue:
        reading = self._reading(knob)
        if isinstance(reading, ReadError):
            raise reading
        assert not isinstance(reading, float)
        return reading

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> FakeOperation[KnobValue]:
        if knob in self.stuck:
            return FakeOperation(
                TimedOut(f"writing {value} to {knob}", f"its deadline of {deadline_seconds:g} s passed")
            )
        if knob in self.slow:
            operation: FakeOperation[KnobValue] = FakeOperation()
            self.waiting.append((knob, value, operation))
            return operation
        return FakeOperation(self.set(knob, value))

    def finish(self) -> None:
        """Let the slow writes take place."""
        waiting, self.waiting = self.waiting, []
        for knob, value, operation in waiting:
            operation.release(self.set(knob, value))

    def set(self, knob: Knob, value: KnobValue) -> KnobValue | KsmdError:
        """What the kernel does on a write: its answer."""
        what = f"writing {value} to {knob}"
        if self.denied or knob in self.refused:
            return Denied(what, errno_text(errno.EACCES), errno=errno.EACCES)
        if knob not in self.knobs:
            return Absent(what, "this kernel does not have it")
        if self.knobs[knob] == value:
            return value
        if KNOBS[knob].needs_unmerge and self.counters["pages_shared"]:
            return Rejected(what, errno_text(errno.EBUSY), errno=errno.EBUSY)
        if knob is Knob.PAGES_TO_SCAN and self.knobs.get(Knob.ADVISOR_MODE) == "scan-time":
            return Rejected(what, errno_text(errno.EINVAL), errno=errno.EINVAL)
        self.written.append((knob, value))
        self.put(knob, value)
        return value

    def put(self, knob: Knob, value: KnobValue) -> None:
        """A knob gets a value, by whomever, with what that does in the kernel."""
        changed = self.knobs[knob] != value
        self.knobs[knob] = value
        if knob is Knob.ADVISOR_MODE and changed:
            self.knobs[Knob.PAGES_TO_SCAN] = 500 if value == "scan-time" else 100
        if knob is Knob.RUN and value == 2:
            self.counters["pages_shared"] = self.counters["pages_sharing"] = 0

    # -- NUMA ------------------------------------------------------------------------------------------------

    def housekeeping(self) -> FakeOperation[str]:
        return FakeOperation(self.housekeeping_outcome)

    def topology(self) -> Topology:
        return Topology(self.nodes, numa=True)

    def placements(self, processes: Iterable[ProcessId]) -> FakeOperation[Placements]:
        everywhere = frozenset(node.number for node in self.nodes)
        there = [one for one in processes if one not in self.gone]
        return FakeOperation(Placements({one: self.confined.get(one, everywhere) for one in there}, self.cpusets))

    def find(self, pid: int) -> ProcessId:
        for found in (*(one.id for one in self.running), *(one.id for one in self.unmergeable)):
            if found.pid == pid:
                return found
        if pid in self.alive:
            return ProcessId(pid, 100 * pid)
        raise NoSuchProcess(f"process {pid}", "it is gone")

    def losses(self, processes: Iterable[ProcessId], cgroups: Iterable[str]) -> Losses:
        kills = {where: count for where, count in self.oom_kills.items() if where == "host" or where in cgroups}
        return Losses(kills, tuple(one for one in processes if one in self.gone))

    def processes(self) -> FakeOperation[ProcessList]:
        listed = ProcessList(tuple(self.running), tuple(self.skipped), tuple(self.unmergeable), tuple(self.unseen))
        return FakeOperation(self.processes_outcome or listed)

    def seen(self) -> Survey:
        """What a survey gives: KSM pages are a tenth of their mappings."""
        pages = {node.number: 0 for node in self.nodes}
        for found in self.running:
            for node, count in found.nodes.items():
                pages[node] += count // 10
        census = Census(self.now, pages, pages, pages, True, KsmDetection.KPAGEFLAGS, 0.01)
        demands = (
            UnmergeDemand("node 0", 3 * 2**20, 2**20),
            UnmergeDemand("host", 2**20, 2**30),
            UnmergeDemand("/a.slice", 9, 1),
        )
        return Survey(
            *(tuple(self.running), tuple(self.skipped), tuple(self.unmergeable), tuple(self.unseen)),
            time_seconds=self.now,
            topology=self.topology(),
            census=census,
            lacking="",
            demands=demands,
            cpu_seconds=0.02,
        )

    def survey(self, budget_cpu_seconds: float) -> FakeOperation[Survey]:
        self.surveys.append(budget_cpu_seconds)
        if self.slow_surveys:
            operation: FakeOperation[Survey] = FakeOperation()
            self.waiting_surveys.append(operation)
            return operation
        return FakeOperation(self.survey_outcome or self.seen())

    def duplicates(self, budget_frames: int) -> FakeOperation[DuplicatePages]:
        self.duplicates_looks.append(budget_frames)
        none = DuplicatePages(0, 0, 0, True, 0.0)
        return FakeOperation(self.duplicates_outcomes.pop(0) if self.duplicates_outcomes else none)

    def duplicate_ksm_pages(self, budget_cpu_seconds: float, most_pages: int) -> FakeOperation[DuplicateKsmPages]:
        self.duplicate_ksm_pages_looks.append((budget_cpu_seconds, most_pages))
        none = DuplicateKsmPages(self.now, 0, 0, {}, (), 0, 0, True, KsmDetection.KPAGEFLAGS, 0.0)
        return FakeOperation(self.duplicate_ksm_pages_outcomes.pop(0) if self.duplicate_ksm_pages_outcomes else none)

    def sharing(self, groups: Sequence[Sequence[ProcessId]], budget_cpu_seconds: float) -> FakeOperation[Sharing]:
        pids = [[process.pid for process in group] for group in groups]
        self.sharing_looks.append((pids, budget_cpu_seconds))
        tally = SharingTally()
        for mapped in self.frames:
            times = [sum(mapped.get(pid, 0) for pid in group) for group in pids]
            if any(times):
                tally.add({number: count for number, count in enumerate(times) if count})
        alone = tuple(tally.alone.get(number, 0) for number in range(len(groups)))
        found = Sharing(self.now, tally.sets(), alone, 1.0, True, KsmDetection.KPAGEFLAGS, 0.02)
        return FakeOperation(self.sharing_outcomes.pop(0) if self.sharing_outcomes else self.sharing_outcome or found)

    def plan(self, request: Move) -> FakeOperation[MovePlan]:
        return FakeOperation(MovePlan({0: 30}, 20, 7, {}, "on node 1", 2**20))

    def move(self, request: Move, deadline_seconds: float) -> FakeOperation[MoveResult]:
        operation: FakeOperation[MoveResult] = FakeOperation(self.move_outcomes.pop(0) if self.move_outcomes else None)
        self.moves.append((request, operation))
        return operation

    def make_huge(self, request: Collapse, deadline_seconds: float) -> FakeOperation[CollapseResult]:
        self.collapses.append(request)
        self.collapse_deadline = deadline_seconds
        return FakeOperation(self.collapse_outcome)

    def writers(self) -> FakeOperation[tuple[Writer, ...]]:
        self.looked_for_writers += 1
        operation = FakeOperation(None if self.slow_writers else self.others)
        self.waiting_writers.append(operation)
        return operation
