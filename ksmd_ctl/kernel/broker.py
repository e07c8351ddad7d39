# SPDX-License-Identifier: GPL-2.0-or-later
"""The small privileged part: it carries out typed requests for the service, which has no privilege itself.

It listens on a unix socket (SOCK_SEQPACKET) that systemd hands over, takes one request a connection from one user,
runs each in a child with a deadline, and ends itself when nothing has come for a while: in steady state it isn't
there. What it can be asked for is `ksmd_ctl.kernel.requests.REQUESTS`, and nothing else.

A request is one packet of at most 64 KiB: ``{"request": NAME, "parameters": {...}, "deadline_seconds": N}``.
``{"cancel": true}`` may follow; hanging up stops it too. The answer is lines of JSON, cut into packets anywhere:
any number of ``{"progress": ...}``, then one ``{"result": ...}`` or ``{"error": ...}``, then the end.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from ksmd_ctl.errors import Cancelled, Denied, HostError, KsmdError, Refused, TimedOut, UsageError
from ksmd_ctl.kernel.requests import REQUESTS, Request
from ksmd_ctl.kernel.wire import JSON, decode, dump, encode_error, load
from ksmd_ctl.kernel.worker import Worker

__all__ = ["MESSAGE_BYTES", "Broker", "Limits", "main", "parse_request", "serve_one"]

#: The longest request, and the longest packet of an answer.
MESSAGE_BYTES = 65536

_MAXIMUM_DEADLINE_SECONDS = 24 * 3600.0
_SYSTEMD_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_BUSY = Refused("the request", "too many requests are being served", hint="try again")


@dataclass(frozen=True, slots=True)
class Limits:
    """What nobody can make the broker exceed.

    :ivar children: requests at a time
    :ivar connections: connections at a time, those without a request among them
    :ivar request_seconds: how long a connection may stay silent, or leave an answer unread
    :ivar idle_seconds: with nothing to do for so long it ends
    :ivar stop_seconds: from SIGTERM to SIGKILL
    :ivar kill_seconds: from SIGKILL to giving up on a child
    """

    children: int = 8
    connections: int = 32
    request_seconds: float = 5
    idle_seconds: float = 30
    stop_seconds: float = 2
    kill_seconds: float = 1


def parse_request(data: bytes) -> tuple[Request[Any], float]:
    """The request in a message, and its deadline in seconds.

    :raises UsageError: there is none
    """
    try:
        if len(data) > MESSAGE_BYTES:
            raise ValueError(f"it is longer than {MESSAGE_BYTES} bytes")
        document = load(data)
        if not isinstance(document, dict):
            raise ValueError("it is not an object")
        if document.keys() != {"request", "parameters", "deadline_seconds"}:
            raise ValueError("its keys are not request, parameters, deadline_seconds")
        name = document["request"]
        kind = REQUESTS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ValueError(f"there is no request {ascii(name)[:60]}")
        deadline = cast(float, decode(float, document["deadline_seconds"], "deadline_seconds"))
        if not 0 < deadline <= _MAXIMUM_DEADLINE_SECONDS:
            raise ValueError(f"deadline_seconds is not between 0 and {_MAXIMUM_DEADLINE_SECONDS:g}")
        return cast("Request[Any]", decode(kind, document["parameters"], "parameters")), deadline
    except (ValueError, OverflowError) as error:
        raise UsageError("reading a request", str(error)) from error


class Broker:
    """The loop that serves connections. One thread: children are forked from it."""

    def __init__(
        self,
        root: Path,
        listener: socket.socket | None = None,
        uid: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.root = root
        self.limits = limits or Limits()
        self.children = 0
        self._listener = listener
        self._uid = uid
        self._exchanges: set[_Exchange] = set()
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def adopt(self, connection: socket.socket, peer: str) -> None:
        """Serve a connection whose other side needs no check."""
        self._exchanges.add(_Exchange(self, connection, peer))

    def run(self) -> None:
        """Serve until there is nothing to serve: at once without a listener, else after the idle time."""
        if self._listener is not None:
            self._listener.setblocking(False)
            self.watch(self._listener.fileno(), select.POLLIN, self._accept)
        idle_since = time.monotonic()
        while True:
            now = time.monotonic()
            for exchange in tuple(self._exchanges):
                if now >= exchange.until:
                    exchange.expire()
            self._exchanges = {exchange for exchange in self._exchanges if not exchange.over}
            if self._exchanges:
                idle_since = now
                until = min(exchange.until for exchange in self._exchanges)
            elif self._listener is None:
                return
            else:
                until = idle_since + self.limits.idle_seconds
                if now >= until:
                    return
            for descriptor, _ in self._poll.poll(max(0, until - now) * 1000 + 1):
                # One of this round's handlers may have ended what this one was for.
                if handler := self._handlers.get(descriptor):
                    handler()

    def watch(self, descriptor: int, mask: int, handler: Callable[[], None]) -> None:
        """Call a handler when a descriptor is ready."""
        self._poll.register(descriptor, mask)
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """Forget about a descriptor."""
        if self._handlers.pop(descriptor, None):
            self._poll.unregister(descriptor)

    def watches(self, descriptor: int) -> bool:
        """Whether a handler waits for a descriptor."""
        return descriptor in self._handlers

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        peer = f"uid {uid} pid {pid}"
        error: KsmdError | None = None
        if uid not in (0, self._uid):
            error = Denied("the request", f"uid {uid} may not ask for anything", hint="only the service and root may")
        elif len(self._exchanges) >= self.limits.connections:
            error = _BUSY
        exchange = _Exchange(self, connection, peer)
        self._exchanges.add(exchange)
        if error is not None:
            exchange.refuse(error)


class _Exchange:
    """One connection: a request, the child that serves it, its answer.

    :ivar until: when `expire` is due
    :ivar over: nothing is left of it
    """

    def __init__(self, broker: Broker, connection: socket.socket, peer: str) -> None:
        connection.setblocking(False)
        self._broker = broker
        self._connection = connection
        self._peer = peer
        self._worker: Worker | None = None
        self._request: Request[Any] | None = None
        self._deadline_seconds = 0.0
        self._stopped: KsmdError | None = None
        self._killed = False
        self._heard = bytearray()
        self._final = b""
        self._unsent = bytearray()
        self._ending = False
        self.over = False
        self.until = time.monotonic() + broker.limits.request_seconds
        broker.watch(connection.fileno(), select.POLLIN, self._on_connection)

    def refuse(self, error: KsmdError) -> None:
        """Answer with an error and end."""
        _log(4, f"{self._peer}: refused: {error}")
        self._end({"error": encode_error(error)})

    def expire(self) -> None:
        """`until` has come."""
        if self._ending:
            self._close()
        elif self._worker is None:
            self.refuse(TimedOut("the request", f"none came for {self._broker.limits.request_seconds:g} s"))
        elif self._stopped is None:
            self._stop(TimedOut(f"the request {self._name}", f"its deadline of {self._deadline_seconds:g} s passed"))
        elif not self._killed:
            self._killed = True
            self.until = time.monotonic() + self._broker.limits.kill_seconds
            self._worker.kill(signal.SIGKILL)
        else:
            self._leave_behind(self._worker)

    @property
    def _name(self) -> str:
        return self._request.name if self._request else "?"

    def _on_connection(self) -> None:
        """The client has sent something, has hung up, or can take more of its answer."""
        if self._ending:
            self._send()
            return
        try:
            data = self._connection.recv(MESSAGE_BYTES + 1)
        except BlockingIOError:
            self._send()
            return
        except OSError:
            data = b""
        if self._worker is None and data:
            try:
                request, deadline = parse_request(data)
            except UsageError as error:
                self.refuse(error)
                return
            self._start(request, deadline)
        elif data == dump({"cancel": True}):
            self._stop(Cancelled(f"the request {self._name}", "it was cancelled"))
        elif self._worker is not None:
            # Hung up, or talks out of turn: then it isn't one of ours.
            self._broker.unwatch(self._connection.fileno())
            self._stop(Cancelled(f"the request {self._name}", "its client is gone"))
        else:
            self._close()

    def _start(self, request: Request[Any], deadline_seconds: float) -> None:
        if self._broker.children >= self._broker.limits.children:
            self.refuse(_BUSY)
            return
        self._request, self._deadline_seconds = request, deadline_seconds
        try:
            self._worker = Worker(request, self._broker.root)
        except OSError as error:
            self.refuse(HostError(f"the request {self._name}", f"no child can be started: {error}", errno=error.errno))
            return
        self._broker.children += 1
        self.until = time.monotonic() + deadline_seconds
        self._broker.watch(self._worker.pipe, select.POLLIN, self._hear)
        self._broker.watch(self._worker.pidfd, select.POLLIN, self._on_exit)

    def _stop(self, cause: KsmdError) -> None:
        assert self._worker is not None
        if self._stopped is None:
            self._stopped = cause
            self.until = time.monotonic() + self._broker.limits.stop_seconds
            self._worker.kill(signal.SIGTERM)

    def _hear(self) -> None:
        """Take in what the child says; progress goes on to the client at once."""
        assert self._worker is not None
        try:
            data = os.read(self._worker.pipe, MESSAGE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._broker.unwatch(self._worker.pipe)
            return
        self._heard += data
        while (end := self._heard.find(b"\n")) >= 0:
            line = bytes(self._heard[: end + 1])
            del self._heard[: end + 1]
            if not line.startswith(b'{"progress":'):
                self._final = line
            elif not self._unsent:
                # A client that doesn't read misses some, and costs nothing.
                self._unsent += line
                self._send()

    def _on_exit(self) -> None:
        worker = self._worker
        assert worker is not None
        status = worker.reap()
        if status is None:
            return
        while self._broker.watches(worker.pipe):
            before = len(self._heard), self._final
            self._hear()
            if (len(self._heard), self._final) == before:
                break
        self._release(worker)
        self._broker.children -= 1
        if self._stopped is not None and not self._final.startswith(b'{"result":'):
            self._end_stopped("")
        elif self._final:
            _log(6, f"{self._peer}: {self._request}: {self._final[:200].decode('ascii', 'replace').strip()}")
            self._end(self._final)
        else:
            code = os.waitstatus_to_exitcode(status)
            why = f"its process ended with {signal.strsignal(-code) or -code if code < 0 else f'status {code}'}"
            self._end_with(HostError(f"the request {self._name}", f"{why}{self._state()}"))

    def _leave_behind(self, worker: Worker) -> None:
        """Answer although the child is still there: nothing ends a process in uninterruptible sleep."""
        where = worker.whereabouts()
        self._release(worker, keep_pidfd=True)

        def reap() -> None:
            if worker.reap() is not None:
                self._broker.unwatch(worker.pidfd)
                os.close(worker.pidfd)
                self._broker.children -= 1

        self._broker.watch(worker.pidfd, select.POLLIN, reap)
        self._end_stopped(f"; process {worker.pid} can't be ended yet ({where}) and will be when it wakes up")

    def _release(self, worker: Worker, *, keep_pidfd: bool = False) -> None:
        self._broker.unwatch(worker.pipe)
        self._broker.unwatch(worker.pidfd)
        os.close(worker.pipe)
        if not keep_pidfd:
            os.close(worker.pidfd)
        self._worker = None

    def _state(self) -> str:
        state = self._request.state(self._broker.root) if self._request else ""
        return f"; {state}" if state else ""

    def _end_stopped(self, more: str) -> None:
        assert self._stopped is not None
        self._end_with(type(self._stopped)(self._stopped.what, f"{self._stopped.why}{self._state()}{more}"))

    def _end_with(self, error: KsmdError) -> None:
        _log(4, f"{self._peer}: {self._request}: {error}")
        self._end({"error": encode_error(error)})

    def _end(self, answer: JSON | bytes) -> None:
        self._ending = True
        self.until = time.monotonic() + self._broker.limits.request_seconds
        self._unsent += answer if isinstance(answer, bytes) else dump(answer)
        self._send()

    def _send(self) -> None:
        """Send what can be sent; end the connection once it is all gone and nothing else is to come."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent[:MESSAGE_BYTES])]
        except BlockingIOError:
            mask = select.POLLOUT if self._ending else select.POLLOUT | select.POLLIN
            self._broker.watch(self._connection.fileno(), mask, self._on_connection)
            return
        except OSError:
            # The client is gone. While its child runs, reading says so too.
            self._unsent.clear()
        if self._ending:
            self._close()
        elif self._broker.watches(self._connection.fileno()):
            self._broker.watch(self._connection.fileno(), select.POLLIN, self._on_connection)

    def _close(self) -> None:
        self._broker.unwatch(self._connection.fileno())
        self._connection.close()
        self.over = True


