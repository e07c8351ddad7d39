# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, NoSuchProcess, Refused, Rejected
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.architecture import AARCH64, X86_64
from ksmd_ctl.kernel.injected_code import Memory, vdso_tail
from ksmd_ctl.kernel.injection import CODES, Injected, inject
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.ptrace import Tracee
from ksmd_ctl.kernel.threads import threads
from tests.kernel.switched import Target, compiled, in_child, started

MACHINE = {found.name: found for found in (X86_64, AARCH64)}.get(platform.machine(), X86_64)
pytestmark = pytest.mark.skipif(platform.machine() != MACHINE.name, reason="injection is for x86_64 and aarch64")

GETPID, EXIT = ((39,), 60) if MACHINE is X86_64 else ((172,), 93)
#: PR_SET_MEMORY_MERGE.
ON, OFF = (MACHINE.prctl, 67, 1, 0, 0, 0), (MACHINE.prctl, 67, 0, 0, 0, 0)
#: Where it takes long: an emulated processor, 1 for this one.
SLOW = float(os.environ.get("KSMD_CTL_SLOW", "1"))
#: How many times as much is done where a guest is booted for it.
TIMES = int(os.environ.get("KSMD_CTL_TIMES", "1"))


def _done() -> int:
    try:
        syscalls.prctl(syscalls.PR_GET_MEMORY_MERGE)
    except OSError as error:
        return -(error.errno or 0)
    return 0


#: What these give on this kernel: before 6.4 it lacks them.
DONE = _done()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("switched"))


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("switched"), "-static")


def expect(process: ProcessId, call: tuple[int, ...], result: int) -> Injected:
    found = inject(process, [call])
    assert found.results == (result,)
    return found


def switched(process: ProcessId, count: int) -> Callable[[], None]:
    """Switch it so many times, on and off."""

    def run() -> None:
        for number in range(count):
            expect(process, OFF if number % 2 else ON, DONE)

    return run


def need_mode(mode: str) -> None:
    if mode == "rseq" and MACHINE is not X86_64:
        pytest.skip("restartable sequences are written for x86_64")


def test_only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", "riscv64")))
    with pytest.raises(Absent, match="riscv64"):
        inject(ProcessId(1, 1), [GETPID])


# -- programs that check themselves --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "count"),
    [(("spin", "200"), 300), (("sleep",), 150), (("rseq",), 150), (("threads",), 4), (("wait",), 50)],
    ids=lambda found: found[0] if isinstance(found, tuple) else "",
)
def test_a_program_does_not_notice(program: Path, mode: tuple[str, ...], count: int) -> None:
    need_mode(mode[0])
    with started(program, *mode) as target:
        assert in_child(switched(target.process, count * (TIMES if mode[0] == "spin" else 1))) == 0
        time.sleep(0.02)
        said = target.end()
        assert said.startswith("0 errors"), said
        assert mode[0] != "spin" or " 0 signals" not in said
        assert target.program.returncode == 0


@pytest.mark.parametrize("mode", [("spin", "200"), ("sleep",)], ids=lambda mode: str(mode[0]))
def test_a_static_program_does_not_notice(static: Path, mode: tuple[str, ...]) -> None:
    """It lies far from its vDSO."""
    with started(static, *mode) as target:
        assert in_child(switched(target.process, 100)) == 0
        assert target.end().startswith("0 errors")


def test_python_does_not_notice() -> None:
    code = "import sys,os\nprint(os.getpid(),flush=True)\nfor line in sys.stdin: print(line[-2::-1],flush=True)"
    with started(sys.executable, "-c", code) as target:
        for number in range(20):
            assert in_child(switched(target.process, 10)) == 0
            assert target.ask(f"{number:3}\n") == f"{number:3}"[::-1] + "\n"


@pytest.mark.parametrize("mode", ["filter", "busy"])
def test_a_filter_that_permits_little_more_than_read_and_write(program: Path, mode: str) -> None:
    """It would end the program for prctl, and for rt_sigreturn; it stays in place."""
    with started(program, mode) as target:
        until = time.monotonic() + 10
        while target.status("Seccomp") != "2" and time.monotonic() < until:
            time.sleep(0.01)
        assert in_child(switched(target.process, 50)) == 0
        assert (target.status("Seccomp"), target.program.poll()) == ("2", None)
        if mode == "filter":
            assert target.ask("a") == "a"
            # In force as before.
            os.write(target.program.stdin.fileno(), b"k")  # type: ignore[union-attr]
            assert target.program.wait(30) == -signal.SIGSYS


