# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers that take their time, over the socket: nodes, processes, and a migration with its progress and its end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.daemon.connection import Limits
from ksmd_ctl.daemon.varlink import INTERFACE, ControlServer
from ksmd_ctl.daemon.varlink_socket import Authority
from ksmd_ctl.errors import Refused
from ksmd_ctl.transactions.migration import MigrationOrder
from tests.varlink.wire import Client, FakeService, served

MIGRATE = f"{INTERFACE}.Migrate"
STATUS = f"{INTERFACE}.Status"
QUICK = Limits(request_bytes=64 * 1024, request_seconds=0.05, idle_seconds=0.05)
PROGRESS = {"progress": {"done": 1, "total": 2, "unit": "pages"}, "result": None}
RESULT = {"progress": None, "result": {"format": 1, "cancelled": False}}


async def begun(service: FakeService, number: int = 1) -> None:
    while len(service.numa.jobs) < number:
        await asyncio.sleep(0)


@pytest.mark.parametrize("method", ["Nodes", "Processes"])
def test_an_answer_that_comes_later(tmp_path: Path, method: str) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client, other = await Client.connect(path), await Client.connect(path)
        client.call(f"{INTERFACE}.{method}")
        client.call(STATUS)
        await begun(service)
        # Nobody else waits for it, and it outlives the time in which a client has to say something.
        other.call(STATUS)
        await other.reply()
        await asyncio.sleep(0.15)
        job = service.numa.jobs[0]
        assert job.asked == method.lower()
        job.done({method.lower(): {"format": 1}})
        assert await client.reply() == {"parameters": {method.lower(): {"format": 1}}}
        # What was asked behind it is answered then.
        assert "report" in (await client.reply())["parameters"]

    assert served(tmp_path / "s", scenario, limits=QUICK) == []