def serve_one(descriptor: int, root: str) -> None:
    """Serve the one connection that was inherited, for a parent that asks by itself."""
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
    broker = Broker(Path(root))
    broker.adopt(socket.socket(fileno=descriptor), f"pid {os.getppid()}")
    broker.run()


def main(arguments: list[str] | None = None) -> int:
    """``python -I -m ksmd_ctl.kernel.broker``: the exit status."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="ksmd-ctl-broker",
        description="Carries out privileged requests for ksmd-ctl's daemon. systemd starts it by its socket.",
    )
    parser.add_argument("--user", required=True, help="who may ask, besides root: a name or a uid")
    parser.add_argument("--socket", type=Path, help="listen there, where systemd hands over no socket")
    parser.add_argument("--idle-seconds", type=float, default=30, help="end after so long without work (default 30)")
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        uid = _uid(options.user)
        listener = _listener(options.socket)
    except KsmdError as error:
        sys.stderr.write(f"ksmd-ctl-broker: {error}\n")
        return int(error.exit_code)
    Broker(options.root, listener, uid, Limits(idle_seconds=options.idle_seconds)).run()
    return 0


def _uid(user: str) -> int:
    if user.isascii() and user.isdigit():
        return int(user)
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise UsageError("--user", f"there is no user {user}") from error


def _listener(path: Path | None) -> socket.socket:
    """The socket that systemd hands over, sd_listen_fds(3), or one of its own.

    :raises UsageError: there is none
    """
    if path is None:
        if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
            raise UsageError("listening", "systemd has not handed over one socket", hint="give --socket PATH")
        listener = socket.socket(fileno=_SYSTEMD_FIRST_DESCRIPTOR)
        os.set_inheritable(listener.fileno(), False)
        if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_SEQPACKET:
            raise UsageError("listening", "the socket that systemd hands over is not ListenSequentialPacket=")
        return listener
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Who connects is checked by their uid, so anybody may try.
    try:
        listener.bind(str(path))
        os.chmod(path, 0o666)
        listener.listen()
    except OSError as error:
        raise UsageError(f"listening on {path}", str(error)) from error
    return listener


def _log(level: int, text: str) -> None:
    """A line for the journal, which takes ``<N>`` as its level, sd-daemon(3)."""
    prefix = f"<{level}>" if "JOURNAL_STREAM" in os.environ else "ksmd-ctl-broker: " if level < 6 else ""
    if prefix:
        sys.stderr.write(f"{prefix}{text}\n")
        sys.stderr.flush()


def _run() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    _run()
