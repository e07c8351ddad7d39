# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's figures of what could be merged and is not, on the simulated host and on a fake one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

from ksmd_ctl.config.loader import load
from ksmd_ctl.daemon.missed_savings import MissedSavings
from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.errors import Denied
from ksmd_ctl.host.knobs import Knob
from tests.daemon.test_recovery import fill
from tests.daemon.watching import Watching, watched
from tests.fakes.host import FakeHost


class Bench(Watching):
    """The watch, with a configuration."""

    def __init__(self, host: Any, cpu_share: float = 0.01) -> None:
        super().__init__(host)
        self.config = dataclasses.replace(load("/dev/null"), census_interval=20.0, census_cpu_share=cpu_share)
        self.watch = MissedSavings(host, self.tasks, lambda: self.config, self.changed)

    @property
    def pages(self) -> Any:
        return self.watch.pages()


def run(host: Any, scenario: Callable[[Bench], Coroutine[Any, Any, None]], cpu_share: float = 0.01) -> None:
    watched(lambda: Bench(host, cpu_share), scenario, 120)


def machine() -> EngineHost:
    return open_engine_host("7.2", 1, demo=False, source=None)


def labels(first: int, pages: int) -> list[str]:
    return [f"content {number}" for number in range(first, first + pages)]


def test_what_the_advisor_leaves_at_a_crawl() -> None:
    host = machine()
    fill(host, "before", labels(0, 500), None)

    async def scenario(bench: Bench) -> None:
        host.set(Knob.RUN, 1)
        await bench.tick()
        assert (bench.pages["swapin"], bench.pages["advisor"]) == (0, 0)
        # Findings F12: what ksmd has worked in its life is taken for what one scan takes.
        host.machine.ksm.cpu_ns += 20_000_000_000
        host.set(Knob.ADVISOR_MAX_CPU, 10)
        host.set(Knob.ADVISOR_TARGET_SCAN_TIME, 1)
        host.set(Knob.ADVISOR_MODE, "scan-time")
        for _ in range(100):
            host.advance(0.02)
            if (host.sample().number("pages_to_scan") or 0) == 10:
                break
        # 500 pages a second: ksmd comes to these in half a minute.
        fill(host, "one", labels(1000, 6000), None)
        fill(host, "two", labels(1000, 6000), None)
        await bench.tick()
        assert bench.changes == 1
        assert bench.pages["advisor"] == 6000
        host.set(Knob.ADVISOR_MODE, "none")
        await bench.tick()
        assert bench.pages["advisor"] == 0

    run(host, scenario)


def test_copies_from_swap_until_they_are_merged_again() -> None:
    host = machine()
    one, other = (fill(host, name, labels(0, 300), None) for name in ("one", "other"))

    async def scenario(bench: Bench) -> None:
        host.set(Knob.PAGES_TO_SCAN, 1000)
        host.set(Knob.RUN, 1)
        await bench.tick(5)
        assert (host.sample().number("pages_sharing"), bench.pages["swapin"]) == (300, 0)
        host.set(Knob.RUN, 0)
        for process, start, pages in (one, other):
            host.machine.swap_out(process.pid, start, pages)
        for process, start, pages in (one, other):
            for page in range(pages):
                host.machine.read(process.pid, start + page * PAGE_SIZE)
        await bench.tick(30)
        # As many as contents say.
        duplicates = host.duplicates(1 << 20)
        while not duplicates.poll():
            pass
        assert bench.pages["swapin"] == duplicates.result().pages == 300
        host.set(Knob.RUN, 1)
        await bench.tick(5)
        assert (host.sample().number("pages_sharing"), bench.pages["swapin"]) == (300, 0)

    run(host, scenario)


def fake_crawl() -> FakeHost:
    host = FakeHost({Knob.RUN: 1, Knob.ADVISOR_MODE: "scan-time", Knob.PAGES_TO_SCAN: 10})
    host.counters["ksm_swpin_copy"] = 0
    return host


def test_who_may_not_look_says_nothing() -> None:
    host = fake_crawl()
    host.duplicates_outcomes = [Denied("comparing contents", "EACCES")]

    async def scenario(bench: Bench) -> None:
        await bench.tick(2)
        assert (bench.pages, len(host.duplicates_looks)) == ({"swapin": 0, "advisor": None, "khugepaged": None}, 1)
        # Not more often than the broker lets anybody but root.
        await bench.tick(20)
        assert len(host.duplicates_looks) == 1
        await bench.tick(20)
        assert len(host.duplicates_looks) == 2

    run(host, scenario)


def test_where_looking_may_cost_nothing_it_is_not_done() -> None:
    host = fake_crawl()

    async def scenario(bench: Bench) -> None:
        await bench.tick(100)
        assert host.duplicates_looks == []

    run(host, scenario, 0.0)
