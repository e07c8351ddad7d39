# SPDX-License-Identifier: GPL-2.0-or-later
"""What seccomp filters do with a system call. Sources: seccomp(2), kernel/seccomp.c, net/core/filter.c.

A filter is a classic BPF program over struct seccomp_data. Of several the most severe action counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Final

from ksmd_ctl.kernel.architecture import X86_64, Architecture

_MASK: Final = 0xFFFFFFFF
_INSTRUCTION: Final = struct.Struct("<HBBI")


class Action(IntEnum):
    """What becomes of a system call, the most severe first (SECCOMP_RET_*, as signed numbers)."""

    KILL_PROCESS = -0x80000000
    KILL_THREAD = 0
    TRAP = 0x00030000
    ERRNO = 0x00050000
    USER_NOTIF = 0x7FC00000
    TRACE = 0x7FF00000
    LOG = 0x7FFC0000
    ALLOW = 0x7FFF0000


def action(
    filters: Iterable[bytes],
    call: Sequence[int],
    pointer: int = 0,
    *,
    strict: bool = False,
    architecture: Architecture = X86_64,
) -> Action:
    """What all filters together do with a call of a 64-bit thread.

    :param call: its number and arguments, and `pointer`: where it is made
    :param strict: strict mode, which has no filters
    """
    if strict:
        return Action.ALLOW if call[0] in architecture.strict else Action.KILL_THREAD
    arguments = (*call[1:], 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", call[0], architecture.audit, pointer, *arguments)
    return min((_action(program, data) for program in filters), default=Action.ALLOW)


def _action(program: bytes, data: bytes) -> Action:
    try:
        return Action((_run(program, data) & 0xFFFF0000 ^ 0x80000000) - 0x80000000)
    except (ValueError, IndexError, KeyError, struct.error):
        # An action, or an instruction, that is not known: the kernel takes the former for this one, too.
        return Action.KILL_PROCESS


def _run(program: bytes, data: bytes) -> int:
    """The value that a program returns. Jumps go forward only, so it ends.

    :raises ValueError, IndexError, KeyError, struct.error: it is no program for seccomp
    """
    instructions = list(_INSTRUCTION.iter_unpack(program))
    accumulator = index = at = 0
    memory = [0] * 16
    while True:
        code, if_true, if_false, constant = instructions[at]
        at += 1
        kind, operand = code & 0x07, index if code & 0x08 else constant
        if kind == 0x06:
            return accumulator if code & 0x18 == 0x10 else constant
        if kind in (0x00, 0x01):
            value = _loaded(code & 0xE0, constant, data, memory)
            accumulator, index = (value, index) if kind == 0x00 else (accumulator, value)
        elif kind in (0x02, 0x03):
            memory[constant] = accumulator if kind == 0x02 else index
        elif kind == 0x04:
            accumulator = _computed(code & 0xF0, accumulator, operand)
        elif kind == 0x05 and code & 0xF0 == 0x00:
            at += constant
        elif kind == 0x05:
            at += if_true if _holds(code & 0xF0, accumulator, operand) else if_false
        elif code == 0x87:
            accumulator = index
        elif code == 0x07:
            index = accumulator
        else:
            raise ValueError(f"instruction {code:#x}")


def _loaded(mode: int, constant: int, data: bytes, memory: Sequence[int]) -> int:
    if mode == 0x20:
        return int(struct.unpack_from("<I", data, constant)[0])
    return {0x00: constant, 0x60: memory[constant & 15], 0x80: len(data)}[mode]


def _holds(test: int, left: int, right: int) -> bool:
    return {0x10: left == right, 0x20: left > right, 0x30: left >= right, 0x40: bool(left & right)}[test]


def _computed(operation: int, left: int, right: int) -> int:
    if operation in (0x30, 0x90) and not right:
        raise ValueError("division by zero")
    if operation in (0x60, 0x70):
        return (left << right if operation == 0x60 else left >> right) & _MASK if right < 32 else 0
    if operation == 0x30:
        return left // right
    if operation == 0x90:
        return left % right
    values = {
        0x00: left + right,
        0x10: left - right,
        0x20: left * right,
        0x40: left | right,
        0x50: left & right,
        0x80: -left,
        0xA0: left ^ right,
    }
    return values[operation] & _MASK
