# SPDX-License-Identifier: GPL-2.0-or-later
"""An operation of a host on the event loop: it is polled when its descriptor has news, and never waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.operation import LOOK_SECONDS, Operation, Progress, outcome

__all__ = ["Running"]

T = TypeVar("T")

# An operation without a descriptor (the engine's) does its work while it is polled.
_STEP_SECONDS: Final = 0.002


class Running(Generic[T]):
    """An operation while it runs.

    :param done: is called once, on the loop and never from within this constructor, with what came of it
    :param progress: is called when how far it is has changed
    """

    def __init__(
        self,
        operation: Operation[T],
        done: Callable[[T | KsmdError], None],
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._operation = operation
        self._done = done
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._watched = -1
        self._said = Progress()
        self._over = False
        self._timer: asyncio.Handle = self._loop.call_soon(self._look)

    def cancel(self) -> None:
        """Ask it to stop; `done` still tells what came of it."""
        if not self._over:
            self._operation.cancel()
            self._timer.cancel()
            self._timer = self._loop.call_soon(self._look)

    def abandon(self) -> None:
        """Stop it, and tell nobody."""
        if not self._over:
            self._operation.cancel()
            self._end()

    def _end(self) -> None:
        self._over = True
        self._timer.cancel()
        self._watch(-1)

    def _watch(self, descriptor: int) -> None:
        if self._watched >= 0:
            self._loop.remove_reader(self._watched)
        self._watched = descriptor
        if descriptor >= 0:
            self._loop.add_reader(descriptor, self._look)

    def _look(self) -> None:
        self._timer.cancel()
        # The descriptor may be closed within, and the next one get its number.
        self._watch(-1)
        if self._operation.poll():
            self._end()
            self._done(outcome(self._operation))
            return
        if self._progress is not None and self._operation.progress != self._said:
            self._said = self._operation.progress
            self._progress(self._said)
        descriptor = self._operation.fileno()
        self._watch(descriptor)
        pause = max(_STEP_SECONDS, self._operation.pause_seconds) if descriptor < 0 else LOOK_SECONDS
        self._timer = self._loop.call_later(pause, self._look)
