# SPDX-License-Identifier: GPL-2.0-or-later
"""What differs between processors where another process's threads make system calls: numbers, names and places.

Sources: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h (arm64), include/uapi/linux/audit.h.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.errors import Absent

#: A system call: its number, and up to six arguments.
Call = tuple[int, ...]
#: The values of general registers by their names.
Registers = dict[str, int]

_ANY_FD: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of processor.

    :ivar name: as uname(2) has it
    :ivar elf_machine: as ELF files have it (e_machine)
    :ivar audit: as seccomp filters have it (AUDIT_ARCH_*)
    :ivar registers: the general registers in the order of NT_PRSTATUS
    :ivar pc: which of them is the instruction pointer, and `sp` the stack pointer
    :ivar arguments: the registers that have a call's arguments
    :ivar syscall: the instruction that makes a system call
    :ivar prctl: the number of that call, as is `madvise`
    :ivar harmless: calls that change nothing, one of which a filter may permit
    :ivar strict: calls that seccomp's strict mode permits
    :ivar ended_by_stops: calls that end with EINTR when their thread is stopped, also where no signal comes (signal(7),
        "Interruption of system calls and library functions by stop signals"); with EINTR they have done nothing yet
    """

    name: str
    elf_machine: int
    audit: int
    registers: tuple[str, ...]
    pc: str
    sp: str
    arguments: tuple[str, ...]
    syscall: bytes
    prctl: int
    madvise: int
    harmless: tuple[Call, ...]
    strict: frozenset[int]
    ended_by_stops: frozenset[int]

    def registers_for(self, call: Call) -> Registers:
        """The arguments of a call in their registers; zeroes in those that it does not have."""
        return dict(zip(self.arguments, (*call[1:], 0, 0, 0, 0, 0, 0), strict=False))


# Harmless: write and read of no descriptor, madvise of nothing, getpid, sched_yield, close of no descriptor. Ended by
# stops: read, write, readv, writev and those of sockets with a timeout, semop, semtimedop, rt_sigtimedwait, epoll_wait,
# epoll_pwait, epoll_pwait2, io_getevents, io_pgetevents, io_uring_enter.
X86_64: Final = Architecture(
    name="x86_64",
    elf_machine=62,
    audit=0xC000003E,
    registers=(
        *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
        *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
    ),
    pc="rip",
    sp="rsp",
    arguments=("rdi", "rsi", "rdx", "r10", "r8", "r9"),
    syscall=b"\x0f\x05",
    prctl=157,
    madvise=28,
    harmless=((1, _ANY_FD, 0, 0), (0, _ANY_FD, 0, 0), (28, 0, 0, 4), (39,), (24,), (3, _ANY_FD)),
    strict=frozenset({0, 1, 15, 60}),
    ended_by_stops=frozenset(
        {0, 1, 19, 20, 43, 44, 45, 46, 47, 288, 299, 307, 65, 220, 128, 232, 281, 441, 208, 333, 426}
    ),
)
AARCH64: Final = Architecture(
    name="aarch64",
    elf_machine=183,
    audit=0xC00000B7,
    registers=(*(f"x{number}" for number in range(31)), "sp", "pc", "pstate"),
    pc="pc",
    sp="sp",
    arguments=("x0", "x1", "x2", "x3", "x4", "x5"),
    syscall=0xD4000001.to_bytes(4, "little"),
    prctl=167,
    madvise=233,
    harmless=((64, _ANY_FD, 0, 0), (63, _ANY_FD, 0, 0), (233, 0, 0, 4), (172,), (124,), (57, _ANY_FD)),
    strict=frozenset({63, 64, 139, 93}),
    ended_by_stops=frozenset(
        {63, 64, 65, 66, 202, 206, 207, 211, 212, 242, 243, 269, 193, 192, 137, 22, 441, 4, 292, 426}
    ),
)
_ALL: Final = {found.name: found for found in (X86_64, AARCH64)}


def architecture() -> Architecture:
    """This machine's.

    :raises Absent: no calls can be injected here
    """
    name = os.uname().machine
    if name not in _ALL:
        why = f"it is written for {' and '.join(_ALL)} only, and this is {name}"
        raise Absent("having another process make a system call", why, value=name)
    return _ALL[name]
