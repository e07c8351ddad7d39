# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from ksmd_ctl.errors import Denied, NoSuchProcess, TimedOut
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.architecture import architecture
from ksmd_ctl.kernel.ptrace import Tracee, sent_by_us, waiting
from tests.kernel.switched import Target, in_child, started

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="ptrace is used on x86_64 and aarch64"
)

CODE = """
import os, signal, sys
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
print(os.getpid(), flush=True)
for line in sys.stdin:
    print(len(got), flush=True)
"""


@pytest.fixture
def target() -> Iterator[Target]:
    with started(sys.executable, "-c", CODE) as found:
        yield found


def asked(target: Target) -> str:
    target.program.stdin.write("\n")  # type: ignore[union-attr]
    return target.answer(2).strip()


def stopped(tracee: Tracee) -> None:
    tracee.interrupt()
    while not (stop := tracee.wait(10)).asked:
        tracee.resume(stop.signal_to_deliver)


def test_registers_and_memory_are_read_and_written(target: Target) -> None:
    def work() -> None:
        with waiting():
            tracee = Tracee(target.process.pid)
            stopped(tracee)
            before = tracee.registers()
            assert before.get("cs", 0x33) == 0x33
            name = "r12" if "r12" in before else "x20"
            tracee.set_registers({**before, name: 0x1234567890})
            assert tracee.registers()[name] == 0x1234567890
            tracee.set_registers(before)
            free = before[architecture().sp] - 4096 & ~7
            tracee.store(free, b"\xff" * 8 + b"\1" * 8)
            with open(f"/proc/{target.process.pid}/mem", "rb") as memory:
                memory.seek(free)
                assert memory.read(16) == b"\xff" * 8 + b"\1" * 8
            assert tracee.restartable() >= 0
            assert not tracee.dispatches_calls()
            assert tracee.blocked_signals() == bytes(8)
            # NT_FPREGSET, and one that nobody has.
            assert any(tracee.register_set(2, 512))
            assert tracee.register_set(0x7777, 16) == bytes(16)
            tracee.detach()

    assert in_child(work) == 0
    assert asked(target) == "0"
    assert target.status("TracerPid") == "0"


@pytest.mark.parametrize("die", [False, True])
def test_a_signal_is_delivered_once_whatever_becomes_of_the_tracer(target: Target, die: bool) -> None:
    def work() -> None:
        with waiting():
            tracee = Tracee(target.process.pid)
            os.kill(target.process.pid, signal.SIGUSR1)
            stop = tracee.wait(10)
            assert stop.signal_to_deliver == signal.SIGUSR1
            # Told twice of the same stop.
            assert tracee.wait(10) == stop
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            tracee.detach(stop.signal_to_deliver)

    assert in_child(work) == (-signal.SIGKILL if die else 0)
    assert asked(target) == "1"


def test_a_signal_that_is_sent_comes_with_what_it_is_given(target: Target) -> None:
    def work() -> None:
        with waiting():
            tracee = Tracee(target.process.pid)
            tracee.send(target.process.pid, signal.SIGUSR1)
            assert tracee.wait(10).signal_to_deliver == signal.SIGUSR1
            info = tracee.signal_info()
            assert sent_by_us(info)
            # SI_USER.
            tracee.set_signal_info(info[:8] + bytes(4) + info[12:])
            assert not sent_by_us(tracee.signal_info())
            tracee.detach(signal.SIGUSR1)

    assert in_child(work) == 0
    assert asked(target) == "1"


def test_who_does_not_stop(target: Target) -> None:
    def work() -> None:
        with waiting():
            tracee = Tracee(target.process.pid)
            begin = time.monotonic()
            with pytest.raises(TimedOut, match=r"did not stop within 0\.05 s"):
                tracee.wait(0.05)
            assert time.monotonic() - begin < 5

    assert in_child(work) == 0
    assert asked(target) == "0"


def test_who_ends(target: Target) -> None:
    def work() -> None:
        with waiting():
            tracee = Tracee(target.process.pid)
            os.kill(target.process.pid, signal.SIGKILL)
            calls: tuple[Callable[[], object], ...] = (
                lambda: tracee.wait(10),
                tracee.registers,
                tracee.detach,
                lambda: tracee.wait(10),
            )
            for call in calls:
                with pytest.raises(NoSuchProcess, match="it ended"):
                    call()

    assert in_child(work) == 0


def test_who_is_traced_or_not_there(target: Target) -> None:
    def work() -> None:
        Tracee(target.process.pid)
        with pytest.raises(Denied) as caught:
            Tracee(target.process.pid)
        assert "ptrace_scope" in caught.value.hint
        with pytest.raises(NoSuchProcess):
            Tracee(1 << 22)

    assert in_child(work) == 0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Yama's scope 3, or another security module."""

    def refusing(*_: object) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(syscalls, "ptrace", refusing)
    with pytest.raises(Denied, match="PTRACE_SEIZE: EPERM") as caught:
        Tracee(1)
    assert "CAP_SYS_PTRACE" in caught.value.hint
    assert "kernel.yama.ptrace_scope" in caught.value.hint
    tracee = object.__new__(Tracee)
    tracee.tid = 1
    with pytest.raises(Denied) as caught:
        tracee.suspend_seccomp()
    assert "CAP_SYS_ADMIN" in caught.value.hint
