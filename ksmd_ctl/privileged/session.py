# SPDX-License-Identifier: GPL-2.0-or-later
"""One connection of the broker: a request, the process that carries it out, its answer."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ksmd_ctl.codec import JSON, decode, decode_error, dump, encode, encode_error, load
from ksmd_ctl.errors import Busy, Cancelled, HostError, KsmdError, TimedOut, UsageError
from ksmd_ctl.host.memory import CONTENTS_PAUSE_SECONDS
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.privileged.requests import REQUESTS, Context, Request

T = TypeVar("T")

#: The longest request, and the longest packet of an answer.
MESSAGE_BYTES = 65536
#: What a client sends to have its request stopped.
CANCEL = dump({"kind": "cancel"})

_MAXIMUM_DEADLINE_SECONDS = 24 * 3600.0
_SEND_AGAIN_SECONDS = 0.1


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
        if document.keys() != {"kind", "request", "parameters", "deadline_seconds"}:
            raise ValueError("its keys are not kind, request, parameters, deadline_seconds")
        if document["kind"] != "request":
            raise ValueError("its kind is not request")
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


class Slots:
    """When a request may begin: at once, when another one has ended, or not at all.

    Writes of knobs need no slot, so that nothing that looks or moves memory can keep a knob from being put back. Of
    each knob there is one write at a time. All other requests share a number of slots. A process that nothing can end
    (uninterruptible sleep) gives its slot back; of those, too, there is a limit.

    :ivar left: requests whose process can't be ended, by its pidfd
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running: list[Request[Any]] = []
        self._stuck: dict[str, str] = {}
        self._contents_due = 0.0
        self.left: dict[int, Request[Any]] = {}

    def is_turn(self, request: Request[Any]) -> bool:
        """Whether no request of the same queue runs, or one of it runs for ever."""
        queue = request.queue
        return not queue or queue in self._stuck or all(one.queue != queue for one in self._running)

    def begin(self, request: Request[Any], uid: int) -> None:
        """Count a request as running; for one with a queue it is its turn.

        :param uid: of whom asks
        :raises Busy: it may not
        """
        if request.queue in self._stuck:
            why = f"an earlier write has not ended: {self._stuck[request.queue]}"
            raise Busy(request.description, why, hint="`ksmd-ctl doctor` tells what keeps ksmd")
        if not request.queue:
            self._need_slot(request)
            if request.compares_contents and uid != 0:
                self._need_pause(request)
        self._running.append(request)

    def _need_slot(self, request: Request[Any]) -> None:
        if sum(not one.queue for one in self._running) >= self._limits.children:
            raise Busy(request.description, "too many requests are being served", hint="try again")
        left = sum(not one.queue for one in self.left.values())
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
        """A request's process can't be ended.

        :param where: which process that is, and what becomes of it, as a phrase
        """
        self._running.remove(request)
        self.left[pidfd] = request
        if request.queue:
            self._stuck[request.queue] = where

    def ended(self, pidfd: int) -> None:
        """A process that could not be ended has ended."""
        self._stuck.pop(self.left.pop(pidfd).queue, None)


@dataclass(frozen=True, slots=True)
class Wait:
    """What a session waits for.

    :ivar until: it goes on then, by time.monotonic()
    :ivar descriptors: or when one of these gets readable
    :ivar turn: or when this holds
    """

    until: float
    descriptors: tuple[int, ...] = ()
    turn: Callable[[], bool] = lambda: False


#: Yields what it waits for, is sent the descriptors that are readable.
Waits = Generator[Wait, Set[int], T]


