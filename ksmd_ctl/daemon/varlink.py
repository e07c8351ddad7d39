# SPDX-License-Identifier: GPL-2.0-or-later
"""The server of the control socket: the Varlink interface io.ksmd-ctl (io.ksmd-ctl.varlink).

docs/dependencies.md says why it uses no Varlink library.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ksmd_ctl import __version__
from ksmd_ctl.daemon import varlink_wire as wire
from ksmd_ctl.daemon.connection import Connection, Connections, Limits
from ksmd_ctl.daemon.history import MOST_EVENTS
from ksmd_ctl.daemon.numa import MOST_BUDGET_SECONDS
from ksmd_ctl.daemon.varlink_socket import Authority, Peer, peer_of
from ksmd_ctl.daemon.varlink_wire import INTERFACE, SERVICE_NAME, BadMessage, Call, CallError, encode_reply, parse_call
from ksmd_ctl.errors import Cancelled, ExitCode, KsmdError
from ksmd_ctl.figures import LOW_YIELD_PAGES
from ksmd_ctl.history.model import Entry, Query
from ksmd_ctl.host.switching import Method
from ksmd_ctl.reports.history import history_document
from ksmd_ctl.reports.sharing import GROUPINGS
from ksmd_ctl.transactions.change import parse_wanted_knobs
from ksmd_ctl.transactions.collapsing import CollapseOrder
from ksmd_ctl.transactions.migration import MigrationOrder
from ksmd_ctl.transactions.switching import SwitchOrder
from ksmd_ctl.transactions.unmerging import UnmergeOrder

LIMITS: Final = Limits(request_bytes=64 * 1024)

# The longest wait_seconds.
_LONGEST_WAIT_SECONDS = 86400

# A subscriber that has not read this many reports in a row is disconnected.
_MISSED_REPORTS = 10

if TYPE_CHECKING:
    from ksmd_ctl.daemon.loop import ServiceLoop

_log = logging.getLogger(__name__)

#: The parameters of a reply, now or later.
Answer = Mapping[str, object] | Coroutine[Any, Any, Mapping[str, object]]


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
        # The events that it gets as they come, and those that came before its first answer.
        self.follows: Query | None = None
        self.held: list[Entry] = []
        # A call that is carried out, and is answered when it is done.
        self.call: Call | None = None
        self.task: asyncio.Task[Mapping[str, object]] | None = None

    def refuse(self, limit: int) -> None:
        self.write(_refusal(wire.TooManyClients(limit)))

    def lost(self) -> None:
        self.server.subscribers.discard(self)
        if self.follows is not None:
            self.server.service.history.unfollow(self.heard)
        if self.task is not None:
            self.task.cancel()

    def is_served(self) -> bool:
        return self.subscribes or self.task is not None

    @property
    def subscribes(self) -> bool:
        """Whether it gets answers for as long as it reads them."""
        return self in self.server.subscribers or self.follows is not None

    def awaits_answer(self) -> bool:
        # A client that closes its sending side during a call stops what can be stopped, and gets the result.
        if self.task is None:
            return False
        self.task.cancel()
        return True

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
        self._answer(call)
        return True

    def _answer(self, call: Call) -> None:
        try:
            if call.interface not in _METHODS:
                raise CallError.no_interface(call.interface)
            if call.method not in _METHODS[call.interface]:
                raise CallError.no_method(call.name)
            found = _METHODS[call.interface][call.method](self, call)
            if isinstance(found, Coroutine):
                self.call, self.task = call, self.server.service.tasks.start(found)
                self.task.add_done_callback(partial(self._done, call))
                return
            reply = encode_reply(found, continues=self.is_served())
        except Exception as error:
            reply = _error_reply(call, error)
        if not call.oneway:
            self.write(reply)

    def _done(self, call: Call, task: asyncio.Task[Mapping[str, object]]) -> None:
        self.call = self.task = None
        try:
            reply = encode_reply(task.result(), continues=self.is_served())
        except asyncio.CancelledError:
            reply = _error_reply(call, Cancelled(call.name, "stopped before it began"))
        except Exception as error:
            reply = _error_reply(call, error)
        if not call.oneway:
            self.write(reply)
        for entry in self.held:
            self.heard(entry)
        self.held = []
        self.resume()

    def progress(self, parameters: Mapping[str, object]) -> None:
        """Send the progress of the call, if the client wants it; a client that does not read misses it."""
        if self.call is not None and self.call.more and not self.unsent:
            self.write(encode_reply(parameters, continues=True))

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

    def get_info(self, call: Call) -> Answer:
        call.take(wire.NoParameters)
        return {
            "vendor": "ksmd-ctl",
            "product": "ksmd-ctl",
            "version": __version__,
            "url": "",
            "interfaces": [SERVICE_NAME, INTERFACE],
        }

    def get_interface_description(self, call: Call) -> Answer:
        name = call.take(wire.InterfaceParameters).interface
        if name not in _METHODS:
            raise CallError.no_interface(name)
        return {"description": Path(__file__).with_name(f"{name}.varlink").read_text(encoding="utf-8")}

    def status(self, call: Call) -> Answer:
        call.take(wire.NoParameters)
        if not call.more:
            return self.server.service.status()
        # A subscriber gets the next report soon.
        document = self.server.service.document()
        self._need_place()
        self.server.subscribers.add(self)
        return {"report": document}

    def _need_place(self) -> None:
        if not self.privileged:
            # Subscriptions do not end, so they must not take all places.
            limit = self.limits.clients // 2
            others = (client for client in self.connections.open if isinstance(client, _Client) and client.subscribes)
            if sum(not client.privileged for client in others) >= limit:
                raise CallError.of(wire.TooManyClients(limit))

    def history(self, call: Call) -> Answer:
        given = call.take(wire.HistoryParameters)
        limit = 1000 if given.limit is None else given.limit
        if not 0 <= limit <= MOST_EVENTS:
            raise CallError.invalid_parameter("limit")
        if given.follow and not call.more:
            raise CallError.invalid_parameter("follow")
        kinds = None if given.kinds is None else frozenset(given.kinds)
        query = Query(given.since_seconds, given.until_seconds, kinds, limit)
        if given.follow:
            self._need_place()
            # The calendar may be set back.
            self.follows = replace(query, since_seconds=None)
        return self._history(query)

    async def _history(self, query: Query) -> Mapping[str, object]:
        history = self.server.service.history

        def begin() -> None:
            if self.follows is not None and not self.closed:
                history.follow(self.heard)

        # Also for a client that has closed its sending side.
        tasks = self.server.service.tasks
        return {"history": await tasks.joined(tasks.start(history.document(query, begin)))}

    def heard(self, entry: Entry) -> None:
        """Send an event to the client that follows; one that does not read is disconnected."""
        if self.follows is None or not self.follows.matches(entry):
            return
        if self.task is not None:
            self.held.append(entry)
            return
        if len(self.unsent) > self.limits.unread_bytes:
            self.abort()
            return
        self.write(encode_reply({"history": history_document([entry], 1)}, continues=True))

    def metrics(self, call: Call) -> Answer:
        call.take(wire.NoParameters)
        return {"text": self.server.service.metrics_text()}

    def nodes(self, call: Call) -> Answer:
        call.take(wire.NoParameters)
        return self.server.service.numa.nodes()

    def processes(self, call: Call) -> Answer:
        call.take(wire.NoParameters)
        return self.server.service.numa.processes()

    def domains(self, call: Call) -> Answer:
        call.take(wire.NoParameters)
        return self.server.service.domains.document(rounded=not self.privileged)

    def sharing(self, call: Call) -> Answer:
        given = call.take(wire.SharingParameters)
        by, budget = given.by or "unit", given.budget_seconds
        if by not in (*GROUPINGS, "domain"):
            raise CallError.invalid_parameter("by")
        if budget is not None and not 0 < budget <= MOST_BUDGET_SECONDS:
            raise CallError.invalid_parameter("budget_seconds")
        return self.server.service.sharing.sharing(by, budget, rounded=not self.privileged)

    def migrate(self, call: Call) -> Answer:
        given = call.take(wire.MigrateParameters)
        order = MigrationOrder(
            to=given.to,
            pid=given.pid,
            unit=given.unit or "",
            ranges=tuple((one.start, one.end) for one in given.ranges or ()),
            everything=bool(given.everything),
            dry_run=bool(given.dry_run),
            latency_seconds=given.latency_seconds,
            keep=given.keep or (),
        )
        # Readers may find out what would be moved.
        if not order.dry_run:
            self.need_authority()
        return self.server.service.numa.migrate(order, self.progress)

    def plan(self, call: Call) -> Answer:
        return self.server.service.transactions.plan(parse_wanted_knobs(call.take(wire.PlanParameters).knobs))

    def set(self, call: Call) -> Answer:
        given = call.take(wire.SetParameters)
        wanted, wait = parse_wanted_knobs(given.knobs), given.wait_seconds or 0.0
        if not 0 <= wait <= _LONGEST_WAIT_SECONDS:
            raise CallError.invalid_parameter("wait_seconds")
        self.need_authority()
        words = " ".join(f"{knob}={value}" for knob, value in wanted.items())
        who = f"ksmd-ctl set {words}, pid {self.peer.pid}, uid {self.peer.uid}"
        return self.server.service.transactions.set(wanted, wait, who, self.progress, force=bool(given.force))

    def unmerge(self, call: Call) -> Answer:
        given = call.take(wire.UnmergeParameters)
        order = UnmergeOrder(given.pid, given.unit or "", given.to, bool(given.dry_run), given.keep or ())
        if not order.dry_run:
            self.need_authority()
        return self.server.service.transactions.unmerge(order, self.progress)

    def collapse(self, call: Call) -> Answer:
        given = call.take(wire.CollapseParameters)
        keep_pages = LOW_YIELD_PAGES if given.keep_pages is None else given.keep_pages
        order = CollapseOrder(given.pid, given.unit or "", keep_pages, bool(given.dry_run))
        if not order.dry_run:
            self.need_authority()
        return self.server.service.transactions.collapse(order, self.progress)

    def merge(self, call: Call) -> Answer:
        given = call.take(wire.MergeParameters)
        if given.method not in (None, *Method):
            raise CallError.invalid_parameter("method")
        order = SwitchOrder(
            on=given.on,
            pid=given.pid,
            unit=given.unit or "",
            vm=given.vm or "",
            ranges=tuple((one.start, one.end) for one in given.ranges or ()),
            method=None if given.method is None else Method(given.method),
            dry_run=bool(given.dry_run),
        )
        self.need_authority()
        by = f"ksmd-ctl merge {order.words}, pid {self.peer.pid}, uid {self.peer.uid}"
        return self.server.service.switches.switch(order, by, self.progress)

    def reload(self, call: Call) -> Answer:
        call.take(wire.NoParameters)
        self.need_authority()
        problems = self.server.service.reload()
        if problems:
            listed = tuple(wire.ConfigProblem(problem.path, problem.key, problem.text) for problem in problems)
            raise CallError.of(wire.ReloadFailed(listed))
        return {}


_METHODS: Final[dict[str, dict[str, Callable[[_Client, Call], Answer]]]] = {
    SERVICE_NAME: {
        "GetInfo": _Client.get_info,
        "GetInterfaceDescription": _Client.get_interface_description,
    },
    INTERFACE: {
        "Status": _Client.status,
        "Metrics": _Client.metrics,
        "Nodes": _Client.nodes,
        "Processes": _Client.processes,
        "Domains": _Client.domains,
        "Sharing": _Client.sharing,
        "History": _Client.history,
        "Migrate": _Client.migrate,
        "Plan": _Client.plan,
        "Set": _Client.set,
        "Unmerge": _Client.unmerge,
        "Collapse": _Client.collapse,
        "Merge": _Client.merge,
        "Reload": _Client.reload,
    },
}


def _error_reply(call: Call, error: Exception) -> bytes:
    if isinstance(error, CallError):
        return encode_reply(error.parameters, error=error.name)
    if isinstance(error, KsmdError):
        return _refusal(wire.Failed(error.what, error.why, error.hint, error.exit_code))
    # A bug in one method must not end the service, and must not look like an answer.
    _log.error("%s failed", call.name, exc_info=error)
    why = f"{type(error).__name__}: {error}"
    return _refusal(wire.Failed(call.name, why, "this is a bug of ksmd-ctl", ExitCode.CHECK_FAILED))


def _refusal(error: wire.OwnError) -> bytes:
    raised = CallError.of(error)
    return encode_reply(raised.parameters, error=raised.name)
