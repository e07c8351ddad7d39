# SPDX-License-Identifier: GPL-2.0-or-later
"""Who shares memory with whom, over the socket: what is asked for, and who gets rounded counts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.daemon.varlink import INTERFACE, ControlServer
from ksmd_ctl.daemon.varlink_socket import Peer
from tests.varlink.wire import Client, FakeService, served

SHARING = f"{INTERFACE}.Sharing"


@pytest.mark.parametrize(
    ("parameters", "asked"),
    [
        ({}, ("unit", None)),
        ({"by": None, "budget_seconds": None}, ("unit", None)),
        ({"by": "process", "budget_seconds": 2}, ("process", 2.0)),
    ],
)
@pytest.mark.parametrize("root", [True, False])
def test_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], asked: tuple[object, ...], root: bool
) -> None:
    # Neither root nor the service's own user.
    monkeypatch.setattr("ksmd_ctl.daemon.varlink.peer_of", lambda _: Peer(1, 0 if root else 4711, frozenset()))

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(SHARING, parameters=parameters)
        while not service.sharing.jobs:
            await asyncio.sleep(0)
        job = service.sharing.jobs[0]
        assert job.asked == (*asked, not root)
        job.done({"sharing": {"format": 1}})
        assert await client.reply() == {"parameters": {"sharing": {"format": 1}}}

    assert served(tmp_path / "s", scenario) == []


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({"by": "user"}, "by"),
        ({"by": 1}, "by"),
        ({"budget_seconds": 0}, "budget_seconds"),
        ({"budget_seconds": 61}, "budget_seconds"),
        ({"budget_seconds": "1"}, "budget_seconds"),
        ({"limit": 1}, "limit"),
    ],
)
def test_parameters_of_another_form(tmp_path: Path, parameters: dict[str, Any], wrong: str) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(SHARING, parameters=parameters)
        assert await client.reply() == {
            "error": "org.varlink.service.InvalidParameter",
            "parameters": {"parameter": wrong},
        }
        assert service.sharing.jobs == []

    assert served(tmp_path / "s", scenario) == []
