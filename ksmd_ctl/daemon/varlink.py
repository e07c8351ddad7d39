# SPDX-License-Identifier: GPL-2.0-or-later
"""The server of the control socket: the Varlink interface io.ksmd-ctl (io.ksmd-ctl.varlink).

docs/dependencies.md says why it uses no Varlink library.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ksmd_ctl import __version__
from ksmd_ctl.daemon import varlink_wire as wire
from ksmd_ctl.daemon.connection import Connection, Connections, Limits
from ksmd_ctl.daemon.numa import Job
from ksmd_ctl.daemon.varlink_socket import Authority, Peer, peer_of
from ksmd_ctl.daemon.varlink_wire import INTERFACE, SERVICE_NAME, BadMessage, Call, CallError, encode_reply, parse_call
from ksmd_ctl.errors import ExitCode, KsmdError
from ksmd_ctl.transactions.change import parse_wanted_knobs
from ksmd_ctl.transactions.migration import MigrationOrder
from ksmd_ctl.transactions.unmerging import UnmergeOrder

LIMITS: Final = Limits(request_bytes=64 * 1024)

# The longest wait_seconds.
_LONGEST_WAIT_SECONDS = 86400

# A subscriber that has not read this many reports in a row is disconnected.
_MISSED_REPORTS = 10

if TYPE_CHECKING:
    from ksmd_ctl.daemon.loop import ServiceLoop

_log = logging.getLogger(__name__)


class ControlServer:
    """The server. `publish` is called after each tick.

    :param sock: bound (`varlink_socket.listen`); it belongs to the server from now on
    """

    def __init__(
        self, service: ServiceLoop, sock: socket.socket, authority: Authority, limits: Limits = LIMITS
    ) -> None:
        self.service = service
        self.authority = authority
        self.connections = Connections(limits, lambda connections, sock: _Client(self, connections, sock))
        self.subscribers: set[_Client] = set()
        self.connections.listen(sock)

    def publish(self) -> None:
        """Send the report to every subscriber that has read the last one."""
        if not self.subscribers:
            return
        try:
            report = encode_reply({"report": self.service.document()}, continues=True)
        except KsmdError as error:
            _log.debug("no report for subscribers: %s", error)
            return
        except Exception:
            # A bug in a report must not end the service.
            _log.exception("no report for subscribers")
            return
        for client in tuple(self.subscribers):
            client.push(report)

    def close(self) -> None:
        """Stop listening and disconnect all clients. The file of the socket stays."""
        self.connections.close()


class _Client(Connection):
    def __init__(self, server: ControlServer, connections: Connections, sock: socket.socket) -> None:
        super().__init__(connections, sock)
        self.server = server
        self.peer: Peer = peer_of(sock.getsockopt)
        self.user = self.peer.uid
        self.privileged = self.peer.uid in (0, server.authority.own_uid)
        self.missed = 0
        self.job: Job | None = None
        self.call: Call | None = None

    def refuse(self, limit: int) -> None:
        self.write(_refusal(wire.TooManyClients(limit)))

    def lost(self) -> None:
        self.server.subscribers.discard(self)
        self._stop()

    def is_served(self) -> bool:
        return self in self.server.subscribers or self.job is not None

    def awaits_answer(self) -> bool:
        # A client that closes its sending side during a job stops the job, and gets its result.
        if self.job is None:
            return False
        self.job.cancel()
        return True

    def _stop(self) -> None:
        job, self.job = self.job, None
        if job is not None:
            job.cancel()

    def take(self) -> bool:
        # Replies are in the order of the calls: further calls wait, up to the limit of one request.
        if self.is_served():
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
        if reply is not None and not call.oneway:
            self.write(reply)
        return True

    # -- answers of jobs -----------------------------------------------------------------------------------

    def progress(self, parameters: Mapping[str, object]) -> None:
        # A client that does not read misses progress; the result waits for it.
        if self.call is not None and self.call.more and not self.unsent:
            self.write(encode_reply(parameters, continues=True))

    def done(self, parameters: Mapping[str, object]) -> None:
        self._end_job(encode_reply(parameters))

    def failed(self, error: KsmdError) -> None:
        self._end_job(_refusal(_failed(error)))

    def _end_job(self, reply: bytes) -> None:
        call, self.call, self.job = self.call, None, None
        if call is not None and not call.oneway:
            self.write(reply)
        self.resume()

    def _answer(self, call: Call) -> bytes | None:
        """The reply; None if it comes later."""
        try:
            if call.interface not in _METHODS:
                raise CallError.no_interface(call.interface)
            if call.method not in _METHODS[call.interface]:
                raise CallError.no_method(call.name)
            found = _METHODS[call.interface][call.method](self, call)
            return None if found is None else encode_reply(found, continues=self.is_served())
        except CallError as error:
            return encode_reply(error.parameters, error=error.name)
        except KsmdError as error:
            return _refusal(_failed(error))
        except Exception as error:
            # A bug in one method must not end the service, and must not look like an answer.
            _log.exception("%s failed", call.name)
            why = f"{type(error).__name__}: {error}"
            return _refusal(wire.Failed(call.name, why, "this is a bug of ksmd-ctl", ExitCode.CHECK_FAILED))

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
        if not self.server.authority.may_change(self.peer):
            group = self.server.authority.group
            name = self.server.authority.group_name or group
            needs = "root" if group is None else f"root or a member of group {name}"
            raise CallError.of(wire.PermissionDenied(needs))

    def get_info(self, call: Call) -> dict[str, object]:
        call.take(wire.NoParameters)
        return {
            "vendor": "ksmd-ctl",
            "product": "ksmd-ctl",
            "version": __version__,
            "url": "",
            "interfaces": [SERVICE_NAME, INTERFACE],
        }

    def get_interface_description(self, call: Call) -> dict[str, object]:
        name = call.take(wire.InterfaceParameters).interface
        if name not in _METHODS:
            raise CallError.no_interface(name)
        return {"description": Path(__file__).with_name(f"{name}.varlink").read_text(encoding="utf-8")}

    def status(self, call: Call) -> dict[str, object] | None:
        call.take(wire.NoParameters)
        # A subscriber gets the next report soon.
        job = None if call.more else self.server.service.status(self)
        if job is not None:
            self.call, self.job = call, job
            return None
        document = self.server.service.document()
        if call.more:
            if not self.privileged:
                # Subscriptions do not end, so they must not take all places.
                limit = self.limits.clients // 2
                if sum(not client.privileged for client in self.server.subscribers) >= limit:
                    raise CallError.of(wire.TooManyClients(limit))
            self.server.subscribers.add(self)
        return {"report": document}

    def metrics(self, call: Call) -> dict[str, object]:
        call.take(wire.NoParameters)
        return {"text": self.server.service.metrics_text()}

    def nodes(self, call: Call) -> None:
        call.take(wire.NoParameters)
        self.call, self.job = call, self.server.service.numa.nodes(self)

    def processes(self, call: Call) -> None:
        call.take(wire.NoParameters)
        self.call, self.job = call, self.server.service.numa.processes(self)

    def migrate(self, call: Call) -> None:
        given = call.take(wire.MigrateParameters)
        order = MigrationOrder(
            to=given.to,
            pid=given.pid,
            unit=given.unit or "",
            ranges=tuple((one.start, one.end) for one in given.ranges or ()),
            everything=bool(given.everything),
            dry_run=bool(given.dry_run),
        )
        # Readers may find out what would be moved.
        if not order.dry_run:
            self.need_authority()
        self.call, self.job = call, self.server.service.numa.migrate(order, self)

    def plan(self, call: Call) -> None:
        wanted = parse_wanted_knobs(call.take(wire.PlanParameters).knobs)
        self.call, self.job = call, self.server.service.transactions.plan(wanted, self)

    def set(self, call: Call) -> None:
        given = call.take(wire.SetParameters)
        wanted, wait = parse_wanted_knobs(given.knobs), given.wait_seconds or 0.0
        if not 0 <= wait <= _LONGEST_WAIT_SECONDS:
            raise CallError.invalid_parameter("wait_seconds")
        self.need_authority()
        words = " ".join(f"{knob}={value}" for knob, value in wanted.items())
        who = f"ksmd-ctl set {words}, pid {self.peer.pid}, uid {self.peer.uid}"
        self.call, self.job = (
            call,
            self.server.service.transactions.set(wanted, wait, who, self, force=bool(given.force)),
        )

    def unmerge(self, call: Call) -> None:
        given = call.take(wire.UnmergeParameters)
        order = UnmergeOrder(given.pid, given.unit or "", given.to, bool(given.dry_run))
        if not order.dry_run:
            self.need_authority()
        self.call, self.job = call, self.server.service.transactions.unmerge(order, self)

    def reload(self, call: Call) -> dict[str, object]:
        call.take(wire.NoParameters)
        self.need_authority()
        problems = self.server.service.reload()
        if problems:
            listed = tuple(wire.ConfigProblem(problem.path, problem.key, problem.text) for problem in problems)
            raise CallError.of(wire.ReloadFailed(listed))
        return {}


_METHODS: Final[dict[str, dict[str, Callable[[_Client, Call], dict[str, object] | None]]]] = {
    SERVICE_NAME: {
        "GetInfo": _Client.get_info,
        "GetInterfaceDescription": _Client.get_interface_description,
    },
    INTERFACE: {
        "Status": _Client.status,
        "Metrics": _Client.metrics,
        "Nodes": _Client.nodes,
        "Processes": _Client.processes,
        "Migrate": _Client.migrate,
        "Plan": _Client.plan,
        "Set": _Client.set,
        "Unmerge": _Client.unmerge,
        "Reload": _Client.reload,
    },
}


def _failed(error: KsmdError) -> wire.Failed:
    return wire.Failed(error.what, error.why, error.hint, error.exit_code)


def _refusal(error: wire.OwnError) -> bytes:
    raised = CallError.of(error)
    return encode_reply(raised.parameters, error=raised.name)
