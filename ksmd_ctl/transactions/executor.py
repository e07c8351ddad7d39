# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries decisions out on a host.

- `Executor` writes the knobs of a tick, one after the other, and those of a stop. Before the first write of a knob its
  value is on disk (`ksmd_ctl.knobs.saved_knobs`).
- `TransactionRunner` carries a transaction out, step by step, for the service and for a command.
- `perform` begins a step of a transaction.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final, TypeVar

from ksmd_ctl.errors import Busy, Cancelled, HostError, KsmdError, Refused, Rejected, TimedOut
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.memory import Inventory, ProcessId
from ksmd_ctl.host.operation import (
    MoveResult,
    Operation,
    Progress,
    Steps,
    Timer,
    UnshareResult,
    finish,
    outcome,
    readable,
)
from ksmd_ctl.knobs.reconcile import Write, WriteResult
from ksmd_ctl.knobs.saved_knobs import NEEDS_UNMERGE, SavedKnobs, Stopped, StopPlan
from ksmd_ctl.transactions.journal import TransactionJournal, transaction_document
from ksmd_ctl.transactions.plan import Limits, Plan, lacking_room
from ksmd_ctl.transactions.transaction import (
    LookStep,
    MoveStep,
    Pause,
    Phase,
    Put,
    Result,
    Step,
    TransactionState,
    UnshareStep,
    begin,
    next_step,
)
from ksmd_ctl.transactions.transitions import StepResult, abandoned, counted, on_result, planned_processes, recovered

T = TypeVar("T")

#: `run` and two more wait for ksmd's batch: at the greatest pages_to_scan that is long, and then it is an error.
DEADLINE_SECONDS: Final = 30.0

# After the deadline: to end the process that writes, or find that it can't be ended, and to say so on a busy host.
_ANSWER_SECONDS: Final = 15.0

# What is refused because too much is going on is asked for again each so often, for so long altogether.
BUSY_PAUSE_SECONDS: Final = 0.25
BUSY_SECONDS: Final = 10.0


def perform(
    host: Host, step: Put | UnshareStep | MoveStep | LookStep
) -> Operation[KnobValue | UnshareResult | MoveResult | Inventory]:
    """Begin a step."""
    match step:
        case Put(knob, value, deadline_seconds):
            return host.write(knob, value, deadline_seconds)
        case UnshareStep():
            return step.begin(host)
        case MoveStep(move, deadline_seconds):
            return host.move(move, deadline_seconds)
        case LookStep(floor_bytes):
            return host.inventory(floor_bytes)


