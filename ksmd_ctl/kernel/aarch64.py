# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions of aarch64 that have a thread make a system call and restore itself, and registers for that.

Where the thread goes on within the reach of a branch (128 MiB), as in the C library, which lies beside the vDSO:

    svc #0; ldr x0, saved_x0; ... the six others that a call changes or takes ...; b where_it_was

To jump anywhere else takes a register. So there rt_sigreturn(2) restores all of them, from a frame behind the
instructions:

    svc #0; rt_sigprocmask(SIG_BLOCK, all of them); mov sp, frame; rt_sigreturn()

No handler could run on that frame, so signals wait until it gives back what was blocked. It has an invalid alternate
stack, which the kernel ignores: the thread's own stays. After rt_sigreturn a call does not go on where it was
(restart_syscall(2)): it begins again, or ends with EINTR where it has gone on before. A thread whose filters refuse
these calls, or with registers that the frame has not, is refused there.

Registers that a tracer finds restart a call already (arch/arm64/kernel/signal.c:do_signal), but two things come after
the stop. A call that is to go on (nanosleep, futex with a timeout) gets the number of restart_syscall: such a thread
goes on until it enters that. And a signal's handler has a call end with EINTR only if the thread leaves the stop as it
came. So one that was in a call is let go where it enters it again, unless that call ends with EINTR at each stop.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import HostError
from ksmd_ctl.kernel.architecture import AARCH64, Architecture, Call, Registers
from ksmd_ctl.kernel.injected_code import Memory, marked, signed
from ksmd_ctl.kernel.proc_pid import read_process_file
from ksmd_ctl.kernel.ptrace import Tracee

CODE_BYTES: Final = 48
SLOT_BYTES: Final = 1152
# What a call takes or changes.
_LOADED: Final = (0, 1, 2, 3, 4, 5, 8)
_REACH_BYTES: Final = 1 << 27
_TRAP: Final = 0xD4200000
_SVC: Final = int.from_bytes(AARCH64.syscall, "little")

_TRIES, _PAUSE_SECONDS = 5, 0.0005
_CLOCK_NANOSLEEP, _FUTEX, _NANOSLEEP = 115, 98, 101
# Of those that stops end: reads and writes, which only end on sockets with a timeout.
_RESTARTED_ELSEWHERE: Final = frozenset({63, 64, 65, 66, 202, 206, 207, 211, 212, 242, 243, 269})
_SIGPROCMASK, _SIGRETURN = 135, 139
_TIMER_ABSTIME: Final = 1
_FUTEX_COMMANDS, _FUTEX_WAITS = 0x7F, frozenset({0, 9})
# Of pstate: that a branch came here, which only some instructions may follow (BTI).
_BRANCHED: Final = 3 << 10

# Of struct rt_sigframe and struct sigcontext (arch/arm64/include/uapi/asm/sigcontext.h). The instructions lie where it
# has struct siginfo, which is for handlers only.
_INFO_BYTES: Final = 128
_BLOCKED_AT: Final = _INFO_BYTES - 8
_STACK_FLAGS_AT, _MASK_AT, _REGISTERS_AT, _VECTORS_AT = 152, 168, 312, 592
_FRAME_BYTES: Final = 1136
_NO_STACK: Final = 7
_VECTORS_MAGIC: Final = 0x46508001
# struct user_fpsimd_state: 32 vector registers, fpsr, fpcr, and 8 bytes of nothing.
_VECTORS: Final = struct.Struct("<512sII8x")

# Sets of registers (include/uapi/linux/elf.h), and of their headers: struct user_sve_header, user_za_header, user_gcs.
_NT_FPREGSET, _NT_SYSTEM_CALL, _NT_SVE, _NT_SSVE, _NT_ZA, _NT_GCS = 2, 0x404, 0x405, 0x40B, 0x40C, 0x410
_HEADER_BYTES, _GCS_BYTES = 16, 24
_HEADER: Final = struct.Struct("<IIHHHH")
_IN_USE: Final = 1


def made_again(found: Registers, call: str) -> Registers | None:
    """Registers with which a thread makes the call again that a stop has ended; None where it has ended none.

    :param call: /proc/PID/task/TID/syscall before the stop: its first argument is in no register any more
    """
    words = [int(word, 0) for word in call.split()] if call[:1].isdigit() else []
    if len(words) != 9 or words[0] not in AARCH64.ended_by_stops or signed(found["x0"]) != -errno.EINTR:
        return None
    number, first, *others, stack, at = words
    # Not another one since.
    if [found["x8"], found["sp"], found["pc"], *(found[f"x{n}"] for n in range(1, 6))] != [number, stack, at, *others]:
        return None
    return {**found, "x0": first, "pc": at - len(AARCH64.syscall)}


def undecided(found: Registers) -> bool:
    """A call that goes on by restart_syscall where it was interrupted, and has not been told apart from a new one."""
    number = found["x8"]
    if number == _CLOCK_NANOSLEEP:
        return not found["x1"] & _TIMER_ABSTIME
    if number == _FUTEX:
        return found["x1"] & _FUTEX_COMMANDS in _FUTEX_WAITS and found["x3"] != 0
    return number == _NANOSLEEP


def near(registers: Registers, place: int) -> bool:
    """Whether a branch from there reaches where a thread goes on."""
    return abs(registers["pc"] - place) < _REACH_BYTES - SLOT_BYTES


def slot(registers: Registers, place: int, tid: int, mask: bytes = b"", vectors: bytes = b"") -> bytes:
    """Instructions that make a system call and then restore these registers, and lie at `place`.

    :param mask: the signals that are blocked, and `vectors`: all of NT_FPREGSET; both only where it is not `near`
    """
    content = _branch(registers, place) if near(registers, place) else _frame(registers, mask, vectors)
    return marked(content, SLOT_BYTES, tid)


