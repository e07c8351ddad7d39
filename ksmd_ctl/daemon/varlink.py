# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: the interface io.ksmd-ctl (io.ksmd-ctl.varlink) for whoever can connect.

Why not a library: docs/dependencies.md.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from ksmd_ctl import __version__
from ksmd_ctl.daemon.authority import Authority, Peer, peer_of
from ksmd_ctl.daemon.connection import Connection, Connections, Limits
from ksmd_ctl.daemon.varlink_wire import (
    SERVICE_DESCRIPTION,
    SERVICE_NAME,
    BadMessage,
    Call,
    CallError,
    encode_reply,
    parse_call,
)
from ksmd_ctl.errors import ExitCode, KsmdError, Problem

__all__ = ["INTERFACE", "LIMITS", "ControlServer", "Service", "serve"]

INTERFACE: Final = "io.ksmd-ctl"

LIMITS: Final = Limits(request_bytes=64 * 1024)

# A subscriber that has not read for so many reports in a row is not there any more.
_MISSED_REPORTS = 10

_log = logging.getLogger(__name__)


class Service(Protocol):
    """What stands behind the socket. Called on the event loop, so each returns at once."""

    def document(self) -> Mapping[str, object]:
        """The report (docs/json.md).

        :raises KsmdError: there is none yet
        """

    def metrics_text(self) -> str:
        """The metrics in Prometheus' text format."""

    def reload(self) -> Sequence[Problem]:
        """Read the configuration again; the problems that kept the old one in place, none if it was taken."""


class ControlServer:
    """The socket, served. The loop calls `publish` after each tick."""

    def __init__(self, service: Service, authority: Authority, limits: Limits = LIMITS) -> None:
        self.service = service
        self.authority = authority
        self.connections = Connections(limits, lambda connections, sock: _Client(self, connections, sock))
        self.subscribers: set[_Client] = set()

    def publish(self) -> None:
        """Give every subscriber the report. One that hasn't read its last one misses this one."""
        if not self.subscribers:
            return
        try:
            report = encode_reply({"report": self.service.document()}, continues=True)
        except KsmdError as error:
            _log.debug("no report for subscribers: %s", error)
            return
        for client in tuple(self.subscribers):
            client.push(report)

    def close(self) -> None:
        """Stop listening and end all clients. The socket's file stays: who made it removes it."""
        self.connections.close()


async def serve(service: Service, sock: socket.socket, authority: Authority, limits: Limits = LIMITS) -> ControlServer:
    """Serve the interface on a bound socket (`varlink_socket.listen`), which belongs to the server from now on."""
    server = ControlServer(service, authority, limits)
    server.connections.listen(sock)
    return server


class _Client(Connection):
    def __init__(self, server: ControlServer, connections: Connections, sock: socket.socket) -> None:
        super().__init__(connections, sock)
        self.server = server
        self.peer: Peer | None = None
        self.missed = 0

    def refuse(self) -> None:
        self.write(encode_reply({"limit": self.limits.clients}, error=f"{INTERFACE}.TooManyClients"))

    def lost(self) -> None:
        self.server.subscribers.discard(self)

    def waits(self) -> bool:
        return self in self.server.subscribers

    def take(self) -> bool:
        # Replies come in the order of the calls, and a subscription's don't end: calls behind it wait, within
        # the limit of one request.
        if self.waits():
            return False
        end = self.buffer.find(0)
        if end < 0:
            return False
        message = self.buffer[:end]
        del self.buffer[: end + 1]
        try:
            if end > self.limits.request_bytes:
                raise BadMessage("longer than a message may be")
            call = parse_call(message)
        except BadMessage as error:
            _log.debug("a client of the control socket was disconnected: %s", error)
            self.abort()
            return True
        reply = self._answer(call)
        if not call.oneway:
            self.write(reply)
        return True

    def _answer(self, call: Call) -> bytes:
        try:
            if call.interface not in _METHODS:
                raise CallError.no_interface(call.interface)
            if call.method not in _METHODS[call.interface]:
                raise CallError.no_method(call.name)
            method, parameters = _METHODS[call.interface][call.method]
            for name in call.parameters:
                if name not in parameters:
                    raise CallError.invalid_parameter(name)
            return encode_reply(method(self, call), continues=self.waits())
        except CallError as error:
            return encode_reply(error.parameters, error=error.name)
        except KsmdError as error:
            return _failed(error.what, error.why, error.hint, error.exit_code)
        except Exception as error:
            # A mistake of ours in one method must not take the service down, and must not look like an answer.
            _log.exception("%s failed", call.name)
            return _failed(call.name, f"{type(error).__name__}: {error}", "this is a bug of ksmd-ctl", 1)

    def push(self, report: bytes) -> None:
        if self.unsent:
            self.missed += 1
            if self.missed >= _MISSED_REPORTS:
                self.abort()
            return
        self.missed = 0
        self.write(report)

    # -- the methods ---------------------------------------------------------------------------------------

    def need_authority(self) -> None:
        if self.peer is None:
            self.peer = peer_of(self.socket.getsockopt)
        if not self.server.authority.may_change(self.peer):
            group = self.server.authority.group
            needs = "root" if group is None else f"root or a member of group {group}"
            raise CallError(f"{INTERFACE}.PermissionDenied", needs=needs)

    def get_info(self, call: Call) -> dict[str, object]:
        return {
            "vendor": "ksmd-ctl",
            "product": "ksmd-ctl",
            "version": __version__,
            "url": "",
            "interfaces": [SERVICE_NAME, INTERFACE],
        }

    def get_interface_description(self, call: Call) -> dict[str, object]:
        name = call.parameters.get("interface")
        if not isinstance(name, str):
            raise CallError.invalid_parameter("interface")
        if name == SERVICE_NAME:
            return {"description": SERVICE_DESCRIPTION}
        if name == INTERFACE:
            return {"description": Path(__file__).with_name(f"{INTERFACE}.varlink").read_text(encoding="utf-8")}
        raise CallError.no_interface(name)

    def status(self, call: Call) -> dict[str, object]:
        document = self.server.service.document()
        if call.more:
            self.server.subscribers.add(self)
        return {"report": document}

    def metrics(self, call: Call) -> dict[str, object]:
        return {"text": self.server.service.metrics_text()}

    def reload(self, call: Call) -> dict[str, object]:
        self.need_authority()
        problems = self.server.service.reload()
        if problems:
            listed = [{"path": problem.path, "key": problem.key, "text": problem.text} for problem in problems]
            raise CallError(f"{INTERFACE}.ReloadFailed", problems=listed)
        return {}


# By interface and method: what answers, and the parameters that it takes.
_METHODS: Final[dict[str, dict[str, tuple[Callable[[_Client, Call], dict[str, object]], tuple[str, ...]]]]] = {
    SERVICE_NAME: {
        "GetInfo": (_Client.get_info, ()),
        "GetInterfaceDescription": (_Client.get_interface_description, ("interface",)),
    },
    INTERFACE: {
        "Status": (_Client.status, ()),
        "Metrics": (_Client.metrics, ()),
        "Reload": (_Client.reload, ()),
    },
}


def _failed(what: str, why: str, hint: str, exit_code: int) -> bytes:
    parameters = {"what": what, "why": why, "hint": hint, "exit_code": int(ExitCode(exit_code))}
    return encode_reply(parameters, error=f"{INTERFACE}.Failed")
