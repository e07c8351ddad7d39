# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests that the broker takes: a closed table.

A request is a frozen dataclass. Its fields are its parameters, which are checked when it is decoded. A write of a knob
that never waits in the kernel is done by the broker itself. Any other request runs in a process of its own
(`ksmd_ctl.privileged.worker`), which may be killed at any moment. `run` imports what it needs, so that a broker that
waits stays small.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Generic, TypeVar, get_type_hints

from ksmd_ctl.codec import between, decode, dump, encode, load
from ksmd_ctl.errors import Absent, Cancelled, ReadError, UsageError
from ksmd_ctl.host.duplicates import DuplicateKsmPages, DuplicatePages
from ksmd_ctl.host.knobs import KNOBS, RUN_OFFLINE, Knob, KnobValue
from ksmd_ctl.host.memory import LEAST_FLOOR_BYTES, Inventory, ProcessId, ProcessList, Survey
from ksmd_ctl.host.operation import (
    Collapse,
    CollapseResult,
    FloorBytes,
    Move,
    MovePlan,
    MoveResult,
    Pages,
    Progress,
    Unshare,
    UnshareResult,
)
from ksmd_ctl.host.sample import Reading
from ksmd_ctl.host.sharing import MOST_PROCESSES, Sharing
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.kernel.ksmd_thread import knob_files
from ksmd_ctl.kernel.ksmfs import KsmFs

if TYPE_CHECKING:
    from ksmd_ctl.kernel.process_pages import Walk


T_co = TypeVar("T_co", covariant=True)
AskedT = TypeVar("AskedT", Move, Unshare, Collapse)

#: The longest request: room for `ksmd_ctl.transactions.transaction.MAXIMUM_RANGES` at the highest addresses.
MESSAGE_BYTES = 128 << 10
#: The longest packet of an answer.
PACKET_BYTES = 64 << 10
#: Requests that are refused unless root asks, or the configuration allows them to the service.
ROOTS: Final = frozenset({"switch_merging"})
#: What a client sends to have its request stopped.
CANCEL = dump({"kind": "cancel"})

_PROGRESS_SECONDS = 0.2

# A list of each second CPU of 1,500.
_CPUS_CHARACTERS = 4096

# A survey of processes ends before its deadline (`ksmd_ctl.privileged.host`), and lists the ones that it left out.
_PROCESSES_SECONDS = 45.0

CpuSeconds = Annotated[float, between(0, 3600)]


class Context:
    """The surroundings of a running request.

    :ivar root: the root of sysfs and procfs
    :ivar uid: of the client
    """

    def __init__(self, root: Path, report: Callable[[Progress], None] = lambda _: None, uid: int | None = None) -> None:
        self.root = root
        self.uid = os.geteuid() if uid is None else uid
        self._report = report
        self._reported_at = -1e9
        self._defers = False
        self._stopped = False

    def stopping(self) -> bool:
        """Whether it has been asked to stop."""
        return self._stopped

    def report(self, progress: Progress) -> None:
        """Report progress, at most a few times a second: each report wakes the client."""
        now = time.monotonic()
        if now - self._reported_at >= _PROGRESS_SECONDS:
            self._reported_at = now
            self._report(progress)

    def defer_cancel(self) -> None:
        """From here on a cancel interrupts no system call: the request calls `stopping` often."""
        self._defers = True

    def stop(self, *_: object) -> None:
        """Stop the request: a signal handler.

        :raises Cancelled: unless that is deferred, so that a system call that waits is not restarted
        """
        self._stopped = True
        if not self._defers:
            # The broker adds the reason.
            raise Cancelled("the request", "")


