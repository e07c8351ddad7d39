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

import importlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ksmd_ctl.errors import Busy, Denied, KsmdError, UsageError
from ksmd_ctl.kernel.exchange import Exchange, Limits
from ksmd_ctl.kernel.slots import Slots

__all__ = ["Broker", "main", "serve_parent"]

# A transaction asks for one thing after the other: a process for each would take longer to start than to run.
_PARENT_IDLE_SECONDS = 5.0
_SYSTEMD_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


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
        self.slots = Slots(self.limits.children, self.limits.left_behind)
        self._listener = listener
        self._feed: socket.socket | None = None
        self._uid = uid
        self._exchanges: set[Exchange] = set()
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], object]] = {}

    def adopt(self, connection: socket.socket, peer: str) -> None:
        """Serve a connection whose other side needs no check: it runs as the same user."""
        self._exchanges.add(Exchange(self, connection, peer, os.geteuid()))

    def follow(self, feed: socket.socket, peer: str) -> None:
        """Serve connections that are sent as descriptors over a socket, whose other side needs no check."""
        feed.setblocking(False)
        self._feed = feed
        self.watch(feed.fileno(), select.POLLIN, lambda: self._take_connection(peer))

    def _take_connection(self, peer: str) -> bool:
        """Adopt the next connection of the feed; False where there is none."""
        assert self._feed is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(self._feed, 1, 1)
        except BlockingIOError:
            return False
        for descriptor in descriptors:
            self.adopt(socket.socket(fileno=descriptor), peer)
        if not data:
            self._drop_feed()
        return bool(data)

    def _drop_feed(self) -> None:
        if self._feed is not None:
            self.unwatch(self._feed.fileno())
            self._feed.close()
            self._feed = None

    def _end_feed(self) -> bool:
        """After the idle time: let nothing more in, and serve what has come until then; True if that is nothing."""
        assert self._feed is not None
        self._feed.shutdown(socket.SHUT_RD)
        while self._take_connection("its parent") and self._feed is not None:
            pass
        self._drop_feed()
        return not self._exchanges

    def stop(self) -> None:
        """Take nothing more, and stop what runs; `run` returns when all of it has been told."""
        if self._listener is not None:
            self.unwatch(self._listener.fileno())
            self._listener = None
        self._drop_feed()
        for exchange in self._exchanges:
            exchange.stop()

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
            elif self._listener is None and self._feed is None:
                return
            elif self.slots.left_behind and self._listener is not None:
                # A broker that was started anew would know nothing of a write that may still take place.
                until, idle_since = now + self.limits.idle_seconds, now
            else:
                until = idle_since + self.limits.idle_seconds
                if now >= until:
                    if self._feed is None or self._end_feed():
                        return
                    continue
            for descriptor, _ in self._poll.poll(max(0, until - now) * 1000 + 1):
                # One of this round's handlers may have ended what this one was for.
                if handler := self._handlers.get(descriptor):
                    handler()

    def watch(self, descriptor: int, mask: int, handler: Callable[[], object]) -> None:
        """Call a handler when a descriptor is ready."""
        self._poll.register(descriptor, mask)
        self._handlers[descriptor] = handler

    def unwatch(self, descriptor: int) -> None:
        """Forget about a descriptor."""
        if self._handlers.pop(descriptor, None):
            self._poll.unregister(descriptor)

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
        elif len(self._exchanges) >= self.limits.connections * (2 if uid == 0 else 1):
            error = Busy("the request", "too many requests are being served", hint="try again")
        exchange = Exchange(self, connection, peer, uid)
        self._exchanges.add(exchange)
        if error is not None:
            exchange.refuse(error)


def serve_parent(descriptor: int, root: str) -> None:
    """Serve connections that come as descriptors over an inherited socket, for a parent that asks by itself.

    It ends when it has been idle for a while, or when the parent has ended.
    """
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
    # It is there for one who has something to do: each child would have to load these by itself.
    for name in ("inventory", "unshare"):
        importlib.import_module(f"ksmd_ctl.kernel.{name}")

    broker = Broker(Path(root), limits=Limits(idle_seconds=_PARENT_IDLE_SECONDS))
    broker.follow(socket.socket(fileno=descriptor), f"pid {os.getppid()}")
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
    broker = Broker(options.root, listener, uid, Limits(idle_seconds=options.idle_seconds))
    # So that children are asked to stop, and not killed because this process ends.
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def stop() -> None:
        os.read(reader, 64)
        broker.stop()

    broker.watch(reader, select.POLLIN, stop)
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
