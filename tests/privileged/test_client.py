# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations: results, errors, deadlines, cancelling, and that nothing is left of them."""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.errors import (
    Cancelled,
    HostError,
    KsmdError,
    Refused,
    Rejected,
    TimedOut,
    Unparsable,
)
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Operation, Progress, finish, readable
from ksmd_ctl.privileged import broker as broker_module
from ksmd_ctl.privileged import client as privileged
from ksmd_ctl.privileged.broker import Broker, Limits
from ksmd_ctl.privileged.client import RequestOperation
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.privileged.requests import REQUESTS, WriteKnob, request_message
from ksmd_ctl.privileged.worker import Worker
from tests.fakes.ksmfs import FakeKsmFs
from tests.privileged.serving import (
    PATIENCE_SECONDS,
    QUICK,
    Careful,
    Descriptors,
    Echo,
    Fail,
    Held,
    Sleep,
    children,
    in_child,
    outlive,
    start,
    wait,
)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def wait_until(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < give_up
        privileged.reap_abandoned()
        time.sleep(0.01)


def finished(running: Operation[Any]) -> Any:
    return finish(running, PATIENCE_SECONDS)


@pytest.fixture(autouse=True)
def _nothing_left_of_other_tests() -> Iterator[None]:
    """Ends what a test drops, so that the next one counts its own processes and descriptors only."""
    yield
    gc.collect()
    give_up = time.monotonic() + PATIENCE_SECONDS
    while privileged._abandoned:
        assert time.monotonic() < give_up, "a broker whose client is gone does not end"
        select.select([], [], [], 0.01)
        privileged.reap_abandoned()


# -- how it may end ----------------------------------------------------------------------------------------


def test_a_result_after_progress() -> None:
    running = start(Echo("abc"))
    assert finished(running) == "abc"
    assert running.progress == Progress(1, 2, "halves")
    assert running.result() == "abc"
    running.cancel()
    assert running.result() == "abc"


def test_a_result_before_it_is_over_is_a_defect_of_the_caller() -> None:
    running = start(Sleep())
    with pytest.raises(RuntimeError):
        running.result()


@pytest.mark.parametrize("times", [10, 100_000, 3_000_000])
def test_results_longer_than_pipes_and_packets(times: int) -> None:
    assert finished(start(Echo("x", times))) == "x" * times


def test_a_result_that_is_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileged, "_MAXIMUM_REPLY", 100_000)
    with pytest.raises(HostError, match="too long"):
        finished(start(Echo("x", 1_000_000)))


def test_errors_cross_as_they_are() -> None:
    with pytest.raises(Rejected) as caught:
        finished(start(Fail("rejected")))
    assert vars(caught.value) == {
        "what": "what",
        "why": "why",
        "hint": "hint",
        "path": "/path",
        "value": 7,
        "errno": 16,
    }


def test_a_defect_is_an_error_too(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KsmdError, match="TypeError: a defect"):
        finished(start(Fail("defect")))
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(("how", "word"), [("killed", "Killed"), ("exits", "status 3")])
def test_a_child_that_dies_is_an_error(how: str, word: str) -> None:
    with pytest.raises(HostError, match=word):
        finished(start(Fail(how)))


def test_a_broker_that_dies_is_an_error() -> None:
    running = start(Sleep())
    wait(running, lambda: bool(running.progress.done))
    worker = os.pidfd_open(running.progress.done)
    os.kill(running.broker_pid, signal.SIGKILL)
    with pytest.raises(HostError, match="ended without a result"):
        finished(running)
    outlive(worker)
    os.close(worker)


