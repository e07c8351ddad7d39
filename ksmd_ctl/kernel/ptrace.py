# SPDX-License-Identifier: GPL-2.0-or-later
"""One thread of another process, traced: ptrace(2) with PTRACE_SEIZE. Source: the man page, kernel/ptrace.c.

A thread that is seized is not stopped by that, gets no SIGSTOP, and goes on if its tracer ends, whatever of
(PTRACE_O_EXITKILL is never set). Signals that come while it is traced are passed on by whoever waits for it.

The Python package python-ptrace (0.9.9, Debian has the same or an older one) attaches by PTRACE_ATTACH, which sends a
SIGSTOP that a stopped process or its parent may see; it has neither PTRACE_SEIZE, PTRACE_INTERRUPT and
PTRACE_EVENT_STOP, without which a group-stop can't be told from a signal, nor PTRACE_O_SUSPEND_SECCOMP,
PTRACE_GET_RSEQ_CONFIGURATION and deadlines of waits; PTRACE_GETREGSET it has for general registers on aarch64 alone.
So it is not used.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.errors import Denied, HostError, NoSuchProcess, Rejected, TimedOut, errno_text
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.architecture import Registers, architecture

_PEEK_LENGTH: Final = 8
_CONT, _POKEDATA, _DETACH, _SYSCALL, _SETOPTIONS = 7, 5, 17, 24, 0x4200
_GETSIGINFO, _SETSIGINFO, _GETREGSET, _SETREGSET, _SEIZE, _INTERRUPT, _GETSIGMASK = *range(0x4202, 0x4208), 0x420A
_SECCOMP_GET_FILTER, _GET_RSEQ_CONFIGURATION, _GET_SYSCALL_USER_DISPATCH_CONFIG = 0x420C, 0x420F, 0x4211
_O_TRACESYSGOOD, _O_SUSPEND_SECCOMP = 1, 1 << 21
_EVENT_STOP = 128
_NT_PRSTATUS = 1
_SI_TKILL = -6
_WALL = 0x40000000
# Of struct ptrace_rseq_configuration and struct ptrace_sud_config (include/uapi/linux/ptrace.h).
_RSEQ_BYTES, _DISPATCH_BYTES = 24, 32
# Of siginfo_t, and of a set of signals as the kernel has it.
_SIGINFO_BYTES, _SIGMASK_BYTES = 128, 8
# The most instructions of one filter (BPF_MAXINSNS), of eight bytes each.
_FILTER_BYTES = 4096 * 8
# SIGCHLD may go to another thread of this process: so the state is looked at again after so long.
_LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a thread stopped.

    :ivar signal_to_deliver: a signal that is about to be delivered, else 0
    :ivar asked: it stopped as `Tracee.interrupt` asked, in a group-stop or outside of one
    :ivar syscall: it enters or leaves a system call
    """

    signal_to_deliver: int = 0
    asked: bool = False
    syscall: bool = False


def need_ptrace(what: str) -> None:
    """
    :param what: what it is for, for errors
    :raises Denied: this process may not make the system call at all
    """
    try:
        # There is no thread 0.
        syscalls.ptrace(_DETACH, 0)
    except OSError as error:
        if error.errno != errno.ESRCH:
            why = f"this program may not call ptrace(2): {errno_text(error.errno or 0)}"
            hint = (
                "the broker's unit allows it with SystemCallFilter=ptrace (docs/security.md); in a container its "
                "seccomp profile has to"
            )
            raise Denied(what, why, hint=hint, path="ptrace", errno=error.errno) from error


def sent_by_us(info: bytes) -> bool:
    """Whether `Tracee.send` has sent a signal that comes with this (siginfo_t)."""
    code, sender = struct.unpack_from("<i4xi", info, 8)
    # In a pid namespace of its own it is told no sender.
    return code == _SI_TKILL and sender in (0, os.getpid())


