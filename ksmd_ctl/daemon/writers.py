# SPDX-License-Identifier: GPL-2.0-or-later
"""Other programs that are known to write the knobs: searched for when a request needs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.operation import Operation, outcome
from ksmd_ctl.host.sample import Writer

# A search reads the name of every process.
_SECONDS: Final = 60.0


class WritersWatch:
    """Keeps the result of the latest search.

    :param changed: called after a search
    :ivar known: the writers of the latest search
    """

    def __init__(self, host: Host, tasks: Tasks, changed: Callable[[], None]) -> None:
        self.known: tuple[Writer, ...] = ()
        self._host = host
        self._tasks = tasks
        self._changed = changed
        self._searched_at: float | None = None
        self._searching: asyncio.Task[None] | None = None
        self._waiting: list[Callable[[], None]] = []

    def search(self, then: Callable[[], None] = lambda: None) -> None:
        """Search again if the latest search is too old.

        :param then: called when `known` is fresh: at once, or later on the event loop
        """
        now = self._host.clock()
        if self._searching is None and (self._searched_at is None or now - self._searched_at >= _SECONDS):
            self._searched_at = now
            operation = self._host.writers()
            if operation.poll():
                self._take(outcome(operation))
            else:
                self._searching = self._tasks.start(self._search(operation))
        if self._searching is None:
            then()
        else:
            self._waiting.append(then)

    async def fresh(self) -> None:
        """Wait until `known` is fresh."""
        self.search()
        if self._searching is not None:
            await self._tasks.joined(self._searching)

    async def _search(self, operation: Operation[tuple[Writer, ...]]) -> None:
        self._take(await self._tasks.outcome(operation))
        self._searching = None
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()

    def _take(self, came: tuple[Writer, ...] | KsmdError) -> None:
        self.known = () if isinstance(came, KsmdError) else came
        self._changed()
