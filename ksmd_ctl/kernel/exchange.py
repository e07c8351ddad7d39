# SPDX-License-Identifier: GPL-2.0-or-later
"""One connection of the broker: a request, the child that carries it out, its answer."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ksmd_ctl.codec import JSON, decode, decode_error, dump, encode_error, load
from ksmd_ctl.errors import Busy, Cancelled, HostError, KsmdError, TimedOut, UsageError
from ksmd_ctl.kernel.requests import REQUESTS, Request
from ksmd_ctl.kernel.slots import Slots, stuck
from ksmd_ctl.kernel.worker import Worker

__all__ = ["MESSAGE_BYTES", "Exchange", "Limits", "Loop", "parse_request"]

#: The longest request, and the longest packet of an answer.
MESSAGE_BYTES = 65536

_MAXIMUM_DEADLINE_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What nobody can make the broker exceed.

    :ivar children: requests at a time, writes of knobs not counted
    :ivar left_behind: processes that nothing can end, writes of knobs not counted
    :ivar connections: connections at a time, those without a request among them; root may have as many again
    :ivar request_seconds: how long a connection may stay silent, or leave an answer unread
    :ivar idle_seconds: with nothing to do for so long it ends
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
        deadline = decode(float, document["deadline_seconds"], "deadline_seconds")
        if not 0 < deadline <= _MAXIMUM_DEADLINE_SECONDS:
            raise ValueError(f"deadline_seconds is not between 0 and {_MAXIMUM_DEADLINE_SECONDS:g}")
        request = decode(kind, document["parameters"], "parameters")
        request.check()
        return request, deadline
    except (ValueError, OverflowError) as error:
        raise UsageError("reading a request", str(error)) from error


class Loop(Protocol):
    """What an exchange needs of the loop that it is part of."""

    root: Path
    limits: Limits
    slots: Slots

    def watch(self, descriptor: int, mask: int, handler: Callable[[], object]) -> None:
        """Call a handler when a descriptor is ready."""

    def unwatch(self, descriptor: int) -> None:
        """Forget about a descriptor."""


class Exchange:
    """One connection: a request, the child that serves it, its answer.

    :ivar until: when `expire` is due
    :ivar over: nothing is left of it
    """

    def __init__(self, broker: Loop, connection: socket.socket, peer: str, uid: int) -> None:
        connection.setblocking(False)
        self._uid = uid
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
        self._deaf = False
        self.over = False
        self.until = time.monotonic() + broker.limits.request_seconds
        broker.watch(connection.fileno(), select.POLLIN, self._on_connection)

    def refuse(self, error: KsmdError) -> None:
        """Answer with an error and end."""
        _log(4, f"{self._peer}: refused: {error}")
        self._end({"error": encode_error(error)})

    def stop(self) -> None:
        """The broker is to end."""
        cause = Cancelled(self._description, "the broker is being stopped")
        if self._worker is not None:
            self._stop(cause)
        elif not self._ending:
            self.refuse(cause)

    def expire(self) -> None:
        """`until` has come."""
        if self._ending:
            self._close()
        elif self._request is not None and self._worker is None:
            self.refuse(TimedOut(self._description, f"its turn did not come for {self._deadline_seconds:g} s"))
        elif self._worker is None:
            self.refuse(TimedOut("the request", f"none came for {self._broker.limits.request_seconds:g} s"))
        elif self._stopped is None:
            self._stop(TimedOut(self._description, f"its deadline of {self._deadline_seconds:g} s passed"))
        elif not self._killed:
            self._killed = True
            self.until = time.monotonic() + self._broker.limits.kill_seconds
            self._worker.kill(signal.SIGKILL)
        else:
            self._leave_behind(self._worker)

    @property
    def _description(self) -> str:
        return self._request.description if self._request else "the request"

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
        if self._request is None and data:
            try:
                request, deadline = parse_request(data)
            except UsageError as error:
                self.refuse(error)
                return
            self._start(request, deadline)
        elif data == dump({"cancel": True}):
            cause = Cancelled(self._description, "it was cancelled")
            if self._worker is not None:
                self._stop(cause)
            else:
                self.refuse(cause)
        elif self._worker is not None:
            # Hung up, or talks out of turn: then it isn't one of ours.
            self._deaf = True
            self._broker.unwatch(self._connection.fileno())
            self._stop(Cancelled(self._description, "its client is gone"))
        else:
            self._close()

    def _start(self, request: Request[Any], deadline_seconds: float) -> None:
        self._request, self._deadline_seconds = request, deadline_seconds
        self.until = time.monotonic() + deadline_seconds
        try:
            now = self._broker.slots.enter(request, self._uid, self._begin, self._refuse_stuck)
        except Busy as error:
            self.refuse(error)
            return
        if now:
            self._begin()

    def _begin(self) -> None:
        """It is this one's turn."""
        request = self._request
        assert request is not None
        try:
            self._worker = Worker(request, self._broker.root, self._uid)
        except OSError as error:
            self._broker.slots.leave(request)
            self.refuse(HostError(self._description, f"no child can be started: {error}", errno=error.errno))
            return
        self._broker.watch(self._worker.pipe, select.POLLIN, self._hear)
        self._broker.watch(self._worker.pidfd, select.POLLIN, self._on_exit)

    def _refuse_stuck(self, where: str) -> None:
        assert self._request is not None
        self.refuse(stuck(self._request, where))

    def _stop(self, cause: KsmdError) -> None:
        assert self._worker is not None
        if self._stopped is None:
            self._stopped = cause
            self.until = time.monotonic() + self._broker.limits.stop_seconds
            self._worker.kill(signal.SIGTERM)

    def _hear(self) -> bool:
        """Take in what the child says; progress goes on to the client at once. False if there was nothing."""
        assert self._worker is not None
        try:
            data = os.read(self._worker.pipe, MESSAGE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._broker.unwatch(self._worker.pipe)
            return False
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
        return True

    def _on_exit(self) -> None:
        worker = self._worker
        assert worker is not None
        status = worker.reap()
        if status is None:
            return
        while self._hear():
            pass
        self._release(worker)
        assert self._request is not None
        self._broker.slots.leave(self._request)
        if self._stopped is not None and not self._final.startswith(b'{"result":'):
            self._end_stopped(self._last_words())
        elif self._final:
            _log(6, f"{self._peer}: {self._outcome()}")
            self._end(self._final)
        else:
            code = os.waitstatus_to_exitcode(status)
            why = f"its process ended with {signal.strsignal(-code) or -code if code < 0 else f'status {code}'}"
            self._end_with(HostError(self._description, f"{why}{self._state()}"))

    def _leave_behind(self, worker: Worker) -> None:
        """Answer although the child is still there: nothing ends a process in uninterruptible sleep."""
        request, slots = self._request, self._broker.slots
        assert request is not None
        where = f"process {worker.pid} can't be ended yet ({worker.whereabouts()}): {request.left_behind()}"
        self._release(worker, keep_pidfd=True)

        def reap() -> None:
            if worker.reap() is not None:
                self._broker.unwatch(worker.pidfd)
                os.close(worker.pidfd)
                slots.ended(request)

        self._broker.watch(worker.pidfd, select.POLLIN, reap)
        slots.leave_behind(request, where)
        self._end_stopped(f"; {where}")

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

    def _outcome(self) -> str:
        """What came of the request, for the log."""
        document = load(self._final)
        if isinstance(document, dict) and "error" in document:
            return f"{self._description}: failed: {decode_error(document['error'])}"
        return f"{self._description}: done"

    def _last_words(self) -> str:
        """How far the child says that it was when it was stopped."""
        document = load(self._final) if self._final else None
        why = decode_error(document["error"]).why if isinstance(document, dict) else ""
        return f"; {why}" if why else ""

    def _end_stopped(self, more: str) -> None:
        assert self._stopped is not None
        self._end_with(type(self._stopped)(self._stopped.what, f"{self._stopped.why}{self._state()}{more}"))

    def _end_with(self, error: KsmdError) -> None:
        _log(4, f"{self._peer}: {error}")
        self._end({"error": encode_error(error)})

    def _end(self, answer: JSON | bytes) -> None:
        self._withdraw()
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
            mask = select.POLLOUT if self._ending or self._deaf else select.POLLOUT | select.POLLIN
            self._broker.watch(self._connection.fileno(), mask, self._on_connection)
            return
        except OSError:
            # The client is gone. While its child runs, reading says so too.
            self._unsent.clear()
        if self._ending:
            self._close()
        elif not self._deaf:
            self._broker.watch(self._connection.fileno(), select.POLLIN, self._on_connection)

    def _withdraw(self) -> None:
        if self._request is not None and self._worker is None:
            self._broker.slots.withdraw(self._request, self._begin)

    def _close(self) -> None:
        self._withdraw()
        self._broker.unwatch(self._connection.fileno())
        self._connection.close()
        self.over = True


def _log(level: int, text: str) -> None:
    """A line for the journal, which takes ``<N>`` as its level, sd-daemon(3)."""
    prefix = f"<{level}>" if "JOURNAL_STREAM" in os.environ else "ksmd-ctl-broker: " if level < 6 else ""
    if prefix:
        sys.stderr.write(f"{prefix}{text}\n")
        sys.stderr.flush()
