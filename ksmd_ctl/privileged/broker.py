# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker: a small privileged process that carries out typed requests for the service, which has no privilege.

It listens on a unix socket (SOCK_SEQPACKET) that systemd passes to it, and takes one request on each connection. A
request that may take long runs in a child with a deadline. The broker ends when no request has come for a while. It
carries out what is in `ksmd_ctl.privileged.requests.REQUESTS`, and nothing else.

A request is one packet of at most 128 KiB:
``{"kind": "request", "request": NAME, "parameters": {...}, "deadline_seconds": N}``.
``{"kind": "cancel"}`` may follow; hanging up stops it too. The answer is lines of JSON, cut into packets anywhere: any
number of ``{"kind": "progress", "value": {...}}``, then one of the kind ``result`` or ``error``, then the end.
"""

from __future__ import annotations

import importlib
import math
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ksmd_ctl.codec import JSON, dump, encode, encode_error
from ksmd_ctl.errors import Busy, Cancelled, Denied, HostError, KsmdError, TimedOut, UsageError
from ksmd_ctl.host.memory import CONTENTS_PAUSE_SECONDS
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.privileged.requests import CANCEL, MESSAGE_BYTES, PACKET_BYTES, ROOTS, Context, Request, parse_request
from ksmd_ctl.privileged.worker import Worker, carried_out

if TYPE_CHECKING:
    import argparse

T = TypeVar("T")

# A transaction asks for one thing after the other: a process for each would take longer to start than to run.
_PARENT_IDLE_SECONDS = 5.0
_SYSTEMD_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_SEND_AGAIN_SECONDS = 0.1
# poll(2) takes an int of milliseconds.
_LONGEST_WAIT_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the broker, whoever sends requests.

    :ivar children: requests at a time, without writes of knobs
    :ivar left_behind: processes that can't be ended, without writes of knobs
    :ivar connections: connections at a time, also those without a request; root may have as many again
    :ivar request_seconds: how long a client may send no request, or not read its answer
    :ivar idle_seconds: the broker ends after so long without work
    :ivar stop_seconds: from SIGTERM to SIGKILL
    :ivar kill_seconds: from SIGKILL to giving up on a child
    """

    children: int = 8
    left_behind: int = 12
    connections: int = 32
    request_seconds: float = 5
    idle_seconds: float = 30
    stop_seconds: float = 2
    kill_seconds: float = 1


class Slots:
    """When a request may begin: at once, when another one has ended, or not at all.

    Writes of knobs need no slot, so that no other request can keep a knob from being put back; there is one write of a
    knob at a time. All other requests share a number of slots. A process that can't be ended (uninterruptible sleep)
    gives its slot back; there is a limit on those, too.

    :ivar left: requests whose process can't be ended, and a phrase about that process, by its pidfd
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running: list[Request[Any]] = []
        self._contents_due = 0.0
        self.left: dict[int, tuple[Request[Any], str]] = {}

    def is_turn(self, request: Request[Any]) -> bool:
        """Whether no request of the same queue runs, or the one that runs can't be ended."""
        queue = request.queue
        return not queue or bool(self._stuck(queue)) or all(one.queue != queue for one in self._running)

    def _stuck(self, queue: str) -> str:
        return next((where for one, where in self.left.values() if one.queue == queue), "")

    def begin(self, request: Request[Any], uid: int) -> None:
        """Count a request as running, when it is its turn.

        :param uid: of the client
        :raises Busy: it may not begin
        """
        if not request.queue:
            self._need_slot(request)
            if request.compares_contents and uid != 0:
                self._need_pause(request)
        elif stuck := self._stuck(request.queue):
            why = f"an earlier write has not ended: {stuck}"
            raise Busy(request.description, why, hint="`ksmd-ctl doctor` tells what keeps ksmd")
        self._running.append(request)

    def _need_slot(self, request: Request[Any]) -> None:
        if sum(not one.queue for one in self._running) >= self._limits.children:
            raise Busy(request.description, "too many requests are being served", hint="try again")
        left = sum(not one.queue for one, _ in self.left.values())
        if left >= self._limits.left_behind:
            why = f"{left} processes of earlier requests wait in the kernel and can't be ended"
            raise Busy(request.description, why, hint="what they wait for is in the log of the broker")

    def _need_pause(self, request: Request[Any]) -> None:
        now = time.monotonic()
        wait_seconds = self._contents_due - now
        if wait_seconds > 0:
            why = f"contents are compared once in {CONTENTS_PAUSE_SECONDS:g} s, but for root"
            raise Busy(request.description, why, hint=f"try again in {wait_seconds:.0f} s")
        self._contents_due = now + CONTENTS_PAUSE_SECONDS

    def end(self, request: Request[Any]) -> None:
        """A request has ended: the next one of its queue may begin."""
        self._running.remove(request)

    def leave(self, request: Request[Any], pidfd: int, where: str) -> None:
        """The process of a request can't be ended.

        :param where: a phrase: which process that is, and what it will do
        """
        self._running.remove(request)
        self.left[pidfd] = request, where


