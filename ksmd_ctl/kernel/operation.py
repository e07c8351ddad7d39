# SPDX-License-Identifier: GPL-2.0-or-later
"""`ksmd_ctl.host.operation.Operation` on the kernel: another process carries it out.

That process is a broker (`ksmd_ctl.kernel.broker`), whether systemd started it or this one did. It forks the
child that does the work, holds the deadline, kills the child and says what came of it. So nothing here waits: not
for a child in uninterruptible sleep, which is the broker's, and init's after it.
"""

from __future__ import annotations

import os
import select
import socket
import time
from typing import Generic, TypeVar, cast

from ksmd_ctl.codec import decode, decode_error, dump, load
from ksmd_ctl.errors import HostError, TimedOut
from ksmd_ctl.host.operation import Finished, Progress

__all__ = ["ChildOperation", "abandon", "reap_abandoned"]

T = TypeVar("T")

#: How long after its deadline an operation waits for the broker's word before it gives up.
GRACE_SECONDS = 10.0

_PACKET = 65536
_MAXIMUM_REPLY = 16 << 20
# A longer answer takes more than a few milliseconds to decode: a thread does that, and who polls goes on meanwhile.
_DECODED_AT_ONCE = 256 << 10

# Brokers that nobody waits for. They end by themselves, and wait to be reaped.
_abandoned: set[int] = set()


class ChildOperation(Generic[T]):
    """A request that a broker has been given.

    :param connection: to the broker, the request sent
    :param what: what is being done, for errors
    :param kind: the result's type
    """

    def __init__(self, connection: socket.socket, what: str, kind: object, deadline_seconds: float) -> None:
        self._connection = connection
        connection.setblocking(False)
        self._what = what
        self._kind = kind
        self._give_up = time.monotonic() + deadline_seconds + GRACE_SECONDS
        self._buffer = bytearray()
        self._last = b""
        self._progress = Progress()
        self._outcome: Finished[T] | None = None
        self._news = -1
        self._decoded: list[Finished[T]] = []
        # The same descriptor until the end, also when the connection is closed, so that an event loop has it easy.
        self._epoll = select.epoll()
        self._epoll.register(connection, select.EPOLLIN)

    def __del__(self) -> None:
        self._connection.close()
        if self._news >= 0:
            os.close(self._news)

    def fileno(self) -> int:
        """A descriptor that gets readable when `poll` has news."""
        return self._epoll.fileno()

    def poll(self) -> bool:
        """Take in what has happened, without waiting; True once it is over."""
        if self._connection.fileno() >= 0:
            self._receive()
        if self._outcome is None and self._decoded:
            self._epoll.unregister(self._news)
            self._outcome = self._decoded[0]
        if self._outcome is None and time.monotonic() > self._give_up:
            self._finish(Finished.failed(TimedOut(self._what, "the broker does not answer; it may still be going on")))
        return self._outcome is not None

    @property
    def progress(self) -> Progress:
        return self._progress

    def cancel(self) -> None:
        """Ask it to stop; it finishes soon after."""
        if self._outcome is None:
            try:
                self._connection.send(dump({"kind": "cancel"}))
            except OSError:
                # The broker has ended, or has been asked often enough; poll finds out which.
                pass

    def result(self) -> T:
        """What came of it.

        :raises KsmdError: it failed, was cancelled, or its deadline passed
        """
        if self._outcome is None:
            raise RuntimeError("the operation is not over: poll() has not said so")
        return self._outcome.result()

    def _receive(self) -> None:
        while self._outcome is None:
            try:
                data = self._connection.recv(_PACKET)
            except BlockingIOError:
                return
            except ConnectionResetError:
                # It closed without reading a cancel. What it said before is still to be read.
                continue
            except OSError as error:
                self._lost(error.strerror or str(error))
                return
            if not data:
                self._end()
                return
            known = len(self._buffer)
            self._buffer += data
            while self._outcome is None and (end := self._buffer.find(b"\n", known)) >= 0:
                self._last = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                known = 0
                if len(self._last) <= _DECODED_AT_ONCE and isinstance(found := self._understood(self._last), Progress):
                    self._progress, self._last = found, b""
            if self._outcome is None and len(self._buffer) > _MAXIMUM_REPLY:
                self._lost("the answer is too long")

    def _end(self) -> None:
        """The connection is closed: what was said last is what came of it."""
        if len(self._last) > _DECODED_AT_ONCE:
            self._take_in_thread(self._last)
            return
        found = self._understood(self._last) if self._last else None
        if isinstance(found, Finished):
            self._finish(found)
        else:
            self._lost("the process that did it ended without a word")

    def _understood(self, line: bytes) -> Progress | Finished[T]:
        try:
            document = load(line)
            if not isinstance(document, dict) or document.keys() != {"kind", "value"}:
                raise ValueError("its keys are not kind, value")
            match document:
                case {"kind": "progress", "value": value}:
                    return decode(Progress, value, "progress")
                case {"kind": "error", "value": value}:
                    return Finished.failed(decode_error(value))
                case {"kind": "result", "value": value}:
                    return Finished.done(cast(T, decode(self._kind, value, "the result")))
                case _:
                    raise ValueError("there is no such kind")
        except ValueError as error:
            return self._unknown(f"the answer makes no sense: {error}")

    def _take_in_thread(self, line: bytes) -> None:
        # Here and not above: hardly anybody gets an answer that long.
        import threading

        def work() -> None:
            found = self._understood(line)
            if isinstance(found, Progress):
                found = self._unknown("the answer makes no sense: progress that long")
            self._decoded.append(found)
            os.eventfd_write(self._news, 1)

        # It is the last that comes. The thread holds on to this object, and so to the descriptor.
        self._epoll.unregister(self._connection)
        self._connection.close()
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._news, select.EPOLLIN)
        threading.Thread(target=work, name="answer", daemon=True).start()

    def _lost(self, why: str) -> None:
        self._finish(self._unknown(why))

    def _unknown(self, why: str) -> Finished[T]:
        hint = "whether it took place is not known; the log of the broker may tell"
        return Finished.failed(HostError(self._what, why, hint=hint))

    def _finish(self, outcome: Finished[T]) -> None:
        self._outcome = outcome
        if self._connection.fileno() >= 0:
            self._epoll.unregister(self._connection)
            self._connection.close()


def abandon(pid: int) -> None:
    """Have a child reaped that nobody waits for: it ends by itself."""
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
