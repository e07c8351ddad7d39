# SPDX-License-Identifier: GPL-2.0-or-later
"""The two ways to a broker (`ksmd_ctl.privileged.broker`), one that systemd starts or a child, and what it answers.

The broker forks the process that does the work, holds the deadline, kills that process, and says what came of it. So
nothing here waits: not for a process in uninterruptible sleep, which is the broker's, and init's after it.

As root, the broker is a child of this process, for as long as requests come. The service starts it with posix_spawn and
does not fork: it has threads, and fork copies locks but not the threads that would release them. Nor does the child
that un-merges, and is the OOM killer's favourite meanwhile, carry the service's memory then. A command has one thread
and little memory: it forks, which takes no new interpreter and no imports.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

from ksmd_ctl.codec import decode, decode_error, load
from ksmd_ctl.errors import Busy, Denied, HostError, KsmdError, TimedOut, Unreachable, errno_text
from ksmd_ctl.host.operation import Operation, Progress, Steps, in_thread, waited
from ksmd_ctl.privileged.requests import CANCEL, PACKET_BYTES, Request

T = TypeVar("T")

#: How long after its deadline an operation waits for the broker's word before it gives up.
GRACE_SECONDS = 10.0

_MAXIMUM_REPLY = 16 << 20
# A longer answer takes more than a few milliseconds to decode, so a thread does it.
_DECODED_AT_ONCE = 256 << 10

# struct ucred: pid, uid, gid (unix(7)).
_CREDENTIALS = struct.Struct("=iII")

# Brokers that have ended or will, and are to be reaped.
_abandoned: set[int] = set()

# With -I modules come neither from the environment nor from the current directory; the package need not be installed.
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from ksmd_ctl.privileged.broker import serve_parent; serve_parent(3, sys.argv[2])"
)
# The descriptor through which connections come to it.
_FEED = 3
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class RequestOperation(Operation[T]):
    """A request that a broker has been sent.

    :param connection: over which it was sent
    :param worked: is given the pid of each process that answers; the connection has SO_PASSCRED then
    """

    def __init__(
        self,
        connection: socket.socket,
        request: Request[T],
        deadline_seconds: float,
        worked: Callable[[int], None] | None = None,
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        give_up = time.monotonic() + deadline_seconds + GRACE_SECONDS
        super().__init__(_answer(connection, request, give_up, worked), connection.fileno())

    def __del__(self) -> None:
        self._connection.close()

    def cancel(self) -> None:
        super().cancel()
        # The broker may have ended, or not have read earlier messages; `poll` finds out.
        with suppress(OSError):
            self._connection.send(CANCEL)


def _answer(
    connection: socket.socket, request: Request[T], give_up: float, worked: Callable[[int], None] | None
) -> Steps[T]:
    """Wait for the result: the last message of the broker."""

    what = request.description
    descriptors: list[int] = []

    def decoded() -> T:
        try:
            match load(line):
                case {"kind": "result", "value": _} if request.gives_descriptor:
                    return cast(T, descriptors.pop())
                case {"kind": "result", "value": value}:
                    return cast(T, decode(request.result, value, "the result"))
                case {"kind": "error", "value": value}:
                    raise decode_error(value)
            raise ValueError("the answer makes no sense: it is neither a result nor an error")
        except (ValueError, IndexError) as error:
            raise _unknown(what, error) from error

    def receive() -> bytes:
        if worked is not None:
            data, about, _, _ = connection.recvmsg(PACKET_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size))
            for level, kind, content in about:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and data:
                    worked(_CREDENTIALS.unpack(content)[0])
            return data
        if not request.gives_descriptor:
            return connection.recv(PACKET_BYTES)
        data, more, _, _ = socket.recv_fds(connection, PACKET_BYTES, 1)
        for descriptor in more:
            # recv_fds() takes no notice of MSG_CMSG_CLOEXEC.
            os.set_inheritable(descriptor, False)
        descriptors.extend(more)
        return data

    try:
        with connection:
            try:
                line = yield from _last_line(receive, what, give_up)
            except (OSError, ValueError) as error:
                raise _unknown(what, error) from error
        if len(line) <= _DECODED_AT_ONCE:
            return decoded()
        return (yield from waited(in_thread(decoded)))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _unknown(what: str, error: OSError | ValueError | IndexError) -> HostError:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return HostError(what, why, hint="whether it took place is not known; the log of the broker may tell")


def _last_line(receive: Callable[[], bytes], what: str, give_up: float) -> Steps[bytes]:
    """Wait for the last message of the broker; the ones before it are progress.

    :raises ValueError: there is none, or one makes no sense
    """
    at, last, buffer = Progress(), b"", bytearray()
    while True:
        try:
            data = receive()
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise TimedOut(what, "the broker does not answer; it may still be going on") from None
            yield at
            continue
        except ConnectionResetError:
            # The broker closed without reading a cancel. Its messages are still to be read.
            continue
        if not data:
            break
        *lines, rest = data.split(b"\n")
        for line in lines:
            last = bytes(buffer + line)
            buffer.clear()
            if len(last) < PACKET_BYTES:
                document = load(last)
                if isinstance(document, dict) and document.get("kind") == "progress":
                    at, last = decode(Progress, document.get("value"), "progress"), b""
        buffer += rest
        if len(buffer) > _MAXIMUM_REPLY:
            raise ValueError("the answer is too long")
    if not last:
        raise ValueError("the process that did it ended without a result")
    return last


class BrokerSocket:
    """The broker that listens on a unix socket: systemd starts it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def connect(self, what: str) -> socket.socket:
        """A connection for one request, which is there at once or not at all: systemd accepts it.

        :param what: what is asked for, for errors
        :raises KsmdError: there is none
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            raise _connect_error(what, self._path, error) from error
        return connection


class OwnBroker:
    """A broker that is a child of this process and ends when it has been idle.

    :param fork: this process has one thread, so the broker may be a fork of it
    """

    def __init__(self, root: Path = Path("/"), *, fork: bool = False) -> None:
        self._root = root
        self._start_broker = _fork if fork else _spawn
        self._feed: socket.socket | None = None
        self._pid = 0

    def __del__(self) -> None:
        # The broker ends when its feed is closed.
        if self._feed is not None:
            self._feed.close()
            abandon(self._pid)

    def connect(self, what: str) -> socket.socket:
        """A connection for one request.

        :param what: what is asked for, for errors
        :raises HostError: the broker can't be started
        """
        reap_abandoned()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._hand_over(theirs)
        except OSError as error:
            ours.close()
            why = f"a process for it can't be started: {errno_text(error.errno or 0)}"
            raise HostError(what, why, path=sys.executable, errno=error.errno) from error
        return ours

    def _hand_over(self, connection: socket.socket) -> None:
        if self._feed is not None:
            try:
                socket.send_fds(self._feed, [b"+"], [connection.fileno()])
                return
            except OSError:
                # The broker was idle for too long, or was killed.
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


def _spawn(descriptor: int, root: Path) -> int:
    """Start a broker that gets connections through its descriptor 3. It inherits stderr and nothing else."""
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
        # Ctrl-C goes to the client, which then cancels.
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
        from ksmd_ctl.privileged.broker import serve_parent
        from ksmd_ctl.privileged.worker import forget_handlers

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
    return Unreachable(
        what, why, hint="is ksmd-ctl-broker.socket active, or the container with `ksmd-ctl broker` running?"
    )


def abandon(pid: int) -> None:
    """Have a child that ends by itself reaped later."""
    _abandoned.add(pid)


def reap_abandoned() -> None:
    """Reap brokers that have ended."""
    for pid in tuple(_abandoned):
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        except ChildProcessError:
            pass
        _abandoned.discard(pid)
