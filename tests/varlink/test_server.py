# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl import __version__
from ksmd_ctl.daemon import connection, varlink
from ksmd_ctl.daemon.connection import Limits
from ksmd_ctl.daemon.varlink import INTERFACE, ControlServer
from ksmd_ctl.daemon.varlink_socket import Authority, Peer
from ksmd_ctl.errors import Problem
from tests.varlink.wire import NOT_YET, Client, FakeService, served

STATUS = f"{INTERFACE}.Status"
QUICK = Limits(request_bytes=64 * 1024, request_seconds=0.05, idle_seconds=0.05)


async def alive(path: Path) -> None:
    """The service still answers somebody else."""
    client = await Client.connect(path)
    client.call(STATUS)
    assert (await client.reply())["parameters"]["report"]["format"] == 1


def test_status_and_metrics(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(STATUS)
        assert await client.reply() == {"parameters": {"report": {"format": 1, "ticks": 0, "padding": ""}}}
        client.call(f"{INTERFACE}.Metrics")
        assert await client.reply() == {"parameters": {"text": "ksm_run 1.0\n"}}

    assert served(tmp_path / "s", scenario) == []


def test_introspection(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call("org.varlink.service.GetInfo")
        info = (await client.reply())["parameters"]
        assert info["version"] == __version__
        assert info["interfaces"] == ["org.varlink.service", INTERFACE]
        for name in info["interfaces"]:
            client.call("org.varlink.service.GetInterfaceDescription", parameters={"interface": name})
            description = (await client.reply())["parameters"]["description"]
            assert f"\ninterface {name}\n" in description
        assert "method Status() -> (report: object)" in description
        client.call("org.varlink.service.GetInterfaceDescription", parameters={"interface": "a.b"})
        assert (await client.reply())["error"] == "org.varlink.service.InterfaceNotFound"
        client.call("org.varlink.service.GetInterfaceDescription")
        assert await client.reply() == {
            "error": "org.varlink.service.InvalidParameter",
            "parameters": {"parameter": "interface"},
        }

    assert served(tmp_path / "s", scenario) == []


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("a.b.C", {}, "org.varlink.service.InterfaceNotFound"),
        (f"{INTERFACE}.Nothing", {}, "org.varlink.service.MethodNotFound"),
        (STATUS, {"x": 1}, "org.varlink.service.InvalidParameter"),
    ],
)
def test_calls_that_can_not_be_answered(tmp_path: Path, method: str, parameters: dict[str, object], error: str) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(method, parameters=parameters)
        assert (await client.reply())["error"] == error
        client.call(STATUS)
        assert "error" not in await client.reply()

    assert served(tmp_path / "s", scenario) == []