def test_a_static_program_with_a_filter_that_refuses_rt_sigreturn(static: Path) -> None:
    """On aarch64 it could not restore itself."""
    with started(static, "filter") as target:
        assert target.ask("a") == "a"
        if MACHINE is X86_64:
            assert in_child(switched(target.process, 2)) == 0
        else:
            with pytest.raises(Refused, match="filters refuse rt_sigreturn"):
                inject(target.process, [ON])
        assert target.ask("b") == "b"
        assert target.status("Seccomp") == "2"


def test_strict_seccomp() -> None:
    code = (
        "import ctypes,os,sys\nprint(os.getpid(),flush=True)\nsys.stdin.buffer.raw.read(1)\n"
        "libc=ctypes.CDLL(None)\nb=ctypes.create_string_buffer(1)\nlibc.prctl(22,1,0,0,0)\n"
        "while libc.read(0,b,1)==1: libc.write(1,b,1)\n"
    )
    with started(sys.executable, "-c", code) as target:
        assert target.ask("ab", 1) == "b"
        assert target.status("Seccomp") == "1"
        assert in_child(switched(target.process, 10)) == 0
        assert target.ask("c") == "c"


# -- states in which a process may be ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["spin", "wait"])
def test_a_stopped_process_stays_stopped(program: Path, mode: str) -> None:
    with started(program, mode) as target:
        os.kill(target.process.pid, signal.SIGSTOP)
        os.waitpid(target.process.pid, os.WUNTRACED)
        assert in_child(switched(target.process, 20)) == 0
        assert target.status("State").startswith("T")
        # Nobody is told that it stopped again.
        assert os.waitpid(target.process.pid, os.WUNTRACED | os.WNOHANG) == (0, 0)
        os.kill(target.process.pid, signal.SIGCONT)
        time.sleep(0.05)
        assert target.end().startswith("0 errors")


def test_a_debugged_process_is_left_to_its_debugger(program: Path) -> None:
    with started(program, "spin") as target:
        code = (
            "from ksmd_ctl.kernel.ptrace import Tracee\nimport sys\nt=Tracee(int(sys.argv[1]))\n"
            "print(1,flush=True)\nsys.stdin.read()"
        )
        with started(sys.executable, "-c", code, str(target.process.pid)) as debugger:
            with pytest.raises(Refused, match=rf"python.* \(pid {debugger.process.pid}\) traces it") as caught:
                inject(target.process, [ON])
            assert "debugger" in caught.value.hint
            assert target.status("State").startswith("R")
        assert target.end().startswith("0 errors")


if MACHINE is AARCH64:

    def test_a_program_that_computes_with_sve_is_refused(program: Path) -> None:
        """Any system call would discard these registers."""
        if " sve " not in Path("/proc/cpuinfo").read_text():
            pytest.skip("this processor has no SVE")
        with started(program, "sve") as target:
            with pytest.raises(Refused, match="SVE registers"):
                inject(target.process, [ON])
            assert target.end().startswith("0 errors")