class Executor:
    """Writes knobs of one host, for whoever holds its lock."""

    def __init__(self, host: Host, journal: SavedKnobs) -> None:
        self._host = host
        self.journal = journal
        # The first one has begun.
        self._waiting: deque[Write] = deque()
        self._writing: Operation[None] = Operation.done(None)
        self._outcomes: list[WriteResult] = []

    @property
    def in_flight(self) -> frozenset[Knob]:
        """Knobs whose writes have begun or wait for their turn."""
        return frozenset(write.knob for write in self._waiting)

    def fileno(self) -> int:
        """A descriptor that gets readable when `poll` has something to do; -1 where there is none."""
        return self._writing.fileno()

    def begin(self, found: Mapping[Knob, KnobValue], writes: Iterable[Write]) -> None:
        """Save the values that knobs have before the service changes them, and begin to write some of these knobs.

        `take_outcomes` has the results; where the values can't be saved, that error is the result of each write.
        """
        writes = tuple(writes)
        try:
            self.journal.note(found, {write.knob: write.value for write in writes})
        except KsmdError as error:
            self._outcomes.extend(WriteResult(write, error) for write in writes)
            return
        idle = not self._waiting
        self._waiting.extend(writes)
        if idle:
            self._writing = Operation(self._write())
        self.poll()

    def _write(self) -> Steps[None]:
        while self._waiting:
            write = self._waiting[0]
            writing = self._host.write(write.knob, write.value, DEADLINE_SECONDS)
            yield writing
            self._waiting.popleft()
            self._outcomes.append(WriteResult(write, outcome(writing)))

    def gave_back(self, values: Mapping[Knob, KnobValue]) -> None:
        """Note that knobs have the values from before the start again, and are not held any more."""
        pages = self.journal.entries.get(Knob.PAGES_TO_SCAN)
        if values.get(Knob.ADVISOR_MODE) == "scan-time" and pages is not None:
            # The kernel's advisor sets it again.
            values = {**values, Knob.PAGES_TO_SCAN: pages.at_first}
        # Not worth a failure where it can't be written: a stop then finds them as they were.
        with contextlib.suppress(KsmdError):
            self.journal.settle(values)

    def poll(self) -> None:
        """Go on as far as nothing has to be waited for."""
        self._writing.poll()

    def take_outcomes(self) -> tuple[WriteResult, ...]:
        """The results of writes since the last call."""
        outcomes, self._outcomes = tuple(self._outcomes), []
        return outcomes

    def wait(self) -> None:
        """Wait for the write that has begun, and drop those that wait for their turn. For the end of the service."""
        while len(self._waiting) > 1:
            self._waiting.pop()
        _finished(self._writing)

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
                # Others that wait for ksmd would wait as long, and systemd limits the time of a stop.
                stuck = f"not tried: the write of {write.knob} is still waiting for ksmd"
            if isinstance(result, KsmdError):
                busy = isinstance(result, Rejected) and result.errno == errno.EBUSY
                left[write.knob] = NEEDS_UNMERGE if busy else result.why
                settled.pop(write.knob, None)
            else:
                written.append(write)
        self.journal.settle(settled, ended=True)
        return Stopped(tuple(written), left)

    def _insist(self, write: Write) -> KnobValue | KsmdError:
        """Write a knob, and wait for it. If the host is too busy, try again: nobody does later."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            result = _finished(self._host.write(write.knob, write.value, DEADLINE_SECONDS))
            if not isinstance(result, Busy) or time.monotonic() >= until:
                return result
            time.sleep(BUSY_PAUSE_SECONDS)


def _finished(operation: Operation[T]) -> T | KsmdError:
    try:
        # The host keeps the deadline; this is for one that doesn't answer at all.
        return finish(operation, DEADLINE_SECONDS + _ANSWER_SECONDS)
    except KsmdError as error:
        return error


class TransactionRunner(Operation[TransactionState]):
    """One transaction, from its first step or from where the journal has it, to its end.

    :ivar state: where it is
    :ivar journal: has that on disk
    :param report: given the transaction's document whenever the phase or the progress is another one
    """

    def __init__(
        self,
        host: Host,
        executor: Executor,
        journal: TransactionJournal,
        limits: Limits,
        state: TransactionState,
        report: Callable[[Mapping[str, object]], None] = lambda _: None,
    ) -> None:
        self.state = replace(state, carrier=_own_process(host))
        self._host = host
        self._executor = executor
        self.journal = journal
        self._limits = limits
        self._report = report
        self._sample = host.sample(fresh=True)
        self._operation: Operation[object] | None = None
        self._why = ""
        self._hurried = False
        self._reported = Progress()
        super().__init__(self._carry_out())

    @classmethod
    def of_plan(
        cls,
        host: Host,
        executor: Executor,
        journal: TransactionJournal,
        limits: Limits,
        plan: Plan,
        who: str,
        report: Callable[[Mapping[str, object]], None] = lambda _: None,
        holds: Callable[[Knob], bool] = lambda _: False,
        *,
        force: bool = False,
    ) -> TransactionRunner:
        """A transaction that carries a plan out. What there was before is on disk afterwards, and nothing is changed.

        Where nothing has to be changed it is over, and the journal doesn't have it.

        :param holds: whether the configuration holds a knob; any other that a person sets is the person's
        :param force: it was asked for although there is too little room somewhere
        :raises Refused: another one is under way
        :raises HostError: the journal can't be written
        """
        if journal.running is not None:
            raise Refused(
                "carrying out a transaction",
                f"another one is under way ({journal.running.who}, in the phase {journal.running.phase})",
                hint="`ksmd-ctl status` shows it; one that was interrupted goes on with `ksmd-ctl set --recover`",
            )
        sample = host.sample(fresh=True)
        forced = lacking_room(plan, limits.floor_bytes) if force else ()
        kills = host.losses((), plan.cgroups).oom_kills if plan.unmerge else {}
        state = begin(plan, sample, str(uuid.uuid4()), who, host.identity.boot_id, forced, kills)
        if state.phase is Phase.OVER:
            # Nothing has to be changed: the last one that changed something stays in the journal.
            return cls(host, executor, journal, limits, state, report)
        given = {write.knob: write.value for write in plan.writes}
        if plan.unmerge:
            given[Knob.RUN] = plan.run_after
        own = {
            knob
            for knob, value in given.items()
            if not holds(knob) and (knob is not Knob.RUN or plan.found[knob] != value)
        }
        executor.journal.note_change({knob: plan.found[knob] for knob in given}, given, own)
        found = cls(host, executor, journal, limits, state, report)
        journal.save(found.state)
        return found

    @classmethod
    def of_journal(
        cls,
        host: Host,
        executor: Executor,
        journal: TransactionJournal,
        limits: Limits,
        report: Callable[[Mapping[str, object]], None] = lambda _: None,
    ) -> TransactionRunner | None:
        """The transaction that the journal has and whose process has ended; None where there is none."""
        if journal.running is None:
            return None
        state = recovered(journal.running, host.sample(), host.identity.boot_id)
        return cls(host, executor, journal, limits, state, report)

    @property
    def over(self) -> bool:
        return self.journal.running is None and self.state.phase is Phase.OVER

    def document(self) -> Mapping[str, object]:
        """The transaction as the report has it (docs/json.md)."""
        document = transaction_document(self.state, self._host.identity.page_size_bytes)
        operation = self._operation
        if operation is not None:
            progress = operation.progress
            document["progress"] = {"done": progress.done, "total": progress.total, "unit": progress.unit}
        return document

    def cancel(self, why: str = "cancelled", *, hurried: bool = False) -> None:
        """Abandon it at the next safe point.

        :param hurried: there is no time to wait for ksmd
        """
        self._why = why
        self._hurried = self._hurried or hurried
        # Not as other operations, which cancel all that they begin afterwards: the steps to come put things back.
        stops = self._operation is None or self.state.phase in (Phase.UNSHARE, Phase.HOME, Phase.UNMERGE)
        if stops and self._inner is not None:
            self._inner.cancel()

    def poll(self) -> bool:
        """Go on as far as nothing has to be waited for; True once it is over."""
        over = super().poll()
        if not over and self._operation is not None and self._operation.progress != self._reported:
            self._reported = self._operation.progress
            self._report(self.document())
        return over

    def _carry_out(self) -> Steps[TransactionState]:
        while (step := self._next_step()) is not None:
            if self._executor.in_flight:
                self._executor.poll()
                if self._executor.in_flight:
                    yield Progress()
                    continue
            if not isinstance(step, Pause) and not self._save():
                continue
            self._report(self.document())
            began = self._host.clock()
            came: StepResult = None
            if isinstance(step, Pause):
                yield Timer(self._host.clock, step.seconds)
            else:
                came = yield from self._perform(step)
            self._sample = self._host.sample(fresh=True)
            self.state = on_result(self.state, step, came, self._sample, self._limits, self._host.clock() - began)
        if not self.over:
            self._close()
        return self.state

    def _next_step(self) -> Step | None:
        if self._why:
            why, self._why = self._why, ""
            self.state = abandoned(self.state, self._sample, why, hurried=self._hurried)
        return next_step(self.state, self._sample, self._limits)

    def _perform(self, step: Put | UnshareStep | MoveStep | LookStep) -> Steps[StepResult]:
        """A step and its result. What is refused because too much is going on is asked for again, for a while."""
        until = self._host.clock() + BUSY_SECONDS
        while True:
            self._operation = perform(self._host, step)
            yield self._operation
            came = outcome(self._operation)
            self._operation = None
            # What only leads on is given up when it is cancelled; what puts things back is not.
            given_up = self._why and self.state.result is None
            if not isinstance(came, Busy) or given_up or self._host.clock() >= until:
                break
            yield Timer(self._host.clock, BUSY_PAUSE_SECONDS)
        # The reason is that of whoever cancelled it.
        if isinstance(came, Cancelled) and self._why:
            return Cancelled(came.what, self._why)
        if isinstance(came, UnshareResult) and came.stopped and self._why:
            return replace(came, stopped=self._why)
        return came

    def _close(self) -> None:
        if self.state.unmerge and self.state.result is not Result.LOST:
            found = self._host.losses(planned_processes(self.state), self.state.cgroups)
            self.state = counted(self.state, found)
        # Where it can't be written it is over all the same; the next one to come finds it in its last phase.
        with contextlib.suppress(HostError):
            self.journal.close(self.state, self._host.identity.page_size_bytes)
        self._report(self.document())

    def _save(self) -> bool:
        try:
            self.journal.save(self.state)
        except HostError as error:
            before = self.state
            self.state = abandoned(self.state, self._sample, f"the journal can't be written: {error.why}")
            # What puts things back goes on without a journal.
            return self.state.phase is before.phase
        return True


def _own_process(host: Host) -> ProcessId | None:
    try:
        return host.find(os.getpid())
    except KsmdError:
        # A simulated host has processes of its own.
        return None


def run_to_end(runner: TransactionRunner, interrupts: Callable[[], int] = lambda: 0) -> TransactionState:
    """Carry a transaction out and wait for its end.

    :param interrupts: how often somebody has asked for its end: the first time abandons it, the second hurries that
    """
    heard = 0
    while not runner.poll():
        asked = interrupts()
        if asked > heard:
            heard = asked
            runner.cancel("interrupted", hurried=heard > 1)
        descriptor = runner.fileno()
        if descriptor >= 0:
            readable(descriptor, 0.2)
        elif runner.pause_seconds:
            time.sleep(runner.pause_seconds)
    return runner.result()
