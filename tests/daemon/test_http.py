# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.daemon import http
from ksmd_ctl.daemon.connection import Limits
from ksmd_ctl.errors import Denied, ExitCode, KsmdError, UsageError
from ksmd_ctl.render.page_history import Span

#: Far more than anything here takes: reaching it means that something hangs.
PATIENCE_SECONDS = 30
QUICK = Limits(request_bytes=8 * 1024, request_seconds=0.05, idle_seconds=0.05)


class FakePages:
    config = SimpleNamespace(metrics_names=("metrics.example", "host_1"))

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.spans: list[Span] = []
        self.error: Exception | None = None

    def exposition(self, accept: str) -> tuple[str, bytes]:
        self.accepted.append(accept)
        if self.error is not None:
            raise self.error
        return "text/plain; version=0.0.4", b"ksm_run 1.0\n"

    def page(self, span: Span) -> bytes:
        self.spans.append(span)
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
        server = http.HttpServer(pages, http.listen("127.0.0.1", 0), limits)
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
            b"GET /metrics?x=1 HTTP/1.1\r\nHost: localhost\r\n"
            b"ACCEPT: application/openmetrics-text\r\nAccept: */*\r\n\r\n"
        )
        status, headers, body = await client.answer()
        assert (status, body) == (200, b"ksm_run 1.0\n")
        assert headers["content-type"] == "text/plain; version=0.0.4"
        assert headers["connection"] == "keep-alive"
        assert pages.accepted == ["application/openmetrics-text, */*"]

    assert served(scenario) == []


def test_the_page_is_of_the_time_that_is_asked_for() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        client = await connect()
        for target in ("/", "/?span=day", "/?x=1&span=week", "/?span=year", "/?span", "/?&&=&span=%00"):
            client.send(f"GET {target} HTTP/1.1\r\n\r\n".encode())
            assert (await client.answer())[0] == 200
        assert pages.spans == [Span.HOUR, Span.DAY, Span.WEEK, *[Span.HOUR] * 3]

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


def statuses(*requests: str) -> list[int]:
    """What a server answers to requests, given as their lines."""
    found = []

    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        for request in requests:
            client = await connect()
            client.send(f"{request}\r\n\r\n".encode("latin-1"))
            found.append((await client.answer())[0])

    assert served(scenario) == []
    return found


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.0.0.1",
        "127.0.0.1:19753",
        "192.0.2.7:80",
        "[::1]:19753",
        "[2001:db8::1]",
        "localhost",
        "LocalHost:19753",
        "localhost.",
        "metrics.example:19753",
        "METRICS.example.",
        "host_1",
    ],
)
def test_hosts_that_are_served(host: str) -> None:
    answers = statuses(
        f"GET /metrics HTTP/1.1\r\nHost: {host}",
        f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: http://{host or 'localhost'}",
        f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: https://{host or 'localhost'}",
    )
    assert answers == [200, 200, 200]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:19753",
        "a.metrics.example",
        "metrics.example.evil",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example, localhost",
        "127.1",
        "2130706433",
        "[::1",
        "::1",
        "[127.0.0.1]",
        "[evil.example]",
        "localhost:80:80",
        "localhost:evil",
        ":80",
        "\xe9",
    ],
)
def test_hosts_that_are_not_served(host: str) -> None:
    """Whoever owns a name can have it lead to this host (DNS rebinding)."""
    answers = statuses(
        f"GET /metrics HTTP/1.1\r\nHost: {host}",
        f"GET / HTTP/1.0\r\nHost: {host}",
        f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: {host}",
        f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: http://{host}",
    )
    assert answers == [421, 421, 421, 403]


@pytest.mark.parametrize("origin", ["null", "file://", "http:", "chrome-extension://localhost", "localhost"])
def test_origins_that_are_not_served(origin: str) -> None:
    assert statuses(f"GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}") == [403]


def test_targets_in_absolute_form() -> None:
    """RFC 9112, 3.2.2: a server accepts them, and their host counts in place of the Host header."""
    answers = statuses(
        "GET http://127.0.0.1:19753/metrics HTTP/1.1\r\nHost: evil.example",
        "GET HTTP://localhost HTTP/1.1",
        "GET http://localhost?x=1 HTTP/1.1",
        "GET http://localhost/metrics?x=1 HTTP/1.1",
        "GET http://[::1]:80/nothing HTTP/1.1",
        "GET http://evil.example/metrics HTTP/1.1\r\nHost: localhost",
        "GET http:///metrics HTTP/1.1",
        "GET https://localhost/metrics HTTP/1.1",
    )
    assert answers == [200, 200, 200, 200, 404, 421, 404, 404]


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


def test_silent_clients_keep_nobody_out() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        silent = [await connect() for _ in range(5)]
        kept = await connect()
        for client in (*silent, kept):
            client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            await client.answer()
        for _ in range(10):
            other = await connect()
            other.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert (await other.answer())[0] == 200
            # Who asks now and then stays.
            kept.send(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert (await kept.answer())[0] == 200
            assert len(server.connections.open) <= 6
        for client in silent:
            assert await client.ended() == b""

    assert served(scenario, Limits(request_bytes=1000, clients=6)) == []


def test_clients_that_do_not_read_keep_nobody_out() -> None:
    async def scenario(server: http.HttpServer, pages: FakePages, connect: Connect) -> None:
        for _ in range(6):
            client = await connect()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(b"GET /metrics HTTP/1.1\r\n\r\n" * 1000)
        other = await connect()
        other.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert (await other.answer())[0] == 200

    assert served(scenario, Limits(request_bytes=100_000, clients=2)) == []


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


@pytest.mark.parametrize("client", ["127.0.0.1", "::1"])
def test_all_addresses_are_those_of_ipv4_too(client: str) -> None:
    with http.listen("::", 0) as sock:
        if client == "::1" and sock.family != socket.AF_INET6:
            pytest.skip("no IPv6 here")
        port = sock.getsockname()[1]
        with socket.create_connection((client, port), timeout=10):
            pass


def test_without_ipv6_all_addresses_are_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    made = socket.socket

    def only_4(family: int, *words: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        return made(family, *words)

    monkeypatch.setattr(http.socket, "socket", only_4)
    with http.listen("::", 0) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"
    with pytest.raises(UsageError, match="EAFNOSUPPORT"):
        http.listen("::1", 0)


def test_localhost_needs_no_name_server() -> None:
    with http.listen("localhost", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
