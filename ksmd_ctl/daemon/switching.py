# SPDX-License-Identifier: GPL-2.0-or-later
"""Merging switched on or off for processes: on request, and again for what has started again (docs/switching.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from ksmd_ctl.codec import encode
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.numa import NumaWatch
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.daemon.transactions import Transactions
from ksmd_ctl.errors import KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import Process, ProcessId, Survey
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.host.switching import Method
from ksmd_ctl.statefiles import became_of
from ksmd_ctl.switch.keep import SwitchJournal, records_document, started_again
from ksmd_ctl.transactions.plan import limits_of
from ksmd_ctl.transactions.switching import SwitchedProcess, Switching, SwitchOrder

_WHAT: Final = "switching merging"
_DONE, _LEFT, _FAILED = "done", "left", "failed"
_AUTO: Final = "auto"
#: Who asks for what is switched off again.
KEEPER: Final = "the service, [switch] keep"


class SwitchWatch:
    """Switches merging for processes, and keeps who was switched.

    :param numa: gives surveys
    :param config: gives the current configuration
    :param changed: called when there is something new to report
    """

    def __init__(
        self,
        host: Host,
        tasks: Tasks,
        log: Log,
        numa: NumaWatch,
        transactions: Transactions,
        config: Callable[[], Config],
        changed: Callable[[], None],
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._log = log
        self._numa = numa
        self._transactions = transactions
        self._config = config
        self._changed = changed
        self._journal = SwitchJournal(Path(config().state_directory), host.identity)
        if damaged := self._journal.damaged:
            text = f"who was switched could not be understood and {became_of(self._journal.path, damaged)}"
            log.event(Event.STATE_DAMAGED, text, path=damaged)
        self._known = self._switches()
        self._looked: Survey | None = None
        self._looked_at = 0.0
        self._told: set[ProcessId] = set()
        # By method and result. One that failed may have tried several methods.
        self._counts = {method: {_DONE: 0, _LEFT: 0, _FAILED: 0} for method in Method} | {_AUTO: {_FAILED: 0}}
        self._task: asyncio.Task[None] | None = None

    def section(self, now: float) -> list[dict[str, object]]:
        """What a report has of it, the latest first."""
        survey = self._numa.survey
        return records_document(self._journal.records, now, () if survey is None else survey.processes)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many processes were switched since this service started, by method and result."""
        return {method: dict(results) for method, results in self._counts.items()}

    # -- requests --------------------------------------------------------------------------------------------

    async def switch(
        self, order: SwitchOrder, by: str, report: Callable[[Mapping[str, object]], None]
    ) -> dict[str, object]:
        """Switch merging, or with `dry_run` find out what that would do.

        :param by: who asks
        :param report: called with the progress
        :raises Refused: the configuration does not allow it, or pages are un-merged or moved already
        """
        order.check()
        if not self._config().switch_allow:
            hint = "run it as root, which does it without the service, or set allow = true in [switch]"
            raise Refused(_WHAT, "the service's configuration does not allow it ([switch] allow = false)", hint=hint)

        def progress(at: Progress) -> None:
            report({"progress": encode(at), "result": None})

        if order.dry_run:
            switching = Switching(self._host, order, limits_of(self._config()))
            return {"result": (await self._tasks.completed(switching, progress)).document(), "progress": None}
        return {"result": await self._switch(order, by, progress), "progress": None}

    async def _switch(
        self, order: SwitchOrder, by: str, progress: Callable[[Progress], None] = lambda _: None
    ) -> dict[str, object]:
        if other := self._transactions.under_way or self._numa.moving:
            raise Refused(_WHAT, other, hint="try again when it is done; `ksmd-ctl status` shows a transaction")
        with self._transactions.doing("switching merging of a process"):
            try:
                switching = Switching(self._host, order, limits_of(self._config()), self._journal, by)
                came = await self._tasks.completed(switching, progress)
            except KsmdError as error:
                self._counts[order.method or _AUTO][_FAILED] += 1
                self._log.event(Event.SWITCH_FAILED, f"merging was not switched {order.words}: {error.why} ({by})")
                self._changed()
                raise
        for one in came.processes:
            self._log_one(one, by, order)
        self._known = self._switches()
        self._numa.stale()
        self._changed()
        return came.document()

    def _log_one(self, one: SwitchedProcess, by: str, order: SwitchOrder) -> None:
        whose, word = f"{one.name} (pid {one.process.pid})", "on" if order.on else "off"
        if one.came is None:
            return
        if isinstance(one.came, KsmdError) or not one.switched:
            method = order.method or _AUTO if isinstance(one.came, KsmdError) else one.came.method
            self._counts[method][_FAILED] += 1
            why = one.came.why if isinstance(one.came, KsmdError) else "its memory is as it was before"
            text = f"merging was not switched {word} for {whose}: {why} ({by})"
            self._log.event(Event.SWITCH_FAILED, text, pid=one.process.pid)
            return
        self._counts[one.came.method][_LEFT if one.came.left else _DONE] += 1
        left = f"; left: {'; '.join(one.came.left)}" if one.came.left else ""
        text = f"merging was switched {word} for {whose}: {one.came.how} ({by}){left}"
        self._log.event(Event.SWITCHED, text, pid=one.process.pid, merging=word, how=one.came.how, who=by)

    # -- in the background -----------------------------------------------------------------------------------

    def tick(self) -> None:
        """Look at what commands have done, and at a new survey: who has ended, and who has started again."""
        if not self._transactions.under_way and self._journal.changed():
            self._notice()
        survey = self._numa.survey
        if survey is None or (self._task is not None and not self._task.done()):
            return
        if survey is self._looked:
            self._look_again(survey)
            return
        self._looked, self._looked_at = survey, self._host.clock()
        try:
            if not self._journal.records:
                return
            self._journal.ended(self._host.losses(self._journal.running(), ()).gone)
        except KsmdError as error:
            self._log.event(Event.SWITCH_FAILED, f"who was switched can't be kept: {error.why}")
            return
        again = started_again(self._journal.records, survey.processes)
        for record, process in again:
            if process.id not in self._told:
                text = f"{record.lasting}, which was switched off ({record.by}), has started again and is mergeable"
                self._log.event(Event.STARTED_AGAIN, f"{text}: {process.name} (pid {process.id.pid})")
        self._told = {process.id for _, process in again}
        config = self._config()
        if again and config.switch_keep and config.switch_allow:
            self._task = self._tasks.start(self._again([process for _, process in again]))

    def _notice(self) -> None:
        """A command has switched somebody without this service."""
        try:
            self._journal.read()
        except KsmdError as error:
            self._log.event(Event.SWITCH_FAILED, f"who was switched can't be read: {error.why}")
            return
        for one in self._journal.records:
            if one.done and (one.process, one.on, one.by) not in self._known:
                word = "on" if one.on else "off"
                text = f"merging was switched {word} for {one.name} (pid {one.process.pid}): {one.how} ({one.by})"
                self._log.event(Event.SWITCHED, text, pid=one.process.pid, merging=word, how=one.how, who=one.by)
        self._known = self._switches()
        self._changed()

    def _switches(self) -> set[tuple[ProcessId, bool, str]]:
        return {(one.process, one.on, one.by) for one in self._journal.records if one.done}

    def _look_again(self, survey: Survey) -> None:
        """Have a survey taken where there would be none, as nothing is merged: what starts again would merge first."""
        config = self._config()
        if not config.census_cpu_share or all(one.on or not one.lasting for one in self._journal.records):
            return
        pause = max(config.census_interval, survey.cpu_seconds / config.census_cpu_share)
        if self._host.clock() >= self._looked_at + pause:
            self._looked_at = self._host.clock()
            self._numa.stale()

    async def _again(self, processes: list[Process]) -> None:
        for process in processes:
            try:
                if self._host.find(process.id.pid) == process.id:
                    await self._switch(SwitchOrder(on=False, pid=process.id.pid), KEEPER)
            except KsmdError:
                # That is logged; the next survey finds it again.
                continue
