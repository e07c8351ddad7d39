# SPDX-License-Identifier: GPL-2.0-or-later
"""The small privileged part: it carries out typed requests for the service, which has no privilege itself.

It listens on a unix socket (SOCK_SEQPACKET) that systemd hands over, takes one request a connection from one user,
runs each in a child with a deadline, and ends itself when nothing has come for a while: in steady state it isn't
there. What it can be asked for is `ksmd_ctl.privileged.requests.REQUESTS`, and nothing else.

A request is one packet of at most 64 KiB:
``{"kind": "request", "request": NAME, "parameters": {...}, "deadline_seconds": N}``.
``{"kind": "cancel"}`` may follow; hanging up stops it too. The answer is lines of JSON, cut into packets anywhere: any
number of ``{"kind": "progress", "value": {...}}``, then one of the kind ``result`` or ``error``, then the end.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ksmd_ctl.errors import Busy, Cancelled, Denied, KsmdError, UsageError
from ksmd_ctl.privileged.session import Limits, Session, Slots, Wait, Waits

# A transaction asks for one thing after the other: a process for each would take longer to start than to run.
_PARENT_IDLE_SECONDS = 5.0
_SYSTEMD_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


class Broker:
    """The loop that serves connections. One thread: processes are forked from it.

    :param listener: where connections come from; see also `adopt` and `follow`
    :param uid: who may ask, besides root
    """

    def __init__(
        self,
        root: Path,
        listener: socket.socket | None = None,
        uid: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.slots = Slots(self.limits)
        self._root = root
        self._uid = uid
        self._listener = listener
        self._feed: socket.socket | None = None
        self._sessions: dict[Waits[None], Wait] = {}
        self._stop_signal = -1

    def adopt(self, connection: socket.socket, peer: str) -> None:
        """Serve a connection whose other side needs no check: it runs as the same user."""
        self._begin(connection, peer, os.geteuid())

    def follow(self, feed: socket.socket) -> None:
        """Serve connections that are sent as descriptors over a socket by the parent of this process."""
        feed.setblocking(False)
        self._feed = feed

    def stop_at(self, descriptor: int) -> None:
        """Stop when a descriptor gets readable: take nothing more, and stop what runs."""
        self._stop_signal = descriptor

    def run(self) -> None:
        """Serve until there is nothing to serve: at once without a source of connections, else after the idle time."""
        if self._listener is not None:
            self._listener.setblocking(False)
        idle_until = time.monotonic() + self.limits.idle_seconds
        while True:
            now = time.monotonic()
            # A broker that was started anew would know nothing of a write that may still take place.
            if self._sessions or (self.slots.left and self._listener is not None):
                idle_until = now + self.limits.idle_seconds
            elif (self._listener is None and self._feed is None) or (
                now >= idle_until and (self._feed is None or self._end_feed())
            ):
                return
            self._round(self._ready(idle_until))

    def _ready(self, until: float) -> set[int]:
        """Wait for what the sessions wait for: the descriptors that are readable."""
        poller = select.poll()
        for wait in self._sessions.values():
            until = 0.0 if wait.turn() else min(until, wait.until)
            for descriptor in wait.descriptors:
                poller.register(descriptor, select.POLLIN)
        sources = [one.fileno() for one in (self._listener, self._feed) if one is not None]
        for descriptor in (*self.slots.left, *sources, self._stop_signal):
            if descriptor >= 0:
                poller.register(descriptor, select.POLLIN)
        return {found for found, _ in poller.poll(max(0.0, until - time.monotonic()) * 1000 + 1)}

    def _round(self, ready: set[int]) -> None:
        now = time.monotonic()
        for session, wait in tuple(self._sessions.items()):
            found = ready.intersection(wait.descriptors)
            if found or now >= wait.until or wait.turn():
                self._go_on(session, partial(session.send, found))
        for pidfd in ready.intersection(self.slots.left):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
            self.slots.ended(pidfd)
        if self._stop_signal in ready:
            self._stop()
        elif self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        elif self._feed is not None and self._feed.fileno() in ready:
            self._take_connection(self._feed)

    def _begin(self, connection: socket.socket, peer: str, uid: int, refusal: KsmdError | None = None) -> None:
        session = Session(connection, peer, uid, self._root, self.limits, self.slots).serve(refusal)
        self._go_on(session, partial(next, session))

    def _go_on(self, session: Waits[None], step: Callable[[], Wait]) -> None:
        try:
            self._sessions[session] = step()
        except (StopIteration, Cancelled):
            self._sessions.pop(session, None)

    def _stop(self) -> None:
        os.read(self._stop_signal, 64)
        self._listener = None
        cause = Cancelled("the request", "the broker is being stopped")
        for session in tuple(self._sessions):
            self._go_on(session, partial(session.throw, cause))

    def _take_connection(self, feed: socket.socket) -> bool:
        """Adopt the next connection of the feed; False where there is none."""
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
        """After the idle time: let nothing more in, and serve what has come until then; True if that is nothing."""
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
    """Serve connections that come as descriptors over an inherited socket, for a parent that asks by itself.

    It ends when it has been idle for a while, or when the parent has ended.
    """
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
    # It is there for one who has something to do: each child would have to load these by itself.
    for name in ("inventory", "unshare"):
        importlib.import_module(f"ksmd_ctl.kernel.{name}")

    broker = Broker(Path(root), limits=Limits(idle_seconds=_PARENT_IDLE_SECONDS))
    broker.follow(socket.socket(fileno=descriptor))
    broker.run()


def main(arguments: list[str] | None = None) -> int:
    """``python -I -m ksmd_ctl.privileged.broker``: the exit status."""
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
    broker = Broker(options.root, listener, uid, Limits(idle_seconds=options.idle_seconds))
    # So that children are asked to stop, and not killed because this process ends.
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    broker.stop_at(reader)
    broker.run()
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
    # Who connects is checked by their uid, so anybody may try. Not with chmod(2), which follows a link that whoever
    # owns the folder puts in the socket's place.
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
