# SPDX-License-Identifier: GPL-2.0-or-later
"""The service's transactions on a fake host: one at a time, told about, no drift meanwhile, ended at a stop."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.config.model import Config, Heal, PolicyName, Want
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.daemon.transactions import Transactions
from ksmd_ctl.errors import Busy, KsmdError, Refused, UsageError
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.operation import CollapsedProcess, CollapseResult, Unshare, UnshareResult
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.transactions.collapsing import CollapseOrder
from ksmd_ctl.transactions.executor import Executor, TransactionRunner
from ksmd_ctl.transactions.journal import TransactionJournal
from ksmd_ctl.transactions.transaction import Phase, Result
from ksmd_ctl.transactions.unmerging import UnmergeOrder
from tests.daemon.test_loop import Bench
from tests.fakes.host import FakeOperation, process
from tests.fakes.memory import MergedHost
from tests.transactions.test_transaction import ACROSS, LIMITS, killed_in, planned

#: Far more than anything here takes: reaching it means that something hangs.
PATIENCE_SECONDS = 30


class Scene:
    def __init__(self, folder: Path) -> None:
        self.host = MergedHost()
        self.moving = ""
        self.events: list[tuple[Event, str]] = []
        self.config = dataclasses.replace(Config(), floor_bytes=1 << 20)
        self.journal = TransactionJournal(folder, self.host.identity)
        self.tasks = Tasks()
        self.progress: list[Any] = []
        self.transactions = Transactions(
            self.host,
            self.tasks,
            Executor(self.host, SavedKnobs(folder, self.host.identity)),
            self.journal,
            Log(lambda text, fields: self.events.append((Event(fields["MESSAGE_ID"]), text))),
            lambda: self.config,
            lambda: None,
            lambda: self.moving,
        )

    def set(
        self, wanted: Mapping[Knob, KnobValue] = ACROSS, who: str = "somebody", wait_seconds: float = 0
    ) -> asyncio.Task[Any]:
        return self.tasks.start(self.transactions.set(wanted, wait_seconds, who, self.progress.append))

    async def waiting_for_room(self) -> asyncio.Task[Any]:
        """A change that is being planned until there is room."""
        self.host.free["/tenant"] = 0
        task = self.set(wait_seconds=1000)
        while not self.transactions.under_way:
            await asyncio.sleep(0)
        return task

    def unmerge(self, order: UnmergeOrder) -> asyncio.Task[Any]:
        return self.tasks.start(self.transactions.unmerge(order, self.progress.append))

    def plan(self) -> asyncio.Task[Any]:
        return self.tasks.start(self.transactions.plan(ACROSS))


def play(folder: Path, script: Callable[[Scene], Awaitable[None]]) -> Scene:
    async def main() -> Scene:
        scene = Scene(folder)
        await asyncio.wait_for(script(scene), PATIENCE_SECONDS)
        scene.tasks.close()
        return scene

    return asyncio.run(main())


def test_a_change_with_word_on_how_far_it_is(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        assert (await scene.set())["transaction"]["result"] == "done"
        phases = [said["progress"]["phase"] for said in scene.progress]
        assert list(dict.fromkeys(phases))[:3] == ["stop", "unshare", "check"]
        assert scene.transactions.section()["totals"]["done"] == 1  # type: ignore[index]
        assert not scene.transactions.active

    scene = play(tmp_path, script)
    assert scene.host.knobs[Knob.MERGE_ACROSS_NODES] == 0
    assert [text for event, text in scene.events if event is Event.TRANSACTION] == [
        "transaction begun: merge_across_nodes=0 (somebody)",
        "transaction done (somebody)",
    ]


def test_what_is_so_already_is_no_transaction(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        first = (await scene.set({Knob.PAGES_TO_SCAN: 500}))["transaction"]
        said = list(scene.events)
        second = (await scene.set({Knob.PAGES_TO_SCAN: 500}, "another"))["transaction"]
        assert (second["result"], second["knobs"]) == ("done", {})
        assert scene.transactions.section()["last"] == first
        assert (scene.events, scene.transactions.active, scene.transactions.under_way) == (said, False, "")

    play(tmp_path, script)


def test_the_second_is_told_who_is_at_it(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        room = dict(scene.host.free)
        first = await scene.waiting_for_room()
        with pytest.raises(Refused, match=r"a transaction is under way \(somebody, being planned\)"):
            await scene.set({Knob.RUN: 0}, "another")
        with pytest.raises(Refused, match="a transaction is under way"):
            await scene.unmerge(UnmergeOrder(pid=10))
        # To look is no trouble to anybody.
        assert (await scene.plan())["plan"]["unmerge"] is True
        first.cancel()
        with pytest.raises(Refused, match="interrupted before anything was changed"):
            await first
        assert scene.transactions.section()["totals"]["refused"] == 1  # type: ignore[index]
        assert (scene.transactions.under_way, scene.host.written) == ("", [])
        scene.host.free.clear()
        scene.host.free.update(room)
        assert (await scene.set(who="another"))["transaction"]["result"] == "done"

    play(tmp_path, script)


def test_while_memory_is_moved_nothing_begins_and_who_moves_it_is_said(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.moving = "the service is moving memory of process 10 to node 1"
        for task in (scene.set(), scene.unmerge(UnmergeOrder(pid=10))):
            with pytest.raises(Refused, match="moving memory of process 10 to node 1"):
                await task
        assert scene.transactions.under_way == ""
        scene.moving = ""
        await scene.set()
        assert scene.transactions.under_way == ""

    play(tmp_path, script)


def test_what_is_declared_wins(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.config = dataclasses.replace(
            scene.config,
            policy=PolicyName.FIXED,
            knobs={Knob.PAGES_TO_SCAN: Want(100, origin="a.toml"), Knob.RUN: Want(0)},
        )
        with pytest.raises(Refused, match=r"the configuration declares 100 \(a.toml\)"):
            await scene.set({Knob.PAGES_TO_SCAN: 5})
        await scene.set()
        # Afterwards run is as declared, not as it was.
        assert scene.host.knobs[Knob.RUN] == 0

    assert play(tmp_path, script).host.written[-1] != (Knob.RUN, 1)


def test_use_zero_pages_can_be_set_where_the_policy_does_not_hold_it(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.config = dataclasses.replace(scene.config, policy=PolicyName.ADAPTIVE)
        with pytest.raises(Refused, match="holds it at 1 under policy") as refused:
            await scene.set({Knob.USE_ZERO_PAGES: 0})
        assert "healing.zero_pages = false" in refused.value.hint
        scene.config = dataclasses.replace(scene.config, heal_zero_pages=Heal.OFF)
        await scene.set({Knob.USE_ZERO_PAGES: 1})
        assert scene.host.knobs[Knob.USE_ZERO_PAGES] == 1

    play(tmp_path, script)


def test_one_that_does_not_fit_is_refused_with_figures_and_counted(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.host.free["/tenant"] = 0
        with pytest.raises(Refused, match=r"in the memory cgroup /tenant it takes up to 640\.0 KiB more"):
            await scene.set()
        assert scene.transactions.section()["totals"]["refused"] == 1  # type: ignore[index]
        assert scene.host.written == []

    play(tmp_path, script)


def test_whoever_asked_can_have_it_abandoned(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        unsharing: list[FakeOperation[UnshareResult]] = []

        def unshare(request: Unshare, deadline_seconds: float) -> FakeOperation[UnshareResult]:
            MergedHost.unshare(scene.host, request, deadline_seconds)
            unsharing.append(FakeOperation())
            return unsharing[-1]

        async def pass_time() -> None:
            while True:
                scene.host.now += 1
                scene.host.merge()
                await asyncio.sleep(0.001)

        scene.host.unshare = unshare  # type: ignore[method-assign]
        task = scene.set()
        while not unsharing:
            await asyncio.sleep(0)
        task.cancel()
        passing = asyncio.create_task(pass_time())
        assert (await task)["transaction"]["result"] == "abandoned"
        passing.cancel()

    scene = play(tmp_path, script)
    assert scene.host.knobs[Knob.MERGE_ACROSS_NODES] == 1
    assert (scene.host.knobs[Knob.RUN], scene.host.knobs[Knob.PAGES_TO_SCAN]) == (1, 100)


def test_the_end_of_the_service_puts_everything_back_at_once(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        reached = asyncio.get_running_loop().create_future()

        def interfere(what: str) -> KsmdError | None:
            if what == "unshare" and not reached.done():
                reached.set_result(None)
            return None

        scene.host.interfere = interfere
        scene.set()
        await reached

    scene = play(tmp_path, script)
    scene.transactions.finish()
    assert scene.journal.last is not None
    assert scene.journal.last["result"] in ("abandoned", "done")
    assert scene.host.knobs[Knob.RUN] == 1
    assert scene.host.knobs[Knob.PAGES_TO_SCAN] == 100


def test_one_that_was_interrupted_goes_on_at_the_start_and_nothing_is_written_meanwhile(tmp_path: Path) -> None:
    host = MergedHost()
    folder = tmp_path / "state"
    executor, journal = Executor(host, SavedKnobs(folder, host.identity)), TransactionJournal(folder, host.identity)
    runner = TransactionRunner.of_plan(host, executor, journal, LIMITS, planned(host, ACROSS), "an earlier one")
    killed_in(Phase.WRITE, host, runner)
    bench = Bench(tmp_path, {Knob.RUN: 1, Knob.SLEEP_MILLISECS: 33}, host)
    bench.executor.journal = SavedKnobs(folder, host.identity)

    async def script() -> None:
        for _ in range(1000):
            bench.tick()
            if not bench.loop.transactions.active:
                break
            assert (Knob.SLEEP_MILLISECS, 33) not in host.written
            await asyncio.sleep(0.002)
        bench.tick()

    bench.run_async(script)
    assert TransactionJournal(folder, host.identity).contents.totals == {Result.DONE: 1}
    assert host.knobs[Knob.MERGE_ACROSS_NODES] == 0
    assert (Knob.SLEEP_MILLISECS, 33) in host.written
    assert bench.seen(Event.DRIFT) == []
    assert bench.seen(Event.TRANSACTION)[0].startswith(
        "a transaction was interrupted in the phase write (an earlier one)"
    )


def test_those_who_only_ask_share_a_look_until_something_changes(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        looks = 0

        def interfere(what: str) -> KsmdError | None:
            nonlocal looks
            looks += what == "inventory"
            return None

        scene.host.interfere = interfere
        dry_run = UnmergeOrder(pid=11, dry_run=True)
        await asyncio.gather(*(scene.plan() if number % 2 else scene.unmerge(dry_run) for number in range(40)))
        assert looks == 1
        scene.host.now += 60
        await scene.plan()
        assert looks == 2
        await scene.unmerge(UnmergeOrder(pid=11))
        assert looks == 3
        (process,) = (await scene.unmerge(dry_run))["result"]["processes"]
        assert (looks, process["merged"]) == (4, 40)

    play(tmp_path, script)


def test_a_dry_run_that_fails_is_not_remembered_and_lets_the_next_one_begin(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        failures = [Busy("looking at mergeable memory", "too many requests are being served")]
        scene.host.interfere = lambda what: failures.pop() if failures and what == "inventory" else None
        first, second = scene.plan(), scene.plan()
        with pytest.raises(Busy):
            await first
        assert (await second)["plan"]

    play(tmp_path, script)


def test_un_merging_one_process(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        (process,) = (await scene.unmerge(UnmergeOrder(pid=11)))["result"]["processes"]
        assert (process["unshared"], process["left"]) == (40, {"not writable": 40})
        assert scene.host.mappings[11][0].nodes == [1] * 40
        assert all(scene.host.mappings[10][0].merged)
        result = (await scene.unmerge(UnmergeOrder(unit="a", to=0, dry_run=True)))["result"]
        assert len(result["processes"]) == 3
        with pytest.raises(UsageError, match="there is no process 99"):
            await scene.unmerge(UnmergeOrder(pid=99))
        with pytest.raises(UsageError, match="either one process or one unit"):
            await scene.unmerge(UnmergeOrder())

    play(tmp_path, script)


def test_huge_pages_are_made_one_after_the_other_and_not_beside_other_changes(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.host.running = [process(11)]
        scene.host.collapse_outcome = CollapseResult((CollapsedProcess(process(11).id, "a", blocks=3),))

        def collapse(**more: Any) -> asyncio.Task[Any]:
            order = CollapseOrder(pid=11, **more)
            return scene.tasks.start(scene.transactions.collapse(order, scene.progress.append))

        (found,) = (await collapse())["result"]["processes"]
        assert found["blocks"] == 3
        assert scene.transactions.under_way == ""
        assert [one.floor_bytes for one in scene.host.collapses] == [1 << 20]
        first = await scene.waiting_for_room()
        with pytest.raises(Refused, match="a transaction is under way"):
            await collapse()
        # To look is no trouble to anybody.
        assert (await collapse(dry_run=True))["result"]["dry_run"] is True
        first.cancel()
        with pytest.raises(Refused):
            await first
        with pytest.raises(UsageError, match="keep_pages"):
            await collapse(keep_pages=0)

    play(tmp_path, script)
