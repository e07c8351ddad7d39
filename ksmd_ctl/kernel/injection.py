# SPDX-License-Identifier: GPL-2.0-or-later
"""Has a thread of another process make system calls.

The thread is stopped by ptrace(2), its instruction pointer set to a few instructions of ours, and put back afterwards.
They make the call, and then restore the thread by themselves (`ksmd_ctl.kernel.x86_64`, `ksmd_ctl.kernel.aarch64`). So
whatever happens to this process, at whatever moment, the thread goes on where it was, with its registers as they were:
the kernel lets go of a thread whose tracer has ended (kernel/ptrace.c:exit_ptrace), it makes the call, if it has not
yet, and returns. Nothing of it is on the thread's stack, of which nobody can tell how much is in use (small stacks of
Go, alternate stacks).

They lie in the vDSO's last page, behind its end, where that page has zeroes: the process gets a copy of that page. Its
program, its libraries and its stack are not written to.

While all goes well this process puts the registers back, at a stop of the same kind as the first one (in get_signal):
so the kernel restarts the call that was interrupted (ERESTARTSYS and its kin, ERESTART_RESTARTBLOCK), or lets a
signal's handler interrupt it, as if nobody had been there. On aarch64 registers do not tell the kernel to do so: the
thread is let go where it enters that call again, and signals that came meanwhile are sent to it there once more. The
instructions themselves can only restart the call. Some calls end with EINTR at each stop, as epoll_wait(2): the thread
makes these again, a timeout of theirs from its beginning.

A signal that comes meanwhile is delivered with the thread's own registers, and the call begun again. A thread is left
to go on for a moment where it is in a restartable sequence (rseq(2)), or still in instructions of somebody who was
killed.

How calls are made that its seccomp filters refuse, `ksmd_ctl.kernel.filtered_calls` says.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Denied, NoSuchProcess, Refused, TimedOut
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.aarch64 import Aarch64Code
from ksmd_ctl.kernel.architecture import AARCH64, X86_64, Call, Registers, architecture
from ksmd_ctl.kernel.filtered_calls import end_slowly, permit, permits
from ksmd_ctl.kernel.injected_code import (
    MARK_BYTES,
    RESTARTED,
    Code,
    Memory,
    free_slot,
    in_sequence,
    signed,
    vdso_tail,
)
from ksmd_ctl.kernel.proc_pid import Held
from ksmd_ctl.kernel.ptrace import Stop, Tracee, sent_by_us, waiting
from ksmd_ctl.kernel.threads import Thread, choose, signal_waits
from ksmd_ctl.kernel.traceable import AT_START
from ksmd_ctl.kernel.x86_64 import X86_64Code

#: The instructions for each kind of processor, by its name.
CODES: Final[Mapping[str, Code]] = {X86_64.name: X86_64Code(), AARCH64.name: Aarch64Code()}
_OWN_CALLS: Final = "it handles system calls itself (PR_SET_SYSCALL_USER_DISPATCH, SIGSYS), as Wine does"

# Of two that want to run: first who has stopped somebody, last who must not end before the other has run.
_FIRST, _LAST = -20, 19
_TRIES: Final = 50
_PAUSE_SECONDS: Final = 0.001
# How long a thread may take until it stops. That is at once, unless it waits in the kernel where no signal reaches it,
# or for a CPU: of 64 threads with nice 19 on a busy machine, one waited for more than 2 s.
_STOP_SECONDS: Final = 20.0
# A signal that waits is delivered at once.
_SIGNAL_SECONDS: Final = 0.02
# A call may walk all of a process's memory. Being late harms nobody: the thread goes on by itself.
_CALL_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Injected:
    """What came of calls.

    :ivar results: of each call that was made, -errno where it failed; the last ones may be missing
    :ivar stopped_seconds: how long the thread was kept from its own work, at most
    """

    results: tuple[int, ...]
    stopped_seconds: float


def inject(
    process: ProcessId,
    calls: Sequence[Call],
    *,
    root: Path = Path("/"),
    budget_seconds: float = 0.002,
    step: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Injected:
    """Have one thread of a process make system calls. For a process of its own with one thread, that ends soon.

    :param budget_seconds: no more calls begin after so long, so that the thread goes on
    :param step: is told before each step what comes next
    :raises NoSuchProcess: it is gone, or executed another program
    :raises Denied: it may not be traced, or somebody else traces it
    :raises Refused: it is in no state for that: the text says why
    :raises Rejected: a 32-bit program
    :raises TimedOut: it did not stop; it is let go when this process ends
    """
    code = CODES[architecture().name]
    what = f"having process {process.pid} make a system call"
    with Held(process, root) as held, waiting(), _niced(_FIRST):
        thread = choose(process.pid, what, root)
        held.verify()
        if thread.seccomp:
            end_slowly()
        step("seize")
        try:
            tracee = Tracee(thread.tid)
        except Denied:
            # Of one that ends just now the kernel says the same, and of one that somebody else has begun to trace.
            held.verify()
            choose(process.pid, what, root)
            raise
        job = _Job(process.pid, thread, tracee, code, root, step)
        began = clock()
        results: list[int] = []
        try:
            job.stop()
            job.permit(calls)
            for call in calls:
                results.append(job.call(call))
                if clock() - began >= budget_seconds:
                    break
        except NoSuchProcess:
            job.forget()
            raise
        finally:
            job.let_go()
            job.memory.close()
        return Injected(tuple(results), clock() - began)


@contextmanager
def _niced(nice: int) -> Iterator[None]:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


# -- one stop ------------------------------------------------------------------------------------------------


class _Signalled(Exception):
    """A signal came, and was delivered; the call was not made."""


class _Job:
    """Calls made by one thread while it is stopped.

    :ivar saved: its own registers, while it is stopped and they are known
    :ivar ended: its stop has ended a call, which is to be made again
    :ivar inside: its registers are not its own but those for a call, or after one
    """

    def __init__(
        self, pid: int, thread: Thread, tracee: Tracee, code: Code, root: Path, step: Callable[[str], None]
    ) -> None:
        self.pid = pid
        self.thread = thread
        self.tracee = tracee
        self.code = code
        self.pc, self.syscall = code.architecture.pc, code.architecture.syscall
        self.root = root
        self.step = step
        self.what = f"having process {pid} make a system call"
        self.memory = Memory(pid, thread.tid, root)
        self.saved: Registers | None = None
        self.inside = False
        self.ended = False
        self.running = True
        self.place = 0
        self.pointer = 0
        self.first: Mapping[Call, Call] = {}

    def stop(self) -> None:
        """Have it stop, outside of any system call."""
        self.step("interrupt")
        call = self.code.call_of(self.pid, self.thread.tid, self.root)
        self.tracee.interrupt()
        if not self.running:
            self.resume()
        self.wait_asked()
        # A program that executed another one since has other memory.
        self.memory.close()
        self.memory = Memory(self.pid, self.thread.tid, self.root)
        again = self.code.made_again(self.tracee.registers(), call)
        # Where a signal waits the program is to learn of it.
        self.ended = bool(again and self.calls_at(again) and not signal_waits(self.thread, self.pid, self.root))
        if again and self.ended:
            self.step("again")
            self.tracee.set_registers(again)
        for _ in range(_TRIES):
            found = self.tracee.registers()
            if not (self.code.undecided(found) and self.calls_at(found)):
                break
            self.step("enter its call")
            self.resume(to_syscall=True)
            self.wait_syscall()
            self.step("interrupt its call")
            self.tracee.interrupt()
            self.resume()
            self.wait_asked()

    def calls_at(self, found: Registers) -> bool:
        """Whether it is about to make a system call."""
        return self.memory.read(found[self.pc], len(self.syscall)) == self.syscall

    def wait_syscall(self) -> None:
        while not (stop := self.wait(_STOP_SECONDS)).syscall:
            self.resume(stop.signal_to_deliver, to_syscall=True)

    def wait_asked(self) -> None:
        while True:
            stop = self.wait(_STOP_SECONDS)
            if stop.asked:
                return
            self.resume(stop.signal_to_deliver)

    def go_on(self, seconds: float) -> None:
        """Let it run for a moment, with its own registers; also one of a process that is stopped."""
        until = time.monotonic() + seconds
        self.resume()
        with suppress(TimedOut):
            while (left := until - time.monotonic()) > 0:
                self.resume(self.wait(left).signal_to_deliver)

    def wait(self, seconds: float) -> Stop:
        stop = self.tracee.wait(seconds)
        self.running = False
        return stop

    def resume(self, number: int = 0, *, to_syscall: bool = False) -> None:
        self.running = True
        self.tracee.resume(number, to_syscall=to_syscall)

    # -- before the first call -------------------------------------------------------------------------------

    def permit(self, calls: Sequence[Call]) -> None:
        """Have its seccomp filters let calls pass.

        :raises Refused: they can't be suspended
        """
        if self.thread.seccomp:
            self.step("filters")
            # A filter may ask where the call is made; where none of our instructions were left, it is there.
            pointer = vdso_tail(self.pid, self.thread.tid, self.memory, self.root)[1]
            self.pointer = pointer - self.code.slot_bytes + len(self.syscall)
            self.first = permit(self.tracee, self.thread, calls, self.pointer, self.what)

    def prepare(self) -> Registers:
        """Its registers, and the instructions in place.

        :raises Refused: it can't be done with this thread
        """
        if self.saved is not None:
            return self.saved
        for _ in range(_TRIES):
            found = self.tracee.registers()
            start, end = vdso_tail(self.pid, self.thread.tid, self.memory, self.root)
            obstacle = self.obstacle(found, start, end)
            if not obstacle:
                break
            self.go_on(_PAUSE_SECONDS)
            self.stop()
        else:
            raise Refused(self.what, f"{obstacle}, each time that it was looked at", hint="try again later")
        if self.tracee.dispatches_calls():
            raise Refused(self.what, _OWN_CALLS, hint=AT_START)
        self.place = self.free_slot(start, end, found[self.code.architecture.sp])
        content = self.code.slot(self.tracee, found, self.place)
        self.step("mark")
        # First whose it is: what was left half-written can be told so.
        mark_at = len(content) - MARK_BYTES
        self.store(self.place + mark_at, content[mark_at:])
        self.step("store")
        self.store(self.place, content[:mark_at])
        self.saved = found
        return found

    def store(self, address: int, content: bytes) -> None:
        """Write what is not there yet."""
        there = self.memory.read(address, len(content))
        for at in range(0, len(content), 8):
            if there[at : at + 8] != content[at : at + 8]:
                self.tracee.store(address + at, content[at : at + 8])

    def obstacle(self, found: Registers, start: int, end: int) -> str:
        """Why it has to go on for a moment first; empty for no reason."""
        at = found[self.pc]
        if start <= at < end:
            return "it is in the instructions of somebody who was killed"
        address = self.tracee.restartable()
        if address and in_sequence(self.memory, address, at):
            return "it is in a restartable sequence (rseq)"
        return self.code.obstacle(self.tracee, self.memory, found, (start, end), self.permits)

    def permits(self, number: int) -> bool:
        return permits(self.tracee, self.thread, number, self.pointer)

    def free_slot(self, start: int, end: int, stack: int) -> int:
        """
        :raises Refused: there is no place
        """
        others = frozenset(map(int, os.listdir(self.root / "proc" / str(self.pid) / "task"))) - {self.thread.tid}
        sizes = self.code.slot_bytes, self.code.code_bytes
        if at := free_slot(self.memory, (start, end), stack, self.thread.tid, others, *sizes):
            return at
        why = "its vDSO has no room for the instructions that this takes" if start else "it has no vDSO"
        raise Refused(self.what, why, hint=AT_START)

    # -- calls -----------------------------------------------------------------------------------------------

    def call(self, call: Call) -> int:
        """Have it make a call: the result, -errno where it failed.

        :raises Refused: signals keep coming
        """
        for _ in range(_TRIES):
            saved = self.prepare()
            with suppress(_Signalled):
                return self.made(saved, call)
        raise Refused(self.what, f"a signal came each of {_TRIES} times", hint="try again later")

    def made(self, saved: Registers, call: Call) -> int:
        first = self.first.get(call, call)
        self.step("registers")
        self.inside = True
        self.tracee.set_registers(self.code.entering(saved, first, self.place))
        self.step("enter")
        self.resume(to_syscall=True)
        self.expect_syscall(saved, self.wait(_STOP_SECONDS))
        if first != call:
            found = self.tracee.registers()
            with _niced(_LAST):
                self.step("replace")
                # Nothing comes between these two: see the top of the file.
                self.code.replace(self.tracee, found, call)
                self.resume(to_syscall=True)
                self.step("made")
                stop = self.wait(_CALL_SECONDS)
        else:
            self.step("make")
            self.resume(to_syscall=True)
            self.step("made")
            stop = self.wait(_CALL_SECONDS)
        self.expect_syscall(saved, stop)
        result = signed(self.tracee.registers()[self.code.result])
        if result in RESTARTED:
            # A signal came while the kernel was at it (mm/ksm.c:unmerge_ksm_pages): once it is delivered, again.
            self.put_back(saved)
            self.saved = None
            self.go_on(_SIGNAL_SECONDS)
            self.stop()
            raise _Signalled
        return result

    def expect_syscall(self, saved: Registers, stop: Stop) -> None:
        """Have a signal delivered that came first, with the thread's own registers.

        :raises _Signalled: one came
        """
        if stop.syscall:
            return
        self.step("signal")
        after = self.place + len(self.syscall)
        refused = stop.signal_to_deliver == signal.SIGSYS and self.tracee.registers()[self.pc] == after
        self.tracee.set_registers(saved)
        self.inside = False
        if refused:
            # It is about the call that it did not ask for: as if nobody had, it learns nothing of it.
            self.resume()
            self.stop()
            raise Refused(self.what, _OWN_CALLS, hint=AT_START)
        if not stop.asked:
            self.saved = None
            self.step("deliver")
            if self.code.enters_again(self.memory, saved, ended=self.ended):
                self.enter_again(stop)
            else:
                self.resume(stop.signal_to_deliver)
            self.stop()
        raise _Signalled

    # -- after a call ----------------------------------------------------------------------------------------

    def put_back(self, saved: Registers) -> None:
        """From the end of a call to a stop as the first one was, with the registers that it had there."""
        self.step("interrupt again")
        self.tracee.interrupt()
        self.step("leave")
        self.resume()
        stop = self.wait(_STOP_SECONDS)
        self.step("put back")
        self.tracee.set_registers(saved)
        self.inside = False
        if self.code.enters_again(self.memory, saved, ended=self.ended):
            self.enter_again(stop)
        elif not stop.asked:
            self.resume(stop.signal_to_deliver)
            self.wait_asked()

    def enter_again(self, stop: Stop) -> None:
        """From a stop, where it has its own registers again, into the call that it was in. It ends up stopped.

        Signals that are about to be delivered are held back until then, and sent again: so they interrupt the call.
        """
        came: list[tuple[int, bytes]] = []
        self.step("enter again")
        while not stop.syscall:
            if stop.signal_to_deliver:
                came.append((stop.signal_to_deliver, self.tracee.signal_info()))
            self.resume(to_syscall=True)
            stop = self.wait(_STOP_SECONDS)
        sent = [number for number, _ in came]
        if not sent:
            return
        for number in sent:
            self.tracee.send(self.pid, number)
        self.step("deliver again")
        # One may wait longer: where the same one waits already, or the call has another signal mask.
        with suppress(TimedOut):
            while sent:
                self.resume(stop.signal_to_deliver)
                stop = self.wait(_SIGNAL_SECONDS)
                if number := stop.signal_to_deliver:
                    info = self.tracee.signal_info()
                    if sent_by_us(info):
                        sent.remove(number)
                    else:
                        came.append((number, info))
                    # In the order in which they came, and as they came.
                    first = next(item for item in came if item[0] == number)
                    came.remove(first)
                    self.tracee.set_signal_info(first[1])
        self.tracee.interrupt()
        if not self.running:
            self.resume(stop.signal_to_deliver)
        self.wait_asked()

    def let_go(self) -> None:
        """Put its registers back, and let it go on."""
        try:
            if self.running:
                # It does not stop: when this process ends it is let go.
                return
            if self.inside and self.saved is not None:
                self.put_back(self.saved)
            if self.saved is not None:
                self.step("clear")
                self.store(self.place, bytes(self.code.slot_bytes))
            self.step("detach")
            self.tracee.detach()
        except NoSuchProcess:
            # Nothing is left to be put back.
            self.forget()

    def forget(self) -> None:
        """Learn of its end: before that, its parent does not."""
        self.running = True
        with suppress(NoSuchProcess, TimedOut):
            for _ in range(_TRIES):
                self.tracee.wait(_STOP_SECONDS)
                # It was stopped, and is ending.
                time.sleep(_PAUSE_SECONDS)
