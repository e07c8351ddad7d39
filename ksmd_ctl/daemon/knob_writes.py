# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps who wrote each knob last, so that a change by others has a name (`ksmd_ctl.kernel.knob_writes`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

from ksmd_ctl.daemon.log import Level, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.kernel.knob_writes import KnobWrite, read_writes

# A change is noticed at the next sample, or, where the service was busy, at the one after that.
_SAMPLES: Final = 2


class KnobWrites:
    """The latest writes.

    :param watch: gives a descriptor of the writes; None for a host that has none
    :param clock: gives the time in seconds
    """

    def __init__(
        self, watch: Callable[[], Operation[int]] | None, tasks: Tasks, log: Log, clock: Callable[[], float]
    ) -> None:
        self._watch = watch
        self._log = log
        self._tasks = tasks
        self._clock = clock
        self._descriptor = -1
        self._latest: dict[Knob, tuple[float, KnobWrite]] = {}

    def begin(self) -> None:
        """Begin to watch; without the privilege nobody is known."""
        if self._watch is not None:
            self._tasks.start(self._begin(self._watch()))

    async def _begin(self, operation: Operation[int]) -> None:
        found = await self._tasks.outcome(operation)
        if isinstance(found, KsmdError):
            self._log.plain(Level.INFO, f"who changes a knob is not known: {found}")
            return
        self._descriptor = found
        asyncio.get_running_loop().add_reader(found, self._read)

    def close(self) -> None:
        """Watch no more."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def who(self, knob: Knob, interval_seconds: float) -> str:
        """Who has changed a knob that was as expected at the sample before; empty where that isn't known.

        :param interval_seconds: how far apart samples are
        """
        self._read()
        at, write = self._latest.get(knob, (-1e9, None))
        own = write is None or write.pid == os.getpid()
        return "" if own or write is None or self._clock() - at > _SAMPLES * interval_seconds + 1 else write.who

    def _read(self) -> None:
        if self._descriptor < 0:
            return
        now = self._clock()
        try:
            for write in read_writes(self._descriptor):
                self._latest[write.knob] = now, write
        except KsmdError as error:
            self.close()
            self._log.plain(Level.INFO, f"who changes a knob is not known any more: {error}")