@dataclass(frozen=True, slots=True)
class Wait:
    """What a session waits for: whichever is first.

    :ivar until: this time, by time.monotonic()
    :ivar descriptors: one of these is readable
    :ivar turn: this returns true
    """

    until: float
    descriptors: tuple[int, ...] = ()
    turn: Callable[[], bool] = lambda: False


#: Yields what it waits for, is sent the descriptors that are readable.
Waits = Generator[Wait, Set[int], T]


def need_leave(request: Request[Any], uid: int, allowed: Callable[[str], bool]) -> None:
    """
    :param allowed: whether the configuration allows the service a request, by its name
    :raises Denied: only root may ask for it
    """
    # What it would do, anybody may ask.
    if request.name not in ROOTS or getattr(request, "dry_run", False) or uid == 0:
        return
    if not allowed(request.name):
        why = f"the configuration of this host does not allow it to uid {uid}"
        raise Denied(request.description, why, hint="root may, without the service; or set [switch] allow = true")


class Session:
    """One connection of a client.

    :param peer: the client, for the log; empty for the parent of this process, which reports errors itself
    """

    def __init__(self, broker: Broker, connection: socket.socket, peer: str, uid: int) -> None:
        connection.setblocking(False)
        self._broker = broker
        self._limits = broker.limits
        self._slots = broker.slots
        self._connection = connection
        self._peer = peer
        self._uid = uid

    def serve(self, refusal: KsmdError | None = None) -> Waits[None]:
        """Read a request, see that it is carried out, and answer.

        :param refusal: answer with this error instead
        """
        with self._connection:
            try:
                if refusal is not None:
                    raise refusal
                yield from self._request()
            except KsmdError as error:
                self._log(4, str(error))
                yield from self._send({"kind": "error", "value": encode_error(error)})
            finally:
                # A process that can't be ended has the connection open, too.
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    def _request(self) -> Waits[None]:
        until = time.monotonic() + self._limits.request_seconds
        ready = yield Wait(until, (self._connection.fileno(), self._broker.stop_descriptor))
        if not ready:
            raise TimedOut("the request", f"none came for {self._limits.request_seconds:g} s")
        if self._connection.fileno() not in ready:
            raise self._cancelled("the request", ready)
        data = self._receive()
        if not data:
            return
        request, deadline_seconds = parse_request(data)
        need_leave(request, self._uid, self._broker.allowed)
        context = Context(self._broker.root, self._report, self._uid)
        if request.blocks:
            yield from self._carry_out(request, context, deadline_seconds)
        else:
            answer = carried_out(request, context)
            descriptor = answer["value"] if request.gives_descriptor else None
            try:
                yield from self._send(answer, [descriptor] if isinstance(descriptor, int) else [])
            finally:
                if isinstance(descriptor, int):
                    os.close(descriptor)
        self._log(6, f"{request.description}: done")

    def _report(self, progress: Progress) -> None:
        # A client that does not read misses some of it.
        with suppress(OSError):
            self._connection.send(dump({"kind": "progress", "value": encode(progress)}))

    def _log(self, level: int, text: str) -> None:
        """Write a line for the journal, which reads ``<N>`` as its level, sd-daemon(3)."""
        prefix = f"<{level}>" if "JOURNAL_STREAM" in os.environ else "ksmd-ctl-broker: " if level < 6 else ""
        if self._peer and prefix:
            sys.stderr.write(f"{prefix}{self._peer}: {text}\n")
            sys.stderr.flush()

    def _cancelled(self, what: str, ready: Set[int]) -> Cancelled:
        """Why a request has to be stopped."""
        if self._connection.fileno() not in ready:
            return Cancelled(what, "the broker is being stopped")
        # Any other message is not from a client of this package.
        return Cancelled(what, "it was cancelled" if self._receive() == CANCEL else "its client is gone")

    def _carry_out(self, request: Request[Any], context: Context, deadline_seconds: float) -> Waits[None]:
        """Carry a request out in a process, and wait for the end of that.

        :raises KsmdError: it failed, or was stopped
        """
        until = time.monotonic() + deadline_seconds
        stops = (self._connection.fileno(), self._broker.stop_descriptor)
        if not self._slots.is_turn(request):
            ready = yield Wait(until, stops, lambda: self._slots.is_turn(request))
            if ready:
                raise self._cancelled(request.description, ready)
            if not self._slots.is_turn(request):
                raise TimedOut(request.description, f"its turn did not come for {deadline_seconds:g} s")
        self._slots.begin(request, self._uid)
        try:
            worker = Worker(request, context, self._connection, self._limits.request_seconds)
        except OSError as error:
            self._slots.end(request)
            why = f"no process can be started for it: {error}"
            raise HostError(request.description, why, errno=error.errno) from error
        ready = yield Wait(until, (worker.pidfd, *stops))
        stopped: KsmdError | None = None
        if not ready:
            stopped = TimedOut(request.description, f"its deadline of {deadline_seconds:g} s passed")
        elif worker.pidfd not in ready:
            stopped = self._cancelled(request.description, ready)
        if stopped is not None and not (yield from self._stop(worker)):
            where = f"process {worker.pid} can't be ended yet ({worker.abandon()}): {request.left_behind()}"
            self._slots.leave(request, worker.pidfd, where)
            raise type(stopped)(stopped.what, self._why(request, stopped.why, where))
        self._slots.end(request)
        status, given = worker.end()
        if status == 0:
            # The process has sent the result itself.
            return
        if stopped is not None:
            raise type(stopped)(stopped.what, self._why(request, stopped.why, given.why if given else ""))
        if given is not None:
            raise given
        how = signal.strsignal(-status) or status if status < 0 else f"status {status}"
        raise HostError(request.description, self._why(request, f"its process ended with {how}"))

    def _stop(self, worker: Worker) -> Waits[bool]:
        """Ask a process to end, then kill it; whether it has ended."""
        for number, seconds in (
            (signal.SIGTERM, self._limits.stop_seconds),
            (signal.SIGKILL, self._limits.kill_seconds),
        ):
            worker.kill(number)
            if (yield Wait(time.monotonic() + seconds, (worker.pidfd,))):
                return True
        return False

    def _why(self, request: Request[Any], why: str, more: str = "") -> str:
        """Why a request was stopped, and the state that it left."""
        return "; ".join(part for part in (why, request.state(self._broker.root), more) if part)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(MESSAGE_BYTES + 1)
        except OSError:
            return b""

    def _send(self, document: Mapping[str, JSON], descriptors: Sequence[int] = ()) -> Waits[None]:
        """Send an answer; drop it if the client does not read it.

        :param descriptors: go with its first packet
        """
        data, until = dump(dict(document)), time.monotonic() + self._limits.request_seconds
        while data and time.monotonic() < until:
            try:
                data = data[socket.send_fds(self._connection, [data[:PACKET_BYTES]], descriptors) :]
                descriptors = ()
            except BlockingIOError:
                yield Wait(time.monotonic() + _SEND_AGAIN_SECONDS)
            except OSError:
                return


