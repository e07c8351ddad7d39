# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that carries out one request, forked by the broker, and gone with it.

The broker is a small program with one thread, so forking is safe there; the daemon, which has threads and an event
loop, never forks.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from ksmd_ctl.codec import JSON, dump, encode, encode_error
from ksmd_ctl.errors import Cancelled, KsmdError
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel.requests import Context, Request

__all__ = ["Worker", "forget_handlers"]


class Worker:
    """A running child.

    :param uid: of whom asks
    :ivar pid: its process
    :ivar pidfd: gets readable when it has ended
    :ivar pipe: what it says, a JSON document a line: progress, then a result or an error
    """

    __slots__ = ("pid", "pidfd", "pipe")

    def __init__(self, request: Request[Any], root: Path, uid: int) -> None:
        self.pipe, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writer, True)
        parent = os.getpid()
        sys.stderr.flush()
        # Until the child has its own handler, SIGTERM waits: the broker's would swallow it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _child(request, root, uid, writer, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writer)
        self.pidfd = os.pidfd_open(self.pid)

    def kill(self, number: signal.Signals) -> None:
        """Send it a signal. Until it is reaped its pid is its own."""
        os.kill(self.pid, number)

    def reap(self) -> int | None:
        """Its wait status, None while it lives."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return status if pid else None

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self.pipe)
        os.close(self.pidfd)

    def whereabouts(self) -> str:
        """The state of a process that does not end, for people: ``state D in ksm_migrate_page``."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0]
            wchan = Path(f"/proc/{self.pid}/wchan").read_text("ascii", "replace").strip("0 \n")
        except (OSError, IndexError):
            return "state unknown"
        return f"state {stat}{f' in {wchan}' if wchan else ''}"


def _child(request: Request[Any], root: Path, uid: int, pipe: int, parent: int) -> NoReturn:
    status = 1
    try:
        _end_with(parent)
        forget_handlers(signal.SIGTERM)
        os.closerange(3, pipe)
        os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))
        # Whatever stood in for stderr may have had a descriptor of its own, closed now.
        sys.stderr = sys.__stderr__ or sys.stderr

        def tell(progress: Progress) -> None:
            _say(pipe, {"progress": encode(progress)})

        # Here and not above, as all that the broker itself doesn't need.
        from ksmd_ctl.kernel.reading import killable_reads

        context = Context(root, tell, uid)
        signal.signal(signal.SIGTERM, context.stop)
        answer: JSON = None
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            try:
                with killable_reads() if request.reads_others else nullcontext():
                    result = request.run(context)
                answer = {"result": encode(result)}
            except KsmdError as error:
                answer = {"error": encode_error(error)}
            # From here on nothing may tear the answer apart.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        except Cancelled as error:
            answer = answer or {"error": encode_error(error)}
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            why = f"{type(error).__name__}: {error}"
            hint = "this is a defect of ksmd-ctl; its log has the traceback"
            answer = {"error": encode_error(KsmdError(request.description, why, hint=hint))}
        _say(pipe, answer)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def forget_handlers(*kept: signal.Signals) -> None:
    """In a fork: give up what the parent does on signals, but for some; SIGPIPE stays an error of the write."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, *kept}:
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)


def _say(pipe: int, document: JSON) -> None:
    data = memoryview(dump(document))
    while data:
        data = data[os.write(pipe, data) :]


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, prctl(2)."""
    # Here and not above: only a child that does something pays for ctypes, never the broker that waits.
    from ksmd_ctl.kernel import syscalls

    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