@pytest.mark.parametrize(
    "answer",
    [
        b"[" + b"1," * 200_000 + b"1]\n",
        b'{"kind":"progress","value":"' + b"x" * 300_000 + b'"}\n',
        b'{"kind":"progress","value":{"done":1}}\n',
        b"garbage\n",
        b"[]\n",
        b'{"kind":"result","value":5}\n',
        b'{"kind":"results","value":"x"}\n',
        b'{"x":1,"y":2}\n',
        b'{"kind":"error","value":{}}\n',
        b"\xff\n",
        b"",
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(answer: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    running = RequestOperation(ours, Echo("x"), 5)
    assert not running.poll()
    theirs.setblocking(False)
    while answer:
        try:
            answer = answer[theirs.send(answer[:10_000]) :]
        except BlockingIOError:
            running.poll()
    theirs.close()
    with pytest.raises(HostError):
        finished(running)


def test_a_broker_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileged, "GRACE_SECONDS", 0.0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    running = RequestOperation(ours, Echo("x"), 0)
    with pytest.raises(TimedOut, match="does not answer"):
        finished(running)
    theirs.close()


# -- deadlines and cancelling ------------------------------------------------------------------------------


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_deadline_kills_and_tells_the_state(stubborn: bool) -> None:
    running = start(Sleep(stubborn), 0.5)
    with pytest.raises(TimedOut, match=r"deadline of 0\.5 s passed; it lies in bed") as caught:
        finished(running)
    assert type(caught.value) is TimedOut


@pytest.mark.parametrize("stubborn", [False, True])
def test_cancelling(stubborn: bool) -> None:
    running = start(Sleep(stubborn))
    wait(running, lambda: bool(running.progress.done))
    worker = os.pidfd_open(running.progress.done)
    running.cancel()
    running.cancel()
    with pytest.raises(Cancelled, match="it was cancelled; it lies in bed"):
        finished(running)
    outlive(worker)
    os.close(worker)


@pytest.mark.parametrize("finishes", [False, True])
def test_what_is_careful_comes_to_a_safe_point_first(tmp_path: Path, finishes: bool) -> None:
    running = start(Careful(str(tmp_path / "file"), finishes), limits=Limits(stop_seconds=PATIENCE_SECONDS))
    wait(running, lambda: bool(running.progress.done))
    running.cancel()
    if finishes:
        assert finished(running) == "partly"
    else:
        with pytest.raises(Cancelled):
            finished(running)
    assert (tmp_path / "file").read_text() == "safe"


def test_what_is_held_says_how_far_it_was() -> None:
    running = start(Held(), limits=Limits(stop_seconds=PATIENCE_SECONDS))
    wait(running, lambda: bool(running.progress.done))
    running.cancel()
    with pytest.raises(Cancelled, match="it was cancelled; 5 of 9 were done"):
        finished(running)
    with pytest.raises(TimedOut, match=r"its deadline of 0\.2 s passed; 5 of 9 were done"):
        finished(start(Held(), 0.2, Limits(stop_seconds=PATIENCE_SECONDS)))


def test_finish_gives_up_and_cancels() -> None:
    running = start(Sleep())
    wait(running, lambda: bool(running.progress.done))
    with pytest.raises(TimedOut, match="no progress"):
        finish(running, 0.05)
    with pytest.raises(Cancelled):
        finished(running)


class _Unkillable(Worker):
    """A child that doesn't end, whatever is sent to it, as in uninterruptible sleep."""

    def kill(self, number: signal.Signals) -> None:
        sent.append(number)


sent: list[signal.Signals] = []


def test_a_child_that_cannot_be_killed_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "Worker", _Unkillable)
    monkeypatch.setitem(REQUESTS, "sleep", Sleep)
    sent.clear()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(request_message(Sleep(), 0.1))
    running = RequestOperation(ours, Sleep(), 0.1)
    broker = Broker(Path("/nowhere"), limits=Limits(stop_seconds=0.1, kill_seconds=0.1))
    before = children()
    broker.adopt(theirs, "a test")
    broker.run()
    assert sent == [signal.SIGTERM, signal.SIGKILL]
    assert len(broker.slots.left) == 1
    with pytest.raises(TimedOut, match=r"it lies in bed; process \d+ can't be ended yet \(state S") as caught:
        finished(running)
    (left,) = children() - before
    assert f"process {left} " in str(caught.value)
    os.kill(left, signal.SIGKILL)
    os.waitpid(left, 0)


# -- what is left ------------------------------------------------------------------------------------------


def test_the_child_has_only_what_it_needs() -> None:
    extra = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(extra, True)
    # 0 to 2, its connection, the file for an error, and the folder that it lists.
    assert len([number for number in finished(start(Descriptors())) if number > 2]) == 3
    os.close(extra)


def test_nothing_is_left_of_200_operations() -> None:
    before, processes = descriptors(), children()
    for number in range(200):
        kind = number % 4
        if kind == 0:
            assert finished(start(Echo("a"))) == "a"
        elif kind == 1:
            with pytest.raises(Rejected):
                finished(start(Fail("rejected")))
        elif kind == 2:
            running = start(Sleep())
            running.cancel()
            with pytest.raises(KsmdError):
                finished(running)
            del running
        else:
            with pytest.raises(HostError):
                finished(start(Fail("killed")))
    gc.collect()
    assert descriptors() == before
    wait_until(lambda: children() == processes)


def test_an_operation_that_is_dropped_is_ended_and_reaped() -> None:
    processes = children()
    running = start(Sleep())
    wait(running, lambda: bool(running.progress.done))
    worker = os.pidfd_open(running.progress.done)
    broker = os.pidfd_open(running.broker_pid)
    running = None  # type: ignore[assignment]
    gc.collect()
    outlive(worker)
    outlive(broker)
    wait_until(lambda: children() == processes)
    os.close(worker)
    os.close(broker)


@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_survives_the_one_who_asked(whole_group: bool) -> None:
    reader, writer = os.pipe()

    def ask() -> None:
        running = start(Sleep(stubborn=True))
        wait(running, lambda: bool(running.progress.done))
        os.write(writer, b"%d %d\n" % (running.progress.done, running.broker_pid))
        time.sleep(PATIENCE_SECONDS)

    asking = in_child(ask)
    worker, broker = map(int, os.read(reader, 100).split())
    pidfds = [os.pidfd_open(worker), os.pidfd_open(broker)]
    if whole_group:
        os.kill(broker, signal.SIGKILL)
    os.kill(asking, signal.SIGKILL)
    os.waitpid(asking, 0)
    for pidfd in pidfds:
        outlive(pidfd)
        os.close(pidfd)
    os.close(reader)
    os.close(writer)


# -- by this user ------------------------------------------------------------------------------------------


def test_a_knob_that_cannot_block_is_written_at_once(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    before = children()
    host = open_kernel_host(fake.root)
    written = host.write(Knob.PAGES_TO_SCAN, 500, 5)
    assert written.poll()
    assert written.result() == 500
    assert fake.text("pages_to_scan") == "500"
    fake.garble("pages_to_scan")
    with pytest.raises(Unparsable):
        finished(host.write(Knob.PAGES_TO_SCAN, 600, 5))
    assert children() == before
    host.close()


def test_a_knob_that_may_block_is_written_by_another_process(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    before, processes = descriptors(), children()
    by_root = open_kernel_host(fake.root)
    brokers = set()
    for value in (1, 2, 0):
        writing = by_root.start(WriteKnob(Knob.RUN, value), 30)
        # One for all: starting one takes longer than most of what it is asked for.
        brokers |= children() - processes
        assert len(brokers) == 1
        assert finished(writing) == value
        assert fake.text("run") == str(value)
        del writing
    del by_root
    gc.collect()
    assert descriptors() == before
    wait_until(lambda: children() == processes)


def test_a_broker_that_was_killed_is_replaced(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    by_root = open_kernel_host(fake.root)
    processes = children()
    assert finished(by_root.start(WriteKnob(Knob.RUN, 1), 30)) == 1
    (broker,) = children() - processes
    pidfd = os.pidfd_open(broker)
    os.kill(broker, signal.SIGKILL)
    outlive(pidfd)
    os.close(pidfd)
    assert finished(by_root.start(WriteKnob(Knob.RUN, 2), 30)) == 2


FORKING = """
import signal, sys
from pathlib import Path
from ksmd_ctl.host.operation import finish
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.privileged.requests import WriteKnob
from ksmd_ctl.host.knobs import Knob

signal.signal(signal.SIGINT, lambda *_: None)
print("once", end=" ")
by_root = open_kernel_host(Path(sys.argv[1]), fork=True)
for value in (1, 2):
    print(finish(by_root.start(WriteKnob(Knob.RUN, value), 30)), end=" ")
children = Path("/proc/self/task").joinpath(Path("/proc/self").resolve().name, "children").read_text().split()
for pid in children:
    fields = dict(line.split(":\\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    print(fields["SigCgt"], [link.name for link in Path(f"/proc/{pid}/fd").iterdir() if int(link.name) < 3])
"""


def test_a_command_forks_its_broker_which_has_nothing_of_it(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    command = [sys.executable, "-c", FORKING, str(fake.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    # Said once: what was not yet written is not written again by the child.
    assert (done.stdout, done.stderr) == ("once 1 2 0000000000000000 ['0', '1', '2']\n", "")
    assert fake.text("run") == "2"


def test_an_idle_broker_of_a_parent_ends_and_takes_what_came_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent at the moment in which it would end is served all the same."""
    monkeypatch.setitem(REQUESTS, "echo", Echo)
    feed, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    broker = Broker(Path("/nowhere"), limits=Limits(idle_seconds=0), feed=theirs)
    asking, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asking.send(request_message(Echo("late"), 5))
    running = RequestOperation(asking, Echo("late"), 5)
    socket.send_fds(feed, [b"+"], [asked.fileno()])
    asked.close()
    broker.run()
    assert finished(running) == "late"
    with pytest.raises(BrokenPipeError):
        feed.send(b"+")
    feed.close()


def test_errors_of_another_process(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    fake.garble("run")
    with pytest.raises(Unparsable) as caught:
        finished(open_kernel_host(fake.root).start(WriteKnob(Knob.RUN, 1), 30))
    assert caught.value.path == str(fake.ksm / "run")
    fake.link("max_page_sharing", Path("/proc/self/oom_score_adj"))
    with pytest.raises(Rejected, match="EINVAL"):
        finished(open_kernel_host(fake.root).start(WriteKnob(Knob.MAX_PAGE_SHARING, 4000), 30))


def test_a_process_that_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    host = open_kernel_host(FakeKsmFs(tmp_path).root)
    before = descriptors()
    with pytest.raises(HostError, match="ENOENT"):
        finished(host.start(WriteKnob(Knob.RUN, 1), 30))
    gc.collect()
    assert descriptors() == before


def test_the_descriptor_gets_readable_when_there_is_news() -> None:
    running = start(Sleep())
    assert readable(running.fileno(), PATIENCE_SECONDS)
    wait(running, lambda: bool(running.progress.done))
    assert not running.poll()
    # Nothing new: whoever waits for it does not spin.
    assert not readable(running.fileno(), 0.05)
    running.cancel()
    with pytest.raises(Cancelled):
        finished(running)
    assert running.fileno() == -1


def test_too_many_at_a_time_are_refused() -> None:
    with pytest.raises(Refused, match="too many"):
        finished(start(Echo("a"), limits=Limits(children=0)))
    assert QUICK.children > 0