class Request(ABC, Generic[T_co]):
    """Something that needs privilege.

    :cvar name: its name in messages
    :cvar compares_contents: its result depends on which pages of different owners have the same content
    :cvar gives_descriptor: its result is a descriptor, which the client gets with the answer (SCM_RIGHTS, unix(7)). It
        does not block
    """

    __slots__ = ()
    name: ClassVar[str]
    compares_contents: ClassVar[bool] = False
    gives_descriptor: ClassVar[bool] = False

    @property
    def description(self) -> str:
        """What it does, as a phrase for people and logs: ``un-merging pages of process 1234``."""
        return f"the request {self.name}"

    @property
    def result(self) -> object:
        """The type of its result: what `run` is declared to return."""
        return get_type_hints(self.run)["return"]

    @property
    def blocks(self) -> bool:
        """It may take long or wait in the kernel; otherwise it needs no process of its own."""
        return True

    @property
    def queue(self) -> str:
        """Requests of one queue are served one after the other and need no slot; empty for those that need one."""
        return ""

    def check(self) -> None:
        """Check what the types of its fields don't say.

        :raises ValueError: it is wrong; the text says what
        """

    @abstractmethod
    def run(self, context: Context) -> T_co:
        """Do it.

        :raises KsmdError: it failed
        """

    def state(self, root: Path) -> str:
        """A phrase: the state that it left when it was stopped; empty if nothing has changed."""
        return ""

    def left_behind(self) -> str:
        """A phrase: what will happen if its process can't be ended."""
        return "it ends when the kernel call returns"


@dataclass(frozen=True, slots=True)
class WriteKnob(Request[KnobValue]):
    """Give a knob a value: `KsmFs.write`, `KsmdThread.write`.

    :raises Refused: run = 2, for which there is no room, and it is not root that asks
    """

    name: ClassVar[str] = "write_knob"

    knob: Knob
    value: KnobValue

    @property
    def description(self) -> str:
        return f"setting {self.knob} to {self.value}"

    @property
    def blocks(self) -> bool:
        return KNOBS[self.knob].blocks

    @property
    def queue(self) -> str:
        return f"writing {self.knob}"

    def check(self) -> None:
        # Which values the knob takes, the error of the write says. But "2" is no way around what run = 2 is bounded by.
        if isinstance(self.value, str):
            if not KNOBS[self.knob].words:
                raise ValueError(f"{self.knob} takes a number")
            if len(self.value) > (most := _CPUS_CHARACTERS if KNOBS[self.knob].cpus else 64):
                raise ValueError(f"the value is longer than {most} characters")
        else:
            between(-(1 << 63), (1 << 64) - 1)(self.value)

    def run(self, context: Context) -> KnobValue:
        if self.knob is Knob.RUN and self.value == 2:
            from ksmd_ctl.privileged.unmerging import need_room, spread_over_nodes

            if context.uid != 0:
                need_room(context.root)
            spread_over_nodes(context.root)
        with closing(knob_files(self.knob, context.root)) as files:
            return files.write(self.knob, self.value)

    def state(self, root: Path) -> str:
        with closing(knob_files(self.knob, root)) as files:
            try:
                # Reading takes no lock of the kernel's (mm/ksm.c, run_show), so this can't wait for the writer.
                return f"{self.knob} reads {files.read(self.knob)} now"
            except ReadError as error:
                return f"{self.knob} can't be read: {error.why}"

    def left_behind(self) -> str:
        # Who writes these waits in the kernel for ksmd (mm/ksm.c:run_store, ksm_thread_mutex), where no signal reaches
        # it. Once it is its turn it writes, and then the signal that waits ends it.
        return f"it writes {self.knob} = {self.value} once ksmd lets it, and ends then"


@dataclass(frozen=True, slots=True)
class WatchWrites(Request[int]):
    """Give the client a descriptor of who writes the knobs: `ksmd_ctl.kernel.knob_writes.WriteReader`."""

    name: ClassVar[str] = "watch_writes"
    description: ClassVar[str] = "watching who writes the knobs"
    gives_descriptor: ClassVar[bool] = True

    @property
    def blocks(self) -> bool:
        return False

    def run(self, context: Context) -> int:
        from ksmd_ctl.kernel.knob_writes import open_writes

        return open_writes(context.root)