def test_who_hangs_up_while_something_is_done_for_them_takes_no_place(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        leaving, staying = await Client.connect(path), await Client.connect(path)
        for number, client in enumerate((leaving, staying), 1):
            client.call(f"{INTERFACE}.Nodes")
            await begun(service, number)
        leaving.writer.close()
        # Who only has nothing more to say still wants to know.
        staying.writer.write_eof()
        while len(server.connections.open) > 1:
            await asyncio.sleep(0)
        for job in service.numa.jobs:
            job.done({"nodes": {}})
        assert await staying.reply() == {"parameters": {"nodes": {}}}

    assert served(tmp_path / "s", scenario) == []


def test_a_migration_with_more(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        parameters = {"to": 1, "pid": 7, "ranges": [{"start": 4096, "end": 8192}], "everything": True}
        client.call(MIGRATE, parameters=parameters, more=True)
        await begun(service)
        job = service.numa.jobs[0]
        assert job.asked == MigrationOrder(to=1, pid=7, ranges=((4096, 8192),), everything=True)
        job.progress(PROGRESS)
        assert await client.reply() == {"parameters": PROGRESS, "continues": True}
        job.done(RESULT)
        assert await client.reply() == {"parameters": RESULT}
        assert not job.cancelled

    assert served(tmp_path / "s", scenario) == []


def test_a_migration_without_more_has_one_answer(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(MIGRATE, parameters={"to": 0, "unit": "a.service", "dry_run": True})
        await begun(service)
        job = service.numa.jobs[0]
        assert job.asked == MigrationOrder(to=0, unit="a.service", dry_run=True)
        job.progress(PROGRESS)
        job.done(RESULT)
        assert await client.reply() == {"parameters": RESULT}

    assert served(tmp_path / "s", scenario) == []


def test_what_failed_at_once_and_what_failed_later(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        service.numa.error = Refused("moving memory", "already", hint="wait")
        client.call(MIGRATE, parameters={"to": 0, "pid": 1})
        failed = {"what": "moving memory", "why": "already", "hint": "wait", "exit_code": 6}
        assert await client.reply() == {"error": f"{INTERFACE}.Failed", "parameters": failed}
        service.numa.error = None
        client.call(MIGRATE, parameters={"to": 0, "pid": 1}, more=True)
        await begun(service)
        service.numa.jobs[0].failed(Refused("moving memory", "already", hint="wait"))
        assert await client.reply() == {"error": f"{INTERFACE}.Failed", "parameters": failed}
        client.call(STATUS)
        assert "error" not in await client.reply()

    assert served(tmp_path / "s", scenario) == []


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({}, "to"),
        ({"to": "1"}, "to"),
        ({"to": True}, "to"),
        ({"to": 1, "pid": 1.5}, "pid"),
        ({"to": 1, "pid": False}, "pid"),
        ({"to": 1, "unit": 3}, "unit"),
        ({"to": 1, "ranges": {}}, "ranges"),
        ({"to": 1, "ranges": [3]}, "ranges"),
        ({"to": 1, "ranges": [{"start": 1}]}, "ranges"),
        ({"to": 1, "ranges": [{"start": True, "end": 5}]}, "ranges"),
        ({"to": 1, "dry_run": 1}, "dry_run"),
        ({"to": 1, "everything": "yes"}, "everything"),
        ({"to": 1, "more": 1}, "more"),
    ],
)
def test_parameters_of_another_form(tmp_path: Path, parameters: dict[str, Any], wrong: str) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(MIGRATE, parameters=parameters)
        assert await client.reply() == {
            "error": "org.varlink.service.InvalidParameter",
            "parameters": {"parameter": wrong},
        }
        assert service.numa.jobs == []

    assert served(tmp_path / "s", scenario) == []


def test_who_may_only_read_may_look_what_would_be_moved(tmp_path: Path) -> None:
    class Nobody(Authority):
        def may_change(self, peer: object) -> bool:
            return False

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(MIGRATE, parameters={"to": 0, "pid": 1})
        assert (await client.reply())["error"] == f"{INTERFACE}.PermissionDenied"
        assert service.numa.jobs == []
        client.call(MIGRATE, parameters={"to": 0, "pid": 1, "dry_run": True})
        await begun(service)
        service.numa.jobs[0].done(RESULT)
        assert await client.reply() == {"parameters": RESULT}

    assert served(tmp_path / "s", scenario, authority=Nobody(group=12)) == []


def test_who_has_nothing_more_to_say_stops_it_and_hears_the_end(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(MIGRATE, parameters={"to": 0, "pid": 1}, more=True)
        await begun(service)
        job = service.numa.jobs[0]
        client.writer.write_eof()
        while not job.cancelled:
            await asyncio.sleep(0)
        # Time passes until it has stopped, and the end of what the client says is no busy loop.
        turns = 0
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.05
        while loop.time() < end:
            await asyncio.sleep(0.005)
            turns += 1
        assert turns <= 10
        job.done(RESULT)
        assert await client.ended() == b'{"parameters":{"progress":null,"result":{"format":1,"cancelled":false}}}\0'

    assert served(tmp_path / "s", scenario, limits=QUICK) == []


def test_who_hangs_up_stops_it(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(MIGRATE, parameters={"to": 0, "pid": 1}, more=True)
        await begun(service)
        client.writer.close()
        while not service.numa.jobs[0].cancelled:
            await asyncio.sleep(0)
        service.numa.jobs[0].progress(PROGRESS)
        service.numa.jobs[0].done(RESULT)
        while server.connections.open:
            await asyncio.sleep(0)

    assert served(tmp_path / "s", scenario) == []


def test_the_end_of_the_service_stops_it(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(MIGRATE, parameters={"to": 0, "pid": 1}, more=True)
        await begun(service)
        server.close()
        await asyncio.sleep(0)
        assert service.numa.jobs[0].cancelled
        service.numa.jobs[0].done(RESULT)
        assert await client.ended() == b""

    assert served(tmp_path / "s", scenario) == []


def test_oneway(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(MIGRATE, parameters={"to": 0, "pid": 1}, oneway=True)
        client.call(STATUS)
        await begun(service)
        service.numa.jobs[0].done(RESULT)
        assert "report" in (await client.reply())["parameters"]

    assert served(tmp_path / "s", scenario) == []
