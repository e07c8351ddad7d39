# SPDX-License-Identifier: GPL-2.0-or-later
"""Surveys and migrations of the service on a fake host; the clock is the host's, so nothing here waits for one."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest

from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.numa import NumaWatch
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import Denied, Refused, TimedOut
from ksmd_ctl.host.memory import Skipped
from ksmd_ctl.host.operation import MoveResult, Progress
from ksmd_ctl.reports.saving import Counters
from ksmd_ctl.transactions.migration import MigrationOrder
from tests.fakes.host import FakeHost, process


class Bench:
    def __init__(self, interval: float = 100.0, share: float = 0.01) -> None:
        self.host = FakeHost()
        self.host.running = [process(1, "a", 500), process(2, "b", 300, remote_pages=300, remote_nodes={0: 300})]
        self.host.counters["pages_shared"] = 80
        config: Config = dataclasses.replace(load("/dev/null"), census_interval=interval, census_cpu_share=share)
        self.config = config
        self.changes = 0
        self.busy = ""
        self.tasks = Tasks()
        self.progress: list[Mapping[str, Any]] = []
        self.watch = NumaWatch(self.host, self.tasks, lambda: self.config, self._changed, lambda: self.busy)

    def _changed(self) -> None:
        self.changes += 1

    def migrate(self, pid: int = 1, dry_run: bool = False) -> asyncio.Task[Any]:
        order = MigrationOrder(to=1, pid=pid, dry_run=dry_run)
        return self.tasks.start(self.watch.migrate(order, self.progress.append))

    async def tick(self, seconds: float = 1.0) -> None:
        """So much time passes, then there is a tick, and all that can be done at once is."""
        self.host.now += seconds
        self.watch.tick(self.host.sample())
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]], **settings: float) -> Bench:
    made: list[Bench] = []

    async def main() -> None:
        made.append(Bench(**settings))
        async with asyncio.timeout(30):
            await scenario(made[0])
        made[0].tasks.close()

    asyncio.run(main())
    return made[0]


def test_it_looks_after_the_start_and_then_at_its_interval_within_its_budget() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(1)
        assert bench.host.surveys == []
        assert bench.watch.section() is None
        assert bench.watch.ksm_pages() == {}
        await bench.tick(5)
        assert bench.host.surveys == [1.0]
        for _ in range(9):
            await bench.tick(10)
        assert len(bench.host.surveys) == 1
        await bench.tick(20)
        assert len(bench.host.surveys) == 2

    bench = run(scenario)
    section = bench.watch.section()
    assert section is not None
    assert bench.changes == bench.watch.surveys == section["surveys"] == 2
    assert bench.watch.surveyed_at == bench.host.now


def test_a_long_interval_is_no_endless_look() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        assert bench.host.surveys == [60.0]

    run(scenario, interval=86400.0, share=0.5)


def test_merged_pages_of_a_process_that_could_not_be_read_are_not_taken_for_gone() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        assert bench.watch.merging_pages == 800
        for left_out in ({"skipped": [Skipped(3, "c", "it keeps its readers waiting")]}, {"unseen": [3]}):
            for name, found in left_out.items():
                setattr(bench.host, name, found)
            await bench.tick(200)
            assert bench.watch.merging_pages is None
            bench.host.skipped, bench.host.unseen = [], []

    run(scenario)


def test_a_list_of_processes_says_what_the_service_knows_of_their_counts() -> None:
    async def scenario(bench: Bench) -> None:
        known = Counters(True, 7)
        watch = NumaWatch(bench.host, bench.tasks, lambda: bench.config, lambda: None, counters=lambda: known)
        found: Any = await watch.processes()
        assert found["processes"]["stale_text"] == known.text

    run(scenario)


def test_the_section() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)

    watch = run(scenario).watch
    section: Any = watch.section()
    assert watch.ksm_pages() == {node: found["ksm_pages"] for node, found in section["nodes"].items()}
    assert section["nodes"]["0"] == {
        "ksm_pages": 80,
        "ksm_pages_low": 80,
        "ksm_pages_high": 80,
        "mapped_pages": 800,
        "remote_pages": 300,
    }
    assert [(group["group"], group["merging_pages"]) for group in section["groups"]] == [("a", 500), ("b", 300)]
    assert section["other"]["processes"] == 0
    assert [place["where"] for place in section["exposure"]] == ["host", "node 0", "/a.slice"]
    assert section["cgroups_over"] == 1


def test_a_dear_look_is_paid_for_by_waiting() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.survey_outcome = dataclasses.replace(bench.host.seen(), cpu_seconds=5.0)
        await bench.tick(5)
        await bench.tick(400)
        assert len(bench.host.surveys) == 1
        await bench.tick(101)
        assert len(bench.host.surveys) == 2

    run(scenario)


def test_what_nobody_merges_is_not_looked_at_again_and_at_once_when_somebody_does() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.running = [process(1)]
        bench.host.counters["pages_shared"] = 0
        await bench.tick(5)
        for _ in range(10):
            await bench.tick(1000)
        assert len(bench.host.surveys) == 1
        bench.host.counters["pages_shared"] = 1
        await bench.tick(1)
        assert len(bench.host.surveys) == 2

    run(scenario)


def test_zeroes_that_splits_freed_are_counted_also_when_nothing_is_merged_any_more() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.running = [process(1, split_zero_pages=7)]
        bench.host.counters["pages_shared"] = 0
        await bench.tick(5)
        assert bench.watch.split_zero_pages == 7
        bench.host.running = [process(1, split_zero_pages=0)]
        for _ in range(10):
            await bench.tick(1000)
        assert bench.watch.split_zero_pages == 0
        assert len(bench.host.surveys) == 2

    run(scenario)


def test_without_a_share_it_looks_only_for_who_asks() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(1000)
        assert bench.host.surveys == []
        found: Any = await bench.watch.nodes()
        assert found["nodes"]["nodes"]["0"]["ksm_pages"] == 80
        assert len(bench.host.surveys) == 1
        await bench.tick(1000)
        assert len(bench.host.surveys) == 1

    run(scenario, share=0.0)


def test_what_is_split_after_a_survey_is_told_until_the_next_one_counts_it() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.counters["split_folio_pages"] = 1024
        await bench.tick(5)
        section: Any = bench.watch.section()
        assert section["split_since_pages"] == 0
        bench.host.counters["split_folio_pages"] = 2560
        await bench.tick(50)
        section = bench.watch.section()
        assert (section["surveys"], section["split_since_pages"]) == (1, 1536)
        await bench.tick(100)
        section = bench.watch.section()
        assert (section["surveys"], section["split_since_pages"]) == (2, 0)

    run(scenario)


def test_a_look_that_fails_is_told_and_the_last_one_stays() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        bench.host.survey_outcome = Denied("looking", "CAP_SYS_PTRACE is missing")
        await bench.tick(200)
        section: Any = bench.watch.section()
        assert section["error"] == "looking: CAP_SYS_PTRACE is missing"
        assert (section["failures"], section["surveys"]) == (1, 1)
        assert section["nodes"]["0"]["ksm_pages"] == 80
        with pytest.raises(Denied, match="CAP_SYS_PTRACE"):
            await bench.watch.processes()
        bench.host.survey_outcome = None
        await bench.tick(500)
        section = bench.watch.section()
        assert section["error"] == ""

    run(scenario)


def test_looks_that_fail_are_charged_and_come_less_and_less_often() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.survey_outcome = TimedOut("looking", "its deadline passed")
        looks = []
        for _ in range(4000):
            await bench.tick(1)
            looks.append(len(bench.host.surveys))
        times = [looks.index(number) for number in range(1, looks[-1] + 1)]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        assert [round(pause / 100) for pause in pauses[:3]] == [2, 4, 8]
        # And it does not give up.
        bench.host.survey_outcome = None
        await bench.tick(2000)
        section: Any = bench.watch.section()
        assert section["surveys"] == 1

    run(scenario)


def test_a_first_look_that_fails_says_nothing_about_nodes() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.survey_outcome = Denied("looking", "no")
        await bench.tick(5)

    bench = run(scenario)
    section: Any = bench.watch.section()
    assert (section["nodes"], section["other"], section["error"]) == ({}, None, "looking: no")


def test_those_who_ask_at_the_same_time_get_the_same_look_and_a_fresh_one_serves_the_next() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.slow_surveys = True
        first = bench.tasks.start(bench.watch.nodes())
        second: Any = bench.tasks.start(bench.watch.processes())
        # Has said everything, as `nc -N` does, and listens.
        silent = bench.tasks.start(bench.watch.nodes())
        await settled()
        silent.cancel()
        await settled()
        (operation,) = bench.host.waiting_surveys
        operation.release(bench.host.seen())
        for task in (first, silent):
            found: Any = await task
            assert found["nodes"]["format"] == 1
        assert [item["pid"] for item in (await second)["processes"]["processes"]] == [1, 2]
        bench.host.now += 2
        third: Any = await bench.watch.nodes()
        assert third["nodes"]["survey"]["age_seconds"] == 2
        bench.host.now += 60
        fourth: Any = bench.tasks.start(bench.watch.nodes())
        await settled()
        assert len(bench.host.waiting_surveys) == 2
        bench.host.waiting_surveys[1].release(bench.host.seen())
        assert (await fourth)["nodes"]["survey"]["age_seconds"] == 0

    run(scenario)


def test_a_change_of_the_topology_is_looked_at_at_the_next_tick() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.running = [process(1)]
        bench.host.counters["pages_shared"] = 0
        await bench.tick(5)
        await bench.tick(5)
        assert len(bench.host.surveys) == 1
        bench.watch.stale()
        await bench.tick(1)
        assert len(bench.host.surveys) == 2
        await bench.tick(1)
        assert len(bench.host.surveys) == 2

    run(scenario)


def test_a_node_that_comes_or_goes_is_noticed_without_any_event() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        sample = bench.host.sample()
        more = dataclasses.replace(sample, nodes={**sample.nodes, 3: sample.nodes[0]})
        for seen, surveys in ((sample, 1), (more, 2), (more, 2), (sample, 3)):
            bench.host.now += 1
            bench.watch.tick(dataclasses.replace(seen, time_seconds=bench.host.now))
            await settled()
            assert len(bench.host.surveys) == surveys

    run(scenario)


def test_a_change_during_a_look_makes_it_look_again() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.slow_surveys = True
        await bench.tick(5)
        bench.watch.stale()
        bench.host.waiting_surveys[0].release(bench.host.seen())
        while bench.watch.surveys == 0:
            await asyncio.sleep(0)
        await bench.tick(1)
        assert len(bench.host.surveys) == 2
        bench.host.waiting_surveys[1].release(bench.host.seen())
        while bench.watch.surveys == 1:
            await asyncio.sleep(0)
        await bench.tick(1)
        assert len(bench.host.surveys) == 2

    run(scenario)


def test_a_migration_tells_how_far_it_is_and_then_where_things_are_is_looked_at_anew() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.tick(5)
        moving = bench.migrate()
        await settled()
        ((request, operation),) = bench.host.moves
        assert bench.watch.moving == "the service is moving memory of process 1 to node 1"
        assert (request.process.pid, request.to) == (1, 1)
        assert (request.floor_bytes, request.latency_seconds) == (bench.config.floor_bytes, bench.config.batch_latency)
        with pytest.raises(Refused, match="moving memory already"):
            await bench.migrate(pid=2)
        operation.at = Progress(10, 30, "pages")
        operation.release(MoveResult(30, 0, {"busy": 1}))
        result = (await moving)["result"]
        assert result["totals"] == {"moved": 30, "would_move": 0, "already": 0, "left": 1}
        assert bench.watch.moving == ""
        await bench.tick(1)
        assert len(bench.host.surveys) == 2

    run(scenario)


def test_nothing_is_moved_during_a_transaction() -> None:
    async def scenario(bench: Bench) -> None:
        bench.busy = "a transaction is under way (somebody, being planned)"
        with pytest.raises(Refused, match=r"a transaction is under way \(somebody"):
            await bench.migrate()
        looking = bench.migrate(dry_run=True)
        await settled()
        assert bench.watch.moving == ""
        assert (await looking)["result"]["dry_run"] is True
        assert bench.host.moves == []

    run(scenario)


def test_dry_runs_take_turns_and_keep_nobody_from_moving() -> None:
    async def scenario(bench: Bench) -> None:
        asked = [bench.migrate(dry_run=True) for _ in range(40)]
        bench.host.move_outcomes = [MoveResult(1, 0, {})]
        moved = bench.migrate()
        stopped = asked.pop(20)
        stopped.cancel()
        assert (await moved)["result"]["totals"]["moved"] == 1
        with pytest.raises(asyncio.CancelledError):
            await stopped
        for task in asked:
            assert (await task)["result"]["dry_run"] is True

    run(scenario)


def test_progress_is_reported_when_there_is_some() -> None:
    async def scenario(bench: Bench) -> None:
        moving = bench.migrate()
        await settled()
        ((_, operation),) = bench.host.moves
        operation.at = Progress(10, 30, "pages")
        while not bench.progress:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert bench.progress == [{"progress": {"done": 10, "total": 30, "unit": "pages"}, "result": None}]
        moving.cancel()
        assert (await moving)["result"]["cancelled"] is True

    run(scenario)


def test_a_migration_that_fails_leaves_the_way_free_for_the_next() -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.move_outcomes = [Denied("moving", "no"), MoveResult(1, 0, {})]
        with pytest.raises(Denied):
            await bench.migrate()
        assert (await bench.migrate())["result"]["totals"]["moved"] == 1

    run(scenario)


def test_the_end_stops_what_runs_and_tells_nobody() -> None:
    async def scenario(bench: Bench) -> None:
        moving = bench.migrate()
        await settled()
        bench.tasks.close()
        ((_, operation),) = bench.host.moves
        with pytest.raises(asyncio.CancelledError):
            await moving
        assert operation.outcome is not None

    run(scenario)
