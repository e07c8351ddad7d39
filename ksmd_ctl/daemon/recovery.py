# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's recovery of duplicate KSM pages: it searches in the background, and un-merges if that is allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.transactions.duplicates import DuplicatesRecovery, SearchDuplicates
from ksmd_ctl.transactions.transaction import UnshareStep


class DuplicatesWatch:
    """Counts duplicate KSM pages and un-merges them (docs/healing.md).

    :param config: gives the current configuration
    :param changed: called when there is something new to report
    :param busy: whether something else moves or un-merges pages now
    """

    def __init__(
        self,
        host: Host,
        tasks: Tasks,
        log: Log,
        config: Callable[[], Config],
        changed: Callable[[], None],
        busy: Callable[[], bool],
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._log = log
        self._config = config
        self._changed = changed
        self._busy = busy
        self._recovery = DuplicatesRecovery(host.clock(), host.identity.page_size_bytes)
        self._sample: Sample | None = None
        self._task: asyncio.Task[None] | None = None

    def section(self, now: float, reasons: Mapping[str, int | None]) -> Mapping[str, object]:
        """The `healing` part of a report.

        :param reasons: pages that are unrealised for other reasons than duplicates
        """
        return self._recovery.section(now, self._config(), reasons)

    def tick(self, sample: Sample) -> None:
        """Take a sample, and start what is due."""
        self._sample = sample
        if self._task is not None and self._busy():
            self._task.cancel()
        rounds = self._recovery.rounds
        action = self._recovery.step(sample, self._config(), self._busy())
        if action is not None:
            self._task = self._tasks.start(self._carry_out(action))
        if self._recovery.rounds != rounds:
            said = f"duplicate KSM pages: {self._recovery.text}"
            self._log.event(Event.HEALED, said, pages=self._recovery.healed_pages)
            self._changed()

    async def _carry_out(self, action: SearchDuplicates | UnshareStep) -> None:
        following: SearchDuplicates | UnshareStep | None = action
        while following is not None:
            match following:
                case SearchDuplicates(budget_cpu_seconds, most_pages):
                    searching = self._host.duplicate_ksm_pages(budget_cpu_seconds, most_pages)
                    found = await self._tasks.outcome(searching)
                    self._recovery.on_result(found, self._config(), self._busy())
                    self._changed()
                    following = None
                case UnshareStep() as step:
                    result = await self._tasks.outcome(step.begin(self._host))
                    self._recovery.on_result(result, self._config(), self._busy())
                    # Not at the next tick: ksmd works meanwhile.
                    assert self._sample is not None
                    following = self._recovery.step(self._sample, self._config(), self._busy())
        self._task = None
