# SPDX-License-Identifier: GPL-2.0-or-later
"""The history over the socket: what is asked for, and who follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.history import HistoryKeeper
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.varlink import INTERFACE, LIMITS, ControlServer
from ksmd_ctl.daemon.varlink_socket import Peer
from ksmd_ctl.history.model import Query
from tests.fakes.host import FakeHost
from tests.varlink.wire import Client, FakeService, served

HISTORY = f"{INTERFACE}.History"


def history(service: Any, path: Path) -> Log:
    """A log whose events are the service's history."""
    log = Log(lambda text, fields: None)
    service.history = HistoryKeeper(path.parent, FakeHost().identity, service.tasks, Config, log, lambda: 100.0)
    return log


async def texts(client: Client) -> list[str]:
    return [event["text"] for event in (await client.reply())["parameters"]["history"]["events"]]


@pytest.mark.parametrize("root", [True, False])
def test_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: bool) -> None:
    monkeypatch.setattr("ksmd_ctl.daemon.varlink.peer_of", lambda _: Peer(1, 0 if root else 4711, frozenset()))

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        log = history(service, path)
        log.event(Event.STARTED, "started")
        log.event(Event.DRIFT, "run was changed", knob="run")
        log.event(Event.STOPPED, "stopped")
        client = await Client.connect(path)
        for parameters, found in (
            ({}, ["started", "run was changed", "stopped"]),
            ({"kinds": ["foreign"]}, ["run was changed"]),
            ({"kinds": ["foreign", "service"], "limit": 2}, ["run was changed", "stopped"]),
            ({"kinds": []}, []),
            ({"limit": 0}, []),
            ({"since_seconds": 100, "until_seconds": None}, ["started", "run was changed", "stopped"]),
            ({"since_seconds": 101}, []),
            ({"until_seconds": 100}, []),
        ):
            client.call(HISTORY, parameters=parameters)
            assert await texts(client) == found, parameters

    assert served(tmp_path / "s", scenario) == []


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({"limit": 2001}, "limit"),
        ({"limit": -1}, "limit"),
        ({"kinds": ["nothing"]}, "kinds"),
        ({"kinds": "foreign"}, "kinds"),
        ({"since_seconds": "1"}, "since_seconds"),
        # That takes `more`.
        ({"follow": True}, "follow"),
        ({"until": 1}, "until"),
    ],
)
def test_parameters_of_another_form(tmp_path: Path, parameters: dict[str, Any], wrong: str) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        history(service, path)
        client = await Client.connect(path)
        client.call(HISTORY, parameters=parameters)
        answer = await client.reply()
        assert answer["error"] == "org.varlink.service.InvalidParameter"
        assert answer["parameters"]["parameter"].partition("[")[0] == wrong

    assert served(tmp_path / "s", scenario) == []


def test_who_follows_gets_each_event_that_matches_until_it_hangs_up(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        log = history(service, path)
        log.event(Event.STARTED, "started")
        client = await Client.connect(path)
        client.call(HISTORY, parameters={"follow": True, "kinds": ["foreign", "service"], "limit": 1}, more=True)
        first = await client.reply()
        assert first["continues"]
        assert [event["text"] for event in first["parameters"]["history"]["events"]] == ["started"]
        log.event(Event.DRIFT, "run was changed")
        log.event(Event.RELOADED, "read again")
        log.event(Event.STOPPED, "stopped")
        assert await texts(client) == ["run was changed"]
        assert await texts(client) == ["stopped"]
        client.writer.close()
        while server.connections.open:
            await asyncio.sleep(0.001)
        log.event(Event.DRIFT, "nobody hears it")
        assert not service.history._followers  # type: ignore[attr-defined]

    assert served(tmp_path / "s", scenario) == []


def test_what_happens_while_the_first_answer_is_made_comes_after_it(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        log = history(service, path)
        keeper: HistoryKeeper = service.history  # type: ignore[attr-defined]
        document = keeper.document

        async def late(query: Query, then: Callable[[], None]) -> dict[str, object]:
            log.event(Event.DRIFT, "before")
            found = await document(query, then)
            log.event(Event.DRIFT, "after")
            return found

        keeper.document = late  # type: ignore[method-assign, assignment]
        client = await Client.connect(path)
        client.call(HISTORY, parameters={"follow": True}, more=True)
        assert await texts(client) == ["before"]
        assert await texts(client) == ["after"]

    assert served(tmp_path / "s", scenario) == []


def test_events_come_also_where_the_clock_was_set_back(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        log = history(service, path)
        client = await Client.connect(path)
        client.call(HISTORY, parameters={"follow": True, "since_seconds": 5000}, more=True)
        assert await texts(client) == []
        log.event(Event.DRIFT, "run was changed")
        assert await texts(client) == ["run was changed"]

    assert served(tmp_path / "s", scenario) == []


def test_who_has_said_all_gets_the_answer(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        history(service, path).event(Event.STARTED, "started")
        client = await Client.connect(path)
        client.call(HISTORY)
        client.writer.write_eof()
        assert await texts(client) == ["started"]

    assert served(tmp_path / "s", scenario) == []


def test_who_does_not_read_is_disconnected(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        log = history(service, path)
        client = await Client.connect(path)
        client.call(HISTORY, parameters={"follow": True}, more=True)
        await client.reply()
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        number = 0
        while server.connections.open:
            number += 1
            assert number < 100_000
            log.event(Event.DRIFT, "x" * 400, knob=f"knob{number}")

    assert served(tmp_path / "s", scenario) == []


def test_those_who_follow_leave_places_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uids = iter(range(1000, 2000))
    monkeypatch.setattr("ksmd_ctl.daemon.varlink.peer_of", lambda _: Peer(1, next(uids), frozenset()))

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        history(service, path)
        clients = [await Client.connect(path) for _ in range(LIMITS.clients // 2 + 1)]
        answers = []
        for number, client in enumerate(clients):
            # Those who watch reports count, too.
            method = HISTORY if number % 2 else f"{INTERFACE}.Status"
            client.call(method, parameters={"follow": True} if number % 2 else {}, more=True)
            answers.append(await client.reply())
        assert [answer.get("error", "") for answer in answers] == [
            *[""] * (LIMITS.clients // 2),
            f"{INTERFACE}.TooManyClients",
        ]

    assert served(tmp_path / "s", scenario) == []