@contextmanager
def waiting() -> Iterator[None]:
    """Have SIGCHLD wait, so that `Tracee.wait` can wait for it with a deadline. For processes with one thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Tracee:
    """One thread that is traced. Only the thread that made this may use it.

    Every method raises `NoSuchProcess` where the thread has ended, or was replaced by execve(2) of another thread.
    """

    def __init__(self, tid: int) -> None:
        """
        :raises Denied: it may not be traced, or another process traces it
        """
        self.tid = tid
        self._names = architecture().registers
        self._format = struct.Struct(f"<{len(self._names)}Q")
        try:
            syscalls.ptrace(_SEIZE, tid, 0, _O_TRACESYSGOOD)
        except OSError as error:
            raise self._error("PTRACE_SEIZE", error) from error

    def interrupt(self) -> None:
        """Have it stop as soon as it can, wherever it is."""
        self._ptrace("PTRACE_INTERRUPT", _INTERRUPT)

    def suspend_seccomp(self) -> None:
        """Have its seccomp filters let everything pass while it is traced.

        :raises Denied: CAP_SYS_ADMIN is missing, or seccomp filters this process itself
        :raises Rejected: this kernel can't
        """
        self._ptrace("PTRACE_O_SUSPEND_SECCOMP", _SETOPTIONS, 0, _O_TRACESYSGOOD | _O_SUSPEND_SECCOMP)

    def wait(self, seconds: float) -> Stop:
        """Wait until it stops.

        :raises TimedOut: it does not
        """
        until = time.monotonic() + seconds
        options = os.WSTOPPED | os.WEXITED | os.WNOHANG | _WALL
        while True:
            try:
                # Not consumed: a signal of which its tracer was told would be lost if the tracer ended now.
                found = os.waitid(os.P_PID, self.tid, options | os.WNOWAIT)
                if found is not None and found.si_code != os.CLD_TRAPPED:
                    os.waitid(os.P_PID, self.tid, options)
                    raise self._gone()
            except ChildProcessError as error:
                raise self._gone() from error
            if found is not None:
                break
            left = until - time.monotonic()
            if left <= 0:
                raise TimedOut(f"stopping thread {self.tid}", f"it did not stop within {seconds:g} s")
            signal.sigtimedwait({signal.SIGCHLD}, min(left, _LOOK_SECONDS))
        number, event = found.si_status & 0xFF, found.si_status >> 8
        if event == _EVENT_STOP:
            return Stop(asked=True)
        if number == signal.SIGTRAP | 0x80:
            return Stop(syscall=True)
        # No other events are asked for.
        return Stop(number)

    def resume(self, number: int = 0, *, to_syscall: bool = False) -> None:
        """Let it run, until it enters or leaves a system call if so asked.

        :param number: the signal to deliver
        """
        self._ptrace("PTRACE_CONT", _SYSCALL if to_syscall else _CONT, 0, number)

    def detach(self, number: int = 0) -> None:
        """Let it go. It must be stopped; one of a process that is stopped is so again."""
        self._ptrace("PTRACE_DETACH", _DETACH, 0, number)

    def registers(self) -> Registers:
        """
        :raises Rejected: it is a 32-bit thread
        """
        memory = syscalls.buffer(self._format.size)
        try:
            found = syscalls.ptrace_regset(_GETREGSET, self.tid, _NT_PRSTATUS, memory)
        except OSError as error:
            raise self._error("PTRACE_GETREGSET", error) from error
        if found != self._format.size:
            why = "it is a 32-bit program"
            raise Rejected(f"thread {self.tid}", why, path="PTRACE_GETREGSET", value=found)
        return dict(zip(self._names, self._format.unpack(memory.raw), strict=True))

    def set_registers(self, registers: Registers) -> None:
        self.set_register_set(_NT_PRSTATUS, self._format.pack(*(registers[name] for name in self._names)))

    def register_set(self, kind: int, length: int) -> bytes:
        """Other registers (NT_*), or the first of them; zeroes where this machine has none of that kind."""
        memory = syscalls.buffer(length)
        try:
            syscalls.ptrace_regset(_GETREGSET, self.tid, kind, memory)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EINVAL, errno.ENODEV):
                return bytes(length)
            raise self._error("PTRACE_GETREGSET", error) from error
        return memory.raw

    def set_register_set(self, kind: int, content: bytes) -> None:
        memory = syscalls.buffer(len(content))
        memory.raw = content
        try:
            syscalls.ptrace_regset(_SETREGSET, self.tid, kind, memory)
        except OSError as error:
            raise self._error("PTRACE_SETREGSET", error) from error

    def blocked_signals(self) -> bytes:
        """Its signal mask as the kernel has it; outside of a call that has another one meanwhile."""
        memory = syscalls.buffer(_SIGMASK_BYTES)
        self._ptrace("PTRACE_GETSIGMASK", _GETSIGMASK, len(memory), memory)
        return memory.raw

    def signal_info(self) -> bytes:
        """What the signal that is about to be delivered comes with (siginfo_t)."""
        memory = syscalls.buffer(_SIGINFO_BYTES)
        self._ptrace("PTRACE_GETSIGINFO", _GETSIGINFO, 0, memory)
        return memory.raw

    def set_signal_info(self, content: bytes) -> None:
        self._ptrace("PTRACE_SETSIGINFO", _SETSIGINFO, 0, content)

    def send(self, pid: int, number: int) -> None:
        """Send it a signal.

        :param pid: its process
        """
        try:
            syscalls.tgkill(pid, self.tid, number)
        except OSError as error:
            raise self._error("tgkill", error) from error

    def store(self, address: int, content: bytes) -> None:
        """Write to its memory, also where it may not write itself: then the process gets a page of its own.

        :param content: whole words of eight bytes
        """
        for at in range(0, len(content), _PEEK_LENGTH):
            word = int.from_bytes(content[at : at + _PEEK_LENGTH], "little", signed=True)
            self._ptrace("PTRACE_POKEDATA", _POKEDATA, address + at, word)

    def filters(self) -> tuple[bytes, ...]:
        """Its seccomp filters as instructions of eight bytes (struct sock_filter), the newest first.

        :raises Denied, Rejected: as `suspend_seccomp`
        """
        found: list[bytes] = []
        memory = syscalls.buffer(_FILTER_BYTES)
        while True:
            try:
                count = syscalls.ptrace(_SECCOMP_GET_FILTER, self.tid, len(found), memory)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return tuple(found)
                raise self._error("PTRACE_SECCOMP_GET_FILTER", error) from error
            found.append(memory.raw[: count * 8])

    def restartable(self) -> int:
        """Where its struct rseq is (rseq(2)); 0 where it has none, or this kernel doesn't tell (before 5.13)."""
        found = self._configuration(_GET_RSEQ_CONFIGURATION, _RSEQ_BYTES)
        return int.from_bytes(found[:8], "little")

    def dispatches_calls(self) -> bool:
        """Its system calls are handed to itself (PR_SET_SYSCALL_USER_DISPATCH); unknown before 6.4."""
        return any(self._configuration(_GET_SYSCALL_USER_DISPATCH_CONFIG, _DISPATCH_BYTES)[:8])

    def _configuration(self, request: int, length: int) -> bytes:
        memory = syscalls.buffer(length)
        try:
            syscalls.ptrace(request, self.tid, length, memory)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EINVAL):
                return bytes(length)
            raise self._error("ptrace", error) from error
        return memory.raw

    def _ptrace(self, name: str, request: int, address: int = 0, data: syscalls.Data = 0) -> None:
        try:
            syscalls.ptrace(request, self.tid, address, data)
        except OSError as error:
            raise self._error(name, error) from error

    def _error(self, call: str, error: OSError) -> HostError:
        what, number = f"thread {self.tid}", error.errno or 0
        if number == errno.ESRCH:
            return self._gone()
        if number in (errno.EPERM, errno.EACCES):
            hint = "needs CAP_SYS_PTRACE, that nobody else traces it, and kernel.yama.ptrace_scope below 3"
            if call in ("PTRACE_O_SUSPEND_SECCOMP", "PTRACE_SECCOMP_GET_FILTER"):
                hint = (
                    "needs CAP_SYS_ADMIN, and a process that is not filtered by seccomp itself: root, not the service"
                )
            return Denied(what, f"{call}: {errno_text(number)}", hint=hint, path=call, errno=number)
        return Rejected(what, f"{call}: {errno_text(number)}", path=call, errno=number)

    def _gone(self) -> NoSuchProcess:
        why = "it ended, or executed another program, meanwhile"
        return NoSuchProcess(f"thread {self.tid}", why, errno=errno.ESRCH)
