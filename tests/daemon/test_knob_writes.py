# SPDX-License-Identifier: GPL-2.0-or-later
"""Who a change is put down to: the one who wrote last, if that was just now and not the service itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import pytest

from ksmd_ctl.daemon import knob_writes
from ksmd_ctl.daemon.knob_writes import KnobWrites
from ksmd_ctl.daemon.log import Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import Denied, HostError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.kernel.knob_writes import KnobWrite


class Writes:
    """What the kernel tells, and what the service's clock shows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.news: list[KnobWrite | HostError] = []
        self.said: list[str] = []
        monkeypatch.setattr(knob_writes, "read_writes", self.read)

    def read(self, descriptor: int) -> Iterator[KnobWrite]:
        news, self.news = self.news, []
        for one in news:
            if isinstance(one, HostError):
                raise one
            yield one

    def run(self, script: Callable[[KnobWrites], None], outcome: int | HostError | None = None) -> None:
        async def main() -> None:
            reading, writing = os.pipe()
            log = Log(lambda text, fields: self.said.append(text))
            operation = Operation.failed(outcome) if isinstance(outcome, HostError) else Operation.done(reading)
            writes = KnobWrites(lambda: operation, Tasks(), log, lambda: self.now)
            writes.begin()
            await asyncio.sleep(0.01)
            script(writes)
            writes.close()
            writes.close()
            os.close(writing)
            if isinstance(outcome, HostError):
                os.close(reading)

        asyncio.run(main())


def test_the_one_who_wrote_last_and_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Writes(monkeypatch)

    def script(writes: KnobWrites) -> None:
        assert writes.who(Knob.RUN, 1.0) == ""
        there.news = [KnobWrite(Knob.RUN, 7, "tee (pid 7)"), KnobWrite(Knob.RUN, 8, "bash (pid 8)")]
        assert writes.who(Knob.RUN, 1.0) == "bash (pid 8)"
        assert writes.who(Knob.PAGES_TO_SCAN, 1.0) == ""
        there.now += 3
        assert writes.who(Knob.RUN, 1.0) == "bash (pid 8)"
        there.now += 0.1
        assert writes.who(Knob.RUN, 1.0) == ""
        # What changes then was the kernel's doing, or nobody saw it.
        there.news = [KnobWrite(Knob.RUN, 7, "tee (pid 7)"), KnobWrite(Knob.RUN, os.getpid(), "ksmd-ctl")]
        assert writes.who(Knob.RUN, 1.0) == ""

    there.run(script)
    assert there.said == []


def test_nobody_is_known_where_it_can_not_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Writes(monkeypatch)
    there.run(lambda writes: there.said.append(writes.who(Knob.RUN, 1.0)), Denied("watching", "EPERM"))
    assert there.said == ["who changes a knob is not known: watching: EPERM", ""]


def test_a_watch_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Writes(monkeypatch)

    def script(writes: KnobWrites) -> None:
        there.news = [HostError("reading", "EIO")]
        assert writes.who(Knob.RUN, 1.0) == ""
        there.news = [KnobWrite(Knob.RUN, 8, "bash (pid 8)")]
        assert writes.who(Knob.RUN, 1.0) == ""

    there.run(script)
    assert there.said == ["who changes a knob is not known any more: reading: EIO"]