class Session:
    """One connection of a client.

    :param peer: who that is, for the log; empty for the process whose own broker this is: that says itself what failed
    """

    def __init__(
        self, connection: socket.socket, peer: str, uid: int, root: Path, limits: Limits, slots: Slots
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._peer = peer
        self._uid = uid
        self._root = root
        self._limits = limits
        self._slots = slots

    def serve(self, refusal: KsmdError | None = None) -> Waits[None]:
        """Serve it until its end. `Cancelled` that is thrown into it stops the request.

        :param refusal: answer with this and do nothing
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
                # A process that can't be ended has the connection, too.
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    def _request(self) -> Waits[None]:
        until = time.monotonic() + self._limits.request_seconds
        if not (yield Wait(until, (self._connection.fileno(),))):
            raise TimedOut("the request", f"none came for {self._limits.request_seconds:g} s")
        data = self._receive()
        if not data:
            return
        request, deadline_seconds = parse_request(data)
        if not request.blocks:
            yield from self._send({"kind": "result", "value": carried_out(request, Context(self._root, uid=self._uid))})
        else:
            until = time.monotonic() + deadline_seconds
            late = TimedOut(request.description, f"its deadline of {deadline_seconds:g} s passed")
            if not (yield from self._turn(request, until, deadline_seconds)):
                return
            self._slots.begin(request, self._uid)
            yield from self._supervise(request, until, late)
        self._log(6, f"{request.description}: done")

    def _log(self, level: int, text: str) -> None:
        """A line for the journal, which takes ``<N>`` as its level, sd-daemon(3)."""
        prefix = f"<{level}>" if "JOURNAL_STREAM" in os.environ else "ksmd-ctl-broker: " if level < 6 else ""
        if self._peer and prefix:
            sys.stderr.write(f"{prefix}{self._peer}: {text}\n")
            sys.stderr.flush()

    def _turn(self, request: Request[Any], until: float, deadline_seconds: float) -> Waits[bool]:
        """Wait until a request may begin; False if its client is gone."""
        while not self._slots.is_turn(request):
            if (yield Wait(until, (self._connection.fileno(),), lambda: self._slots.is_turn(request))):
                if self._receive() != CANCEL:
                    return False
                raise Cancelled(request.description, "it was cancelled")
            if time.monotonic() >= until:
                raise TimedOut(request.description, f"its turn did not come for {deadline_seconds:g} s")
        return True

    def _supervise(self, request: Request[Any], until: float, late: TimedOut) -> Waits[None]:
        """Have a process carry a request out, and see to its end.

        :raises KsmdError: it failed, or was stopped
        """
        try:
            worker = Worker(request, self._root, self._uid, self._connection, self._limits.request_seconds)
        except OSError as error:
            self._slots.end(request)
            why = f"no process can be started for it: {error}"
            raise HostError(request.description, why, errno=error.errno) from error
        stopped: KsmdError | None = None
        killed, hung_up = False, False
        while True:
            watched = (worker.pidfd,) if hung_up else (worker.pidfd, self._connection.fileno())
            cause: KsmdError | None = None
            try:
                ready = yield Wait(until, watched)
            except Cancelled as error:
                cause = Cancelled(request.description, error.why)
            else:
                if worker.pidfd in ready:
                    break
                if ready:
                    # Whoever talks out of turn isn't one of ours.
                    hung_up = self._receive() != CANCEL
                    cause = Cancelled(request.description, "its client is gone" if hung_up else "it was cancelled")
                elif stopped is None:
                    cause = late
                elif not killed:
                    killed = True
                    worker.kill(signal.SIGKILL)
                    until = time.monotonic() + self._limits.kill_seconds
                else:
                    where = f"process {worker.pid} can't be ended yet ({worker.abandon()}): {request.left_behind()}"
                    self._slots.leave(request, worker.pidfd, where)
                    raise type(stopped)(stopped.what, f"{stopped.why}{self._state(request)}; {where}")
            if cause is not None and stopped is None:
                stopped = cause
                worker.kill(signal.SIGTERM)
                until = time.monotonic() + self._limits.stop_seconds
        self._slots.end(request)
        status, given = worker.end()
        if status == 0:
            # It has sent its result itself.
            return
        if stopped is not None:
            said = f"; {given.why}" if given is not None and given.why else ""
            raise type(stopped)(stopped.what, f"{stopped.why}{self._state(request)}{said}")
        if given is not None:
            raise given
        how = signal.strsignal(-status) or status if status < 0 else f"status {status}"
        raise HostError(request.description, f"its process ended with {how}{self._state(request)}")

    def _state(self, request: Request[Any]) -> str:
        state = request.state(self._root)
        return f"; {state}" if state else ""

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(MESSAGE_BYTES + 1)
        except OSError:
            return b""

    def _send(self, document: JSON) -> Waits[None]:
        """Send an answer, unless nobody reads it."""
        data, until = dump(document), time.monotonic() + self._limits.request_seconds
        while data and time.monotonic() < until:
            try:
                data = data[self._connection.send(data[:MESSAGE_BYTES]) :]
            except BlockingIOError:
                yield Wait(time.monotonic() + _SEND_AGAIN_SECONDS)
            except OSError:
                return


def carried_out(request: Request[Any], context: Context) -> JSON:
    """Carry a request out in this process: the document of its result.

    :raises KsmdError: it failed
    """
    try:
        return encode(request.run(context))
    except KsmdError:
        raise
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        why = f"{type(error).__name__}: {error}"
        hint = "this is a defect of ksmd-ctl; its log has the traceback"
        raise KsmdError(request.description, why, hint=hint) from error


class Worker:
    """A process that carries out one request, forked by the broker, and gone with it.

    The broker is a small program with one thread, so forking is safe there; the service, which has threads and an
    event loop, never forks. Progress and a result go to the client at once; an error is for the session to complete.

    :ivar pidfd: gets readable when it has ended
    """

    def __init__(
        self, request: Request[Any], root: Path, uid: int, connection: socket.socket, send_seconds: float
    ) -> None:
        self._error = os.memfd_create("error")
        parent = os.getpid()
        sys.stderr.flush()
        # Until the child has its own handler, SIGTERM waits: the broker's would swallow it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._carry_out(request, root, uid, connection, send_seconds, parent)
        except OSError:
            os.close(self._error)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pidfd = os.pidfd_open(self.pid)

    def _carry_out(
        self, request: Request[Any], root: Path, uid: int, connection: socket.socket, send_seconds: float, parent: int
    ) -> NoReturn:
        status = 1
        try:
            _end_with(parent)
            forget_handlers(signal.SIGTERM)
            # Other sessions are the broker's: nothing of them is finalised here.
            gc.freeze()
            first, second = sorted((connection.fileno(), self._error))
            for start, end in ((3, first), (first + 1, second), (second + 1, os.sysconf("SC_OPEN_MAX"))):
                os.closerange(start, end)
            # Whatever stood in for stderr may have had a descriptor of its own, closed now.
            sys.stderr = sys.__stderr__ or sys.stderr

            def report(progress: Progress) -> None:
                try:
                    connection.send(dump({"kind": "progress", "value": encode(progress)}))
                except OSError:
                    # A client that doesn't read misses some; of one that is gone the session knows.
                    pass

            # Here and not above, as all that the broker itself doesn't need.
            from ksmd_ctl.kernel.reading import killable_reads

            context = Context(root, report, uid)
            signal.signal(signal.SIGTERM, context.stop)
            try:
                try:
                    signal.pthread_sigmask(signal.SIG_SETMASK, ())
                    with killable_reads() if request.reads_others else nullcontext():
                        answer = dump({"kind": "result", "value": carried_out(request, context)})
                finally:
                    # From here on nothing may tear the answer apart.
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
            except KsmdError as error:
                os.write(self._error, dump(encode_error(error)))
            else:
                status = 0
                _send_all(connection, answer, send_seconds)
        finally:
            sys.stderr.flush()
            os._exit(status)

    def kill(self, number: signal.Signals) -> None:
        """Send it a signal. Until it is reaped its pid is its own."""
        os.kill(self.pid, number)

    def end(self) -> tuple[int, KsmdError | None]:
        """Reap it: its exit status (0: the result is sent; negative: a signal), and the error that it gave."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        size = os.fstat(self._error).st_size
        try:
            error = decode_error(load(os.pread(self._error, size, 0))) if size else None
        except ValueError:
            # It was killed while it wrote.
            error = None
        os.close(self.pidfd)
        os.close(self._error)
        return status, error

    def abandon(self) -> str:
        """It does not end: its state, for people: ``state D in ksm_migrate_page``. Its pidfd stays open."""
        os.close(self._error)
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0]
            wchan = Path(f"/proc/{self.pid}/wchan").read_text("ascii", "replace").strip("0 \n")
        except (OSError, IndexError):
            return "state unknown"
        return f"state {stat}{f' in {wchan}' if wchan else ''}"


def _send_all(connection: socket.socket, data: bytes, timeout_seconds: float) -> None:
    connection.settimeout(timeout_seconds)
    try:
        for start in range(0, len(data), MESSAGE_BYTES):
            connection.send(data[start : start + MESSAGE_BYTES])
    except OSError:
        # The client is gone, or doesn't read.
        pass


def forget_handlers(*kept: signal.Signals) -> None:
    """In a fork: give up what the parent does on signals, but for some; SIGPIPE stays an error of the write."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, *kept}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, prctl(2)."""
    # Here and not above: only a child that does something pays for ctypes, never the broker that waits.
    from ksmd_ctl.kernel import syscalls

    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
