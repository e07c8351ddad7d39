# SPDX-License-Identifier: GPL-2.0-or-later
"""The running kernel as a host."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ksmd_ctl.errors import Denied, KsmdError, ReadError
from ksmd_ctl.host.duplicates import DuplicateKsmPages, DuplicatePages
from ksmd_ctl.host.knobs import KNOBS, KSMD_KNOBS, RUN_OFFLINE, Knob, KnobValue, same_value
from ksmd_ctl.host.memory import (
    Inventory,
    Losses,
    Placements,
    ProcessId,
    ProcessList,
    Range,
    Survey,
    Topology,
)
from ksmd_ctl.host.operation import (
    Collapse,
    CollapseResult,
    Move,
    MovePlan,
    MoveResult,
    Operation,
    Unshare,
    UnshareResult,
    in_thread,
)
from ksmd_ctl.host.sample import HostIdentity, HostKind, NodeMemory, Reading, Sample, Writer
from ksmd_ctl.host.sharing import Sharing
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.kernel.ksmd_thread import KsmdThread
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.procfs import HostFiles, NodeFiles
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, read_file
from ksmd_ctl.kernel.writers import WriterFinder
from ksmd_ctl.privileged.client import BrokerSocket, OwnBroker, RequestOperation
from ksmd_ctl.privileged.requests import (
    CountSharedFrames,
    FindDuplicateKsmPages,
    FindDuplicates,
    ListProcesses,
    MakeHugePages,
    MoveMemory,
    PlanMove,
    Request,
    SwitchMerging,
    TakeInventory,
    TakeSurvey,
    UnsharePages,
    WatchWrites,
    WriteKnob,
    request_message,
)

T = TypeVar("T")

#: How old what is around ksmd may be. Its files take the kernel and their parser longer than all of KSM's together,
#: and only some policies decide on them each second (`Host.sample` with fresh).
SURROUNDINGS_SECONDS = 5.0

# Looking at the processes of a large host takes a few seconds; in a minute something is wrong with it.
_SURVEY_SECONDS = 60.0
_WATCH_SECONDS = 10.0
# A write has a process of its own, or the broker's; those of the last few samples are asked about.
_MOST_WRITERS = 64


def open_kernel_host(root: Path = Path("/"), broker_socket: Path | None = None, *, fork: bool = False) -> KernelHost:
    """The running kernel.

    :param root: the root of sysfs and procfs: ``/``, but in tests
    :param broker_socket: the socket of the broker; without it, a child of this process is the broker
    :param fork: this process has one thread, so that child may be a fork of it
    :raises ReadError: procfs is not there
    """
    if broker_socket is None and os.geteuid() == 0:
        from ksmd_ctl.kernel.namespaces import join_host_cgroups

        # In a container without the right to do so, units can't be told.
        with suppress(Denied):
            join_host_cgroups(root)
    return KernelHost(root, OwnBroker(root, fork=fork) if broker_socket is None else BrokerSocket(broker_socket))


class KernelHost:
    """The running kernel. `ksmd_ctl.host.interface.Host` describes the methods. Not for several threads at once."""

    def __init__(self, root: Path, broker: BrokerSocket | OwnBroker) -> None:
        self._root = root
        self._broker = broker
        self._ksm = KsmFs(root)
        self._thread = KsmdThread(root)
        self._files = HostFiles(root)
        self._nodes = NodeFiles(root)
        self._writers = WriterFinder(root)
        self._knob_writers: deque[int] = deque(maxlen=_MOST_WRITERS)
        self._surroundings: dict[str, Reading] = {}
        self._memory: dict[int, NodeMemory] = {}
        self._surroundings_until = 0.0
        self._identity = HostIdentity(
            kind=HostKind.KERNEL,
            release=_line(root / "proc/sys/kernel/osrelease"),
            page_size_bytes=PAGE_SIZE,
            boot_id=_line(root / "proc/sys/kernel/random/boot_id"),
        )

    @property
    def identity(self) -> HostIdentity:
        return self._identity

    def close(self) -> None:
        """Give the descriptors back; a later call opens them again."""
        self._ksm.close()
        self._thread.close()
        self._files.close()
        self._nodes.close()

    def clock(self) -> float:
        """CLOCK_MONOTONIC: it stops while the host is suspended, as ksmd does.

        Rates and deadlines are about time in which something could happen; with CLOCK_BOOTTIME a night's suspend
        would look like a ksmd that scans nothing, and every deadline would have passed on waking up.
        """
        return time.clock_gettime(time.CLOCK_MONOTONIC)

    def sample(self, *, fresh: bool = False) -> Sample:
        """Read everything that a tick needs, as quickly one after the other as can be; it's no atomic snapshot.

        What is not ksmd's own (vmstat, memory, pressure) is up to `SURROUNDINGS_SECONDS` old, unless it is to be fresh.
        """
        readings: dict[str, Reading] = {}
        now = self.clock()
        self._ksm.sample(readings)
        if fresh or now >= self._surroundings_until:
            self._surroundings = {}
            self._memory = self._node_memory(self._files.sample(self._surroundings))
            self._surroundings_until = now + SURROUNDINGS_SECONDS
        readings.update(self._surroundings)
        self._thread.sample(readings)
        return Sample(now, readings, self._memory)

    def read(self, knob: Knob) -> KnobValue:
        return self._knob_files(knob).read(knob)

    def _knob_files(self, knob: Knob) -> KsmFs | KsmdThread:
        return self._thread if knob in KSMD_KNOBS else self._ksm

    def start(self, request: Request[T], deadline_seconds: float) -> Operation[T]:
        """Send the broker a request. Nothing is raised here: every error is the operation's."""
        worked = self._knob_writers.append if isinstance(request, WriteKnob) else None
        try:
            connection = self._broker.connect(request.description)
        except KsmdError as error:
            return Operation.failed(error)
        if worked is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        # The broker may have refused this user before it read anything: the operation reads its answer.
        with suppress(OSError):
            connection.send(request_message(request, deadline_seconds))
        return RequestOperation(connection, request, deadline_seconds, worked)

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> Operation[KnobValue]:
        try:
            if isinstance(self._broker, OwnBroker) and not KNOBS[knob].blocks:
                return Operation.done(self._knob_files(knob).write(knob, value))
            found = self.read(knob)
        except KsmdError as error:
            return Operation.failed(error)
        if same_value(knob, found, value):
            # This needs no privilege.
            return Operation.done(found)
        return self.start(WriteKnob(knob, value), deadline_seconds)

    def writers(self) -> Operation[tuple[Writer, ...]]:
        try:
            advised = self._ksm.read(Knob.ADVISOR_MODE) == "scan-time"
        except ReadError:
            advised = False
        return self._writers.find((Writer("advisor"),) if advised else ())

    def watch_writes(self) -> Operation[int]:
        """A descriptor of who writes the knobs (`ksmd_ctl.kernel.knob_writes`); it is the caller's."""
        return self.start(WatchWrites(), _WATCH_SECONDS)

    def has_written(self, pid: int) -> bool:
        """Whether a process wrote a knob for this host: this one, or one of the broker's that has answered lately."""
        return pid == os.getpid() or pid in self._knob_writers

    def housekeeping(self) -> Operation[str]:
        from ksmd_ctl.kernel.housekeeping import housekeeping_cpus

        # It looks at each thread of each virtual machine, which a tick must not wait for.
        return in_thread(lambda: housekeeping_cpus(self._root), _SURVEY_SECONDS)

    def topology(self) -> Topology:
        # Imported here and below, because most programs do not need them, nor ctypes.
        from ksmd_ctl.kernel import libnuma
        from ksmd_ctl.kernel.topology import read_topology

        try:
            run = self._ksm.read(Knob.RUN)
        except ReadError:
            run = 0
        offline = isinstance(run, int) and bool(run & RUN_OFFLINE)
        return read_topology(self._root, numa=libnuma.available(), going_offline=offline)

    def placements(self, processes: Sequence[ProcessId]) -> Operation[Placements]:
        from ksmd_ctl.kernel.placements import read_placements

        return in_thread(lambda: read_placements(processes, self._root), _SURVEY_SECONDS)

    def find(self, pid: int) -> ProcessId:
        from ksmd_ctl.kernel.proc_pid import start_time_ticks

        return ProcessId(pid, start_time_ticks(pid, self._root))

    def losses(self, processes: Sequence[ProcessId], cgroups: Sequence[str]) -> Losses:
        from ksmd_ctl.kernel.headroom import read_losses

        return read_losses(processes, cgroups, self._root)

    def processes(self) -> Operation[ProcessList]:
        return self.start(ListProcesses(), _SURVEY_SECONDS)

    def ranges(self, process: ProcessId) -> tuple[Range, ...]:
        from ksmd_ctl.kernel.proc_pid import Held
        from ksmd_ctl.kernel.ranges import read_ranges

        with Held(process, self._root) as held:
            found = read_ranges(process.pid, self._root)
            held.verify()
        return found

    def survey(self, budget_cpu_seconds: float) -> Operation[Survey]:
        return self.start(TakeSurvey(budget_cpu_seconds), 2 * _SURVEY_SECONDS + 10 * budget_cpu_seconds)

    def inventory(self, floor_bytes: int) -> Operation[Inventory]:
        return self.start(TakeInventory(floor_bytes), 10 * _SURVEY_SECONDS)

    def duplicates(self, budget_frames: int) -> Operation[DuplicatePages]:
        return self.start(FindDuplicates(budget_frames), _SURVEY_SECONDS)

    def duplicate_ksm_pages(self, budget_cpu_seconds: float, most_pages: int) -> Operation[DuplicateKsmPages]:
        deadline_seconds = 2 * _SURVEY_SECONDS + 10 * budget_cpu_seconds
        return self.start(FindDuplicateKsmPages(budget_cpu_seconds, most_pages), deadline_seconds)

    def sharing(self, groups: Sequence[Sequence[ProcessId]], budget_cpu_seconds: float) -> Operation[Sharing]:
        request = CountSharedFrames(tuple(tuple(group) for group in groups), budget_cpu_seconds)
        return self.start(request, 2 * _SURVEY_SECONDS + 10 * budget_cpu_seconds)

    def plan(self, request: Move) -> Operation[MovePlan]:
        return self.start(PlanMove(request), _SURVEY_SECONDS)

    def move(self, request: Move, deadline_seconds: float) -> Operation[MoveResult]:
        return self.start(MoveMemory(request), deadline_seconds)

    def unshare(self, request: Unshare, deadline_seconds: float) -> Operation[UnshareResult]:
        return self.start(UnsharePages(request), deadline_seconds)

    def unit_members(self, unit: str) -> Operation[tuple[ProcessId, ...]]:
        from ksmd_ctl.kernel.processes import unit_members

        return in_thread(lambda: tuple(unit_members(unit, self._root)), _SURVEY_SECONDS)

    def switch(
        self,
        request: Switch,
        method: Method | None,
        deadline_seconds: float,
        *,
        dry_run: bool = False,
    ) -> Operation[SwitchResult]:
        return self.start(SwitchMerging(request, method, dry_run), deadline_seconds)

    def make_huge(self, request: Collapse, deadline_seconds: float) -> Operation[CollapseResult]:
        return self.start(MakeHugePages(request), deadline_seconds)

    def _node_memory(self, host: NodeMemory | None) -> dict[int, NodeMemory]:
        try:
            nodes = self._nodes.sample()
        except ReadError:
            # The nodes are not known, so none is shown.
            return {}
        if nodes is not None:
            return nodes
        # A kernel without NUMA: all of its memory is node 0, as in `Topology`.
        return {} if host is None else {0: host}


def _line(path: Path) -> str:
    return read_file(path).decode("utf-8", "replace").strip()
