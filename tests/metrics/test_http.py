# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.daemon import http
from ksmd_ctl.daemon.connection import Limits
from ksmd_ctl.errors import Denied, ExitCode, KsmdError, UsageError

#: Far more than anything here takes: reaching it means that something hangs.
PATIENCE_SECONDS = 30
QUICK = Limits(request_bytes=8 * 1024, request_seconds=0.05, idle_seconds=0.05)


class FakePages:
    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.error: Exception | None = None

    def exposition(self, accept: str) -> tuple[str, bytes]:
        self.accepted.append(accept)
        if self.error is not None:
            raise self.error
        return "text/plain; version=0.0.4", b"ksm_run 1.0\n"

    def page(self) -> bytes:
        return b"<!DOCTYPE html>\n<p>&amp; more\n"


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        top = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status, *rest = top.split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest if line)}
        return (
            int(status.split()[1]),
            headers,
            await self.reader.readexactly(int(headers["content-length"])) if body else b"",
        )

    async def ended(self) -> bytes:
        found = b""
        try:
            while part := await self.reader.read(2**16):
                found += part
        except ConnectionError:
            pass
        return found


Connect = Callable[[], Awaitable[Client]]
Scenario = Callable[[http.HttpServer, FakePages, Connect], Awaitable[None]]


def served(scenario: Scenario, limits: Limits = http.LIMITS) -> list[Mapping[str, Any]]:
    """Run a scenario against a server; what asyncio's exception handler was told, which should be nothing."""
    told: list[Mapping[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        pages = FakePages()
        server = await http.serve(pages, http.listen("127.0.0.1", 0), limits)
        host, port = server.address.split(":")

        async def connect() -> Client:
            return Client(*await asyncio.open_connection(host, int(port)))

        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await scenario(server, pages, connect)
        finally:
            server.close()

    asyncio.run(run())
    return told


def test_metrics_and_what_they_are_asked_for_in() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        client.send(
            b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nACCEPT: application/openmetrics-text\r\nAccept: */*\r\n\r\n"
        )
        status, headers, body = await client.answer()
        assert (status, body) == (200, b"ksm_run 1.0\n")
        assert headers["content-type"] == "text/plain; version=0.0.4"
        assert headers["connection"] == "keep-alive"
        assert pages.accepted == ["application/openmetrics-text, */*"]

    assert served(scenario) == []


def test_one_connection_takes_several_requests_in_any_pieces() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        for byte in b"GET /metrics HTTP/1.1\r\n\r\nHEAD /metrics HTTP/1.1\r\n\r\nGET / HTTP/1.0\r\n\r\n":
            client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.answer())[2] == b"ksm_run 1.0\n"
        status, headers, _ = await client.answer(body=False)
        assert (status, headers["content-length"]) == (200, "12")
        status, headers, body = await client.answer()
        assert headers["connection"] == "close"
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert body == b"<!DOCTYPE html>\n<p>&amp; more\n"
        assert await client.ended() == b""

    assert served(scenario) == []


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /nothing HTTP/1.1", 404),
        (b"GET /metrics/ HTTP/1.1", 404),
        (b"POST /metrics HTTP/1.1", 405),
        (b"DELETE / HTTP/1.1", 405),
        (b"GET /metrics HTTP/2.0", 505),
        (b"GET /metrics", 400),
        (b"GET  HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"GET / HTTP/1.1\r\nno header", 400),
        (b"GET / HTTP/1.1\r\nA : b", 400),
        (b"GET / HTTP/1.1\r\nAccept: a\nX: b", 400),
    ],
)
def test_what_is_not_served(request_line: bytes, status: int) -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        client.send(request_line + b"\r\n\r\n")
        assert (await client.answer())[0] == status

    assert served(scenario) == []


def test_a_body_is_never_taken_for_a_request() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        for header in (b"Content-Length: 27", b"Transfer-Encoding: chunked"):
            client = await connect()
            client.send(b"GET / HTTP/1.1\r\n" + header + b"\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n")
            assert (await client.answer())[1]["connection"] == "close"
            assert await client.ended() == b""
        assert pages.accepted == []

    assert served(scenario) == []


def test_headers_that_are_too_long() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        client.send(b"GET / HTTP/1.1\r\nA: " + b"x" * 10000)
        assert (await client.answer())[0] == 431
        assert await client.ended() == b""

    assert served(scenario) == []


def test_failures_are_answered() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        pages.error = KsmdError("the report", "there is none yet")
        client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        status, _, body = await client.answer()
        assert (status, body) == (503, b"the report: there is none yet\n")
        pages.error = KeyError("a mistake")
        client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await client.answer())[0] == 500
        pages.error = None
        client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await client.answer())[0] == 200

    assert served(scenario) == []


@pytest.mark.parametrize("sent", [b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nA: b\r\n"])
def test_a_silent_client_is_closed(sent: bytes) -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        client.send(sent)
        assert await client.ended() == b""

    assert served(scenario, QUICK) == []


def test_too_many_clients() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        inside = [await connect() for _ in range(2)]
        for client in inside:
            client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            await client.answer()
        outside = await connect()
        assert b" 503 " in await outside.ended()
        inside[0].writer.close()
        while len(server.connections.open) == 2:
            await asyncio.sleep(0)
        again = await connect()
        again.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await again.answer())[0] == 200

    assert served(scenario, Limits(request_bytes=1000, clients=2)) == []


PIECES = st.sampled_from(
    [
        b"GET /metrics HTTP/1.1\r\n",
        b"GET / HTTP/1.0\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Length: -1\r\n",
        b"Accept: application/openmetrics-text;version=\xb9\r\n",
        b"Connection: close\r\n",
        b"\0",
        b"A" * 9000,
    ]
)


@settings(max_examples=60)
@given(st.lists(PIECES | st.binary(max_size=100), max_size=8))
def test_anything_in_pieces(pieces: list[bytes]) -> None:
    """Whatever comes: the server lives, the client is let go, and nothing is reported."""

    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        try:
            for piece in pieces:
                client.send(piece)
                await client.writer.drain()
            client.writer.write_eof()
        except (ConnectionError, OSError):
            pass
        await client.ended()
        other = await connect()
        other.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await other.answer())[0] == 200

    assert served(scenario, QUICK) == []


def test_an_address_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="EADDRINUSE") as caught:
        http.listen("127.0.0.1", taken.getsockname()[1])
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--metrics-listen" in caught.value.hint


@pytest.mark.parametrize("host", ["localhost.example", "256.0.0.1", "", "192.0.2.1"])
def test_addresses_that_can_not_be(host: str) -> None:
    with pytest.raises(UsageError):
        http.listen(host or "not an address", 0)


def test_a_port_that_takes_a_privilege(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", denied)
    with pytest.raises(Denied, match="EACCES"):
        http.listen("127.0.0.1", 80)


def test_localhost_needs_no_name_server() -> None:
    with http.listen("localhost", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
