# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ways to what needs privilege: through a broker that systemd starts, or by this user.

Both give the request to a broker and return the same operation. As root, the broker is a child of this process, for
as long as requests come. The daemon starts it with posix_spawn and does not fork: it has threads, and fork copies
locks but not the threads that would release them. Nor does the child that un-merges, and is the OOM killer's favourite
meanwhile, carry the daemon's memory then. A command has one thread and little memory: it forks, which takes no new
interpreter and no imports.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Protocol, TypeVar

from ksmd_ctl.codec import JSON, dump, encode
from ksmd_ctl.errors import Busy, Denied, HostError, KsmdError, Unreachable, errno_text
from ksmd_ctl.host.operation import Finished, Operation
from ksmd_ctl.kernel.operation import ChildOperation, abandon, reap_abandoned
from ksmd_ctl.kernel.requests import Context, Request

__all__ = ["BrokerClient", "InProcess", "Privileged", "request_document"]

T = TypeVar("T")

# -I leaves environment and current directory out of where modules come from; this package need not be installed.
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from ksmd_ctl.kernel.broker import serve_parent; serve_parent(3, sys.argv[2])"
)
# The descriptor through which connections come to it.
_FEED = 3
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class Privileged(Protocol):
    """Where requests are taken to."""

    def start(self, request: Request[T], deadline_seconds: float) -> Operation[T]:
        """Begin with a request. Every failure is the operation's, none is raised here."""


def request_document(request: Request[object], deadline_seconds: float) -> JSON:
    """The message that asks for a request."""
    return {
        "kind": "request",
        "request": request.name,
        "parameters": encode(request),
        "deadline_seconds": float(deadline_seconds),
    }


class InProcess:
    """By this user: what can't block at once, all else in a broker of its own, which ends when it has been idle."""

    def __init__(self, root: Path = Path("/"), *, fork: bool = False) -> None:
        self._root = root
        self._start_broker = _fork if fork else _spawn
        self._feed: socket.socket | None = None
        self._pid = 0

    def __del__(self) -> None:
        # The broker ends with its feed.
        if self._feed is not None:
            self._feed.close()
            abandon(self._pid)

    def start(self, request: Request[T], deadline_seconds: float) -> Operation[T]:
        reap_abandoned()
        if not request.blocks:
            try:
                return Finished[T].done(request.run(Context(self._root)))
            except KsmdError as error:
                return Finished[T].failed(error)
        what = request.description
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            ours.send(dump(request_document(request, deadline_seconds)))
            with theirs:
                self._hand_over(theirs)
        except OSError as error:
            ours.close()
            why = f"a process for it can't be started: {errno_text(error.errno or 0)}"
            return Finished[T].failed(HostError(what, why, path=sys.executable, errno=error.errno))
        return ChildOperation[T](ours, what, request.result, deadline_seconds)

    def _hand_over(self, connection: socket.socket) -> None:
        if self._feed is not None:
            try:
                socket.send_fds(self._feed, [b"+"], [connection.fileno()])
                return
            except OSError:
                # It has been idle for too long, or was killed.
                self._feed.close()
                self._feed = None
                abandon(self._pid)
        feed, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._pid = self._start_broker(theirs.fileno(), self._root)
            socket.send_fds(feed, [b"+"], [connection.fileno()])
        except OSError:
            feed.close()
            raise
        self._feed = feed


class BrokerClient:
    """Through the broker that listens on a unix socket."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, request: Request[T], deadline_seconds: float) -> Operation[T]:
        what = request.description
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # A connection is there at once or not at all: systemd accepts it before the broker runs.
            connection.setblocking(False)
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            return Finished[T].failed(_connect_error(what, self._path, error))
        try:
            connection.send(dump(request_document(request, deadline_seconds)))
        except OSError:
            # The broker may have said no to this user before reading anything: then that is to be read.
            pass
        return ChildOperation[T](connection, what, request.result, deadline_seconds)


def _spawn(descriptor: int, root: Path) -> int:
    """A broker that is fed through its descriptor 3. Of all else it gets stderr only."""
    null = os.devnull
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-c", _PROGRAM, _PACKAGE_PARENT, str(root)],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, descriptor, _FEED),
            (os.POSIX_SPAWN_OPEN, 0, null, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, null, os.O_WRONLY, 0),
        ],
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        # A session of its own: Ctrl-C is for whoever asked, who then cancels.
        setsid=True,
    )


def _fork(descriptor: int, root: Path) -> int:
    """As `_spawn`, for a process with one thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        from ksmd_ctl.kernel.broker import serve_parent
        from ksmd_ctl.kernel.session import forget_handlers

        forget_handlers()
        os.dup2(descriptor, _FEED)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        serve_parent(_FEED, str(root))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _connect_error(what: str, path: Path, error: OSError) -> KsmdError:
    why = f"{path}: {errno_text(error.errno or 0)}"
    if isinstance(error, PermissionError):
        hint = "the socket belongs to the service's user"
        return Denied(what, why, hint=hint, path=str(path), errno=error.errno)
    if isinstance(error, BlockingIOError):
        return Busy(what, f"{path}: too many are waiting for it", hint="try again")
    return Unreachable(what, why, hint="is ksmd-ctl-broker.socket active?")
