# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for an operation, and operations that are over."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from ksmd_ctl.errors import NoSuchProcess, TimedOut
from ksmd_ctl.host import operation
from ksmd_ctl.host.operation import Operation, Progress, Steps, finish, in_thread, outcome, waited


def silent(descriptor: int, looks: int) -> Operation[str]:
    """Says nothing, and is over at the last of so many looks."""

    def steps() -> Steps[str]:
        for _ in range(looks - 1):
            yield Progress()
        return "it is over"

    return Operation(steps(), descriptor)


@pytest.fixture
def unreadable() -> Iterator[int]:
    """A descriptor on which nothing ever comes."""
    ours, theirs = os.pipe()
    yield ours
    os.close(ours)
    os.close(theirs)


def test_what_is_over_already() -> None:
    done = Operation.done(5)
    assert done.poll()
    assert done.fileno() == -1
    done.cancel()
    assert done.result() == finish(done) == outcome(done) == 5
    error = NoSuchProcess("what", "why")
    failed: Operation[int] = Operation.failed(error)
    assert outcome(failed) is error
    for _ in range(2):
        with pytest.raises(NoSuchProcess):
            finish(failed)


def test_what_waits_for_another_passes_a_cancel_on(unreadable: int) -> None:
    def steps(inner: Operation[str]) -> Steps[str]:
        yield Progress(1, 2, "steps")
        return (yield from waited(inner))

    for polls in range(3):
        inner = silent(unreadable, 3)
        running = Operation(steps(inner))
        for _ in range(polls):
            assert not running.poll()
        running.cancel()
        while not running.poll():
            assert running.progress in (Progress(), Progress(1, 2, "steps"))
        assert inner.cancelled
        assert running.result() == "it is over"


def test_a_thread_gives_a_result_or_an_error() -> None:
    def fail() -> str:
        raise NoSuchProcess("what", "why")

    assert finish(in_thread(lambda: "done")) == "done"
    with pytest.raises(NoSuchProcess):
        finish(in_thread(fail))


def test_a_thread_that_takes_too_long_is_left_behind() -> None:
    end = threading.Event()
    running = in_thread(end.wait, 0.0)
    with pytest.raises(TimedOut):
        finish(running)
    end.set()


def test_one_without_a_descriptor_is_polled_until_it_is_over() -> None:
    assert finish(silent(-1, 1000)) == "it is over"


@pytest.mark.parametrize("timeout", [None, 3600.0])
def test_a_deadline_that_no_descriptor_tells_of_is_noticed(
    unreadable: int, timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation, "LOOK_SECONDS", 0.001)
    assert finish(silent(unreadable, 5), timeout) == "it is over"


@pytest.mark.parametrize("look", [0.001, 5.0])
def test_one_that_says_nothing_for_too_long_is_cancelled(
    unreadable: int, look: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation, "LOOK_SECONDS", look)
    running = silent(unreadable, 1 << 30)
    with pytest.raises(TimedOut, match=r"no progress for 0\.01 s"):
        finish(running, 0.01)
    assert running.cancelled
