# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes
import mmap
import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.architecture import X86_64
from ksmd_ctl.kernel.injected_code import MARK, free_slot, in_sequence
from ksmd_ctl.kernel.x86_64 import CODE_BYTES, SLOT_BYTES, made_again, restarted, slot

words = st.integers(0, (1 << 64) - 1)


@given(st.fixed_dictionaries(dict.fromkeys(X86_64.registers, words)), words)
def test_the_instructions_restore_each_register(registers: dict[str, int], changed: int) -> None:
    """Those that are no call's are never changed, and each other one is loaded from its own place."""
    content = slot(registers, 4711)
    found = {}
    at = 2
    names = {0: "rax", 1: "rcx", 2: "rdx", 6: "rsi", 7: "rdi", 8: "r8", 9: "r9", 10: "r10", 11: "r11"}
    while content[at] != 0xFF:
        rex, opcode, modrm = content[at : at + 3]
        assert opcode == 0x8B
        assert modrm & 0xC7 == 0x05
        where = at + 7 + int.from_bytes(content[at + 3 : at + 7], "little", signed=True)
        found[names[(modrm >> 3) | (8 if rex == 0x4C else 0)]] = int.from_bytes(content[where : where + 8], "little")
        at += 7
    assert content[at : at + 2] == b"\xff\x25"
    where = at + 6 + int.from_bytes(content[at + 2 : at + 6], "little", signed=True)
    assert int.from_bytes(content[where : where + 8], "little") == registers["rip"]
    assert found == {name: registers[name] for name in names.values()}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86-64's")
@pytest.mark.parametrize("count", [1, 5])
def test_the_instructions_by_themselves(count: int) -> None:
    """Run in this process: they make a call, and go on where they should."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    registers = dict.fromkeys(X86_64.registers, 0)
    # What they go on with: mov %rdi, %rax; ret.
    page[1024:1028] = b"\x48\x89\xf8\xc3"
    for number in range(count):
        content = slot({**registers, "rdi": 4711 + number, "rip": address + 1024}, 1)
        page[: len(content)] = content
        # mov $39, %eax (getpid), and on to the instructions; a C function may lose all that they load.
        page[512:522] = b"\xb8\x27\0\0\0\xe9" + (-(512 + 10)).to_bytes(4, "little", signed=True)
        assert ctypes.CFUNCTYPE(ctypes.c_long)(address + 512)() == 4711 + number


@pytest.mark.parametrize(
    ("code", "rax", "moved"),
    [(-512, 7, 2), (-513, 7, 2), (-514, 7, 2), (-516, 219, 2), (-4, (1 << 64) - 4, 0), (3, 3, 0)],
)
def test_a_thread_in_a_call_goes_on_as_the_kernel_has_it(code: int, rax: int, moved: int) -> None:
    registers = {**dict.fromkeys(X86_64.registers, 5), "orig_rax": 7, "rax": code % (1 << 64), "rip": 1000}
    found = restarted(registers)
    assert (found["rax"], found["rip"], found["orig_rax"]) == (rax, 1000 - moved, (1 << 64) - 1)
    # Outside of a call the same number is just a number.
    outside = {**registers, "orig_rax": (1 << 64) - 1}
    assert restarted(outside) == outside


class FakeMemory:
    """Contents by their addresses."""

    def __init__(self, contents: dict[int, bytes]) -> None:
        self.contents = contents

    def read(self, address: int, length: int) -> bytes:
        return self.contents.get(address, b"")[:length]


def test_instructions_that_a_handler_returns_to_are_left_alone() -> None:
    """All places are taken by this thread's killed tracers; a signal's frame on its stack leads into one of them."""
    base, stack, tid = 1 << 30, 1 << 40, 7
    tail = (base + 16, base + 4 * SLOT_BYTES)
    places = [tail[1] - number * SLOT_BYTES for number in (1, 2, 3)]
    taken = slot(dict.fromkeys(X86_64.registers, 1), tid)

    def found(frame: int, contents: bytes = taken, others: frozenset[int] = frozenset({9})) -> int:
        words = b"".join(word.to_bytes(8, "little") for word in (5, frame, 6))
        memory = FakeMemory({stack: words, **dict.fromkeys(places, contents)})
        return free_slot(memory, tail, stack + 3, tid, others, SLOT_BYTES, CODE_BYTES)  # type: ignore[arg-type]

    assert found(0) == places[0]
    assert found(places[0] + 9) == places[1]
    assert found(0, bytes(SLOT_BYTES)) == places[0]
    # Another thread that lives has them, or the vDSO itself.
    assert found(0, taken, frozenset({tid})) == 0
    assert found(0, b"\1" * SLOT_BYTES) == 0
    # Half-written: of nobody.
    assert found(0, (MARK + bytes(8)).rjust(SLOT_BYTES, b"\0")) == places[0]
    assert free_slot(FakeMemory({}), (0, 0), stack, tid, frozenset(), SLOT_BYTES, CODE_BYTES) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(("at", "inside"), [(999, False), (1000, True), (1019, True), (1020, False)])
def test_restartable_sequences(at: int, inside: bool) -> None:
    words = (0).to_bytes(8, "little") + b"".join(word.to_bytes(8, "little") for word in (1000, 20, 2000))
    memory = FakeMemory({108: (4096).to_bytes(8, "little"), 4096: words})
    assert in_sequence(memory, 100, at) is inside  # type: ignore[arg-type]
    assert not in_sequence(FakeMemory({108: bytes(8)}), 100, at)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "code", "again"), [(232, -4, True), (232, -512, False), (35, -4, False), (232, 1, False)]
)
def test_a_call_that_a_stop_has_ended_is_made_again(number: int, code: int, again: bool) -> None:
    """epoll_wait, and not nanosleep, which the kernel goes on with by itself."""
    registers = {**dict.fromkeys(X86_64.registers, 5), "orig_rax": number, "rax": code % (1 << 64), "rip": 1000}
    found = made_again(registers)
    assert (found is not None) is again
    if found is not None:
        assert found == {**registers, "rax": number, "orig_rax": (1 << 64) - 1, "rip": 998}