@dataclass(frozen=True, slots=True)
class ListProcesses(Request[ProcessList]):
    """Look at every process: `ksmd_ctl.kernel.processes.Surveyor`."""

    name: ClassVar[str] = "processes"
    description: ClassVar[str] = "looking at processes"

    def run(self, context: Context) -> ProcessList:
        return self.survey(context, _PROCESSES_SECONDS)[0]

    def survey(self, context: Context, most_seconds: float) -> tuple[ProcessList, Mapping[int, Walk]]:
        """The processes, and what their page tables showed, by pid."""
        from ksmd_ctl.kernel import libnuma
        from ksmd_ctl.kernel.detection import reader_or_none
        from ksmd_ctl.kernel.processes import Surveyor
        from ksmd_ctl.kernel.topology import read_frame_map, read_topology

        context.defer_cancel()
        # Where it can't be seen which pages are merged, the processes still say how many.
        with reader_or_none(context.root) as reader:
            surveyor = Surveyor(
                read_topology(context.root, numa=libnuma.available()),
                read_frame_map(context.root),
                reader,
                root=context.root,
            )
            found = surveyor.all(context.report, context.stopping, most_seconds=most_seconds)
            listed = ProcessList(found, tuple(surveyor.skipped), tuple(surveyor.unmergeable), tuple(surveyor.denied))
            return listed, surveyor.walks


@dataclass(frozen=True, slots=True)
class TakeSurvey(Request[Survey]):
    """Nodes, processes, census and what un-merging takes, in one process: to start it is what costs on a quiet host."""

    name: ClassVar[str] = "survey"
    description: ClassVar[str] = "looking at nodes and processes"

    budget_cpu_seconds: CpuSeconds

    def run(self, context: Context) -> Survey:
        from ksmd_ctl.kernel import libnuma
        from ksmd_ctl.kernel.census import take
        from ksmd_ctl.kernel.detection import open_reader
        from ksmd_ctl.kernel.inventory import survey_demands
        from ksmd_ctl.kernel.reading import reading_seconds
        from ksmd_ctl.kernel.topology import read_frame_map, read_topology

        context.defer_cancel()
        began, spent = time.monotonic(), time.process_time()
        readings: dict[str, Reading] = {}
        with closing(KsmFs(context.root)) as ksm:
            run = ksm.read(Knob.RUN)
            ksm.sample(readings)
        shared = readings["pages_shared"]
        offline = isinstance(run, int) and bool(run & RUN_OFFLINE)
        # Of pages that are freed the counter learns when ksmd comes by.
        scanning = isinstance(run, int) and run & ~RUN_OFFLINE == 1
        census, lacking = None, ""
        try:
            with open_reader(context.root) as reader:
                census = take(
                    self.budget_cpu_seconds,
                    reader=reader,
                    frames=read_frame_map(context.root),
                    pages_shared=shared if scanning and isinstance(shared, int) else None,
                    root=context.root,
                    stop=context.stopping,
                )
        except Absent as error:
            lacking = str(error)
        listed, walks = ListProcesses().survey(context, 2 * _PROCESSES_SECONDS)
        topology = read_topology(context.root, numa=libnuma.available(), going_offline=offline)
        freed = census.pages if census else None
        demands = survey_demands(listed.processes, listed.skipped, walks, topology, freed, context.root)
        return Survey(
            *(listed.processes, listed.skipped, listed.unmergeable, listed.denied),
            time_seconds=began,
            topology=topology,
            census=census,
            lacking=lacking,
            demands=demands,
            cpu_seconds=time.process_time() - spent + reading_seconds(),
        )


@dataclass(frozen=True, slots=True)
class TakeInventory(Request[Inventory]):
    """Look at everything that is mergeable: `ksmd_ctl.kernel.inventory.take`."""

    name: ClassVar[str] = "inventory"
    description: ClassVar[str] = "looking at mergeable memory"

    floor_bytes: FloorBytes

    def run(self, context: Context) -> Inventory:
        from ksmd_ctl.kernel.inventory import take

        context.defer_cancel()
        return take(self.floor_bytes, root=context.root, progress=context.report, stop=context.stopping)


@dataclass(frozen=True, slots=True)
class FindDuplicates(Request[DuplicatePages]):
    """Compare contents of mergeable memory: `ksmd_ctl.kernel.duplicates`. Only counts leave the process.

    :raises Refused: KSM does not run, and it is not root that asks
    """

    name: ClassVar[str] = "duplicates"
    description: ClassVar[str] = "comparing the contents of mergeable memory"
    compares_contents: ClassVar[bool] = True

    budget_frames: Annotated[int, between(1, 1 << 44)]

    def run(self, context: Context) -> DuplicatePages:
        from ksmd_ctl.kernel.duplicates import find_duplicates

        context.defer_cancel()
        return find_duplicates(self.budget_frames, uid=context.uid, root=context.root, stop=context.stopping)


