# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's recovery of duplicate KSM pages: it searches in the background, and un-merges if that is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.duplicates import DuplicateKsmPages
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.operation import UnshareResult
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.transactions.duplicates import DuplicatesRecovery, SearchDuplicates
from ksmd_ctl.transactions.executor import perform
from ksmd_ctl.transactions.transaction import UnshareStep

__all__ = ["DuplicatesWatch"]


class DuplicatesWatch:
    """Counts duplicate KSM pages and un-merges them (docs/healing.md).

    :param config: gives the configuration that is in force
    :param changed: is called when there is something new to be reported
    :param busy: whether somebody else moves or un-merges pages now
    """

    def __init__(
        self,
        host: Host,
        log: Log,
        config: Callable[[], Config],
        changed: Callable[[], None],
        busy: Callable[[], bool],
    ) -> None:
        self._host = host
        self._log = log
        self._config = config
        self._changed = changed
        self._busy = busy
        self._recovery = DuplicatesRecovery(host.clock(), host.identity.page_size_bytes)
        self._sample: Sample | None = None
        self._running: Running[Any] | None = None

    def section(self, now: float, reasons: Mapping[str, int | None]) -> Mapping[str, object]:
        """What a report has of it.

        :param reasons: pages that are unrealised for other reasons than duplicates
        """
        return self._recovery.section(now, self._config(), reasons)

    def tick(self, sample: Sample) -> None:
        """Go on with it."""
        self._sample = sample
        if self._running is not None and self._busy():
            self._running.cancel()
        rounds = self._recovery.rounds
        self._go_on(sample)
        if self._recovery.rounds != rounds:
            self._log.event(Event.HEALED, f"twins: {self._recovery.text}", pages=self._recovery.healed_pages)
            self._changed()

    def _go_on(self, sample: Sample) -> None:
        match self._recovery.step(sample, self._config(), self._busy()):
            case SearchDuplicates(budget_cpu_seconds, most_pages):
                self._running = Running(self._host.duplicate_ksm_pages(budget_cpu_seconds, most_pages), self._searched)
            case UnshareStep() as step:
                self._running = Running(perform(self._host, step), self._unshared)

    def _searched(self, came: DuplicateKsmPages | KsmdError) -> None:
        self._running = None
        self._recovery.on_result(came, self._config(), self._busy())
        self._changed()

    def _unshared(self, came: UnshareResult | KsmdError) -> None:
        assert self._sample is not None
        self._running = None
        self._recovery.on_result(came, self._config(), self._busy())
        # Not at the next tick: ksmd is at work meanwhile.
        self._go_on(self._sample)

    def close(self) -> None:
        """The service ends: stop what runs. What was un-merged ksmd merges again, as far as it runs."""
        if self._running is not None:
            self._running.abandon()
            self._running = None
