# SPDX-License-Identifier: GPL-2.0-or-later
"""A service to serve, and a client that says whatever a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ksmd_ctl.daemon.connection import Limits
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.daemon.varlink import LIMITS, ControlServer
from ksmd_ctl.daemon.varlink_socket import Authority, listen
from ksmd_ctl.errors import KsmdError, Problem
from ksmd_ctl.transactions.migration import MigrationOrder

#: Far more than anything here takes: reaching it means that something hangs.
PATIENCE_SECONDS = 30


Report = Callable[[Mapping[str, object]], None]


class FakeJob:
    """What was begun for somebody."""

    def __init__(self, tasks: Tasks, asked: object, report: Report | None) -> None:
        self.asked = asked
        self._tasks = tasks
        self.cancelled = False
        self._report = report
        self._result: asyncio.Future[Mapping[str, object]] = asyncio.get_running_loop().create_future()

    def progress(self, parameters: Mapping[str, object]) -> None:
        assert self._report is not None
        self._report(parameters)

    def done(self, parameters: Mapping[str, object]) -> None:
        self._result.set_result(parameters)

    def failed(self, error: KsmdError) -> None:
        self._result.set_exception(error)

    async def result(self) -> Mapping[str, object]:
        """What the test said; being cancelled is only noted."""
        while not self._result.done():
            try:
                await asyncio.wait((self._result,))
            except asyncio.CancelledError:
                self.cancelled = True
                if self._tasks.closed:
                    raise
        return self._result.result()


class FakeJobs:
    """Begins what it is asked for; a test answers."""

    def __init__(self, tasks: Tasks) -> None:
        self.jobs: list[FakeJob] = []
        self.error: KsmdError | None = None
        self._tasks = tasks

    async def begin(self, asked: object, report: Report | None = None) -> Mapping[str, object]:
        if self.error is not None:
            raise self.error
        self.jobs.append(FakeJob(self._tasks, asked, report))
        return await self.jobs[-1].result()


class FakeNuma(FakeJobs):
    async def nodes(self) -> Mapping[str, object]:
        return await self.begin("nodes")

    async def processes(self) -> Mapping[str, object]:
        return await self.begin("processes")

    async def migrate(self, order: MigrationOrder, report: Report) -> Mapping[str, object]:
        return await self.begin(order, report)


class FakeSharing(FakeJobs):
    async def sharing(self, by: str, budget_cpu_seconds: float | None, *, rounded: bool) -> Mapping[str, object]:
        return await self.begin((by, budget_cpu_seconds, rounded))


class FakeService:
    """A service that says what it was told to say."""

    def __init__(self) -> None:
        self.ticks = 0
        self.padding = ""
        self.problems: list[Problem] = []
        self.error: Exception | None = None
        self.reloads = 0
        self.tasks = Tasks()
        self.numa = FakeNuma(self.tasks)
        self.sharing = FakeSharing(self.tasks)

    async def status(self) -> Mapping[str, object]:
        return {"report": self.document()}

    def document(self) -> Mapping[str, object]:
        if self.error is not None:
            raise self.error
        return {"format": 1, "ticks": self.ticks, "padding": self.padding}

    def metrics_text(self) -> str:
        return "ksm_run 1.0\n"

    def reload(self) -> Sequence[Problem]:
        self.reloads += 1
        return self.problems


class Client:
    """One connection to the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: Path) -> Client:
        return cls(*await asyncio.open_unix_connection(str(path), limit=2**24))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def call(self, method: str, **more: object) -> None:
        self.send(json.dumps({"method": method, **more}).encode() + b"\0")

    async def reply(self) -> Any:
        return json.loads((await self.reader.readuntil(b"\0"))[:-1])

    async def ended(self) -> bytes:
        """All that comes until the other side hangs up, in whichever way."""
        found = b""
        try:
            while part := await self.reader.read(2**16):
                found += part
        except ConnectionError:
            pass
        return found


Scenario = Callable[[ControlServer, FakeService, Path], Awaitable[None]]


def served(
    path: Path, scenario: Scenario, limits: Limits = LIMITS, authority: Authority | None = None
) -> list[Mapping[str, Any]]:
    """Run a scenario against a server; what asyncio's exception handler was told, which should be nothing."""
    told: list[Mapping[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        service = FakeService()
        made = listen(path)
        server = ControlServer(service, made.sock, authority or Authority(), limits)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await scenario(server, service, path)
        finally:
            service.tasks.close()
            server.close()
            made.remove()

    asyncio.run(run())
    return told


NOT_YET = KsmdError("the report", "there is none yet", hint="wait a second")
