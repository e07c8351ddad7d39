# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries decisions out: the only place that starts an operation which changes a host.

Before the first write of a knob, what it was is on disk (`ksmd_ctl.control.state`). Writes are done one after the
other, in the order that they are given in; none is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from ksmd_ctl.control.migration import Order, Part, check_target, members, named_process
from ksmd_ctl.control.migration import Outcome as MoveOutcome
from ksmd_ctl.control.reconcile import Outcome, Write
from ksmd_ctl.control.state import Journal
from ksmd_ctl.control.stop import NEEDS_UNMERGE, Stopped, StopPlan
from ksmd_ctl.control.transaction import LookStep, MoveStep, Put, UnshareStep
from ksmd_ctl.errors import Busy, Cancelled, KsmdError, Refused, Rejected, TimedOut
from ksmd_ctl.host.memory import Inventory, Losses, ProcessId, ProcessList, Topology
from ksmd_ctl.host.operation import (
    Move,
    MovePlan,
    MoveResult,
    Operation,
    Steps,
    Unshare,
    UnshareResult,
    finish,
    outcome,
    waited,
)
from ksmd_ctl.host.sample import HostIdentity, Sample, Writer
from ksmd_ctl.knobs import KNOBS, Knob, KnobValue

__all__ = [
    "BUSY_PAUSE_SECONDS",
    "BUSY_SECONDS",
    "DEADLINE_SECONDS",
    "MOVE_DEADLINE_SECONDS",
    "Executor",
    "KnobHost",
    "MemoryHost",
    "Migration",
    "MovingHost",
    "perform",
]

#: `run` and two more wait for ksmd's batch: at the greatest pages_to_scan that is long, and then it is an error.
DEADLINE_SECONDS: Final = 30.0

# After the deadline: to end the process that writes, or find that it can't be ended, and to say so on a busy host.
_ANSWER_SECONDS: Final = 15.0

# What is refused because too much is going on is asked for again each so often, for so long altogether.
BUSY_PAUSE_SECONDS: Final = 0.25
BUSY_SECONDS: Final = 10.0

#: For the memory of one process: at 1 GB a second, which is slow, it is enough for all that fits into a machine.
MOVE_DEADLINE_SECONDS: Final = 3600.0


class KnobHost(Protocol):
    """As much of `ksmd_ctl.host.interface.Host` as holding knobs takes."""

    @property
    def identity(self) -> HostIdentity: ...

    def clock(self) -> float: ...

    def sample(self, *, fresh: bool = False) -> Sample: ...

    def read(self, knob: Knob) -> KnobValue: ...

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> Operation[KnobValue]: ...

    def writers(self) -> Operation[tuple[Writer, ...]]: ...


class MovingHost(Protocol):
    """As much of `ksmd_ctl.host.interface.Host` as moving memory takes."""

    def topology(self) -> Topology: ...

    def find(self, pid: int) -> ProcessId: ...

    def processes(self) -> Operation[ProcessList]: ...

    def plan(self, request: Move) -> Operation[MovePlan]: ...

    def move(self, request: Move, deadline_seconds: float) -> Operation[MoveResult]: ...


class Migration(Operation[MoveOutcome]):
    """Moves the memory of one process after the other.

    :raises KsmdError: nothing of the kind can be done on this host
    """

    def __init__(self, host: MovingHost, order: Order) -> None:
        order.check()
        check_target(host.topology(), order.to)
        waiting: deque[tuple[ProcessId, str]] = deque()
        if order.pid is not None:
            waiting.append((named_process(host, order.pid), ""))
        super().__init__(self._migrate(host, order, waiting))

    def _migrate(self, host: MovingHost, order: Order, waiting: deque[tuple[ProcessId, str]]) -> Steps[MoveOutcome]:
        """
        :raises KsmdError: nothing could be done about any process; then nothing was moved
        """
        result = MoveOutcome(order)
        if order.pid is None:
            found = yield from waited(host.processes())
            waiting.extend((process.id, process.name) for process in members(found.processes, order.unit))
        result.cancelled = self.cancelled
        while waiting and not result.cancelled:
            process, name = waiting.popleft()
            request = order.move(process)
            moving: Operation[MoveResult] | Operation[MovePlan] = (
                host.plan(request) if order.dry_run else host.move(request, MOVE_DEADLINE_SECONDS)
            )
            yield moving
            came: MoveResult | MovePlan | KsmdError = outcome(moving)
            result.parts.append(Part(process, name, came))
            # What was moved stays where it is then.
            result.cancelled = self.cancelled or isinstance(came, Cancelled)
        result.untouched = len(waiting)
        if result.nothing and not result.cancelled:
            what = f"process {order.pid}" if order.pid is not None else f"unit {order.unit}"
            raise Refused(
                "what is to be moved",
                f"{what} has no mergeable memory that could be moved",
                hint="see `ksmd-ctl processes`; --everything moves memory that is not mergeable, too",
            )
        errors = result.errors()
        if errors and len(errors) == len(result.parts) and not result.cancelled:
            raise errors[0]
        return result


class MemoryHost(KnobHost, Protocol):
    """As much of `ksmd_ctl.host.interface.Host` as transactions take."""

    def losses(self, processes: Sequence[ProcessId], cgroups: Sequence[str]) -> Losses: ...

    def topology(self) -> Topology: ...

    def find(self, pid: int) -> ProcessId: ...

    def processes(self) -> Operation[ProcessList]: ...

    def inventory(self, floor_bytes: int) -> Operation[Inventory]: ...

    def move(self, request: Move, deadline_seconds: float) -> Operation[MoveResult]: ...

    def unshare(self, request: Unshare, deadline_seconds: float) -> Operation[UnshareResult]: ...


