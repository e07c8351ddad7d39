# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps ksmd off isolated CPUs and those of pinned virtual CPUs, where the configuration asks for it."""

from __future__ import annotations

from typing import Final

from ksmd_ctl.daemon.log import Level, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.policy_runner import PolicyRunner

# A look reads the name of every process, and the status of each thread of a virtual machine.
_SECONDS: Final = 60.0


class HousekeepingWatch:
    """Looks for the housekeeping CPUs once a minute, and tells the policy's runner."""

    def __init__(self, host: Host, tasks: Tasks, log: Log, runner: PolicyRunner) -> None:
        self._host = host
        self._tasks = tasks
        self._log = log
        self._runner = runner
        self._next_at = 0.0

    def tick(self, sample: Sample) -> None:
        """Start a look if one is due."""
        if sample.time_seconds >= self._next_at and self._runner.needs_housekeeping:
            self._next_at = sample.time_seconds + _SECONDS
            self._tasks.start(self._look())

    async def _look(self) -> None:
        found = await self._tasks.outcome(self._host.housekeeping())
        before = self._runner.housekeeping
        if found != before and str(found) != str(before):
            if isinstance(found, str):
                self._log.plain(Level.INFO, f"the housekeeping CPUs are {found}")
            self._runner.set_housekeeping(found)
