# SPDX-License-Identifier: GPL-2.0-or-later
"""The instructions of aarch64 and their frame, byte by byte; tests/soak/test_aarch64.py runs them in a guest."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.aarch64 import CODE_BYTES, SLOT_BYTES, Aarch64Code, made_again, near, slot, undecided
from ksmd_ctl.kernel.architecture import AARCH64, X86_64
from ksmd_ctl.kernel.injected_code import MARK
from ksmd_ctl.kernel.seccomp import Action, action

PLACE = 0xFFFF_8764_2B80
SVC = 0xD4000001
words = st.integers(0, (1 << 64) - 1)
registers = st.fixed_dictionaries(dict.fromkeys(AARCH64.registers, words))
ZEROES = dict.fromkeys(AARCH64.registers, 0)


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def code_of(content: bytes) -> tuple[int, ...]:
    return struct.unpack_from(f"<{CODE_BYTES // 4}I", content)


@given(registers, st.integers(-(1 << 24), 1 << 24))
def test_near_each_register_is_loaded_and_a_branch_goes_back(found: dict[str, int], words_away: int) -> None:
    found["pc"] = PLACE + 4 * words_away
    assert near(found, PLACE)
    content = slot(found, PLACE, 4711)
    assert len(content) == SLOT_BYTES
    assert content[-16:] == MARK + (4711).to_bytes(8, "little")
    code = code_of(content)
    assert code[0] == SVC
    loaded = {}
    for number, instruction in enumerate(code[1:8], 1):
        assert instruction >> 24 == 0x58
        at = 4 * number + 4 * signed(instruction >> 5 & 0x7FFFF, 19)
        loaded[f"x{instruction & 31}"] = int.from_bytes(content[at : at + 8], "little")
    assert loaded == {name: found[name] for name in ("x0", "x1", "x2", "x3", "x4", "x5", "x8")}
    assert code[8] >> 26 == 0x05
    assert PLACE + 32 + 4 * signed(code[8] & 0x3FFFFFF, 26) == found["pc"]
    assert set(code[9:]) == {0xD4200000}


@given(registers, st.binary(min_size=8, max_size=8), st.binary(min_size=528, max_size=528))
def test_far_a_frame_has_each_register(found: dict[str, int], mask: bytes, vectors: bytes) -> None:
    """As struct rt_sigframe is laid out for 64-bit programs."""
    found["pc"] = 0x400000
    assert not near(found, PLACE)
    frame = slot(found, PLACE, 1, mask, vectors)
    siginfo, flags, link, stack, stack_flags, stack_size = struct.unpack_from("<128sQQQi4xQ", frame)
    assert (flags, link, stack, stack_flags, stack_size) == (0, 0, 0, 7, 0)
    assert frame[168:176] == mask
    assert struct.unpack_from("<34Q", frame, 312) == tuple(found[name] for name in AARCH64.registers)
    magic, size, status, control = struct.unpack_from("<4I", frame, 592)
    assert (magic, size) == (0x46508001, 528)
    assert frame[608:1120] == vectors[:512]
    assert struct.pack("<II", status, control) == vectors[512:520]
    assert frame[1120:1136] == bytes(16)
    # Signals are blocked, all of them, and then the stack pointer is this frame.
    code = code_of(siginfo)
    moves = {0xD2800000, 0xD2800002, 0xD2800103, 0xD2800000 | 135 << 5 | 8}
    assert code[0] == code[6] == code[10] == SVC
    assert moves < set(code[1:6])
    (address,) = set(code[1:6]) - moves
    at = code.index(address)
    assert (address & 0x9F00001F, frame[4 * at + 4 * (address >> 5 & 0x7FFFF) :][:8]) == (0x10000001, b"\xff" * 8)
    assert code[7] & 0x9F00001F == 0x10000009
    assert 28 + 4 * signed(code[7] >> 5 & 0x7FFFF, 19) == 0
    assert code[8:10] == (0x9100013F, 0xD2800000 | 139 << 5 | 8)


@pytest.mark.parametrize(
    ("number", "first", "second", "fourth", "open_"),
    [
        (101, 0, 0, 0, True),
        (115, 1, 0, 0, True),
        # TIMER_ABSTIME is restarted as it is, and so is a futex without a timeout.
        (115, 1, 1, 0, False),
        (98, 4096, 128, 0, False),
        (98, 4096, 128, 8192, True),
        (98, 4096, 128 | 9 | 256, 8192, True),
        (98, 4096, 6, 8192, False),
        (63, 0, 0, 0, False),
        (128, 0, 0, 0, False),
    ],
)
def test_calls_that_may_be_ones_that_go_on(number: int, first: int, second: int, fourth: int, open_: bool) -> None:
    assert undecided({**ZEROES, "x8": number, "x0": first, "x1": second, "x3": fourth}) is open_


def as_proc_has_it(number: int, arguments: list[int], stack: int, at: int) -> str:
    return " ".join([str(number), *map(hex, [*arguments, stack, at])]) + "\n"


BEFORE = as_proc_has_it(22, [7, 1, 2, 3, 4, 5], 100, 1004)
ENDED = {**ZEROES, "x8": 22, "x0": (1 << 64) - 4, "x1": 1, "x2": 2, "x3": 3, "x4": 4, "x5": 5, "sp": 100, "pc": 1004}


def test_a_call_that_a_stop_has_ended_is_made_again() -> None:
    assert made_again(ENDED, BEFORE) == {**ENDED, "x0": 7, "pc": 1000}
    # Another call, one that was not ended, or somewhere else meanwhile.
    for change in ({"x0": 1}, {"x1": 9}, {"x8": 63}, {"sp": 84}, {"pc": 1008}):
        assert made_again({**ENDED, **change}, BEFORE) is None
    for call in ("", "running\n", "-1 0x64 0x3ec\n", as_proc_has_it(101, [7, 1, 2, 3, 4, 5], 100, 1004)):
        assert made_again(ENDED, call) is None
    assert made_again({**ENDED, "x8": 101}, as_proc_has_it(101, [7, 1, 2, 3, 4, 5], 100, 1004)) is None


def test_registers_for_a_call() -> None:
    saved = {**ZEROES, "x7": 7, "sp": 96, "pc": 4096, "pstate": 0x60001C00}
    found = Aarch64Code().entering(saved, (167, 67, 1, 0, 0, 0), PLACE)
    # Not as if a branch had come there.
    assert found == {**saved, "x8": 167, "x0": 67, "x1": 1, "pc": PLACE, "pstate": 0x60001000}


class FakeMemory:
    """There is this instruction everywhere."""

    def __init__(self, instruction: int) -> None:
        self.instruction = instruction

    def read(self, address: int, length: int) -> bytes:
        return self.instruction.to_bytes(4, "little")[:length]


def test_who_enters_a_call_again() -> None:
    def again(number: int, instruction: int, ended: bool = False) -> bool:
        memory, found = FakeMemory(instruction), {**ZEROES, "x8": number}
        return Aarch64Code().enters_again(memory, found, ended=ended)  # type: ignore[arg-type]

    assert again(101, SVC)
    # A read: of a pipe, and of a socket with a timeout.
    assert again(63, SVC)
    assert not again(63, SVC, ended=True)
    assert not again(101, 0xD2800008)
    # epoll_pwait
    assert not again(22, SVC)


class FakeTracee:
    """Sets of registers by their kind; none of any other."""

    def __init__(self, sets: dict[int, bytes]) -> None:
        self.sets = sets

    def register_set(self, kind: int, length: int) -> bytes:
        return self.sets.get(kind, b"")[:length].ljust(length, b"\0")


SVE = struct.pack("<IIHHHHI", 16, 8192, 32, 256, 1, 0, 0)
ZA = struct.pack("<IIHHHH", 4096, 4096, 32, 256, 0, 0)


@pytest.mark.parametrize(
    ("sets", "permitted", "by_branch", "by_frame"),
    [
        ({}, True, "", ""),
        ({0x405: SVE}, True, "SVE", "SVE"),
        ({0x405: SVE[:12] + bytes(4)}, True, "", ""),
        ({0x40B: SVE}, True, "SVE", "SVE"),
        ({0x40C: ZA}, True, "", "ZA"),
        ({0x410: (1).to_bytes(24, "little")}, True, "", "shadow stack"),
        ({}, False, "", "seccomp"),
    ],
)
def test_what_can_not_be_restored(sets: dict[int, bytes], permitted: bool, by_branch: str, by_frame: str) -> None:
    def permits(number: int) -> bool:
        return permitted or number not in (135, 139)

    for at, why in ((PLACE - 8192, by_branch), (0x400000, by_frame)):
        found = {**ZEROES, "pc": at}
        tail = (PLACE, PLACE + 4096)
        said = Aarch64Code().obstacle(FakeTracee(sets), None, found, tail, permits)  # type: ignore[arg-type]
        assert (why in said) if why else not said


def test_numbers() -> None:
    """As the kernel's own headers have them, where they are."""
    header = Path("/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("needs linux-libc-dev")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR")]
    numbers = {line[1].removeprefix("__NR_").removeprefix("__NR3264_"): line[2] for line in lines if len(line) == 3}

    def named(*names: str) -> set[int]:
        return {int(numbers[name]) for name in names}

    assert {AARCH64.prctl, AARCH64.madvise} == named("prctl", "madvise")
    assert AARCH64.strict == named("read", "write", "rt_sigreturn", "exit")
    assert {call[0] for call in AARCH64.harmless} == named("read", "write", "madvise", "getpid", "sched_yield", "close")
    assert AARCH64.ended_by_stops == named(
        *("read", "write", "readv", "writev", "accept", "accept4", "sendto", "recvfrom", "sendmsg", "recvmsg"),
        *("sendmmsg", "recvmmsg", "semop", "semtimedop", "rt_sigtimedwait", "epoll_pwait", "epoll_pwait2"),
        *("io_getevents", "io_pgetevents", "io_uring_enter"),
    )


def test_a_filter_for_this_machine() -> None:
    code = [(0x20, 0, 0, 4), (0x15, 0, 1, 0xC00000B7), (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0)]
    program = b"".join(struct.pack("<HBBI", *one) for one in code)
    assert action((program,), (167,), architecture=AARCH64) is Action.ALLOW
    assert action((program,), (167,), architecture=X86_64) is Action.KILL_THREAD
    assert action((), (139,), strict=True, architecture=AARCH64) is Action.ALLOW
