# SPDX-License-Identifier: GPL-2.0-or-later
"""Who a change is put down to: the one who wrote last before it was noticed, and not the service nor its broker."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Set

import pytest

from ksmd_ctl.daemon import knob_writes
from ksmd_ctl.daemon.knob_writes import Change, KnobWrites
from ksmd_ctl.daemon.log import Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import Denied, HostError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.kernel.knob_writes import KnobWrite
from ksmd_ctl.knobs.reconcile import Drift

INTERVAL = 1.0
BASH = KnobWrite(Knob.RUN, 8, "bash (pid 8)")
TEE = KnobWrite(Knob.RUN, 7, "tee (pid 7)")
BROKER = KnobWrite(Knob.RUN, 77, "a process that has ended (pid 77)")


class Place:
    """A host that tells of writes, the service's clock, and what the service says.

    :ivar ours: processes that have answered as the broker's
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.said: list[str] = []
        self.ours = {os.getpid()}
        self.refused: HostError | None = None
        self.news: list[KnobWrite | HostError] = []
        self.writing = -1
        self.writes: KnobWrites
        self.descriptor = -1
        place = self

        class Reader:
            def __init__(self, descriptor: int) -> None:
                self.descriptor = descriptor

            def read(self) -> Iterator[KnobWrite]:
                for _ in os.read(self.descriptor, 100):
                    one = place.news.pop(0)
                    if isinstance(one, HostError):
                        raise one
                    yield one

        monkeypatch.setattr(knob_writes, "WriteReader", Reader)

    def watch_writes(self) -> Operation[int]:
        return Operation.failed(self.refused) if self.refused is not None else Operation.done(self.descriptor)

    def has_written(self, pid: int) -> bool:
        return pid in self.ours

    def came(self, *news: KnobWrite | HostError) -> None:
        """The kernel tells of writes, and the thread has read that."""
        self.news += news
        os.write(self.writing, b"." * len(news))
        limit = time.monotonic() + 30
        while (self.news or len(self.writes._arrived) < len(news)) and self.writes._error is None:
            assert time.monotonic() < limit
            time.sleep(0.001)

    def told(
        self, *changes: Change, in_flight: Set[Knob] = frozenset(), interval: float = INTERVAL
    ) -> list[tuple[object, str]]:
        found = self.writes.told(changes, in_flight, interval)
        return [(change.drift.found, change.who) for change in found]

    def seen(self, found: int, knob: Knob = Knob.RUN) -> Change:
        """A change that is noticed now."""
        return Change(Drift(knob, 1, found), "is being put back", self.now)

    def run(self, script: Callable[[], None]) -> None:
        async def main() -> None:
            self.descriptor, self.writing = os.pipe()
            log = Log(lambda text, fields: self.said.append(text))
            self.writes = KnobWrites(self, Tasks(), log, lambda: self.now)
            self.writes.begin()
            await asyncio.sleep(0.01)
            script()
            self.writes.close()
            self.writes.close()
            os.close(self.writing)
            if self.refused is not None:
                os.close(self.descriptor)

        # What earlier tests have left open.
        gc.collect()
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        asyncio.run(main())
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(monkeypatch)


def test_the_one_who_wrote_last_and_just_now(place: Place) -> None:
    def script() -> None:
        place.came(TEE, BASH)
        assert place.told(place.seen(0)) == [(0, "bash (pid 8)")]
        # A write explains one change.
        assert place.told(place.seen(0)) == []
        place.now += 2
        assert place.told() == [(0, "")]
        # Noticed at the second sample.
        place.came(BASH)
        place.now += 3
        assert place.told(place.seen(0)) == [(0, "bash (pid 8)")]
        # What changes now was the kernel's doing, or nobody saw it.
        place.came(BASH)
        place.now += 3.1
        assert place.told(place.seen(0)) == []
        place.now += 2
        assert place.told() == [(0, "")]

    place.run(script)
    assert place.said == []


