# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions that have a thread make a system call and restore itself, and where they lie. x86-64.

`ksmd_ctl.kernel.injection` says why they are as they are.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from pathlib import Path
from typing import Final

from ksmd_ctl.kernel.proc_pid import process_file_error, read_process_bytes
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ptrace import Registers

#: A system call: its number, and up to six arguments.
Call = tuple[int, ...]

# What system calls change (rax, rcx, r11) and their arguments, with the bytes of `mov disp32(%rip), register`.
_LOADED: Final = {
    "rax": b"\x48\x8b\x05",
    "rcx": b"\x48\x8b\x0d",
    "r11": b"\x4c\x8b\x1d",
    "rdi": b"\x48\x8b\x3d",
    "rsi": b"\x48\x8b\x35",
    "rdx": b"\x48\x8b\x15",
    "r10": b"\x4c\x8b\x15",
    "r8": b"\x4c\x8b\x05",
    "r9": b"\x4c\x8b\x0d",
}
_ARGUMENTS: Final = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
SYSCALL, _JUMP = b"\x0f\x05", b"\xff\x25"
_OFFSET_BYTES: Final = 4
CODE_BYTES: Final = 72
SLOT_BYTES: Final = 192
# The end of a slot says whose it is.
MARK: Final = b"ksmd-ctl"
MARK_AT: Final = SLOT_BYTES - 16

NO_CALL: Final = (1 << 64) - 1
RESTARTED, _RESTART_BLOCK = frozenset({-512, -513, -514}), -516
_RESTART_SYSCALL, _X32_BIT = 219, 1 << 30

_AT_SYSINFO_EHDR: Final = 33
_MOST_PAGES: Final = 16
# Calls that end with EINTR when their thread is stopped, also where no signal comes (signal(7), "Interruption of system
# calls and library functions by stop signals"), by their numbers on x86-64: read, write, readv, writev and those of
# sockets with a timeout, semop, semtimedop, rt_sigtimedwait, epoll_wait, epoll_pwait, epoll_pwait2, io_getevents,
# io_pgetevents, io_uring_enter. With EINTR they have done nothing yet.
_ENDED_BY_STOPS: Final = frozenset(
    {0, 1, 19, 20, 43, 44, 45, 46, 47, 288, 299, 307, 65, 220, 128, 232, 281, 441, 208, 333, 426}
)
# As much of a stack as is searched for a signal's frame.
_STACK_BYTES: Final = 1 << 20
# Of include/uapi/linux/rseq.h: where struct rseq has rseq_cs, and struct rseq_cs.
_SEQUENCE_AT: Final = 8
_CRITICAL_SECTION: Final = struct.Struct("<IIQQQ")


def restarted(found: Registers) -> Registers:
    """Registers with which a thread goes on from a stop, as the kernel makes them where no signal is delivered.

    Source: arch/x86/kernel/signal.c:arch_do_signal_or_restart.
    """
    result = {**found, "orig_rax": NO_CALL}
    if signed(found["orig_rax"]) == -1:
        return result
    code = signed(found["rax"])
    if code in RESTARTED:
        return _calls_again(found, found["orig_rax"])
    if code == _RESTART_BLOCK:
        return _calls_again(found, _RESTART_SYSCALL | found["orig_rax"] & _X32_BIT)
    return result


def made_again(found: Registers) -> Registers | None:
    """Registers with which a thread makes the call again that a stop has ended; None where it has ended none."""
    if found["orig_rax"] not in _ENDED_BY_STOPS or signed(found["rax"]) != -errno.EINTR:
        return None
    return _calls_again(found, found["orig_rax"])


def _calls_again(found: Registers, number: int) -> Registers:
    """Registers with which a thread makes a call, from its instruction on."""
    return {**found, "rax": number, "orig_rax": NO_CALL, "rip": found["rip"] - len(SYSCALL)}


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def slot(registers: Registers, tid: int) -> bytes:
    """Instructions that make a system call and then restore these registers; they may lie anywhere."""
    code, data = bytearray(SYSCALL), bytearray()
    for name, instruction in (*_LOADED.items(), ("rip", _JUMP)):
        code += instruction
        code += (CODE_BYTES + len(data) - len(code) - _OFFSET_BYTES).to_bytes(_OFFSET_BYTES, "little", signed=True)
        data += registers[name].to_bytes(8, "little")
    whole = bytes(code).ljust(CODE_BYTES, b"\xcc") + bytes(data)
    return whole.ljust(MARK_AT, b"\0") + MARK + tid.to_bytes(8, "little")


