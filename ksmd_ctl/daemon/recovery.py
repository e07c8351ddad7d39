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
from ksmd_ctl.transactions.duplicates import Circumstances, Recovery, SearchDuplicates, recovery_section
from ksmd_ctl.transactions.executor import perform
from ksmd_ctl.transactions.transaction import UnshareStep

__all__ = ["TwinsWatch"]


class TwinsWatch:
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
        self._state = Recovery.begin(host.clock())
        self._sample: Sample | None = None
        self._running: Running[Any] | None = None

    def section(self, now: float, reasons: Mapping[str, int | None]) -> Mapping[str, object]:
        """What a report has of it.

        :param reasons: pages that are unrealised for other reasons than duplicates
        """
        return recovery_section(self._state, now, self._allowed(), reasons)

    def tick(self, sample: Sample) -> None:
        """Go on with it."""
        self._sample = sample
        around = self._around()
        if self._running is not None and around.busy:
            self._running.cancel()
        before = self._state
        self._go_on(sample, around)
        if self._state.rounds != before.rounds:
            self._log.event(Event.HEALED, f"twins: {self._state.text}", pages=self._state.healed_pages)
            self._changed()

    def _go_on(self, sample: Sample, around: Circumstances) -> None:
        self._state, action = self._state.step(sample, around)
        match action:
            case SearchDuplicates(budget_cpu_seconds, most_pages):
                self._running = Running(self._host.duplicate_ksm_pages(budget_cpu_seconds, most_pages), self._looked)
            case UnshareStep():
                self._running = Running(perform(self._host, action), self._unshared)

    def _allowed(self) -> bool:
        config = self._config()
        return config.heal_twins and config.policy.writes

    def _around(self) -> Circumstances:
        config = self._config()
        return Circumstances(
            allowed=self._allowed(),
            busy=self._busy(),
            interval_seconds=config.census_interval,
            cpu_share=config.census_cpu_share,
            floor_bytes=config.floor_bytes,
            headroom_share=config.headroom_share,
            latency_seconds=config.batch_latency,
            page_size_bytes=self._host.identity.page_size_bytes,
        )

    def _looked(self, came: DuplicateKsmPages | KsmdError) -> None:
        assert self._sample is not None
        self._running = None
        self._state = self._state.on_duplicates(came, self._sample, self._around())
        self._changed()

    def _unshared(self, came: UnshareResult | KsmdError) -> None:
        assert self._sample is not None
        self._running = None
        self._state = self._state.on_unshared(came)
        # Not at the next tick: ksmd is at work meanwhile.
        self._go_on(self._sample, self._around())

    def close(self) -> None:
        """The service ends: stop what runs. What was un-merged ksmd merges again, as far as it runs."""
        if self._running is not None:
            self._running.abandon()
            self._running = None
