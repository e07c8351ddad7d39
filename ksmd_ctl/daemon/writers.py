# SPDX-License-Identifier: GPL-2.0-or-later
"""Other programs that are known to write the knobs: searched for when a request needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.operation import outcome
from ksmd_ctl.host.sample import Writer

# A search reads the name of every process.
_SECONDS: Final = 60.0


class WritersWatch:
    """Keeps the result of the latest search.

    :param changed: called after a search
    :ivar known: the writers of the latest search
    """

    def __init__(self, host: Host, changed: Callable[[], None]) -> None:
        self.known: tuple[Writer, ...] = ()
        self._host = host
        self._changed = changed
        self._looked_at: float | None = None
        self._running: Running[tuple[Writer, ...]] | None = None
        self._waiting: list[Callable[[], None]] = []

    def look(self, then: Callable[[], None] | None = None) -> bool:
        """Search again if the latest search is too old.

        :param then: called when `known` is fresh: at once, or later on the event loop
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
        """Stop; waiting requests get what is known."""
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