def test_in_namespaces_of_its_own(program: Path) -> None:
    made = subprocess.run(["unshare", "--user", "--pid", "--fork", "true"], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("needs user and pid namespaces")
    with started(
        program, "spin", before=("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    ) as target:
        assert in_child(switched(target.process, 20)) == 0
        assert in_child(lambda: expect(target.process, GETPID, 1)) == 0
        assert target.end().startswith("0 errors")


VSYSCALL = """
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
static volatile sig_atomic_t over;
static void end(int number) { over = 1; }
int main(void)
{
	long (*now)(long *) = (void *)0xffffffffff600400, last = 0, told, errors = 0;
	signal(SIGUSR2, end);
	last = now(&told);
	printf("%d\\n", getpid());
	fflush(stdout);
	for (; !over; last = told)
		errors += now(&told) != told || told < last;
	printf("%ld errors\\n", errors);
}
"""


def test_a_program_that_lives_in_the_vsyscall_page(tmp_path: Path) -> None:
    if "[vsyscall]" not in Path("/proc/self/maps").read_text():
        pytest.skip("this kernel has no vsyscall page (vsyscall=none)")
    source = tmp_path / "vsyscall.c"
    source.write_text(VSYSCALL)
    with started(compiled(tmp_path, source=source)) as target:
        assert in_child(switched(target.process, 200)) == 0
        assert target.end() == "0 errors\n"


def test_a_32_bit_program_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "small.S"
    source.write_text(
        ".globl _start\n_start: movl $4, %eax\nmovl $1, %ebx\nmovl $text, %ecx\nmovl $2, %edx\nint $0x80\n"
        '1: movl $29, %eax\nint $0x80\njmp 1b\n.data\ntext: .ascii "1\\n"\n'
    )
    with started(compiled(tmp_path, "-m32", "-nostdlib", "-static", source=source)) as target:
        with pytest.raises((Rejected, Refused), match="32-bit"):
            inject(target.process, [ON])
        # It is not held.
        assert target.status("State")[0] in "SR"


@pytest.mark.parametrize("tells", [True, False])
def test_who_handles_system_calls_itself(tells: bool) -> None:
    """As Wine does. Before 6.4 no kernel tells a tracer, but the program gets a SIGSYS, which would end this one."""
    code = (
        "import ctypes,os,sys\nlibc=ctypes.CDLL(None,use_errno=True)\nblock=ctypes.c_char(b'\\1')\n"
        "vdso=next(int(line.split('-')[0],16) for line in open('/proc/self/maps') if '[vdso]' in line)\n"
        # Its own instructions are permitted: where it can't read a clock it makes the call.
        "head=ctypes.string_at(vdso,64)\nnumber=lambda at,n: int.from_bytes(head[at:at+n],'little')\n"
        "end=vdso+number(40,8)+number(58,2)*number(60,2)\n"
        "done=libc.prctl(59,1,ctypes.c_ulong(4096),ctypes.c_ulong(end-4096),ctypes.byref(block))\n"
        "print(os.getpid(),flush=True)\nfor line in sys.stdin: os.write(1,b'%2d' % done)"
    )
    with started(sys.executable, "-c", code) as target:
        if target.ask("a\n") != " 0":
            pytest.skip("needs PR_SET_SYSCALL_USER_DISPATCH (since 5.11)")

        def work() -> None:
            if not tells:
                Tracee.dispatches_calls = lambda _: False  # type: ignore[method-assign]
            with pytest.raises(Refused, match="handles system calls itself"):
                inject(target.process, [ON])

        assert in_child(work) == 0
        assert target.ask("a\n") == " 0"


def test_who_is_gone(program: Path) -> None:
    with pytest.raises(NoSuchProcess):
        inject(ProcessId(os.getpid(), 1), [ON])
    with started(program, "wait") as target:
        target.program.kill()
        os.waitid(os.P_PID, target.process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NoSuchProcess, match="exited"):
            inject(target.process, [ON])


def test_its_first_thread_has_ended() -> None:
    code = (
        "import ctypes,os,threading,time\nprint(os.getpid(),flush=True)\n"
        f"threading.Thread(target=lambda: time.sleep(600)).start()\nctypes.CDLL(None).syscall({EXIT},0)"
    )
    with started(sys.executable, "-c", code) as target:
        until = time.monotonic() + 10
        while not target.status("State").startswith("Z") and time.monotonic() < until:
            time.sleep(0.01)
        first, second = threads(target.process.pid)
        assert (first.state, second.state) == ("Z", "S")
        # The call's result says that it is one process still.
        assert in_child(lambda: expect(target.process, GETPID, target.process.pid)) == 0


def test_a_program_that_is_replaced_again_and_again(program: Path) -> None:
    """Each try succeeds, or says that it went; the program goes on."""
    with started(program, "exec") as target:

        def run() -> None:
            for _ in range(100):
                with suppress(NoSuchProcess):
                    inject(target.process, [GETPID, ON])

        assert in_child(run) == 0
        assert target.program.poll() is None


def test_programs_that_end_meanwhile(program: Path) -> None:
    for number in range(10):
        with started(program, "spin") as target:

            def run(pid: int = target.process.pid, process: ProcessId = target.process, at: int = number + 2) -> None:
                seen = 0

                def step(_: str) -> None:
                    nonlocal seen
                    seen += 1
                    if seen == at:
                        os.kill(pid, signal.SIGKILL)

                # Killed at its last steps, it has made the call; then the next one finds nobody.
                with suppress(NoSuchProcess):
                    inject(process, [ON], step=step)
                with pytest.raises(NoSuchProcess):
                    inject(process, [ON])

            assert in_child(run) == 0


# -- killed --------------------------------------------------------------------------------------------------


def killed_at_each_step(target: Target, count: int, alive: Callable[[], None]) -> None:
    """Kill who injects, at one step after the other and at random moments in turn."""

    def run(at: int, on: int) -> Callable[[], None]:
        def work() -> None:
            seen = 0

            def step(_: str) -> None:
                nonlocal seen
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            assert inject(target.process, [ON if on else OFF], step=step).results == (DONE,)

        return work

    chance, killed, at = random.Random(7), 0, 0
    for number in range(count):
        if number % 2:
            status = in_child(run(-1, number & 2), kill_after=SLOW * chance.uniform(0, 0.004))
        else:
            at += 1
            status = in_child(run(at, number & 2))
            at = at if status else 0
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        assert target.program.poll() is None, f"killed at {number}"
        alive()
    assert killed > count // 2
    # What was left by those who were killed does not keep the next one from it.
    assert in_child(switched(target.process, 2)) == 0


@pytest.mark.parametrize("mode", [("spin", "100"), ("sleep",), ("rseq",)], ids=lambda mode: str(mode[0]))
def test_killed_at_any_moment_it_leaves_the_program_as_it_was(program: Path, mode: tuple[str, ...]) -> None:
    need_mode(mode[0])
    with started(program, *mode) as target:
        killed_at_each_step(target, 60 * TIMES, lambda: None)
        assert target.end().startswith("0 errors")


def test_killed_at_any_moment_it_leaves_a_static_program_as_it_was(static: Path) -> None:
    with started(static, "spin", "100") as target:
        killed_at_each_step(target, 60 * TIMES, lambda: None)
        assert target.end().startswith("0 errors")


def test_killed_at_any_moment_it_leaves_the_filter_in_place(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if SLOW > 1:
        # Page tables take as much longer there.
        monkeypatch.setattr("ksmd_ctl.kernel.filtered_calls._ADDRESSES_BYTES", int((4 << 30) / SLOW) & -4096)
    with started(program, "filter") as target:
        assert target.ask("a") == "a"

        def alive() -> None:
            assert target.ask("x") == "x"
            assert target.status("Seccomp") == "2"

        killed_at_each_step(target, 36 * TIMES, alive)


def test_killed_while_stopped(program: Path) -> None:
    with started(program, "spin") as target:
        os.kill(target.process.pid, signal.SIGSTOP)
        os.waitpid(target.process.pid, os.WUNTRACED)

        def alive() -> None:
            until = time.monotonic() + 10
            while not target.status("State").startswith("T"):
                assert time.monotonic() < until
                time.sleep(0.001)

        killed_at_each_step(target, 40, alive)
        os.kill(target.process.pid, signal.SIGCONT)
        assert target.end().startswith("0 errors")


def test_nothing_stays_in_its_memory(program: Path) -> None:
    with started(program, "wait") as target:
        pid = target.process.pid
        memory = Memory(pid, pid, Path("/"))
        start, end = vdso_tail(pid, pid, memory)
        before = memory.read(start, end - start)
        assert end - start >= CODES[MACHINE.name].slot_bytes
        assert before == bytes(end - start)
        assert in_child(lambda: expect(target.process, GETPID, pid)) == 0
        assert memory.read(start, end - start) == before
        memory.close()


def test_more_calls_than_time(program: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with started(program, "wait") as target:

        def run() -> None:
            found = inject(target.process, [GETPID] * 1000, budget_seconds=0.001)
            assert set(found.results) == {target.process.pid}
            assert 1 <= len(found.results) < 1000
            # While it is stopped this process comes first, and not afterwards.
            assert os.getpriority(os.PRIO_PROCESS, 0) == before

        assert in_child(run) == 0
        assert start_time_ticks(target.process.pid) == target.process.start_time_ticks


WAITING = """
import ctypes, os, select, signal, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
poll = select.epoll()
poll.register(0, select.EPOLLIN)
events = ctypes.create_string_buffer(16)
signals = ctypes.create_string_buffer(struct.pack("Q", 1 << (signal.SIGUSR1 - 1)) + bytes(120))
calls = {
    "epoll_wait": lambda: libc.epoll_wait(poll.fileno(), events, 1, -1),
    "sigtimedwait": lambda: libc.sigtimedwait(signals, None, ctypes.create_string_buffer(struct.pack("qq", 60, 0))),
}
print(os.getpid(), flush=True)
while True:
    ctypes.set_errno(0)
    found = calls[sys.argv[1]]()
    print(found, ctypes.get_errno(), flush=True)
    os.read(0, 1)
"""


@pytest.mark.parametrize(("call", "ended"), [("epoll_wait", "1 0"), ("sigtimedwait", f"{int(signal.SIGUSR1)} 0")])
def test_a_call_that_each_stop_ends_is_made_again(call: str, ended: str) -> None:
    """These end with EINTR when their thread is stopped, also without a signal (signal(7))."""
    with started(sys.executable, "-c", WAITING, call) as target:
        time.sleep(0.3)
        assert in_child(switched(target.process, 20)) == 0
        if call == "epoll_wait":
            assert target.program.stdin
            os.write(target.program.stdin.fileno(), b"x")
        else:
            os.kill(target.process.pid, signal.SIGUSR1)
        assert target.program.stdout
        assert target.program.stdout.readline().strip() == ended


def in_a_call(target: Target) -> None:
    """Wait until it waits in the kernel."""
    path, until, before = Path(f"/proc/{target.process.pid}/syscall"), time.monotonic() + 60, ""
    while (now := path.read_text()) != before or not now[:1].isdigit():
        assert time.monotonic() < until
        before = now
        time.sleep(0.02)


SLEEPING = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
span = ctypes.create_string_buffer((3).to_bytes(8, "little") + bytes(8))
word = ctypes.c_int(0)
futex = 202 if os.uname().machine == "x86_64" else 98
calls = {
    "nanosleep": lambda: libc.nanosleep(span, None),
    "clock_nanosleep": lambda: libc.clock_nanosleep(1, 0, span, None),
    "futex": lambda: libc.syscall(futex, ctypes.byref(word), 0, 0, span, None, 0),
    "poll": lambda: libc.poll(None, 0, 3000),
}
print(os.getpid(), flush=True)
os.read(0, 1)
ctypes.set_errno(0)
begin = time.monotonic()
found = calls[sys.argv[1]]()
print(found, ctypes.get_errno(), begin, time.monotonic(), flush=True)
"""


@pytest.mark.parametrize(
    ("call", "ended"), [("nanosleep", "0 0"), ("clock_nanosleep", "0 0"), ("futex", "-1 110"), ("poll", "0 0")]
)
def test_a_wait_ends_when_it_would_have(call: str, ended: str) -> None:
    with started(sys.executable, "-c", SLEEPING, call) as target:
        assert target.program.stdin
        os.write(target.program.stdin.fileno(), b"x")
        in_a_call(target)
        # Switched for more than half of the time: had it begun again, it would end that much later.
        until = time.monotonic() + 1.6
        while time.monotonic() < until:
            assert in_child(switched(target.process, 2)) == 0
        last = time.monotonic()
        assert target.program.stdout
        *result, begin, end = target.program.stdout.readline().split()
        assert " ".join(result) == ended
        assert float(begin) + 3 <= float(end) < last + 3


PAUSED = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda *_: None)
nothing, _ = os.pipe()
byte = ctypes.create_string_buffer(1)
print(os.getpid(), flush=True)
while True:
    ctypes.set_errno(0)
    found = libc.pause() if sys.argv[1] == "pause" else libc.read(nothing, byte, 1)
    print(found, ctypes.get_errno(), flush=True)
"""


@pytest.mark.parametrize("call", ["pause", "read"])
def test_a_signal_that_comes_meanwhile_ends_the_call(call: str) -> None:
    """Whenever it comes: a call that waits for one does not begin again after it."""
    with started(sys.executable, "-c", PAUSED, call) as target:
        pid, process = target.process.pid, target.process
        for at in range(1, 16):
            in_a_call(target)

            def work(at: int = at) -> None:
                seen = 0

                def step(_: str) -> None:
                    nonlocal seen
                    seen += 1
                    if seen == at:
                        os.kill(pid, signal.SIGUSR1)

                inject(process, [GETPID], step=step)
                if seen < at:
                    os.kill(pid, signal.SIGUSR1)

            assert in_child(work) == 0
            assert target.answer(5) == "-1 4\n"
