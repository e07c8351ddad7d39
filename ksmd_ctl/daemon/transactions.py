# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's transactions: at most one at a time, requested over the control socket or found in the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from ksmd_ctl.codec import encode
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import Inventory
from ksmd_ctl.host.operation import Operation, Progress, Steps, waited
from ksmd_ctl.render.transaction import killed_text
from ksmd_ctl.statefiles import became_of
from ksmd_ctl.transactions.change import check_declared, fitting_plan, plan_document, planning
from ksmd_ctl.transactions.collapsing import CollapseOrder, Collapsing
from ksmd_ctl.transactions.executor import Executor, TransactionRunner, run_to_end
from ksmd_ctl.transactions.journal import TransactionJournal, transactions_section
from ksmd_ctl.transactions.plan import Limits, Plan, limits_of
from ksmd_ctl.transactions.transaction import Phase, Result
from ksmd_ctl.transactions.unmerging import UnmergeOrder, Unmerging

# A dry run gets an inventory that is no older than this, or than twice the time that it took.
_FRESH_SECONDS: Final = 5.0

#: Called with the parameters of a progress message (ksmd_ctl/daemon/io.ksmd-ctl.varlink).
Report = Callable[[Mapping[str, object]], None]


class Transactions:
    """Carries out changes, one after the other.

    :param tasks: where the transaction that the journal has is carried out
    :param config: gives the current configuration
    :param changed: called when there is something new to report
    :param moving: what moves memory now, as a phrase; empty for nothing
    :ivar ended: number of transactions that were carried out, with any result
    """

    def __init__(
        self,
        host: Host,
        tasks: Tasks,
        executor: Executor,
        journal: TransactionJournal,
        log: Log,
        config: Callable[[], Config],
        changed: Callable[[], None],
        moving: Callable[[], str] = lambda: "",
    ) -> None:
        self.journal = journal
        self.ended = 0
        self._host = host
        self._tasks = tasks
        self._executor = executor
        self._log = log
        self._config = config
        self._changed = changed
        self._moving = moving
        # Anybody who can connect may ask for dry runs: they take turns.
        self._dry_run = asyncio.Lock()
        self._inventories = Inventories(host)
        self._runner: TransactionRunner | None = None
        self._requested_by = ""
        self._report: Report = _ignore
        # What it does with the memory of a process, as a phrase.
        self._changing = ""
        self._reported: Phase | None = None

    @property
    def active(self) -> bool:
        """Whether one is being carried out: nothing else may write a knob meanwhile."""
        return self._runner is not None

    @property
    def under_way(self) -> str:
        """What un-merges pages now or is about to, and who requested it, as a phrase; empty for nothing."""
        running = self.journal.running
        if running is not None:
            return f"a transaction is under way ({running.who}, in the phase {running.phase})"
        if self._requested_by:
            return f"a transaction is under way ({self._requested_by}, being planned)"
        return f"the service is {self._changing}" if self._changing else ""

    def section(self) -> Mapping[str, object]:
        """What a report has of transactions (docs/json.md)."""
        return transactions_section(self.journal, None if self._runner is None else self._runner.document())

    # -- requests --------------------------------------------------------------------------------------------

    async def plan(self, wanted: Mapping[Knob, KnobValue]) -> dict[str, object]:
        """Find out what a change would do.

        :raises KsmdError: it can't be planned
        """
        check_declared(self._config(), wanted)
        limits = self._limits()
        async with self._dry_run:
            looking = planning(self._host, wanted, limits, self._config(), self.journal.rates, self._inventories.take)
            plan = await self._tasks.completed(looking)
        return {"plan": plan_document(plan, limits, self._host.identity.page_size_bytes)}

    async def set(
        self, wanted: Mapping[Knob, KnobValue], wait_seconds: float, who: str, report: Report, *, force: bool = False
    ) -> dict[str, object]:
        """Carry a change out, as soon as there is room for it.

        :param wait_seconds: how long to wait for room at most
        :param report: called with the progress
        :param force: also if the plan finds too little room
        :raises Refused: there is no room, pages are un-merged or moved already, or the configuration declares
            something else
        """
        check_declared(self._config(), wanted)
        self._need_nothing_else("carrying out a transaction")
        self._requested_by, self._report = who, report
        try:
            fitting = fitting_plan(self._host, wanted, self._config, self.journal.rates, wait_seconds, force=force)
            plan = await self._tasks.completed(fitting)
            runner = self._begin(plan, who, force=force)
        except KsmdError as error:
            if isinstance(error, Refused):
                self.journal.refused()
            self._changed()
            raise
        finally:
            self._requested_by = ""
        if runner.over:
            # Nothing has to be changed, so nothing began either.
            return {"transaction": runner.document(), "progress": None}
        await self._carry_out(runner)
        return {"transaction": self.journal.last, "progress": None}

    async def unmerge(self, order: UnmergeOrder, report: Report) -> dict[str, object]:
        """Un-merge the pages of one process or unit.

        :param report: called with the progress
        :raises Refused: pages are un-merged or moved already
        """
        order.check()

        def progress(at: Progress) -> None:
            report({"progress": encode(at), "result": None})

        if order.dry_run:
            async with self._dry_run:
                unmerging = Unmerging(self._host, order, self._limits(), self._inventories.take)
                result = await self._tasks.completed(unmerging, progress)
        else:
            self._need_nothing_else("un-merging pages")
            with self.doing("un-merging a process"):
                result = await self._tasks.completed(Unmerging(self._host, order, self._limits()), progress)
        return {"result": result.document(), "progress": None}

    async def collapse(self, order: CollapseOrder, report: Report) -> dict[str, object]:
        """Make huge pages of memory of one process or unit.

        :param report: called with the progress
        :raises Refused: pages are un-merged or moved
        """
        order.check()
        if order.dry_run:
            async with self._dry_run:
                return await self._collapse(order, report)
        self._need_nothing_else("making huge pages")
        with self.doing("making huge pages"):
            return await self._collapse(order, report)

    async def _collapse(self, order: CollapseOrder, report: Report) -> dict[str, object]:
        def progress(at: Progress) -> None:
            report({"progress": encode(at), "result": None})

        result = await self._tasks.completed(Collapsing(self._host, order, self._limits()), progress)
        return {"result": result.document(), "progress": None}

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Something is done with the memory of processes for as long as this lasts: nobody else un-merges or moves any.

        :param what: what, as a phrase
        """
        self._changing = what
        self._inventories.forget()
        try:
            yield
        finally:
            self._changing = ""
            self._inventories.forget()

    def _need_nothing_else(self, what: str) -> None:
        # It does not wait for its turn: by then its pages may be elsewhere, and there may be less room.
        other = self.under_way or self._moving()
        if other:
            raise Refused(what, other, hint="try again when it is done; `ksmd-ctl status` shows a transaction")

    def _limits(self) -> Limits:
        return limits_of(self._config())

    # -- carrying out ----------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Continue the transaction that was interrupted, if there is one."""
        if self.journal.damaged:
            self._log.event(
                Event.STATE_DAMAGED,
                "the journal of transactions could not be understood and "
                f"{became_of(self.journal.path, self.journal.damaged)}; "
                "if one was under way, `ksmd-ctl status` shows how the knobs are now",
                path=self.journal.damaged,
            )
        runner = TransactionRunner.of_journal(
            self._host, self._executor, self.journal, self._limits(), self._runner_reports
        )
        if runner is not None:
            self._log.event(
                Event.TRANSACTION,
                f"a transaction was interrupted in the phase {runner.state.recovered} ({runner.state.who}); "
                "it is taken up again",
                id=runner.state.id,
                phase=runner.state.recovered,
                who=runner.state.who,
            )
            self._runner = runner
            self._tasks.start(self._carry_out(runner))

    def _begin(self, plan: Plan, who: str, *, force: bool) -> TransactionRunner:
        holds = self._config().holds
        runner = TransactionRunner.of_plan(
            self._host,
            self._executor,
            self.journal,
            self._limits(),
            plan,
            who,
            self._runner_reports,
            holds,
            force=force,
        )
        if runner.over:
            return runner
        changes = " ".join(f"{write.knob}={write.value}" for write in plan.writes)
        forced = f"; forced, though {'; '.join(runner.state.forced)}" if runner.state.forced else ""
        self._log.event(
            Event.TRANSACTION,
            f"transaction begun: {changes} ({who}){forced}",
            id=runner.state.id,
            phase="begun",
            who=who,
        )
        return runner

    async def _carry_out(self, runner: TransactionRunner) -> None:
        self._runner = runner
        self._reported = None
        self._inventories.forget()
        # At the end of the service `finish` continues it.
        await self._tasks.outcome(runner)
        state = runner.state
        self._runner = None
        self._report = _ignore
        self._inventories.forget()
        self.ended += 1
        killed = killed_text(self.journal.last or {})
        event = Event.TRANSACTION if state.result is Result.DONE and not killed else Event.TRANSACTION_FAILED
        said = "; ".join(filter(None, (state.reason, killed)))
        after = f": {said}" if said else ""
        self._log.event(
            event,
            f"transaction {state.result}{after} ({state.who})",
            id=state.id,
            result=state.result,
            who=state.who,
        )
        self._changed()

    def _runner_reports(self, document: Mapping[str, object]) -> None:
        if self._runner is None:
            return
        phase = self._runner.state.phase
        if phase is not self._reported:
            self._reported = phase
            self._changed()
        if phase is not Phase.OVER:
            self._report({"transaction": None, "progress": dict(document)})

    def finish(self) -> None:
        """Abandon what runs, quickly, and wait for that. For the end of the service, when the loop is over."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        runner.cancel("the service was stopped", hurried=True)
        state = run_to_end(runner)
        event = Event.TRANSACTION if state.result is Result.DONE else Event.TRANSACTION_FAILED
        self._log.event(
            event,
            f"transaction {state.result}: {state.reason} ({state.who})",
            id=state.id,
            result=state.result or "",
            who=state.who,
        )


class Inventories:
    """Keeps the latest inventory of a host for dry runs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._latest: tuple[Inventory, int] | None = None
        self._until = 0.0

    def take(self, floor_bytes: int) -> Operation[Inventory]:
        """An inventory that is at most a few seconds old."""
        if self._latest is not None and self._latest[1] == floor_bytes and self._host.clock() < self._until:
            return Operation.done(self._latest[0])
        return Operation(self._take(floor_bytes, self._host.clock()))

    def _take(self, floor_bytes: int, began: float) -> Steps[Inventory]:
        found = yield from waited(self._host.inventory(floor_bytes))
        self._latest = found, floor_bytes
        self._until = began + max(_FRESH_SECONDS, 2 * (self._host.clock() - began))
        return found

    def forget(self) -> None:
        """Something changes: take a new inventory next time."""
        self._latest = None


def _ignore(parameters: Mapping[str, object]) -> None:
    pass
