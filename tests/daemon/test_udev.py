# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of memory and CPUs: bursts, overflows, and what is nobody's business, from a source that tests feed."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.daemon import udev
from ksmd_ctl.daemon.udev import KernelEvents, TopologyWatch


class Fed:
    """A source that says what a test has put into it; readable for as long as there is something."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK)
        self.waiting: list[str | OSError | None] = []
        self.closed = False

    def feed(self, *events: str | OSError | None) -> None:
        self.waiting += events
        os.eventfd_write(self._descriptor, 1)

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> str | None:
        if not self.waiting:
            try:
                os.eventfd_read(self._descriptor)
            except BlockingIOError:
                pass
            return None
        event = self.waiting.pop(0)
        if isinstance(event, OSError):
            raise event
        return event

    def close(self) -> None:
        self.closed = True
        os.close(self._descriptor)


def watched(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Fed, TopologyWatch, list[int]], Coroutine[Any, Any, None]]
) -> None:
    monkeypatch.setattr(udev, "_SETTLE_SECONDS", 0.01)
    told: list[int] = []

    async def main() -> None:
        source = Fed()
        watch = TopologyWatch(source, lambda: told.append(watch.events))
        async with asyncio.timeout(30):
            await scenario(source, watch, told)
        watch.close()
        assert source.closed

    asyncio.run(main())


async def until(what: Callable[[], object]) -> None:
    while not what():
        await asyncio.sleep(0.001)


def test_a_burst_is_one_change(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(source: Fed, watch: TopologyWatch, told: list[int]) -> None:
        source.feed(*(f"memory offline memory{number}" for number in range(2000)))
        await until(lambda: told)
        await until(lambda: watch.events == 2000)
        await asyncio.sleep(0.05)
        assert len(told) <= 2
        source.feed("cpu online cpu3")
        before = len(told)
        await until(lambda: len(told) > before)

    watched(monkeypatch, scenario)


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EIO])
def test_what_was_lost_counts_as_a_change(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    async def scenario(source: Fed, watch: TopologyWatch, told: list[int]) -> None:
        source.feed(OSError(number, os.strerror(number)))
        await until(lambda: told)
        assert (watch.events, watch.overflows) == (0, 1)
        source.feed("node add node1")
        await until(lambda: len(told) == 2)
        assert watch.events == 1

    watched(monkeypatch, scenario)


def test_what_others_do_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(source: Fed, watch: TopologyWatch, told: list[int]) -> None:
        # The descriptor is readable, and nothing of it is of our subsystems.
        source.feed()
        await asyncio.sleep(0.05)
        assert (watch.events, told) == (0, [])

    watched(monkeypatch, scenario)


@given(st.lists(st.sampled_from(["event", "overflow", "nothing"]), min_size=1, max_size=40))
def test_whatever_comes_nothing_is_missed(kinds: list[str]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:

        async def scenario(source: Fed, watch: TopologyWatch, told: list[int]) -> None:
            for kind in kinds:
                word = {"event": "memory online memory1", "overflow": OSError(errno.ENOBUFS, "x"), "nothing": None}[
                    kind
                ]
                source.feed(word)  # type: ignore[arg-type]
            await until(lambda: not source.waiting)
            await until(lambda: (watch.events, watch.overflows) == (kinds.count("event"), kinds.count("overflow")))
            if watch.events or watch.overflows:
                await until(lambda: told)

        watched(monkeypatch, scenario)


def test_the_kernels_own_events_can_be_listened_to() -> None:
    try:
        events = KernelEvents()
    except (OSError, ImportError) as error:
        pytest.skip(f"pyudev or libudev is missing: {error}")
    assert os.get_blocking(events.fileno()) is False
    while events.read() is not None:
        pass
    events.close()