def perform(
    host: MemoryHost, step: Put | UnshareStep | MoveStep | LookStep
) -> Operation[KnobValue] | Operation[UnshareResult] | Operation[MoveResult] | Operation[Inventory]:
    """Begin with a step of a transaction (`ksmd_ctl.control.carrier`), which has its own journal."""
    match step:
        case Put(knob, value, deadline_seconds):
            return host.write(knob, value, deadline_seconds)
        case UnshareStep(unshare, deadline_seconds):
            return host.unshare(unshare, deadline_seconds)
        case MoveStep(move, deadline_seconds):
            return host.move(move, deadline_seconds)
        case LookStep(floor_bytes):
            return host.inventory(floor_bytes)


class Executor:
    """Writes knobs of one host, for whoever holds its lock."""

    def __init__(self, host: KnobHost, journal: Journal) -> None:
        self._host = host
        self.journal = journal
        self._waiting: deque[Write] = deque()
        self._current: tuple[Write, Operation[KnobValue]] | None = None
        self._outcomes: list[Outcome] = []

    @property
    def in_flight(self) -> frozenset[Knob]:
        """Knobs whose writes have begun or wait for their turn."""
        if self._current is None:
            return frozenset()
        return frozenset({self._current[0].knob, *(write.knob for write in self._waiting)})

    def fileno(self) -> int:
        """A descriptor that gets readable when `poll` has something to do; -1 where there is none."""
        return -1 if self._current is None else self._current[1].fileno()

    def begin(self, found: Mapping[Knob, KnobValue], writes: Iterable[Write]) -> None:
        """Note what knobs are at before the service has to do with them, and begin with writes of some of these.

        What comes of the writes, `take_outcomes` tells; without a note on disk that is the error.
        """
        writes = tuple(writes)
        try:
            self.journal.note(found, {write.knob: write.value for write in writes})
        except KsmdError as error:
            self._outcomes.extend(Outcome(write, error) for write in writes)
            return
        self._waiting.extend(writes)
        self.poll()

    def gave_back(self, values: Mapping[Knob, KnobValue]) -> None:
        """Note that knobs are as they were before the start, and are nobody's concern from now on."""
        pages = self.journal.entries.get(Knob.PAGES_TO_SCAN)
        if values.get(Knob.ADVISOR_MODE) == "scan-time" and pages is not None:
            # The kernel's advisor sets it again, as it did before.
            values = {**values, Knob.PAGES_TO_SCAN: pages.at_first}
        # Not worth a failure where it can't be written: a stop then finds them as they were.
        with contextlib.suppress(KsmdError):
            self.journal.settle(values)

    def poll(self) -> None:
        """Go on as far as nothing has to be waited for."""
        while True:
            if self._current is None:
                if not self._waiting:
                    return
                write = self._waiting.popleft()
                self._current = write, self._host.write(write.knob, write.value, DEADLINE_SECONDS)
            write, operation = self._current
            if not operation.poll():
                return
            self._current = None
            self._outcomes.append(Outcome(write, outcome(operation)))

    def take_outcomes(self) -> tuple[Outcome, ...]:
        """What has come of writes since the last call."""
        if not self._outcomes:
            return ()
        outcomes, self._outcomes = tuple(self._outcomes), []
        return outcomes

    def wait(self) -> None:
        """Wait for the writes that have begun, and drop those that wait for their turn. For the end of the service."""
        self._waiting.clear()
        if self._current is not None:
            write, operation = self._current
            self._current = None
            self._outcomes.append(Outcome(write, _finished(operation)))

    def carry_out(self, plan: StopPlan) -> Stopped:
        """Carry a stop out, and wait for it."""
        left = dict(plan.left)
        settled = dict(plan.settled)
        written = []
        stuck = ""
        for write in plan.writes:
            if stuck and KNOBS[write.knob].blocks:
                left[write.knob] = stuck
                settled.pop(write.knob, None)
                continue
            result = self._insist(write)
            if isinstance(result, TimedOut | Busy) and KNOBS[write.knob].blocks:
                # Others that wait for ksmd would wait as long, and the service manager does not for ever.
                stuck = f"it was not tried, for {write.knob} waits for ksmd"
            if isinstance(result, KsmdError):
                busy = isinstance(result, Rejected) and result.errno == errno.EBUSY
                left[write.knob] = NEEDS_UNMERGE if busy else result.why
                settled.pop(write.knob, None)
            else:
                written.append(write)
        self.journal.settle(settled, ended=True)
        return Stopped(tuple(written), left)

    def _insist(self, write: Write) -> KnobValue | KsmdError:
        """Write a knob, and wait for it: again where too much is going on, for nobody tries it later."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            result = _finished(self._host.write(write.knob, write.value, DEADLINE_SECONDS))
            if not isinstance(result, Busy) or time.monotonic() >= until:
                return result
            time.sleep(BUSY_PAUSE_SECONDS)


def _finished(operation: Operation[KnobValue]) -> KnobValue | KsmdError:
    try:
        # The host keeps the deadline; this is for one that doesn't answer at all.
        return finish(operation, DEADLINE_SECONDS + _ANSWER_SECONDS)
    except KsmdError as error:
        return error