def test_what_the_service_says_that_failed(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        service.error = NOT_YET
        client.call(STATUS)
        assert await client.reply() == {
            "error": f"{INTERFACE}.Failed",
            "parameters": {
                "what": "the report",
                "why": "there is none yet",
                "hint": "wait a second",
                "exit_code": 1,
            },
        }
        service.error = KeyError("a mistake")
        client.call(STATUS)
        assert "KeyError" in (await client.reply())["parameters"]["why"]
        service.error = None
        client.call(STATUS)
        assert "error" not in await client.reply()

    assert served(tmp_path / "s", scenario) == []


def test_reload(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(f"{INTERFACE}.Reload")
        assert await client.reply() == {"parameters": {}}
        service.problems = [Problem("/etc/x.toml", "policy", "is no policy")]
        client.call(f"{INTERFACE}.Reload")
        assert await client.reply() == {
            "error": f"{INTERFACE}.ReloadFailed",
            "parameters": {"problems": [{"path": "/etc/x.toml", "key": "policy", "text": "is no policy"}]},
        }
        client.call(f"{INTERFACE}.Reload", oneway=True)
        client.call(STATUS)
        assert "report" in (await client.reply())["parameters"]
        assert service.reloads == 3

    assert served(tmp_path / "s", scenario) == []


def test_who_may_not_reload(tmp_path: Path) -> None:
    class Nobody(Authority):
        def may_change(self, peer: object) -> bool:
            return False

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(f"{INTERFACE}.Reload")
        assert await client.reply() == {
            "error": f"{INTERFACE}.PermissionDenied",
            "parameters": {"needs": "root or a member of group 12"},
        }
        assert service.reloads == 0
        client.call(STATUS)
        assert "error" not in await client.reply()

    assert served(tmp_path / "s", scenario, authority=Nobody(group=12)) == []


def test_a_subscriber_gets_a_report_each_tick(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(STATUS, more=True)
        for tick in range(20):
            found = await client.reply()
            assert found["continues"] is True
            assert found["parameters"]["report"]["ticks"] == tick
            service.ticks += 1
            server.publish()
        service.error = NOT_YET
        server.publish()
        service.error = None
        client.writer.close()
        while server.subscribers:
            await asyncio.sleep(0)
        server.publish()

    # The limits of time are for those whom we wait for, not for those who wait for us.
    assert served(tmp_path / "s", scenario, limits=QUICK) == []


def test_a_report_that_can_not_be_written_ends_nothing(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(STATUS, more=True)
        await client.reply()
        service.padding = float("nan")  # type: ignore[assignment]
        server.publish()
        service.padding, service.ticks = "", 7
        server.publish()
        assert (await client.reply())["parameters"]["report"]["ticks"] == 7

    assert served(tmp_path / "s", scenario) == []


def test_a_subscriber_outlives_the_limit_of_time(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        subscriber, silent = await Client.connect(path), await Client.connect(path)
        subscriber.call(STATUS, more=True)
        await subscriber.reply()
        assert await silent.ended() == b""
        server.publish()
        await subscriber.reply()

    assert served(tmp_path / "s", scenario, limits=QUICK) == []


def test_a_subscriber_that_stops_reading_is_dropped(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        service.padding = "x" * 2**20
        client = await Client.connect(path)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.call(STATUS, more=True)
        while not server.subscribers:
            await asyncio.sleep(0)
        waiting = 0
        while server.subscribers:
            server.publish()
            for other in server.connections.open:
                waiting = max(waiting, len(other.unsent))
            await asyncio.sleep(0)
        # Never more than the one report that it was given before it stopped.
        assert waiting < 2 * 2**20
        service.padding = ""
        await alive(path)

    assert served(tmp_path / "s", scenario) == []


@pytest.mark.parametrize("sent", [b"", b'{"method":'], ids=["nothing", "half a call"])
def test_a_silent_client_is_closed(tmp_path: Path, sent: bytes) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.send(sent)
        assert await client.ended() == b""

    assert served(tmp_path / "s", scenario, limits=QUICK) == []


def test_a_client_that_drips_is_closed(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        ended = asyncio.ensure_future(client.ended())
        while not ended.done():
            client.send(b" ")
            await asyncio.sleep(0.005)
        assert ended.result() == b""

    assert served(tmp_path / "s", scenario, limits=QUICK) == []


@pytest.mark.parametrize("end", [b"", b"\0"], ids=["endless", "complete"])
def test_a_message_that_is_too_long(tmp_path: Path, end: bytes) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.send(b'{"method":"' + b"x" * 2**17 + end)
        assert await client.ended() == b""
        assert all(len(other.buffer) < 2**17 for other in server.connections.open)
        await alive(path)

    assert served(tmp_path / "s", scenario) == []


class Users:
    """Says of each client that connects that it is the next of some users."""

    def __init__(self, *uids: int) -> None:
        self._uids = iter(uids)

    def __call__(self, getsockopt: object) -> Peer:
        return Peer(1, next(self._uids), frozenset())


async def subscribe(path: Path) -> Client:
    client = await Client.connect(path)
    client.call(STATUS, more=True)
    assert "error" not in await client.reply()
    return client


async def refusal(path: Path) -> Any:
    return json.loads((await (await Client.connect(path)).ended())[:-1])


def too_many(limit: int) -> Any:
    return {"error": f"{INTERFACE}.TooManyClients", "parameters": {"limit": limit}}


def test_the_idlest_client_makes_room(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        first, second, third = [await Client.connect(path) for _ in range(3)]
        for client in (first, second, third, first):
            client.call(STATUS)
            await client.reply()
        await alive(path)
        assert await second.ended() == b""
        first.call(STATUS)
        assert "error" not in await first.reply()
        assert server.connections.refused == 0

    limits = Limits(request_bytes=1000, clients=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlink, "peer_of", Users(1, 2, 3, 4))
        assert served(tmp_path / "s", scenario, limits=limits, authority=Authority(own_uid=99)) == []


def test_no_user_takes_every_place(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        greedy = [await subscribe(path) for _ in range(3)]
        assert await refusal(path) == too_many(3)
        await alive(path)
        greedy.pop().writer.close()
        while len(server.subscribers) == 3:
            await asyncio.sleep(0)
        await subscribe(path)

    limits = Limits(request_bytes=1000, clients=20, clients_of_user=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlink, "peer_of", Users(1, 1, 1, 1, 2, 1))
        assert served(tmp_path / "s", scenario, limits=limits, authority=Authority(own_uid=99)) == []


@pytest.mark.parametrize("privileged", [0, 99], ids=["root", "the service's user"])
def test_there_is_a_place_for_root_whatever_others_do(tmp_path: Path, privileged: int) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        for _ in range(4):
            client = await Client.connect(path)
            client.call(f"{INTERFACE}.Nodes")
        while len(service.numa.jobs) < 4:
            await asyncio.sleep(0)
        assert await refusal(path) == too_many(4)
        kept = [await subscribe(path) for _ in range(2)]
        # Root's own are not turned out for others, nor is there place for any number of them.
        assert await refusal(path) == too_many(4)
        assert await refusal(path) == too_many(6)
        server.publish()
        for client in kept:
            await client.reply()

    users = Users(1, 2, 3, 4, 5, privileged, privileged, 6, privileged)
    limits = Limits(request_bytes=1000, clients=4, reserved=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlink, "peer_of", users)
        assert served(tmp_path / "s", scenario, limits=limits, authority=Authority(own_uid=99)) == []


def test_subscribers_leave_places_for_those_who_ask_and_go(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        kept = [await subscribe(path) for _ in range(3)]
        late = await Client.connect(path)
        late.call(STATUS, more=True)
        assert await late.reply() == too_many(3)
        late.call(STATUS)
        assert "error" not in await late.reply()
        kept.append(await subscribe(path))
        server.publish()
        for client in kept:
            await client.reply()

    limits = Limits(request_bytes=1000, clients=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlink, "peer_of", Users(1, 2, 3, 4, 0))
        assert served(tmp_path / "s", scenario, limits=limits, authority=Authority(own_uid=99)) == []


def test_a_client_that_asks_and_does_not_read_waits(tmp_path: Path) -> None:
    """Its requests are left in its own socket, and it is closed for not getting on."""

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        service.padding = "x" * 2**16
        greedy = await Client.connect(path)
        greedy.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(1000):
            greedy.call(STATUS)
        most = 0
        while not server.connections.open:
            await asyncio.sleep(0)
        while server.connections.open:
            for other in server.connections.open:
                most = max(most, len(other.unsent) + len(other.buffer))
            await asyncio.sleep(0)
        assert most < 2**19

    assert served(tmp_path / "s", scenario, limits=QUICK) == []


def test_one_turn_of_the_loop_answers_one_call(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        greedy, modest = await Client.connect(path), await Client.connect(path)
        for _ in range(500):
            greedy.call(f"{INTERFACE}.Reload")
        while not service.reloads:
            await asyncio.sleep(0)
        modest.call(STATUS)
        await modest.reply()
        assert service.reloads < 500
        for _ in range(500):
            await greedy.reply()

    assert served(tmp_path / "s", scenario) == []


def test_who_has_said_everything_still_gets_the_answers(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(STATUS)
        client.call(STATUS)
        client.writer.write_eof()
        assert (await client.ended()).count(b"\0") == 2

    assert served(tmp_path / "s", scenario) == []


def test_close_ends_everything(tmp_path: Path) -> None:
    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        client.call(STATUS, more=True)
        await client.reply()
        server.close()
        assert await client.ended() == b""
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(path)

    assert served(tmp_path / "s", scenario) == []


def test_no_descriptors_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting fails for a while: that is no busy loop, and afterwards the client is served."""
    monkeypatch.setattr(connection, "_ACCEPT_AGAIN_SECONDS", 0.01)
    accept = socket.socket.accept
    failures = [OSError(errno.EMFILE, "Too many open files")] * 3

    def failing(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return accept(self)

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        monkeypatch.setattr(socket.socket, "accept", failing)
        await alive(path)
        assert failures == []
        failures.append(OSError(errno.EMFILE, "Too many open files"))
        await Client.connect(path)
        while failures:
            await asyncio.sleep(0)
        server.close()

    assert served(tmp_path / "s", scenario) == []


CALLS = st.sampled_from(
    [
        b'{"method":"io.ksmd-ctl.Status"}\0',
        b'{"method":"io.ksmd-ctl.Metrics","oneway":true}\0',
        b'{"method":"io.ksmd-ctl.Status","more":true}\0',
        b'{"method":"org.varlink.service.GetInfo"}\0',
        b'{"method":"a.b","parameters":{"\\ud800":1}}\0',
        b"\0",
        b"[" * 2000 + b"\0",
        b"\xff\xfe\0",
        b'{"method":"io.ksmd-ctl.Status","method":"io.ksmd-ctl.Reload"}\0',
    ]
)


@settings(max_examples=60)
@given(st.lists(CALLS | st.binary(max_size=300), max_size=6), st.lists(st.integers(0, 1500), max_size=6))
def test_anything_in_any_pieces(parts: list[bytes], cuts: list[int]) -> None:
    """Whatever comes, however it is cut: every whole reply is JSON, the server lives, and nothing is reported."""
    data = b"".join(parts)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})

    async def scenario(server: ControlServer, service: FakeService, path: Path) -> None:
        client = await Client.connect(path)
        for start, end in itertools.pairwise(edges):
            client.send(data[start:end])
            await asyncio.sleep(0)
        client.writer.write_eof()
        for reply in (await client.ended()).split(b"\0")[:-1]:
            assert "parameters" in json.loads(reply)
        await alive(path)

    with tempfile.TemporaryDirectory() as folder:
        assert served(Path(folder) / "s", scenario, limits=QUICK) == []


def test_the_default_authority_is_of_this_process() -> None:
    assert Authority().own_uid == os.geteuid()
