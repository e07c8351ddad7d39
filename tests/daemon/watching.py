# SPDX-License-Identifier: GPL-2.0-or-later
"""What drives one of the service's watches without the service: each tick is a second of the host's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.engine.host import EngineHost


class Watching:
    """A watch, its host, and how often it said that something had changed."""

    watch: Any

    def __init__(self, host: Any) -> None:
        self.host = host
        self.changes = 0
        self.tasks = Tasks()

    def changed(self) -> None:
        self.changes += 1

    async def tick(self, count: int = 1) -> None:
        """So many seconds; what the watch began is waited for."""
        for _ in range(count):
            if isinstance(self.host, EngineHost):
                self.host.advance(1.0)
            else:
                self.host.now += 1.0
            self.watch.tick(self.host.sample())
            while self.tasks.running:
                await asyncio.sleep(0)


B = TypeVar("B", bound=Watching)


def watched(make: Callable[[], B], scenario: Callable[[B], Coroutine[Any, Any, None]], seconds: float) -> B:
    """Play a scenario to its end; its bench, the watch closed."""

    async def main() -> B:
        bench = make()
        async with asyncio.timeout(seconds):
            await scenario(bench)
        bench.tasks.close()
        return bench

    return asyncio.run(main())