def _branch(registers: Registers, place: int) -> bytes:
    code = [_SVC]
    for number, register in enumerate(_LOADED):
        code.append(0x58000000 | _words(CODE_BYTES + 8 * number - 4 * len(code), 19) << 5 | register)
    code.append(0x14000000 | _words(registers["pc"] - place - 4 * len(code), 26))
    return _coded(code) + struct.pack("<7Q", *(registers[f"x{register}"] for register in _LOADED))


def _frame(registers: Registers, mask: bytes, vectors: bytes) -> bytes:
    code = [_SVC]
    # rt_sigprocmask(SIG_BLOCK, all of them, 0, 8)
    code += [_move(0, 0), _address(1, _BLOCKED_AT - 4 * (len(code) + 1)), _move(2, 0), _move(3, 8)]
    code += [_move(8, _SIGPROCMASK), _SVC]
    # mov sp, x9
    code += [_address(9, -4 * len(code)), 0x9100013F, _move(8, _SIGRETURN), _SVC]
    frame = bytearray(_FRAME_BYTES)
    frame[:CODE_BYTES] = _coded(code)
    frame[_BLOCKED_AT:_INFO_BYTES] = b"\xff" * 8
    struct.pack_into("<I", frame, _STACK_FLAGS_AT, _NO_STACK)
    frame[_MASK_AT : _MASK_AT + 8] = mask
    struct.pack_into("<34Q", frame, _REGISTERS_AT, *(registers[name] for name in AARCH64.registers))
    held, status, control = _VECTORS.unpack(vectors)
    struct.pack_into(
        "<IIII512s", frame, _VECTORS_AT, _VECTORS_MAGIC, _VECTORS.size, status, control, held
    )  # and nothing more follows
    return bytes(frame)


def _coded(code: list[int]) -> bytes:
    return struct.pack("<12I", *code, *[_TRAP] * (CODE_BYTES // 4 - len(code)))


def _words(distance: int, bits: int) -> int:
    return distance // 4 & (1 << bits) - 1


def _move(register: int, value: int) -> int:
    return 0xD2800000 | value << 5 | register


def _address(register: int, distance: int) -> int:
    """adr"""
    return 0x10000000 | _words(distance, 19) << 5 | register


class Aarch64Code:
    """`ksmd_ctl.kernel.injected_code.Code` of aarch64."""

    architecture: Final[Architecture] = AARCH64
    slot_bytes: Final = SLOT_BYTES
    code_bytes: Final = CODE_BYTES
    result: Final = "x0"

    def call_of(self, pid: int, tid: int, root: Path) -> str:
        said = ""
        with suppress(HostError):
            for _ in range(_TRIES):
                said = read_process_file(pid, f"task/{tid}/syscall", root)
                if said[:1].isdigit():
                    break
                # It runs; on its way into a call it would end up there and not be known.
                time.sleep(_PAUSE_SECONDS)
        return said

    def made_again(self, found: Registers, call: str) -> Registers | None:
        return made_again(found, call)

    def undecided(self, found: Registers) -> bool:
        return undecided(found)

    def enters_again(self, memory: Memory, saved: Registers, *, ended: bool) -> bool:
        # Being let go there ends one that each stop ends.
        if ended or saved["x8"] in AARCH64.ended_by_stops - _RESTARTED_ELSEWHERE:
            return False
        return memory.read(saved["pc"], len(AARCH64.syscall)) == AARCH64.syscall

    def obstacle(
        self,
        tracee: Tracee,
        memory: Memory,
        found: Registers,
        tail: tuple[int, int],
        permits: Callable[[int], bool],
    ) -> str:
        # A call, any call, discards them.
        for kind in (_NT_SVE, _NT_SSVE):
            if _header(tracee, kind)[4] & _IN_USE:
                return "its SVE registers hold something, which each system call discards"
        if all(near(found, at) for at in tail):
            return ""
        size, *_ = _header(tracee, _NT_ZA)
        if size > _HEADER_BYTES:
            return "its matrix registers (ZA) hold something, which rt_sigreturn(2) discards"
        if any(tracee.register_set(_NT_GCS, _GCS_BYTES)[:8]):
            return "it has a shadow stack (GCS), and goes on where no branch from the vDSO reaches"
        if not (permits(_SIGRETURN) and permits(_SIGPROCMASK)):
            return "its seccomp filters refuse rt_sigreturn(2), and it goes on where no branch from the vDSO reaches"
        return ""

    def slot(self, tracee: Tracee, found: Registers, place: int) -> bytes:
        if near(found, place):
            return slot(found, place, tracee.tid)
        vectors = tracee.register_set(_NT_FPREGSET, _VECTORS.size)
        return slot(found, place, tracee.tid, tracee.blocked_signals(), vectors)

    def entering(self, saved: Registers, call: Call, place: int) -> Registers:
        return {
            **saved,
            **AARCH64.registers_for(call),
            "x8": call[0],
            "pc": place,
            "pstate": saved["pstate"] & ~_BRANCHED,
        }

    def replace(self, tracee: Tracee, found: Registers, call: Call) -> None:
        tracee.set_register_set(_NT_SYSTEM_CALL, struct.pack("<i", call[0]))
        tracee.set_registers({**found, **AARCH64.registers_for(call), "x8": call[0]})


def _header(tracee: Tracee, kind: int) -> tuple[int, ...]:
    """Size, most, vector length, most, flags."""
    return _HEADER.unpack(tracee.register_set(kind, _HEADER_BYTES))
