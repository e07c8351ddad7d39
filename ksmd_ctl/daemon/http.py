# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP server: metrics, and the status page. It is read-only and has no authentication.

It answers requests for addresses, localhost and the names in the configuration. Otherwise a foreign web page could
resolve its own name to this host, and read what the browser of a local user may read (DNS rebinding).

docs/dependencies.md says why it does not use the server of prometheus_client.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from ksmd_ctl.daemon.connection import Connection, Connections, Limits
from ksmd_ctl.errors import Denied, KsmdError, UsageError, errno_text
from ksmd_ctl.render.page_history import Span

#: Prometheus keeps its connection between scrapes, unless it scrapes less often than idle_seconds.
LIMITS: Final = Limits(request_bytes=8 * 1024, idle_seconds=30.0, unread_bytes=256 * 1024)

# Of a kernel without IPv6, or booted with ipv6.disable=1, or where the sysctl has switched it off.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_TEXT = "text/plain; charset=utf-8"
_HTML = "text/html; charset=utf-8"
# The browser may load nothing for the page.
_POLICY = "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

# RFC 9112, 3.2.2, and RFC 3986, 3.2.
_ABSOLUTE = re.compile(r"(?i:http)://(?P<authority>[^/?#]+)(?P<rest>.*)")
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[^\]]*)\]|(?P<host>[^:\[\]]+))(?::[0-9]*)?")

if TYPE_CHECKING:
    from ksmd_ctl.daemon.loop import ServiceLoop

_log = logging.getLogger(__name__)


