# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's transactions: at most one at a time, asked for over the control socket, taken up again at the start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from ksmd_ctl.codec import encode
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.dry_runs import DryRuns, Inventories
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.numa import Answer, Job
from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.operation import Operation, Progress
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.render.transaction import killed_text
from ksmd_ctl.statefiles import became_of
from ksmd_ctl.transactions.change import check_declared, plan_document, planning, too_busy
from ksmd_ctl.transactions.executor import Executor, TransactionRunner, run_to_end
from ksmd_ctl.transactions.journal import TransactionJournal, transactions_section
from ksmd_ctl.transactions.plan import Limits, Plan, limits_of
from ksmd_ctl.transactions.transaction import Phase, Result, TransactionState
from ksmd_ctl.transactions.unmerging import UnmergeOrder, UnmergeOutcome, Unmerging

__all__ = ["Transactions"]

_WAIT_STEP_SECONDS: Final = 2.0


class Transactions:
    """Carries out what is asked for, one after the other, on the event loop.

    :param config: gives the configuration that is in force
    :ivar ended: how many were carried out, to whatever end

    :param changed: is called when there is something new to be reported
    :param moving: who moves memory now, as a phrase; empty while nobody does
    """

    def __init__(
        self,
        host: Host,
        executor: Executor,
        journal: TransactionJournal,
        log: Log,
        config: Callable[[], Config],
        changed: Callable[[], None],
        moving: Callable[[], str] = lambda: "",
    ) -> None:
        self.journal = journal
        self._host = host
        self._executor = executor
        self._log = log
        self._config = config
        self._changed = changed
        self._moving = moving
        self._dry_runs = DryRuns()
        self._inventories = Inventories(host)
        self._runner: TransactionRunner | None = None
        self._request: _Request | None = None
        self._unmerging: Running[UnmergeOutcome] | None = None
        self._running: Running[TransactionState] | None = None
        self._said: Phase | None = None
        self.ended = 0

    @property
    def active(self) -> bool:
        """One is being carried out: nothing else may write a knob meanwhile."""
        return self._runner is not None

    @property
    def under_way(self) -> str:
        """What un-merges pages now or is about to, and who asked for it, as a phrase; empty for nothing."""
        running = self.journal.running
        if running is not None:
            return f"a transaction is under way ({running.who}, in the phase {running.phase})"
        if self._request is not None:
            return f"a transaction is under way ({self._request.who}, being planned)"
        return "" if self._unmerging is None else "the service is un-merging a process"

    def section(self) -> Mapping[str, object]:
        """What a report has of transactions (docs/json.md)."""
        return transactions_section(self.journal, None if self._runner is None else self._runner.document())

    # -- what is asked ---------------------------------------------------------------------------------------

    def plan(self, wanted: Mapping[Knob, KnobValue], answer: Answer) -> Job:
        """Find out what a change would do: a document.

        :raises KsmdError: it can't be planned
        """
        check_declared(self._config(), wanted)
        limits = self._limits()

        def begin() -> Operation[Plan]:
            return planning(self._host, wanted, limits, self._config(), self.journal.rates, self._inventories.take)

        def done(came: Plan | KsmdError) -> None:
            if isinstance(came, KsmdError):
                answer.failed(came)
            else:
                answer.done({"plan": plan_document(came, limits, self._host.identity.page_size_bytes)})

        return self._dry_runs.begin(begin, done)

    def set(
        self, wanted: Mapping[Knob, KnobValue], wait_seconds: float, who: str, answer: Answer, *, force: bool = False
    ) -> Job:
        """Carry a change out.

        :param force: also where there is too little room by the plan
        :raises Refused: pages are un-merged or moved already, or the configuration declares something else
        """
        check_declared(self._config(), wanted)
        self._need_nothing_else("carrying out a transaction")
        self._request = _Request(self, wanted, wait_seconds, who, answer, force)
        return self._request

    def unmerge(self, order: UnmergeOrder, answer: Answer) -> Job:
        """Un-merge the pages of one process or unit.

        :raises Refused: pages are un-merged or moved already
        """
        order.check()
        if not order.dry_run:
            self._need_nothing_else("un-merging pages")
            self._inventories.forget()

        def done(came: UnmergeOutcome | KsmdError) -> None:
            if not order.dry_run:
                self._unmerging = None
                self._inventories.forget()
            if isinstance(came, KsmdError):
                answer.failed(came)
            else:
                answer.done({"result": came.document(), "progress": None})

        def progress(at: Progress) -> None:
            answer.progress({"progress": encode(at), "result": None})

        limits = self._limits()
        if order.dry_run:
            take = self._inventories.take
            return self._dry_runs.begin(lambda: Unmerging(self._host, order, limits, take), done, progress)
        self._unmerging = Running(Unmerging(self._host, order, limits), done, progress)
        return self._unmerging

    def _need_nothing_else(self, what: str) -> None:
        # Where a page belongs, and where there is room, would be another matter by the time that it is its turn.
        other = self.under_way or self._moving()
        if other:
            raise Refused(what, other, hint="try again when it is done; `ksmd-ctl status` shows a transaction")

    def _limits(self) -> Limits:
        return limits_of(self._config())

    # -- carrying out ----------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Go on with the one whose process ended in the middle, if there is one."""
        if self.journal.damaged:
            self._log.event(
                Event.STATE_DAMAGED,
                "the journal of transactions could not be understood and "
                f"{became_of(self.journal.path, self.journal.damaged)}; "
                "if one was under way, `ksmd-ctl status` shows how the knobs are now",
                path=self.journal.damaged,
            )
        runner = TransactionRunner.of_journal(self._host, self._executor, self.journal, self._limits(), self._told)
        if runner is not None:
            self._log.event(
                Event.TRANSACTION,
                f"a transaction was interrupted in the phase {runner.state.recovered} ({runner.state.who}); "
                "it is taken up again",
                id=runner.state.id,
                phase=runner.state.recovered,
            )
            self._begin(runner)

    def begin(self, plan: Plan, who: str, *, force: bool = False) -> None:
        """Begin with a plan that fits.

        :raises KsmdError: the journal can't be written
        """
        holds = self._config().holds
        runner = TransactionRunner.of_plan(
            self._host, self._executor, self.journal, self._limits(), plan, who, self._told, holds, force=force
        )
        if runner.over:
            # Nothing has to be changed, so nothing began either.
            self._answer(runner.document())
            return
        changes = " ".join(f"{write.knob}={write.value}" for write in plan.writes)
        forced = f"; forced, though {'; '.join(runner.state.forced)}" if runner.state.forced else ""
        self._log.event(
            Event.TRANSACTION, f"transaction begun: {changes} ({who}){forced}", id=runner.state.id, phase="begun"
        )
        self._begin(runner)

    def _begin(self, runner: TransactionRunner) -> None:
        self._inventories.forget()
        self._runner = runner
        self._said = None
        self._running = Running(runner, lambda _: self._ended(runner.state))

    def _told(self, document: Mapping[str, object]) -> None:
        runner = self._runner
        if runner is None:
            return
        if runner.state.phase is not self._said:
            self._said = runner.state.phase
            self._changed()
        if self._request is not None and runner.state.phase is not Phase.OVER:
            self._request.tell(document)

    def _ended(self, state: TransactionState) -> None:
        self._runner = self._running = None
        self._inventories.forget()
        self.ended += 1
        killed = killed_text(self.journal.last or {})
        event = Event.TRANSACTION if state.result is Result.DONE and not killed else Event.TRANSACTION_FAILED
        said = "; ".join(filter(None, (state.reason, killed)))
        after = f": {said}" if said else ""
        self._log.event(event, f"transaction {state.result}{after} ({state.who})", id=state.id, result=state.result)
        self._answer(self.journal.last)
        self._changed()

    def _answer(self, document: Mapping[str, object] | None) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.answer.done({"transaction": document, "progress": None})

    def refused(self, error: KsmdError) -> None:
        """The one that was asked for is not begun."""
        request, self._request = self._request, None
        if isinstance(error, Refused):
            self.journal.refused()
        if request is not None:
            request.answer.failed(error)
        self._changed()

    def cancel(self, why: str) -> None:
        """Abandon the one that runs."""
        if self._runner is not None:
            self._runner.cancel(why)

    def finish(self) -> None:
        """Abandon what runs, quickly, and wait for that. For the end of the service, when the loop is over."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        runner.cancel("the service was stopped", hurried=True)
        state = run_to_end(runner)
        event = Event.TRANSACTION if state.result is Result.DONE else Event.TRANSACTION_FAILED
        self._log.event(
            event, f"transaction {state.result}: {state.reason} ({state.who})", id=state.id, result=state.result or ""
        )

    def close(self) -> None:
        """The loop ends: nobody is told anything any more."""
        if self._running is not None:
            # What it waits for then, `finish` says.
            self._running.abandon()
        self._dry_runs.close()
        request, self._request = self._request, None
        if request is not None:
            request.close()
        if self._unmerging is not None:
            self._unmerging.abandon()


class _Request:
    """A change that somebody asked for: planned until it fits, then carried out."""

    def __init__(
        self,
        transactions: Transactions,
        wanted: Mapping[Knob, KnobValue],
        wait_seconds: float,
        who: str,
        answer: Answer,
        force: bool,
    ) -> None:
        self.who = who
        self._force = force
        self.answer = answer
        self._transactions = transactions
        self._wanted = wanted
        self._first: Sample = transactions._host.sample(fresh=True)
        self._until = self._first.time_seconds + wait_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._planning: Running[Plan] | None = None
        self._plan()

    def tell(self, document: Mapping[str, object]) -> None:
        self.answer.progress({"transaction": None, "progress": dict(document)})

    def cancel(self) -> None:
        """Whoever asked is gone, or wants it stopped."""
        if self._transactions.active:
            self._transactions.cancel("interrupted")
            return
        self.close()
        self._transactions.refused(Refused("changing the knobs", "interrupted before anything was changed"))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._planning is not None:
            self._planning.abandon()

    def _plan(self) -> None:
        transactions = self._transactions
        looking = planning(
            transactions._host,
            self._wanted,
            transactions._limits(),
            transactions._config(),
            transactions.journal.rates,
        )
        self._planning = Running(looking, self._planned)

    def _planned(self, came: Plan | KsmdError) -> None:
        transactions = self._transactions
        self._planning = None
        if isinstance(came, KsmdError):
            transactions.refused(came)
            return
        second = transactions._host.sample(fresh=True)
        busy = too_busy(came, transactions._limits(), self._first, second, force=self._force)
        if busy is None:
            try:
                transactions.begin(came, self.who, force=self._force)
            except KsmdError as error:
                transactions.refused(error)
        elif second.time_seconds < self._until:
            self._first = second
            self._timer = asyncio.get_running_loop().call_later(_WAIT_STEP_SECONDS, self._plan)
        else:
            transactions.refused(busy)
