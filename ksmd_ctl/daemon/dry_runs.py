# SPDX-License-Identifier: GPL-2.0-or-later
"""Dry runs: what whoever can connect may ask for takes turns, and shares a look at the host's memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from ksmd_ctl.daemon.running import Running
from ksmd_ctl.errors import Cancelled, KsmdError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import Inventory
from ksmd_ctl.host.operation import Operation, Progress, Steps, waited

__all__ = ["DryRun", "DryRuns", "Inventories"]

T = TypeVar("T")

# As old may an inventory be that a dry run gets; where one takes longer, twice as old as that.
_FRESH_SECONDS: Final = 5.0


class DryRuns:
    """Operations on the event loop, one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._waiting: deque[DryRun[Any]] = deque()
        self._current: DryRun[Any] | None = None

    def begin(
        self,
        make: Callable[[], Operation[T]],
        done: Callable[[T | KsmdError], None],
        progress: Callable[[Progress], None] | None = None,
    ) -> DryRun[T]:
        """Have an operation carried out when it is its turn.

        :param make: begins with it; what it raises is what comes of it
        :param done: is called once, on the loop and never from within this call, with what came of it
        """
        asked = DryRun(self, make, done, progress)
        self._waiting.append(asked)
        self._go_on()
        return asked

    def close(self) -> None:
        """The loop ends: nobody is told anything any more."""
        self._waiting.clear()
        if self._current is not None and self._current.running is not None:
            self._current.running.abandon()

    def ended(self, asked: DryRun[Any]) -> None:
        """One is over, or waits no more."""
        if asked is self._current:
            self._current = None
        elif asked in self._waiting:
            self._waiting.remove(asked)
        self._go_on()

    def _go_on(self) -> None:
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self._current.start()


class DryRun(Generic[T]):
    """One that was asked for.

    :ivar running: once it is its turn
    """

    def __init__(
        self,
        runs: DryRuns,
        make: Callable[[], Operation[T]],
        done: Callable[[T | KsmdError], None],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.running: Running[T] | None = None
        self._runs = runs
        self._make = make
        self._done = done
        self._progress = progress

    def start(self) -> None:
        """It is its turn."""
        try:
            operation = self._make()
        except KsmdError as error:
            operation = Operation.failed(error)
        self.running = Running(operation, self._ended, self._progress)

    def cancel(self) -> None:
        """Whoever asked is gone, or wants it stopped; the answer still comes."""
        if self.running is not None:
            self.running.cancel()
            return
        stopped = Cancelled("the dry run", "it was stopped before its turn")
        self.running = Running(Operation.failed(stopped), self._ended)

    def _ended(self, came: T | KsmdError) -> None:
        self._runs.ended(self)
        self._done(came)


class Inventories:
    """The latest inventory of a host, given again to those who ask within seconds."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._latest: tuple[Inventory, int] | None = None
        self._until = 0.0

    def take(self, floor_bytes: int) -> Operation[Inventory]:
        """An inventory that is some seconds old at most."""
        if self._latest is not None and self._latest[1] == floor_bytes and self._host.clock() < self._until:
            return Operation.done(self._latest[0])
        return Operation(self._look(floor_bytes, self._host.clock()))

    def _look(self, floor_bytes: int, began: float) -> Steps[Inventory]:
        found = yield from waited(self._host.inventory(floor_bytes))
        self._latest = found, floor_bytes
        self._until = began + max(_FRESH_SECONDS, 2 * (self._host.clock() - began))
        return found

    def forget(self) -> None:
        """Something is changed: the latest one says nothing any more."""
        self._latest = None