class HttpServer:
    """The server.

    :param sock: bound (`listen`); it belongs to the server from now on
    :ivar address: where it listens, as in ``127.0.0.1:19753``
    """

    def __init__(self, service: ServiceLoop, sock: socket.socket, limits: Limits = LIMITS) -> None:
        self.service = service
        self.connections = Connections(limits, lambda connections, sock: _Client(self, connections, sock))
        host, port = sock.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.connections.listen(sock)

    def close(self) -> None:
        """Stop listening and disconnect all clients."""
        self.connections.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    :param host: a numeric address or ``localhost``; no name server is asked. ``::`` is all addresses, of IPv4 as well,
        and only these where there is no IPv6
    :param port: 0 for any free port
    :raises UsageError: the address is in use, or not an address of this host
    :raises Denied: ports below 1024 need a privilege
    """
    what = f"the metrics address {host}:{port}"
    try:
        numeric = "127.0.0.1" if host == "localhost" else host
        found = socket.getaddrinfo(
            numeric, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )
    except (OSError, OverflowError) as error:
        raise UsageError(what, "not a numeric address", hint="give ADDRESS:PORT, as in 127.0.0.1:19753") from error
    family, kind, protocol, _, address = found[0]
    sock: socket.socket | None = None
    try:
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        # After a restart, connections of the previous service may still be in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        sock.bind(address)
        sock.listen()
        return sock
    except OSError as error:
        if sock is not None:
            sock.close()
        number = error.errno or 0
        if host == "::" and number in _NO_IPV6:
            return listen("0.0.0.0", port)
        if number in (errno.EACCES, errno.EPERM):
            raise Denied(what, errno_text(number), hint="choose a port from 1024 on", errno=number) from error
        hint = "choose another address (--metrics-listen), or stop what listens there"
        raise UsageError(what, errno_text(number), hint=hint) from error


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT
    headers: tuple[str, ...] = ()


class _BadRequest(Exception):
    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


class _Client(Connection):
    def __init__(self, server: HttpServer, connections: Connections, sock: socket.socket) -> None:
        super().__init__(connections, sock)
        self.server = server
        # An answer is written in one piece.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A page for which the history is read.
        self.task: asyncio.Task[None] | None = None

    def is_served(self) -> bool:
        return self.task is not None

    def awaits_answer(self) -> bool:
        return self.is_served()

    def take(self) -> bool:
        if self.is_served():
            return False
        end = self.buffer.find(b"\r\n\r\n")
        limit = self.limits.request_bytes
        if end > limit or (end < 0 and len(self.buffer) > limit):
            self._send(_plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {limit} bytes"), keep=False)
            return True
        if end < 0:
            return False
        request = bytes(self.buffer[:end])
        del self.buffer[: end + 4]
        try:
            method, path, version, headers = _parse(request)
        except _BadRequest as error:
            self._send(_plain(error.status, error.status.phrase), keep=False)
            return True
        # A body would be read as the next request, so a request with one is the last one.
        keep = (
            version == "HTTP/1.1"
            and "close" not in headers.get("connection", "").lower()
            and headers.get("content-length", "0") == "0"
            and "transfer-encoding" not in headers
        )
        answer = self._refusal(headers) or self._answer(method, path, headers)
        send = partial(self._send, keep=keep, head=method == "HEAD")
        if isinstance(answer, _Answer):
            send(answer)
        else:
            self.task = asyncio.get_running_loop().create_task(self._answer_later(answer, send))
        return True

    async def _answer_later(self, page: Coroutine[Any, Any, bytes], send: Callable[[_Answer], None]) -> None:
        try:
            answer = _page(await page)
        except Exception as error:
            answer = _failure("/", error)
        self.task = None
        send(answer)
        self.resume()

    def _refusal(self, headers: dict[str, str]) -> _Answer | None:
        names = self.server.service.config.metrics_names
        # Browsers always send it.
        if not _is_served(headers.get("host") or "localhost", names):
            text = "served under addresses, localhost and the names in [service] metrics_names only"
            return _plain(HTTPStatus.MISDIRECTED_REQUEST, text)
        scheme, _, origin = headers.get("origin", "http://localhost").partition("://")
        if scheme not in ("http", "https") or not _is_served(origin, names):
            return _plain(HTTPStatus.FORBIDDEN, "not for pages from elsewhere")
        return None

    def _answer(self, method: str, path: str, headers: dict[str, str]) -> _Answer | Coroutine[Any, Any, bytes]:
        if method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "this only reads", "Allow: GET, HEAD")
        try:
            path, _, query = path.partition("?")
            match path:
                case "/metrics":
                    content_type, body = self.server.service.exposition(headers.get("accept", ""))
                    return _Answer(HTTPStatus.OK, body, content_type, ("Vary: Accept",))
                case "/":
                    found = self.server.service.page(_span(query))
                    return _page(found) if isinstance(found, bytes) else found
                case _:
                    return _plain(HTTPStatus.NOT_FOUND, "there are / and /metrics")
        except Exception as error:
            return _failure(path, error)

    def _send(self, answer: _Answer, *, keep: bool, head: bool = False) -> None:
        lines = (
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            f"Connection: {'keep-alive' if keep else 'close'}",
            *answer.headers,
        )
        top = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        self.write(top if head else top + answer.body)
        if not keep:
            self.buffer.clear()
            self.close()


def _span(query: str) -> Span:
    """Which page is asked for; that of an hour by default."""
    named = dict(item.partition("=")[::2] for item in query.split("&")).get("span", "")
    return Span(named) if named in tuple(Span) else Span.HOUR


def _page(content: bytes) -> _Answer:
    return _Answer(HTTPStatus.OK, content, _HTML, (_POLICY,))


def _failure(path: str, error: Exception) -> _Answer:
    if isinstance(error, KsmdError):
        return _plain(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
    # A bug in one page must not end the service.
    _log.error("%s failed", path, exc_info=error)
    return _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "this is a bug of ksmd-ctl; see its log")


def _plain(status: HTTPStatus, text: str, *headers: str) -> _Answer:
    return _Answer(status, f"{text}\n".encode(), headers=headers)


def _parse(request: bytes) -> tuple[str, str, str, dict[str, str]]:
    # latin-1 decodes every byte (RFC 9110, 5.5).
    first, *rest = request.decode("latin-1").split("\r\n")
    if not "".join(rest).replace("\t", " ").isprintable():
        # A bare end of line in a header could be repeated in an answer.
        raise _BadRequest(HTTPStatus.BAD_REQUEST)
    words = first.split(" ")
    if len(words) != 3 or not all(words):
        raise _BadRequest(HTTPStatus.BAD_REQUEST)
    method, target, version = words
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise _BadRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    headers: dict[str, str] = {}
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _BadRequest(HTTPStatus.BAD_REQUEST)
        name = name.lower()
        # Several headers of one name are a list (RFC 9110, 5.3).
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    if absolute := _ABSOLUTE.fullmatch(target):
        # An absolute target replaces the Host header (RFC 9112, 3.2.2).
        headers["host"] = absolute["authority"]
        target = absolute["rest"] if absolute["rest"].startswith("/") else f"/{absolute['rest']}"
    return method, target, version, headers


def _is_served(authority: str, names: Collection[str]) -> bool:
    """Whether a host, with or without a port, is an address, localhost or one of `names`."""
    found = _AUTHORITY.fullmatch(authority.lower())
    if found is None:
        return False
    if found["ipv6"] is not None:
        return _is_address(socket.AF_INET6, found["ipv6"])
    host = found["host"].removesuffix(".")
    return host == "localhost" or host in names or _is_address(socket.AF_INET, host)


def _is_address(family: int, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
    except (OSError, ValueError):
        return False
    return True
