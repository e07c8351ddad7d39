# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's looks at who shares frames with whom, on a fake host."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ksmd_ctl.config.domains import Domain, Domains
from ksmd_ctl.config.loader import load
from ksmd_ctl.daemon.numa import NumaWatch
from ksmd_ctl.daemon.sharing import SharingWatch
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import Denied
from ksmd_ctl.host.memory import KsmDetection
from ksmd_ctl.host.sharing import Sharing
from tests.fakes.host import FakeHost, process


class Bench:
    def __init__(self, interval: float = 100.0, share: float = 0.05) -> None:
        self.host = FakeHost()
        self.host.running = [process(1, "a", 900), process(2, "b", 600), process(3, "a", 10), process(4, "idle", 0)]
        # 600 frames of a and b, 300 that the second one of a has, too, and one of b alone.
        self.host.frames = [{1: 1, 2: 1}] * 300 + [{1: 1, 2: 1, 3: 1}] * 300 + [{2: 2}]
        self.host.counters["pages_shared"] = 601
        self.config = dataclasses.replace(load("/dev/null"), census_interval=interval, census_cpu_share=share)
        self.changes = 0
        self.tasks = Tasks()
        self.numa = NumaWatch(self.host, self.tasks, lambda: self.config, lambda: None)
        self.watch = SharingWatch(self.host, self.tasks, lambda: self.config, self._changed, self.numa)

    def _changed(self) -> None:
        self.changes += 1

    async def tick(self, seconds: float = 1.0) -> None:
        """So much time passes, then there is a tick, and all that it starts ends."""
        self.host.now += seconds
        sample = self.host.sample()
        self.numa.tick(sample)
        while self.tasks.running:
            await asyncio.sleep(0.001)
        self.watch.tick(sample)
        while self.tasks.running:
            await asyncio.sleep(0.001)

    @property
    def section(self) -> Any:
        return self.watch.section(self.host.now)

    async def ask(self, by: str = "unit", budget: float | None = None, *, rounded: bool = False) -> Any:
        return (await self.watch.sharing(by, budget, rounded=rounded))["sharing"]


def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]], **settings: float) -> None:
    async def main() -> None:
        bench = Bench(**settings)
        async with asyncio.timeout(30):
            await scenario(bench)
        bench.tasks.close()

    asyncio.run(main())


def test_it_looks_by_unit_after_a_survey_and_then_at_its_interval() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(1)
        assert (bench.section, bench.host.sharing_looks) == (None, [])
        await bench.tick(5)
        # Those with most merged pages first, and nobody who has none.
        assert bench.host.sharing_looks == [([[1, 3], [2]], 5.0)]
        assert bench.changes == 1
        section = bench.section
        assert (section["looks"], section["failures"], section["age_seconds"], section["complete"]) == (1, 0, 0.0, True)
        for _ in range(9):
            await bench.tick(10)
        assert len(bench.host.sharing_looks) == 1
        assert bench.section["age_seconds"] == 90.0
        await bench.tick(10)
        assert len(bench.host.sharing_looks) == 2

    run(scenario)


def test_counts_are_rounded_in_what_everybody_can_read() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        first, second = bench.section["groups"]
        assert (first["group"], first["shared_bytes"], first["processes"]) == ("a", 768 * 4096, 2)
        assert (second["group"], second["shared_bytes"]) == ("b", 512 * 4096)
        (pair,) = bench.section["pairs"]
        assert (pair["groups"], pair["frames"]) == (["a", "b"], 512)
        assert bench.section["other"]["shared_bytes"] == 0

    run(scenario)


def test_a_small_share_of_a_cpu_makes_the_next_look_later_and_none_switches_it_off() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcome = Sharing(0.0, (), (0, 0), 1.0, True, KsmDetection.KPAGEFLAGS, 2.0)
        await bench.tick(5)
        assert [budget for _, budget in bench.host.sharing_looks] == [1.0]
        await bench.tick(1990)
        assert len(bench.host.sharing_looks) == 1
        await bench.tick(10)
        assert len(bench.host.sharing_looks) == 2

    async def nothing(bench: Bench) -> None:
        await bench.tick(5)
        await bench.tick(1000)
        assert bench.host.sharing_looks == []

    run(scenario, share=0.001)
    run(nothing, share=0.0)


def test_units_that_the_latest_look_had_not_yet_are_looked_at_sooner() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        # What it lacks is not said to share nothing.
        assert "new" not in {group["group"] for group in bench.section["groups"]}
        bench.host.running.append(process(5, "new", 700))
        bench.host.frames += [{1: 1, 5: 1}] * 512
        await bench.tick(20)
        assert len(bench.host.sharing_looks) == 1, "no survey has it yet"
        await bench.numa.fresh_survey()
        await bench.tick(1)
        assert len(bench.host.sharing_looks) == 2
        (found,) = [group for group in bench.section["groups"] if group["group"] == "new"]
        assert found["shared_bytes"] == 512 * 4096
        await bench.tick(20)
        assert len(bench.host.sharing_looks) == 2

    run(scenario)


