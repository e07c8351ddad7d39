# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps what this process does to a share of a CPU."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Final

from ksmd_ctl.kernel.reading import reading_seconds

_SLACK_SECONDS: Final = 0.02


def used_seconds() -> float:
    """CPU time of this process, of children that have ended, and of those that read for it now."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system + reading_seconds()


class Pace:
    """Keeps CPU time to a share of the time that passes."""

    def __init__(
        self,
        share: float,
        cpu: Callable[[], float] = used_seconds,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._share = share
        self._cpu, self._clock, self._sleep = cpu, clock, sleep
        self._cpu_began, self._began = cpu(), clock()
        # Before that it can't be too much: CPU time grows no faster than the clock.
        self._due = self._began

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    @property
    def cpu_seconds(self) -> float:
        return self._cpu() - self._cpu_began

    @property
    def share(self) -> float:
        return self._share

    def keep(self, *, exactly: bool = False) -> None:
        """Sleep as long as too much was used; a short time is only slept `exactly`, for each sleep costs as well."""
        if not exactly and self._clock() < self._due:
            return
        too_early = self.cpu_seconds / self._share - self.seconds
        if too_early > (0.0 if exactly else _SLACK_SECONDS):
            self._sleep(too_early)
            too_early = 0.0
        growth = 1 / self._share - 1
        self._due = self._clock() + (_SLACK_SECONDS - too_early) / growth if growth else math.inf

    def wait_until(self, seconds: float) -> None:
        """Sleep until so long after the beginning."""
        self._sleep(max(0.0, seconds - self.seconds))
