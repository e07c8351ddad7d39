# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions of x86-64 that have a thread make a system call and restore itself, and registers for that:

    syscall; mov saved_rax(%rip), %rax; ... the eight others that a call changes or takes ...; jmp *saved_rip(%rip)

Flags and extended registers (SSE, AVX, ...) are not changed by a system call, nor by these instructions, so nobody
saves them. A shadow stack does not matter, as nothing returns.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ksmd_ctl.kernel.architecture import X86_64, Architecture, Call, Registers
from ksmd_ctl.kernel.injected_code import RESTARTED, Memory, marked, signed
from ksmd_ctl.kernel.ptrace import Tracee

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
_JUMP: Final = b"\xff\x25"
_OFFSET_BYTES: Final = 4
CODE_BYTES: Final = 72
SLOT_BYTES: Final = 192

NO_CALL: Final = (1 << 64) - 1
_RESTART_BLOCK, _RESTART_SYSCALL, _X32_BIT = -516, 219, 1 << 30


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
    if found["orig_rax"] not in X86_64.ended_by_stops or signed(found["rax"]) != -errno.EINTR:
        return None
    return _calls_again(found, found["orig_rax"])


def _calls_again(found: Registers, number: int) -> Registers:
    """Registers with which a thread makes a call, from its instruction on."""
    return {**found, "rax": number, "orig_rax": NO_CALL, "rip": found["rip"] - len(X86_64.syscall)}


def slot(registers: Registers, tid: int) -> bytes:
    """Instructions that make a system call and then restore these registers; they may lie anywhere."""
    code, data = bytearray(X86_64.syscall), bytearray()
    for name, instruction in (*_LOADED.items(), ("rip", _JUMP)):
        code += instruction
        code += (CODE_BYTES + len(data) - len(code) - _OFFSET_BYTES).to_bytes(_OFFSET_BYTES, "little", signed=True)
        data += registers[name].to_bytes(8, "little")
    return marked(bytes(code).ljust(CODE_BYTES, b"\xcc") + bytes(data), SLOT_BYTES, tid)


class X86_64Code:
    """`ksmd_ctl.kernel.injected_code.Code` of x86-64."""

    architecture: Final[Architecture] = X86_64
    slot_bytes: Final = SLOT_BYTES
    code_bytes: Final = CODE_BYTES
    result: Final = "rax"

    def call_of(self, pid: int, tid: int, root: Path) -> str:
        # Its registers have it.
        return ""

    def made_again(self, found: Registers, call: str) -> Registers | None:
        return made_again(found)

    def undecided(self, found: Registers) -> bool:
        return False

    def enters_again(self, memory: Memory, saved: Registers, *, ended: bool) -> bool:
        # From its registers the kernel knows what is to be done with the call.
        return False

    def obstacle(
        self,
        tracee: Tracee,
        memory: Memory,
        found: Registers,
        tail: tuple[int, int],
        permits: Callable[[int], bool],
    ) -> str:
        if signed(found["orig_rax"]) != -1 and memory.read(found["rip"] - 2, 2) != X86_64.syscall:
            return "it is in a 32-bit system call"
        return ""

    def slot(self, tracee: Tracee, found: Registers, place: int) -> bytes:
        return slot(restarted(found), tracee.tid)

    def entering(self, saved: Registers, call: Call, place: int) -> Registers:
        return {**saved, **X86_64.registers_for(call), "rax": call[0], "rip": place, "orig_rax": NO_CALL}

    def replace(self, tracee: Tracee, found: Registers, call: Call) -> None:
        tracee.set_registers({**found, **X86_64.registers_for(call), "orig_rax": call[0]})