def test_units_that_come_often_take_no_more_of_a_cpu() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcome = Sharing(0.0, (), (0, 0), 1.0, True, KsmDetection.KPAGEFLAGS, 2.0)
        await bench.tick(5)
        bench.host.running.append(process(5, "new", 700))
        await bench.tick(15)
        await bench.numa.fresh_survey()
        bench.host.sharing_outcome = Sharing(0.0, (), (0, 0, 0), 1.0, True, KsmDetection.KPAGEFLAGS, 2.0)
        await bench.tick(23)
        assert len(bench.host.sharing_looks) == 1
        await bench.tick(3)
        assert len(bench.host.sharing_looks) == 2

    run(scenario)


def test_while_nothing_is_merged_there_is_no_look_but_one_afterwards() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        bench.host.counters["pages_shared"], bench.host.frames = 0, []
        await bench.tick(100)
        assert len(bench.host.sharing_looks) == 2
        assert {group["shared_bytes"] for group in bench.section["groups"]} == {0}
        assert bench.section["pairs"] == []
        await bench.tick(100)
        assert len(bench.host.sharing_looks) == 2

    run(scenario)


def test_a_failure_is_reported_and_the_last_figures_stay() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcome = Denied("looking", "it needs CAP_SYS_ADMIN")
        await bench.tick(5)
        assert (bench.section["error"], bench.section["failures"]) == ("looking: it needs CAP_SYS_ADMIN", 1)
        assert (bench.section["age_seconds"], bench.section["groups"], bench.section["other"]) == (None, [], None)
        bench.host.sharing_outcome = None
        await bench.tick(200)
        assert (bench.section["error"], len(bench.section["groups"])) == ("", 2)
        bench.host.sharing_outcome = Denied("looking", "it needs CAP_SYS_ADMIN")
        await bench.tick(200)
        assert (bench.section["failures"], bench.section["looks"], len(bench.section["groups"])) == (2, 1, 2)
        with pytest.raises(Denied):
            await bench.ask()

    run(scenario)


def test_who_asks_gets_exact_counts_as_root_and_rounded_ones_otherwise() -> None:
    async def scenario(bench: Bench) -> None:
        exact, rounded = await bench.ask(), await bench.ask(rounded=True)
        assert [pair["frames"] for pair in exact["pairs"]] == [600]
        assert [pair["frames"] for pair in rounded["pairs"]] == [512]
        # Both are of one look, and a little later there is a new one.
        assert len(bench.host.sharing_looks) == 1
        bench.host.now += 6
        await bench.ask()
        assert len(bench.host.sharing_looks) == 2

    run(scenario)


def test_processes_are_groups_of_their_own_where_that_is_asked_for() -> None:
    async def scenario(bench: Bench) -> None:
        found = await bench.ask("process", 9.0)
        assert bench.host.sharing_looks == [([[1], [2], [3]], 9.0)]
        assert {(group["group"], group["pid"]) for group in found["groups"]} == {
            ("p1[1]", 1),
            ("p2[2]", 2),
            ("p3[3]", 3),
        }
        assert {tuple(pair["groups"]): pair["frames"] for pair in found["pairs"]} == {
            ("p1[1]", "p2[2]"): 600,
            ("p1[1]", "p3[3]"): 300,
            ("p2[2]", "p3[3]"): 300,
        }

    run(scenario)


def test_after_a_reload_nobody_is_told_of_domains_that_were() -> None:
    async def scenario(bench: Bench) -> None:
        for name in ("gold", "silver"):
            domains = Domains((Domain(name, units=("x",)),), unmatched=name)
            bench.config = dataclasses.replace(bench.config, domains=domains)
            assert [one["group"] for one in (await bench.ask("domain"))["groups"]] == [name]

    run(scenario)


def test_who_allows_more_time_is_not_told_what_was_counted_in_less() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.sharing_outcome = Sharing(bench.host.now, (), (0, 0), 0.5, False, KsmDetection.KPAGEFLAGS, 0.1)
        for budget in (0.1, 0.1, 9.0, 0.1):
            await bench.ask(budget=budget)
        assert [budget for _, budget in bench.host.sharing_looks] == [0.1, 9.0]

    run(scenario)


def test_many_who_ask_at_once_share_one_look() -> None:
    async def scenario(bench: Bench) -> None:
        found = await asyncio.gather(*(bench.ask() for _ in range(5)))
        assert len(bench.host.sharing_looks) == len(bench.host.surveys) == 1
        assert all(one == found[0] for one in found)

    run(scenario)
