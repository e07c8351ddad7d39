# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries a transaction out, step by step: journal, executor, sample. The same for the service and for a command."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, cast

from ksmd_ctl.control.executor import BUSY_PAUSE_SECONDS, BUSY_SECONDS, Executor, perform
from ksmd_ctl.control.plan import Limits, Plan, lacking_room
from ksmd_ctl.control.transaction import (
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
from ksmd_ctl.control.transaction_journal import TransactionJournal, transaction_document
from ksmd_ctl.control.transitions import StepResult, abandoned, counted, on_result, planned_processes, recovered
from ksmd_ctl.errors import Busy, Cancelled, HostError, KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Operation, Progress, UnshareResult, outcome, readable
from ksmd_ctl.knobs import Knob

# Where there is nothing to wait on it is looked at so often.
_LOOK_AGAIN_SECONDS: Final = 0.05
_REFUSED: Final = "carrying out a transaction"


class TransactionRunner:
    """One transaction, from its first step or from where the journal has it, to its end.

    :ivar state: where it is
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
        self._journal = journal
        self._limits = limits
        self._report = report
        self._sample = host.sample(fresh=True)
        self._step: Step | None = None
        self._operation: Operation[object] | None = None
        self._began = 0.0
        self._until = 0.0
        self._cancelled = ""
        self._hurried = False
        self._reported = Progress()

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
                _REFUSED,
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
        return self._journal.running is None and self.state.phase is Phase.OVER

    def fileno(self) -> int:
        """A descriptor that gets readable when `poll` has something to do; -1 where there is none."""
        return -1 if self._operation is None else self._operation.fileno()

    @property
    def pause_seconds(self) -> float:
        """How long nothing has to be done where there is no descriptor to wait on."""
        if self._operation is not None or self._executor.in_flight:
            return 0.0 if self.fileno() < 0 and self._operation is not None else _LOOK_AGAIN_SECONDS
        return max(0.0, min(_LOOK_AGAIN_SECONDS, self._until - self._host.clock()))

    def document(self) -> Mapping[str, object]:
        """The transaction as the report has it (docs/json.md)."""
        document = transaction_document(self.state, self._host.identity.page_size_bytes)
        operation = self._operation
        if operation is not None:
            progress = operation.progress
            document["progress"] = {"done": progress.done, "total": progress.total, "unit": progress.unit}
        return document

    def cancel(self, why: str, *, hurried: bool = False) -> None:
        """Abandon it at the next safe point.

        :param hurried: there is no time to wait for ksmd
        """
        self._cancelled = why
        self._hurried = self._hurried or hurried
        if self._operation is not None and self.state.phase in (Phase.UNSHARE, Phase.HOME, Phase.UNMERGE):
            self._operation.cancel()

    def poll(self) -> bool:
        """Go on as far as nothing has to be waited for; True once it is over."""
        while True:
            if self._step is None:
                if not self._begin():
                    return self.over
                continue
            came: StepResult = None
            if self._operation is not None:
                if not self._operation.poll():
                    if self._operation.progress != self._reported:
                        self._reported = self._operation.progress
                        self._report(self.document())
                    return False
                came = cast(StepResult, outcome(self._operation))
                if isinstance(came, Cancelled) and self._cancelled:
                    # Why is what they said who asked for it.
                    came = Cancelled(came.what, self._cancelled)
                elif isinstance(came, UnshareResult) and came.stopped and self._cancelled:
                    came = replace(came, stopped=self._cancelled)
                if isinstance(came, Busy) and self._asks_again():
                    return False
            elif self._host.clock() < self._until and not self._cancelled:
                return False
            elif not isinstance(self._step, Pause):
                self._perform(self._step)
                continue
            self._learn(came)

    def _begin(self) -> bool:
        """Begin with the next step, or find that it is another one; False where there is none, or it has to wait."""
        if self._cancelled:
            why, self._cancelled = self._cancelled, ""
            self.state = abandoned(self.state, self._sample, why, hurried=self._hurried)
        step = next_step(self.state, self._sample, self._limits)
        if step is None:
            if not self.over:
                if self.state.unmerge and self.state.result is not Result.LOST:
                    found = self._host.losses(planned_processes(self.state), self.state.cgroups)
                    self.state = counted(self.state, found)
                try:
                    self._journal.close(self.state, self._host.identity.page_size_bytes)
                except HostError:
                    # It is over all the same; the next one to come finds it in its last phase, and ends it again.
                    pass
                self._report(self.document())
            return False
        if self._executor.in_flight:
            self._executor.poll()
            if self._executor.in_flight:
                return False
        if not isinstance(step, Pause) and not self._save():
            return True
        self._report(self.document())
        self._step, self._began = step, self._host.clock()
        if isinstance(step, Pause):
            self._until = self._began + step.seconds
        else:
            self._perform(step)
        return True

    def _perform(self, step: Put | UnshareStep | MoveStep | LookStep) -> None:
        self._operation = cast("Operation[object]", perform(self._host, step))

    def _asks_again(self) -> bool:
        """After a refusal because too much is going on: whether the step is to be asked for again, in a moment."""
        now = self._host.clock()
        if now >= self._began + BUSY_SECONDS or self._hurried_away():
            return False
        self._operation, self._until = None, now + BUSY_PAUSE_SECONDS
        return True

    def _hurried_away(self) -> bool:
        # What only leads on is given up when it is cancelled; what puts things back is not.
        return bool(self._cancelled) and self.state.result is None

    def _save(self) -> bool:
        try:
            self._journal.save(self.state)
        except HostError as error:
            before = self.state
            self.state = abandoned(self.state, self._sample, f"the journal can't be written: {error.why}")
            # What puts things back goes on without a journal.
            return self.state.phase is before.phase
        return True

    def _learn(self, came: StepResult) -> None:
        assert self._step is not None
        seconds = self._host.clock() - self._began
        self._sample = self._host.sample(fresh=True)
        self.state = on_result(self.state, self._step, came, self._sample, self._limits, seconds)
        self._step = self._operation = None


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
        _wait(runner.fileno(), runner.pause_seconds)
    return runner.state


def _wait(descriptor: int, seconds: float) -> None:
    if descriptor < 0:
        if seconds:
            time.sleep(seconds)
        return
    readable(descriptor, 0.2)
