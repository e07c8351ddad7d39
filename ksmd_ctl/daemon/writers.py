# SPDX-License-Identifier: GPL-2.0-or-later
"""Who else writes the knobs, as far as the service knows: looked for when somebody asks, and never waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.operation import outcome
from ksmd_ctl.host.sample import Writer

# A look takes the name of every process.
_SECONDS: Final = 60.0


class WritersWatch:
    """Keeps who was found the last time.

    :param changed: is called when there is something new
    :ivar known: the writers as of the latest look
    """

    def __init__(self, host: Host, changed: Callable[[], None]) -> None:
        self.known: tuple[Writer, ...] = ()
        self._host = host
        self._changed = changed
        self._looked_at: float | None = None
        self._running: Running[tuple[Writer, ...]] | None = None
        self._waiting: list[Callable[[], None]] = []

    def look(self, then: Callable[[], None] | None = None) -> bool:
        """Look again, if the latest look is too old for whoever asks.

        :param then: is called once `known` is fresh: at once, or later on the event loop
        :returns: whether it is fresh already
        """
        now = self._host.clock()
        if self._running is None and (self._looked_at is None or now - self._looked_at >= _SECONDS):
            self._looked_at = now
            operation = self._host.writers()
            if operation.poll():
                self._take(outcome(operation))
            else:
                self._running = Running(operation, self._took)
        fresh = self._running is None
        if then is not None:
            if fresh:
                then()
            else:
                self._waiting.append(then)
        return fresh

    def close(self) -> None:
        """The service ends: those who wait get what is known."""
        if self._running is not None:
            self._running.abandon()
            self._running = None
        self._tell()

    def _took(self, came: tuple[Writer, ...] | KsmdError) -> None:
        self._running = None
        self._take(came)
        self._tell()

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()

    def _take(self, came: tuple[Writer, ...] | KsmdError) -> None:
        self.known = () if isinstance(came, KsmdError) else came
        self._changed()