@dataclass(frozen=True, slots=True)
class FindDuplicateKsmPages(Request[DuplicateKsmPages]):
    """Find KSM pages that max_page_sharing does not explain: `ksmd_ctl.kernel.duplicate_ksm_pages`."""

    name: ClassVar[str] = "duplicate_ksm_pages"
    description: ClassVar[str] = "looking for KSM pages with equal contents"

    budget_cpu_seconds: CpuSeconds
    most_pages: Pages

    def run(self, context: Context) -> DuplicateKsmPages:
        from ksmd_ctl.kernel.detection import open_reader
        from ksmd_ctl.kernel.duplicate_ksm_pages import find_duplicate_ksm_pages

        context.defer_cancel()
        with open_reader(context.root) as reader:
            return find_duplicate_ksm_pages(
                self.budget_cpu_seconds,
                self.most_pages,
                reader=reader,
                uid=context.uid,
                root=context.root,
                stop=context.stopping,
            )


@dataclass(frozen=True, slots=True)
class CountSharedFrames(Request[Sharing]):
    """Count the frames that groups of processes share: `ksmd_ctl.kernel.sharing`. Only counts leave the process."""

    name: ClassVar[str] = "sharing"
    description: ClassVar[str] = "looking at who shares merged pages with whom"

    groups: tuple[tuple[ProcessId, ...], ...]
    budget_cpu_seconds: CpuSeconds

    def check(self) -> None:
        pids = [process.pid for group in self.groups for process in group]
        if len(pids) > MOST_PROCESSES:
            raise ValueError(f"it has more than {MOST_PROCESSES} processes")
        if len(set(pids)) < len(pids):
            raise ValueError("it has a process twice")

    def run(self, context: Context) -> Sharing:
        from ksmd_ctl.kernel.detection import open_reader
        from ksmd_ctl.kernel.sharing import count_shared

        context.defer_cancel()
        with open_reader(context.root) as reader:
            return count_shared(
                self.groups,
                self.budget_cpu_seconds,
                reader=reader,
                uid=context.uid,
                root=context.root,
                stop=context.stopping,
            )


def above_floor(request: AskedT) -> AskedT:
    """The same, which leaves `LEAST_FLOOR_BYTES` free whatever it says."""
    return replace(request, floor_bytes=max(request.floor_bytes, LEAST_FLOOR_BYTES))


@dataclass(frozen=True, slots=True)
class PlanMove(Request[MovePlan]):
    """Find out what a move would do: `ksmd_ctl.kernel.migrate.plan`."""

    name: ClassVar[str] = "plan_move"

    move: Move

    @property
    def description(self) -> str:
        return f"planning to move memory of process {self.move.process.pid} to node {self.move.to}"

    def run(self, context: Context) -> MovePlan:
        from ksmd_ctl.kernel.migrate import plan

        return plan(above_floor(self.move), root=context.root)


@dataclass(frozen=True, slots=True)
class MoveMemory(Request[MoveResult]):
    """Move a process's memory: `ksmd_ctl.kernel.migrate.move`."""

    name: ClassVar[str] = "move"

    move: Move

    @property
    def description(self) -> str:
        return f"moving memory of process {self.move.process.pid} to node {self.move.to}"

    def run(self, context: Context) -> MoveResult:
        from ksmd_ctl.kernel.migrate import move

        context.defer_cancel()
        return move(above_floor(self.move), root=context.root, progress=context.report, stop=context.stopping)

    def state(self, root: Path) -> str:
        return "what was moved until then stays where it is now"