def test_another_knob_is_another_matter(place: Place) -> None:
    def script() -> None:
        place.came(BASH)
        assert place.told(place.seen(7, Knob.PAGES_TO_SCAN), place.seen(0)) == [(0, "bash (pid 8)")]
        assert [change.drift.knob for change in place.writes.rest(INTERVAL)] == [Knob.PAGES_TO_SCAN]
        assert place.writes.rest(INTERVAL) == []

    place.run(script)


def test_the_kernel_tells_of_a_write_after_the_change_is_seen(place: Place) -> None:
    def script() -> None:
        assert place.told(place.seen(0)) == []
        place.now += 1
        place.came(BASH)
        assert place.told() == [(0, "bash (pid 8)")]
        # The service has put it back meanwhile.
        place.ours.add(77)
        assert place.told(place.seen(0)) == []
        place.now += 1
        place.came(BASH, BROKER)
        assert place.told() == [(0, "bash (pid 8)")]

    place.run(script)


def test_who_unmerged_all_is_known_when_that_is_over(place: Place) -> None:
    def script() -> None:
        # This one has written what was there.
        place.came(TEE)
        change = place.seen(2)
        place.now += 0.001
        assert place.told(change) == []
        for _ in range(50):
            place.now += 1
            # The service waits until it can write 1.
            assert place.told(in_flight={Knob.RUN}) == []
        place.came(BASH, BROKER)
        place.ours.add(77)
        assert place.told() == [(2, "bash (pid 8)")]

    place.run(script)


def test_what_still_waits_at_the_end_of_the_service_is_told_with_the_name_that_is_known(place: Place) -> None:
    def script() -> None:
        assert place.told(place.seen(2), place.seen(7, Knob.PAGES_TO_SCAN)) == []
        place.came(BASH)
        assert [change.who for change in place.writes.rest(INTERVAL)] == ["bash (pid 8)", ""]

    place.run(script)


def test_nobody_waits_for_ever_for_the_end_of_an_unmerging(place: Place) -> None:
    def script() -> None:
        assert place.told(place.seen(2)) == []
        place.now += 60
        assert place.told(in_flight={Knob.RUN}) == [(2, "")]

    place.run(script)


@pytest.mark.parametrize("writes", [(BASH, BROKER, TEE), (BROKER, BASH, TEE)], ids=["in order", "the second one first"])
def test_two_changes_with_the_services_own_write_between(place: Place, writes: tuple[KnobWrite, ...]) -> None:
    """2 by bash, 1 by the service's broker, 0 by tee at once."""

    def script() -> None:
        assert place.told(place.seen(2)) == []
        place.now += 1
        place.came(*writes)
        place.ours.add(77)
        assert place.told(place.seen(0)) == [(2, "bash (pid 8)"), (0, "tee (pid 7)")]

    place.run(script)


def test_the_services_own_writes_are_nobody_elses(place: Place) -> None:
    def script() -> None:
        place.ours.add(77)
        place.came(KnobWrite(Knob.RUN, os.getpid(), "ksmd-ctl (pid 1)"), BROKER)
        assert place.told(place.seen(0)) == []
        place.now += 2
        assert place.told() == [(0, "")]

    place.run(script)


def test_whoever_writes_all_the_time_takes_no_memory(place: Place) -> None:
    def script() -> None:
        for _ in range(20):
            place.came(*[TEE] * 50)
            place.told()
        assert len(place.writes._latest) == 256
        place.came(BASH)
        assert place.told(place.seen(0)) == [(0, "bash (pid 8)")]

    place.run(script)


def test_nobody_is_known_where_it_can_not_be_watched(place: Place) -> None:
    place.refused = Denied("watching", "EPERM")
    place.run(lambda: place.said.append(str(place.told(place.seen(2)))))
    assert place.said == ["who changes a knob is not known: watching: EPERM", "[(2, '')]"]


def test_a_watch_that_ends_is_told(place: Place) -> None:
    def script() -> None:
        place.came(HostError("reading", "EIO"))
        assert place.told(place.seen(0)) == [(0, "")]
        assert place.told(place.seen(2)) == [(2, "")]

    place.run(script)
    assert place.said == ["who changes a knob is not known any more: reading: EIO"]
