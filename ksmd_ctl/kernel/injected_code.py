# SPDX-License-Identifier: GPL-2.0-or-later
"""Where instructions lie that have a thread make a system call and restore itself, and what is asked of them.

`ksmd_ctl.kernel.injection` says why they are as they are; `ksmd_ctl.kernel.x86_64` and `ksmd_ctl.kernel.aarch64` have
them.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from ksmd_ctl.kernel.architecture import Architecture, Call, Registers
from ksmd_ctl.kernel.proc_pid import process_file_error, read_process_bytes
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ptrace import Tracee

# The end of a slot says whose it is.
MARK: Final = b"ksmd-ctl"
MARK_BYTES: Final = 16

#: Results of calls that are to be made again, which only a tracer sees (include/linux/errno.h).
RESTARTED: Final = frozenset({-512, -513, -514})

_AT_SYSINFO_EHDR: Final = 33
_MOST_PAGES: Final = 16
# As much of a stack as is searched for a signal's frame.
_STACK_BYTES: Final = 1 << 20
# Of include/uapi/linux/rseq.h: where struct rseq has rseq_cs, and struct rseq_cs.
_SEQUENCE_AT: Final = 8
_CRITICAL_SECTION: Final = struct.Struct("<IIQQQ")


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def marked(content: bytes, length: int, tid: int) -> bytes:
    """A slot: instructions and what they load, and at its end whose it is."""
    return content.ljust(length - MARK_BYTES, b"\0") + MARK + tid.to_bytes(8, "little")


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
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


class Code(Protocol):
    """The instructions of one kind of processor.

    :ivar slot_bytes: how much room they take, with what they load
    :ivar code_bytes: how much of that are instructions
    :ivar result: the register that has the result of a call
    """

    @property
    def architecture(self) -> Architecture: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def code_bytes(self) -> int: ...
    @property
    def result(self) -> str: ...

    def call_of(self, pid: int, tid: int, root: Path) -> str:
        """What `made_again` has to know of a thread that is about to be stopped."""

    def made_again(self, found: Registers, call: str) -> Registers | None:
        """Registers with which a thread makes the call again that a stop has ended; None where it has ended none."""

    def undecided(self, found: Registers) -> bool:
        """Whether registers of a thread that is about to make a call tell that only once it has entered it."""

    def enters_again(self, memory: Memory, saved: Registers, *, ended: bool) -> bool:
        """Whether a thread that gets its registers back has to enter its call before it is let go.

        :param ended: the call is one that its stop has ended
        """

    def obstacle(
        self,
        tracee: Tracee,
        memory: Memory,
        found: Registers,
        tail: tuple[int, int],
        permits: Callable[[int], bool],
    ) -> str:
        """Why a thread has to go on for a moment first; empty for no reason.

        :param tail: where the instructions may lie
        :param permits: whether its seccomp filters permit a call, by its number
        """

    def slot(self, tracee: Tracee, found: Registers, place: int) -> bytes:
        """What is to be stored there, so that the thread goes on with what was found of it."""

    def entering(self, saved: Registers, call: Call, place: int) -> Registers:
        """Registers with which it makes a call there."""

    def replace(self, tracee: Tracee, found: Registers, call: Call) -> None:
        """Have a thread that enters a call make another one."""


def vdso_tail(pid: int, tid: int, memory: Memory, root: Path = Path("/")) -> tuple[int, int]:
    """Where the vDSO's last page has nothing of it any more: (start, end); of no length where there is none.

    The vDSO is an ELF image, followed by zeroes up to a whole page (arch/x86/entry/vdso/vdso2c.c,
    arch/arm64/kernel/vdso-wrap.S).
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


def free_slot(
    memory: Memory,
    tail: tuple[int, int],
    stack: int,
    tid: int,
    others: frozenset[int],
    slot_bytes: int,
    code_bytes: int,
) -> int:
    """A place for the instructions that nobody is in, or returns to; 0 where there is none.

    :param tail: where they may lie
    :param stack: the stack pointer of the thread, `tid`, which is stopped elsewhere
    :param others: the process's other threads
    """
    start, end = tail
    left = []
    for at in range(end - slot_bytes, start - 1, -slot_bytes) if start else ():
        content = memory.read(at, slot_bytes)
        if content == bytes(slot_bytes):
            return at
        mark = content[slot_bytes - MARK_BYTES :]
        if mark[:8] == MARK and int.from_bytes(mark[8:], "little") not in others:
            left.append(at)
    # Left by somebody who was killed. This thread is stopped elsewhere, but may be in a signal's handler that came
    # upon it there, and returns.
    words = array("Q", memory.read(stack & ~7, _STACK_BYTES)) if left else ()
    return next((at for at in left if not any(at <= word < at + code_bytes for word in words)), 0)
