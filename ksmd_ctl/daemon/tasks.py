# SPDX-License-Identifier: GPL-2.0-or-later
"""What the service waits for: tasks of the event loop, and operations of a host in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.operation import LOOK_SECONDS, Operation, Progress

T = TypeVar("T")

# An operation without a descriptor (the engine's) does its work while it is polled.
_STEP_SECONDS: Final = 0.002


class Tasks:
    """The tasks of a service.

    Cancelling a task cancels the operation that it waits for; the task goes on with the operation's result.

    :ivar running: the tasks that have not ended
    :ivar closed: the service ends: tasks end at once
    """

    def __init__(self) -> None:
        self.running: set[asyncio.Task[Any]] = set()
        self.closed = False

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task; what it does begins in the next iteration of the event loop."""
        task = asyncio.get_running_loop().create_task(work)
        # The event loop itself keeps no reference.
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    def close(self) -> None:
        """Cancel all tasks and operations, and wait for none: `asyncio.CancelledError` ends each task."""
        self.closed = True
        for task in tuple(self.running):
            task.cancel()

    async def completed(self, operation: Operation[T], report: Callable[[Progress], None] | None = None) -> T:
        """The result of an operation, which is polled when its descriptor has news.

        :param report: called when its progress has changed
        :raises KsmdError: as `Operation.result`
        """
        reported = Progress()
        while not operation.poll():
            if report is not None and operation.progress != reported:
                reported = operation.progress
                report(reported)
            try:
                await _news(operation)
            except asyncio.CancelledError:
                operation.cancel()
                if self.closed:
                    raise
        return operation.result()

    async def outcome(self, operation: Operation[T]) -> T | KsmdError:
        """The same, with an error as a value."""
        try:
            return await self.completed(operation)
        except KsmdError as error:
            return error

    async def joined(self, task: asyncio.Task[T]) -> T:
        """The result of a task that others wait for, too: it goes on when one of them is cancelled."""
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                if self.closed:
                    raise
        return task.result()


async def _news(operation: Operation[Any]) -> None:
    descriptor = operation.fileno()
    if descriptor < 0:
        await asyncio.sleep(max(_STEP_SECONDS, operation.pause_seconds))
        return
    loop = asyncio.get_running_loop()
    news: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _set, news)
    try:
        await asyncio.wait((news,), timeout=LOOK_SECONDS)
    finally:
        # The next poll may close the descriptor, and something else get its number.
        loop.remove_reader(descriptor)


def _set(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)