class Broker:
    """The loop that serves connections. It has one thread, because it forks.

    :param listener: the socket that clients connect to; see also `adopt`
    :param uid: the user who may send requests, besides root
    :param feed: the socket over which the parent of this process sends connections, as descriptors
    :param stop_descriptor: is readable once the broker has to stop all requests and end
    :param allowed: whether who is not root may ask for one of `ksmd_ctl.privileged.requests.ROOTS`, by its name
    """

    def __init__(
        self,
        root: Path,
        listener: socket.socket | None = None,
        uid: int | None = None,
        limits: Limits | None = None,
        *,
        feed: socket.socket | None = None,
        stop_descriptor: int = -1,
        allowed: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.root = root
        self.allowed = allowed
        self.limits = limits or Limits()
        self.slots = Slots(self.limits)
        self.stop_descriptor = stop_descriptor
        self._uid = uid
        self._listener = listener
        self._feed = feed
        self._sessions: dict[Waits[None], Wait] = {}
        for source in (listener, feed):
            if source is not None:
                source.setblocking(False)

    def adopt(self, connection: socket.socket, peer: str) -> None:
        """Serve a connection of a client that needs no check, because it runs as the same user."""
        self._begin(connection, peer, os.geteuid())

    def run(self) -> None:
        """Serve until nothing is left to do: without a listener or feed at once, else after the idle time."""
        idle_until = time.monotonic() + self.limits.idle_seconds
        while True:
            now = time.monotonic()
            # The next broker would not know of a write that may still take place.
            if self._sessions or (self.slots.left and self._listener is not None):
                idle_until = now + self.limits.idle_seconds
            elif (self._listener is None and self._feed is None) or (
                now >= idle_until and (self._feed is None or self._end_feed())
            ):
                return
            self._round(self._ready(idle_until))

    def _ready(self, until: float) -> set[int]:
        """Wait until a session can go on or a connection comes: the descriptors that are readable."""
        sources = [self._listener, self._feed]
        descriptors = {*self.slots.left, *(one.fileno() for one in sources if one is not None)}
        if self._listener is not None:
            descriptors.add(self.stop_descriptor)
        for wait in self._sessions.values():
            until = 0.0 if wait.turn() else min(until, wait.until)
            descriptors.update(wait.descriptors)
        poller = select.poll()
        for descriptor in descriptors - {-1}:
            poller.register(descriptor, select.POLLIN)
        wait_seconds = min(max(0.0, until - time.monotonic()), _LONGEST_WAIT_SECONDS)
        return {found for found, _ in poller.poll(wait_seconds * 1000 + 1)}

    def _round(self, ready: set[int]) -> None:
        now = time.monotonic()
        for session, wait in tuple(self._sessions.items()):
            found = ready.intersection(wait.descriptors)
            if found or now >= wait.until or wait.turn():
                self._go_on(session, found)
        for pidfd in ready.intersection(self.slots.left):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
            del self.slots.left[pidfd]
        if self.stop_descriptor in ready:
            # The sessions watch it, too.
            self._listener = None
        elif self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        elif self._feed is not None and self._feed.fileno() in ready:
            self._take_connection(self._feed)

    def _begin(self, connection: socket.socket, peer: str, uid: int, refusal: KsmdError | None = None) -> None:
        self._go_on(Session(self, connection, peer, uid).serve(refusal))

    def _go_on(self, session: Waits[None], ready: Set[int] | None = None) -> None:
        try:
            self._sessions[session] = next(session) if ready is None else session.send(ready)
        except StopIteration:
            self._sessions.pop(session, None)

    def _take_connection(self, feed: socket.socket) -> bool:
        """Serve the next connection of the feed; False if there is none."""
        try:
            data, descriptors, _, _ = socket.recv_fds(feed, 1, 1)
        except BlockingIOError:
            return False
        for descriptor in descriptors:
            self.adopt(socket.socket(fileno=descriptor), "")
        if not data:
            self._feed = None
        return bool(data)

    def _end_feed(self) -> bool:
        """After the idle time: close the feed, and serve the connections in it; True if there are none."""
        feed = self._feed
        assert feed is not None
        feed.shutdown(socket.SHUT_RD)
        while self._take_connection(feed):
            pass
        self._feed = None
        return not self._sessions

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        refusal: KsmdError | None = None
        if uid not in (0, self._uid):
            refusal = Denied("the request", f"uid {uid} may not ask for anything", hint="only the service and root may")
        elif len(self._sessions) >= self.limits.connections * (2 if uid == 0 else 1):
            refusal = Busy("the request", "too many requests are being served", hint="try again")
        self._begin(connection, f"uid {uid} pid {pid}", uid, refusal)


def serve_parent(descriptor: int, root: str) -> None:
    """Serve the parent of this process, which sends connections over an inherited socket.

    It ends when it has been idle for a while, or when the parent has ended.
    """
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
    # Requests follow at once: otherwise each child would have to load these.
    for name in ("inventory", "unshare"):
        importlib.import_module(f"ksmd_ctl.kernel.{name}")

    limits = Limits(idle_seconds=_PARENT_IDLE_SECONDS)
    Broker(Path(root), limits=limits, feed=socket.socket(fileno=descriptor)).run()


def main(arguments: list[str] | None = None, allowed: Callable[[str], bool] = lambda _: False) -> int:
    """``python -I -m ksmd_ctl.privileged.broker``: the exit status.

    :param allowed: as of `Broker`
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog="ksmd-ctl-broker",
        description="Carries out privileged requests for ksmd-ctl's daemon. systemd starts it by its socket.",
    )
    parser.add_argument("--user", required=True, help="who may ask, besides root: a name or a uid")
    parser.add_argument("--socket", type=Path, help="listen there, where systemd hands over no socket")
    parser.add_argument("--idle-seconds", type=float, default=30, help="end after so long without work (default 30)")
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="without systemd, as in a container: serve until SIGTERM and until the service has ended, whose lock is "
        "beside the socket",
    )
    parser.add_argument(
        "--state-directory",
        type=Path,
        default=Path("/var/lib/ksmd-ctl"),
        help="with --standalone: give it to the user if it is root's (default /var/lib/ksmd-ctl)",
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # Children have time to stop; they would be killed with this process.
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    limits = Limits(idle_seconds=options.idle_seconds)
    try:
        uid = _uid(options.user)
        if options.standalone:
            limits = Limits(idle_seconds=math.inf)
            _stand_alone(options, uid, writer)
        else:
            signal.set_wakeup_fd(writer)
            signal.signal(signal.SIGTERM, lambda *_: None)
        listener = _listener(options.socket)
    except KsmdError as error:
        sys.stderr.write(f"ksmd-ctl-broker: {error}\n")
        return int(error.exit_code)
    Broker(options.root, listener, uid, limits, stop_descriptor=reader, allowed=allowed).run()
    return 0


def _stand_alone(options: argparse.Namespace, uid: int, stop: int) -> None:
    """
    :param stop: the descriptor that ends the broker when something is written to it
    :raises KsmdError: it can't be done
    """
    # Not loaded where systemd does all that.
    from ksmd_ctl.privileged import standalone

    if options.socket is None:
        raise UsageError("listening", "--standalone takes a socket of its own", hint="give --socket PATH")
    standalone.prepare(options.state_directory, options.socket.parent, uid, options.root)
    standalone.clear(options.socket)
    standalone.stop_after_service(options.socket.parent, stop)


def _uid(user: str) -> int:
    if user.isascii() and user.isdigit():
        return int(user)
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise UsageError("--user", f"there is no user {user}") from error


def _listener(path: Path | None) -> socket.socket:
    """The socket that systemd passes, sd_listen_fds(3), or a new one at a path.

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
    # Anybody may connect, because the uid of a client is checked. Not with chmod(2): it would follow a link that the
    # owner of the folder puts in the socket's place.
    old = os.umask(0o111)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        raise UsageError(f"listening on {path}", str(error)) from error
    finally:
        os.umask(old)
    return listener


if __name__ == "__main__":
    sys.exit(main())
