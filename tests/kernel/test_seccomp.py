# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.kernel.seccomp import Action, action

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000 | errno.ENOTTY, 0x80000000
_GETPPID, _GETPID = 110, 39


def program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<HBBI", *one) for one in instructions)


def only(number: int, then: int, otherwise: int) -> bytes:
    """A filter that looks at the number of a call."""
    return program((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, then), (0x06, 0, 0, otherwise))


def test_the_most_severe_action_counts() -> None:
    allow, refuse = only(1, _ALLOW, _ERRNO), only(2, _KILL, _ALLOW)
    assert action((), (1,)) is Action.ALLOW
    assert action((allow,), (1,)) is Action.ALLOW
    assert action((allow,), (2,)) is Action.ERRNO
    assert action((allow, refuse), (2,)) is Action.KILL_PROCESS
    assert action((refuse, allow), (3,)) is Action.ERRNO
    assert action((only(1, 0, _ALLOW),), (1,)) is Action.KILL_THREAD


def test_arguments_machine_and_place() -> None:
    # The third argument, the machine, and the place.
    third = program((0x20, 0, 0, 32), (0x15, 0, 1, 12), (0x06, 0, 0, _ALLOW), (0x06, 0, 0, _KILL))
    assert action((third,), (28, 1 << 40, 4096, 12)) is Action.ALLOW
    assert action((third,), (28, 12, 12, 4)) is Action.KILL_PROCESS
    machine = program((0x20, 0, 0, 4), (0x15, 0, 1, 0xC000003E), (0x06, 0, 0, _ALLOW), (0x06, 0, 0, _KILL))
    assert action((machine,), (1,)) is Action.ALLOW
    place = program((0x20, 0, 0, 8), (0x15, 0, 1, 0x1234), (0x06, 0, 0, _ALLOW), (0x06, 0, 0, _KILL))
    assert action((place,), (1,), 0x1234) is Action.ALLOW
    assert action((place,), (1,)) is Action.KILL_PROCESS


def test_strict_mode() -> None:
    assert action((), (0,), strict=True) is Action.ALLOW
    assert action((), (157,), strict=True) is Action.KILL_THREAD


@pytest.mark.parametrize("broken", [b"", b"\x20", program((0x20, 0, 0, 0)), program((0xFF, 0, 0, 0), (0x06, 0, 0, 1))])
def test_what_is_not_understood_ends_the_process(broken: bytes) -> None:
    assert action((broken,), (1,)) is Action.KILL_PROCESS


constants = st.sampled_from([0, 1, 2, 3, 4, 31, 32, 39, 110, 0x0F0F, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
computing = st.tuples(
    st.sampled_from([0x04 | op | source for op in range(0, 0xB0, 0x10) if op != 0x80 for source in (0, 8)] + [0x84]),
    st.just(0),
    st.just(0),
    constants,
)
moving = st.sampled_from([(0x00, 3), (0x01, 5), (0x07, 0), (0x87, 0), (0x02, 1), (0x03, 2), (0x60, 1), (0x61, 2)])
others = st.one_of(moving.map(lambda one: (one[0], 0, 0, one[1])), st.just((0x20, 0, 0, 0)), st.just((0x80, 0, 0, 0)))
jumping = st.tuples(
    st.sampled_from([0x05 | test | source for test in (0x10, 0x20, 0x30, 0x40) for source in (0, 8)]),
    st.integers(0, 2),
    st.integers(0, 2),
    constants,
)
bodies = st.lists(st.one_of(computing, others, jumping), min_size=1, max_size=12)


def kernel_says(code: bytes) -> str:
    """What this kernel does with getppid under a filter, tried in a process of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        libc = ctypes.CDLL(None, use_errno=True)
        memory = ctypes.create_string_buffer(code, len(code))
        described = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(memory)))
        libc.prctl(38, 1, 0, 0, 0)
        if libc.prctl(22, 2, described, 0, 0):
            os.write(writer, b"refused")
            os._exit(0)
        result = libc.syscall(_GETPPID)
        os.write(writer, b"errno" if result == -1 else b"allowed")
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 100).decode()
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "killed" if status == -signal.SIGSYS else said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls by their numbers on x86_64")
@settings(max_examples=60, deadline=None)
@given(bodies, constants)
def test_as_this_kernel_does(body: list[tuple[int, int, int, int]], constant: int) -> None:
    """Of a made-up program's result one bit decides; other calls than the one that is tried are allowed."""
    # Both scratch words are written first, as the kernel demands.
    begin = [(0x20, 0, 0, 0), (0x15, 1, 0, _GETPPID), (0x06, 0, 0, _ALLOW), (0x02, 0, 0, 1), (0x02, 0, 0, 2)]
    end = [(0x54, 0, 0, constant | 1), (0x15, 0, 1, 0)]
    # No jump of the body reaches beyond these.
    rest = [(0x87, 0, 0, 0)] * 2 + end + [(0x06, 0, 0, _ERRNO), (0x06, 0, 0, _ALLOW)]
    code = program(*begin, *body, *rest)
    said = kernel_says(code)
    if said == "refused":
        return
    found = action((code,), (_GETPPID,))
    # A division by a register that is zero ends a program with 0: the thread is killed.
    assert {"errno": Action.ERRNO, "allowed": Action.ALLOW}.get(said, found) is found
    assert said != "killed" or found in (Action.KILL_THREAD, Action.KILL_PROCESS)
    assert action((code,), (_GETPID,)) is Action.ALLOW
