# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that carries out one request of the broker."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from ksmd_ctl.codec import JSON, decode_error, dump, encode, encode_error, load
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.privileged.requests import PACKET_BYTES, Context, Request


def carried_out(request: Request[Any], context: Context) -> dict[str, JSON]:
    """Carry a request out in this process: its answer.

    :raises KsmdError: it failed
    """
    try:
        result = encode(request.run(context))
    except KsmdError:
        raise
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        why = f"{type(error).__name__}: {error}"
        hint = "this is a defect of ksmd-ctl; its log has the traceback"
        raise KsmdError(request.description, why, hint=hint) from error
    return {"kind": "result", "value": result}


class Worker:
    """A process that carries out one request. It is a fork of the broker, and killed when the broker ends.

    The broker has one thread, so it may fork; the service has several and never forks. The process sends progress and
    a result to the client itself. It gives an error to the session, which adds the state that was left.

    :ivar pidfd: is readable when the process has ended
    """

    def __init__(self, request: Request[Any], context: Context, connection: socket.socket, send_seconds: float) -> None:
        self._error = os.memfd_create("error")
        parent = os.getpid()
        sys.stderr.flush()
        # Block SIGTERM until the child has its own handler: the broker's does nothing.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._run(request, context, connection, send_seconds, parent)
        except OSError:
            os.close(self._error)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pidfd = os.pidfd_open(self.pid)

    def _run(
        self, request: Request[Any], context: Context, connection: socket.socket, send_seconds: float, parent: int
    ) -> NoReturn:
        status = 1
        try:
            _end_with(parent)
            forget_handlers(signal.SIGTERM)
            # The objects of other sessions must not be finalised here.
            gc.freeze()
            first, second = sorted((connection.fileno(), self._error))
            for start, end in ((3, first), (first + 1, second), (second + 1, os.sysconf("SC_OPEN_MAX"))):
                os.closerange(start, end)
            # sys.stderr may have been an object with a descriptor that is closed now.
            sys.stderr = sys.__stderr__ or sys.stderr
            try:
                answer = _interruptible(request, context)
            except KsmdError as error:
                os.write(self._error, dump(encode_error(error)))
            else:
                status = 0
                _send_all(connection, answer, send_seconds)
        finally:
            sys.stderr.flush()
            os._exit(status)

    def kill(self, number: signal.Signals) -> None:
        """Send the process a signal. It has not been reaped, so its pid is not reused."""
        os.kill(self.pid, number)

    def end(self) -> tuple[int, KsmdError | None]:
        """Reap the process: its exit status (0: the result is sent; negative: a signal), and its error."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        size = os.fstat(self._error).st_size
        try:
            error = decode_error(load(os.pread(self._error, size, 0))) if size else None
        except ValueError:
            # The process was killed while it wrote.
            error = None
        os.close(self.pidfd)
        os.close(self._error)
        return status, error

    def abandon(self) -> str:
        """Give up on the process: its state as a phrase, ``state D in ksm_migrate_page``. Its pidfd stays open."""
        os.close(self._error)
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0]
            wchan = Path(f"/proc/{self.pid}/wchan").read_text("ascii", "replace").strip("0 \n")
        except (OSError, IndexError):
            return "state unknown"
        return f"state {stat}{f' in {wchan}' if wchan else ''}"


def _interruptible(request: Request[Any], context: Context) -> bytes:
    """Carry a request out until SIGTERM: its answer."""
    # Imported here, because the broker itself does not need it.
    from ksmd_ctl.kernel.reading import killable_reads

    signal.signal(signal.SIGTERM, context.stop)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Other processes whose files it reads may hold nothing up.
        with killable_reads():
            return dump(carried_out(request, context))
    finally:
        # From here on the answer must not be interrupted.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _send_all(connection: socket.socket, data: bytes, timeout_seconds: float) -> None:
    connection.settimeout(timeout_seconds)
    try:
        for start in range(0, len(data), PACKET_BYTES):
            connection.send(data[start : start + PACKET_BYTES])
    except OSError:
        # The client is gone, or doesn't read.
        pass


def forget_handlers(*kept: signal.Signals) -> None:
    """In a fork: restore the default action of signals, but for some; SIGPIPE stays an error of the write."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, *kept}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, prctl(2)."""
    # Imported here, because it loads ctypes, which the broker does not need.
    from ksmd_ctl.kernel import syscalls

    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
