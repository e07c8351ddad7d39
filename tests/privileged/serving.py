# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests that do what a test needs, and a broker in a process of its own that knows them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ksmd_ctl.errors import Cancelled, Rejected
from ksmd_ctl.host.operation import Operation, Progress, readable
from ksmd_ctl.privileged.broker import Broker, Limits
from ksmd_ctl.privileged.client import RequestOperation, abandon
from ksmd_ctl.privileged.host import KernelHost, open_kernel_host
from ksmd_ctl.privileged.requests import REQUESTS, Context, Request, request_message

#: Nothing here takes so long, unless it hangs.
PATIENCE_SECONDS = 30.0

QUICK = Limits(request_seconds=5, stop_seconds=0.3, kill_seconds=5)


@dataclass(frozen=True, slots=True)
class Echo(Request[str]):
    """Gives back a text, so many times over."""

    name: ClassVar[str] = "echo"
    text: str
    times: int = 1

    def run(self, context: Context) -> str:
        context.report(Progress(1, 2, "halves"))
        return self.text * self.times


@dataclass(frozen=True, slots=True)
class Sleep(Request[None]):
    """Tells its pid as its progress, then sleeps; through SIGTERM if it is stubborn."""

    name: ClassVar[str] = "sleep"
    stubborn: bool = False

    def run(self, context: Context) -> None:
        if self.stubborn:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        context.report(Progress(os.getpid()))
        time.sleep(600)

    def state(self, root: Path) -> str:
        return "it lies in bed"


@dataclass(frozen=True, slots=True)
class Queued(Sleep):
    """Sleeps, or gives an answer at once; of one queue there is one at a time."""

    name: ClassVar[str] = "queued"
    name_of_queue: str = "knob"
    sleeps: bool = True

    @property
    def queue(self) -> str:
        return self.name_of_queue

    def run(self, context: Context) -> int:  # type: ignore[override]
        if self.sleeps:
            Sleep.run(self, context)
        return 1


@dataclass(frozen=True, slots=True)
class Compared(Request[int]):
    """Says of whom it was asked, and comes under the rule for contents."""

    name: ClassVar[str] = "compared"
    compares_contents: ClassVar[bool] = True

    def run(self, context: Context) -> int:
        return context.uid


@dataclass(frozen=True, slots=True)
class Careful(Request[str]):
    """When it is asked to stop it first writes a file; it then has a result, or not."""

    name: ClassVar[str] = "careful"
    path: str
    finishes: bool

    def run(self, context: Context) -> str:
        context.defer_cancel()
        context.report(Progress(os.getpid()))
        while not context.stopping():
            time.sleep(0.01)
        Path(self.path).write_text("safe")
        if not self.finishes:
            raise Cancelled("the request", "")
        return "partly"


@dataclass(frozen=True, slots=True)
class Held(Request[None]):
    """Looks by itself whether it is asked to stop, and says how far it was."""

    name: ClassVar[str] = "held"

    def run(self, context: Context) -> None:
        context.defer_cancel()
        context.report(Progress(os.getpid()))
        while not context.stopping():
            time.sleep(0.01)
        raise Cancelled("it", "5 of 9 were done")


@dataclass(frozen=True, slots=True)
class Fail(Request[None]):
    """Fails in one of several ways."""

    name: ClassVar[str] = "fail"
    how: str

    def run(self, context: Context) -> None:
        if self.how == "rejected":
            raise Rejected("what", "why", hint="hint", path="/path", value=7, errno=16)
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exits":
            os._exit(3)
        raise TypeError("a defect")


@dataclass(frozen=True, slots=True)
class Descriptors(Request[tuple[int, ...]]):
    """Which descriptors the child has."""

    name: ClassVar[str] = "descriptors"

    def run(self, context: Context) -> tuple[int, ...]:
        return tuple(sorted(int(name) for name in os.listdir("/proc/self/fd")))


TABLE: dict[str, type[Request[Any]]] = {
    kind.name: kind for kind in (Echo, Sleep, Queued, Compared, Careful, Held, Fail, Descriptors)
}


def in_child(run: Callable[[], None]) -> int:
    """A forked child that runs a function; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


class Served(RequestOperation[Any]):
    """An operation whose broker is a child of this process."""

    broker_pid: int


def start(request: Request[Any], deadline_seconds: float = PATIENCE_SECONDS, limits: Limits = QUICK) -> Served:
    """An operation that a broker of its own carries out."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        ours.close()
        REQUESTS.update(TABLE)
        broker = Broker(Path("/nowhere"), limits=limits)
        broker.adopt(theirs, "a test")
        broker.run()

    ours.send(request_message(request, deadline_seconds))
    pid = in_child(serve)
    theirs.close()
    abandon(pid)
    running = Served(ours, request, deadline_seconds)
    running.broker_pid = pid
    return running


def client_of(path: Path) -> KernelHost:
    """Somebody who asks the broker that listens there."""
    return open_kernel_host(broker_socket=path)


def wait(operation: Operation[Any], until: Callable[[], bool]) -> None:
    """Poll an operation until something holds."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not until():
        assert time.monotonic() < give_up, "it hangs"
        readable(operation.fileno(), 1)
        operation.poll()


def outlive(pidfd: int) -> None:
    """Wait for the end of a process."""
    assert readable(pidfd, PATIENCE_SECONDS), "it is still there"


def children() -> set[int]:
    """The processes that this one has started and not reaped."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == os.getpid():
            found.add(int(stat.parent.name))
    return found