@dataclass(frozen=True, slots=True)
class UnsharePages(Request[UnshareResult]):
    """Un-merge pages of processes: `ksmd_ctl.kernel.unshare.unshare`."""

    name: ClassVar[str] = "unshare"

    unshare: Unshare

    @property
    def description(self) -> str:
        pids = {part.process.pid for part in self.unshare.parts}
        if len(pids) == 1:
            return f"un-merging pages of process {pids.pop()}"
        return f"un-merging pages of {len(pids)} processes"

    def run(self, context: Context) -> UnshareResult:
        from ksmd_ctl.kernel.detection import open_reader
        from ksmd_ctl.kernel.unshare import unshare

        context.defer_cancel()
        with open_reader(context.root) as reader:
            return unshare(
                above_floor(self.unshare),
                reader=reader,
                root=context.root,
                progress=context.report,
                stop=context.stopping,
            )

    def state(self, root: Path) -> str:
        return "what was un-merged until then stays un-merged until ksmd scans it again"


@dataclass(frozen=True, slots=True)
class MakeHugePages(Request[CollapseResult]):
    """Make huge pages of memory of processes: `ksmd_ctl.kernel.collapse.make_huge`."""

    name: ClassVar[str] = "make_huge"

    collapse: Collapse

    @property
    def description(self) -> str:
        process = self.collapse.process
        whose = f"unit {self.collapse.unit!a}" if process is None else f"process {process.pid}"
        return f"making huge pages of memory of {whose}"

    def check(self) -> None:
        if (self.collapse.process is None) == (not self.collapse.unit):
            raise ValueError("it is either one process or one unit")

    def run(self, context: Context) -> CollapseResult:
        from ksmd_ctl.kernel.collapse import make_huge

        context.defer_cancel()
        return make_huge(above_floor(self.collapse), root=context.root, progress=context.report, stop=context.stopping)

    def state(self, root: Path) -> str:
        return "what became huge pages until then stays so"


@dataclass(frozen=True, slots=True)
class SwitchMerging(Request[SwitchResult]):
    """Switch merging on or off for a process: `ksmd_ctl.switch.methods`."""

    name: ClassVar[str] = "switch_merging"

    switch: Switch
    method: Method | None = None
    dry_run: bool = False

    @property
    def description(self) -> str:
        return f"switching merging {'on' if self.switch.on else 'off'} for process {self.switch.process.pid}"

    def check(self) -> None:
        if self.switch.ranges and self.method is Method.QMP:
            raise ValueError("a monitor switches no ranges")

    def run(self, context: Context) -> SwitchResult:
        from ksmd_ctl.switch.methods import switch_merging

        context.defer_cancel()
        return switch_merging(
            replace(self.switch, floor_bytes=max(self.switch.floor_bytes, LEAST_FLOOR_BYTES)),
            self.method,
            dry_run=self.dry_run,
            root=context.root,
            progress=context.report,
            stop=context.stopping,
        )

    def state(self, root: Path) -> str:
        return "a part of its memory may be switched"


#: Every request there is, by its name.
REQUESTS: dict[str, type[Request[Any]]] = {
    kind.name: kind
    for kind in (
        WriteKnob,
        WatchWrites,
        ListProcesses,
        TakeSurvey,
        TakeInventory,
        FindDuplicates,
        FindDuplicateKsmPages,
        CountSharedFrames,
        PlanMove,
        MoveMemory,
        UnsharePages,
        MakeHugePages,
        SwitchMerging,
    )
}


@dataclass(frozen=True, slots=True)
class RequestMessage:
    """What a client sends first."""

    kind: str
    request: str
    parameters: object
    deadline_seconds: Annotated[float, between(0.001, 24 * 3600)]


def request_message(request: Request[Any], deadline_seconds: float) -> bytes:
    """The message that asks for a request."""
    return dump(encode(RequestMessage("request", request.name, encode(request), float(deadline_seconds))))


def parse_request(data: bytes) -> tuple[Request[Any], float]:
    """The request in a message, and its deadline in seconds.

    :raises UsageError: there is none
    """
    try:
        if len(data) > MESSAGE_BYTES:
            raise ValueError(f"it is longer than {MESSAGE_BYTES} bytes")
        message = decode(RequestMessage, load(data), "the message")
        if message.kind != "request":
            raise ValueError("its kind is not request")
        kind = REQUESTS.get(message.request)
        if kind is None:
            raise ValueError(f"there is no request {ascii(message.request)[:60]}")
        request = decode(kind, message.parameters, "parameters")
        request.check()
        return request, message.deadline_seconds
    except (ValueError, OverflowError) as error:
        raise UsageError("reading a request", str(error)) from error