class Memory:
    """Another process's memory, for reading."""

    def __init__(self, pid: int, tid: int, root: Path) -> None:
        self._pid = pid
        # Where the first thread has ended, the process has no memory by its own file.
        self._path = root / "proc" / str(pid) / "task" / str(tid) / "mem"
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise process_file_error(pid, self._path, error) from error

    def read(self, address: int, length: int) -> bytes:
        """What is there; empty where nothing is mapped."""
        try:
            return os.pread(self._descriptor, length, address)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EFAULT):
                return b""
            raise process_file_error(self._pid, self._path, error) from error
        except OverflowError:
            return b""

    def close(self) -> None:
        os.close(self._descriptor)


def vdso_tail(pid: int, tid: int, memory: Memory, root: Path = Path("/")) -> tuple[int, int]:
    """Where the vDSO's last page has nothing of it any more: (start, end); of no length where there is none.

    The vDSO is an ELF image, followed by zeroes up to a whole page (arch/x86/entry/vdso/vdso2c.c).
    """
    auxiliary = read_process_bytes(pid, f"task/{tid}/auxv", root)
    words = struct.unpack(f"<{len(auxiliary) // 16 * 2}Q", auxiliary[: len(auxiliary) // 16 * 16])
    base = dict(zip(words[::2], words[1::2], strict=True)).get(_AT_SYSINFO_EHDR, 0)
    header = memory.read(base, 64) if base else b""
    if header[:5] != b"\x7fELF\x02":
        return 0, 0
    segments_at, sections_at = struct.unpack_from("<QQ", header, 32)
    segment_bytes, segments, section_bytes, sections = struct.unpack_from("<4H", header, 54)
    ends = [sections_at + section_bytes * sections]
    for number in range(segments):
        segment = memory.read(base + segments_at + number * segment_bytes, 56)
        if len(segment) == 56 and segment[:4] == b"\x01\0\0\0":
            offset, _, _, size = struct.unpack_from("<4Q", segment, 8)
            ends.append(offset + size)
    end = max(ends)
    if not 0 < end <= _MOST_PAGES * PAGE_SIZE:
        return 0, 0
    return base + -(-end // 16) * 16, base + -(-end // PAGE_SIZE) * PAGE_SIZE


def arguments(call: Call) -> Registers:
    return dict(zip(_ARGUMENTS, (*call[1:], 0, 0, 0, 0, 0, 0), strict=False))


def in_sequence(memory: Memory, sequences: int, at: int) -> bool:
    """Whether an instruction is in a restartable sequence (rseq(2)).

    :param sequences: where the thread's struct rseq is
    """
    section = int.from_bytes(memory.read(sequences + _SEQUENCE_AT, 8), "little")
    data = memory.read(section, _CRITICAL_SECTION.size) if section else b""
    if len(data) != _CRITICAL_SECTION.size:
        return False
    _, _, first, length, _ = _CRITICAL_SECTION.unpack(data)
    return bool(first <= at < first + length)


def free_slot(memory: Memory, tail: tuple[int, int], stack: int, tid: int, others: frozenset[int]) -> int:
    """A place for the instructions that nobody is in, or returns to; 0 where there is none.

    :param tail: where they may lie
    :param stack: the stack pointer of the thread, `tid`, which is stopped elsewhere
    :param others: the process's other threads
    """
    start, end = tail
    left = []
    for at in range(end - SLOT_BYTES, start - 1, -SLOT_BYTES) if start else ():
        content = memory.read(at, SLOT_BYTES)
        if content == bytes(SLOT_BYTES):
            return at
        if content[MARK_AT:][:8] == MARK and int.from_bytes(content[MARK_AT + 8 :], "little") not in others:
            left.append(at)
    # Left by somebody who was killed. This thread is stopped elsewhere, but may be in a signal's handler that came
    # upon it there, and returns.
    words = array("Q", memory.read(stack & ~7, _STACK_BYTES)) if left else ()
    return next((at for at in left if not any(at <= word < at + CODE_BYTES for word in words)), 0)
