# SPDX-License-Identifier: GPL-2.0-or-later
"""The service switches what it may, says who was switched, and finds who has started again."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.numa import NumaWatch
from ksmd_ctl.daemon.switching import SwitchWatch
from ksmd_ctl.daemon.transactions import Transactions
from ksmd_ctl.errors import Denied, Refused
from ksmd_ctl.host.memory import ProcessClass
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.host.switching import Method
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.switch.keep import SwitchJournal
from ksmd_ctl.transactions.executor import Executor
from ksmd_ctl.transactions.journal import TransactionJournal
from ksmd_ctl.transactions.switching import SwitchOrder
from tests.daemon.watching import Watching, watched
from tests.fakes.host import process
from tests.fakes.switching import SwitchHost, switched
from tests.switch.test_keep import record

VM = {"machine": True, "unit": "machine-qemu-1.scope", "name": "qemu"}


class Bench(Watching):
    """A service with one machine, on a host where something is merged."""

    def __init__(self, folder: Path, *, allow: bool = True, keep: bool = False) -> None:
        super().__init__(SwitchHost())
        self.host.running = [process(11, "vm-1", 100, **VM)]
        self.host.counters["pages_shared"] = 10
        self.config: Config = dataclasses.replace(
            load("/dev/null"),
            switch_allow=allow,
            switch_keep=keep,
            state_directory=str(folder),
            census_interval=10.0,
            census_cpu_share=0.5,
        )
        self.folder = folder
        self.logged: list[tuple[str, str]] = []
        self.told: list[Mapping[str, object]] = []
        log = Log(self._log)
        self.numa = NumaWatch(self.host, self.tasks, lambda: self.config, lambda: None)
        identity = self.host.identity
        executor = Executor(self.host, SavedKnobs(folder, identity))
        self.transactions = Transactions(
            self.host,
            self.tasks,
            executor,
            TransactionJournal(folder, identity),
            log,
            lambda: self.config,
            self.changed,
        )
        self.switches = SwitchWatch(
            self.host, self.tasks, log, self.numa, self.transactions, lambda: self.config, self.changed
        )
        self.watch = self

    def _log(self, text: str, fields: Mapping[str, str]) -> None:
        self.logged.append((Event(fields["MESSAGE_ID"]).name, text))

    def events(self, event: Event) -> list[str]:
        return [text for name, text in self.logged if name == event.name]

    def section(self) -> list[dict[str, Any]]:
        return self.switches.section(self.host.now)

    async def switch(self, order: SwitchOrder) -> Any:
        return (await self.switches.switch(order, "uid 0", self.told.append))["result"]

    # A tick of the watches that are there, as the service's loop has them.
    def tick_all(self, sample: Sample) -> None:
        self.numa.tick(sample)
        self.switches.tick()

    async def restart(self, pid: int) -> None:
        """The machine ends, another process of its name comes, and the surveys pass."""
        (before,) = self.host.running
        self.host.gone.add(before.id)
        self.host.running = [process(pid, "vm-1", before.merged_pages, **VM)]
        await self.seconds(25)

    async def seconds(self, count: int) -> None:
        for _ in range(count):
            self.host.now += 1.0
            self.tick_all(self.host.sample())
            while self.tasks.running:
                await asyncio.sleep(0)


def run(folder: Path, scenario: Callable[[Bench], Coroutine[Any, Any, None]], **settings: Any) -> Bench:
    return watched(lambda: Bench(folder, **settings), scenario, 60)


OFF = SwitchOrder(on=False, vm="vm-1")


def test_it_is_refused_unless_allowed(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        for order in (OFF, dataclasses.replace(OFF, dry_run=True)):
            with pytest.raises(Refused, match=r"\[switch\] allow = false") as caught:
                await bench.switch(order)
            assert "as root" in caught.value.hint
        assert (bench.host.switches, bench.section()) == ([], [])

    run(tmp_path, scenario, allow=False)


def test_a_switch_is_recorded_logged_and_reported(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        document = await bench.switch(OFF)
        assert document["processes"][0]["after"] is False
        (one,) = bench.section()
        assert (one["pid"], one["group"], one["on"], one["by"], one["done"]) == (11, "vm-1", False, "uid 0", True)
        assert bench.events(Event.SWITCHED) == [
            "merging was switched off for qemu (pid 11): prctl(PR_SET_MEMORY_MERGE) (uid 0)"
        ]

    bench = run(tmp_path, scenario)
    assert bench.changes
    assert [one.on for one in SwitchJournal(tmp_path, bench.host.identity).records] == [False]


def test_a_failure_is_logged(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.switch_outcomes = [Denied("switching", "no permission")]
        with pytest.raises(Denied):
            await bench.switch(OFF)
        assert bench.events(Event.SWITCH_FAILED) == ["merging was not switched off --vm vm-1: no permission (uid 0)"]
        assert bench.section() == []

    run(tmp_path, scenario)


def test_nothing_else_moves_pages_meanwhile(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        with bench.transactions.doing("un-merging a process"), pytest.raises(Refused, match="un-merging a process"):
            await bench.switch(OFF)
        # A dry run may.
        with bench.transactions.doing("un-merging a process"):
            await bench.switch(dataclasses.replace(OFF, dry_run=True))
        assert bench.host.switches == [(11, False, None, True)]

    run(tmp_path, scenario)


def test_what_started_again_is_reported(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.switch(OFF)
        await bench.restart(77)
        assert bench.section()[0]["again"] == {"pid": 77}
        await bench.seconds(25)
        assert bench.events(Event.STARTED_AGAIN) == [
            "virtual machine vm-1, which was switched off (uid 0), has started again and is mergeable: qemu (pid 77)"
        ]
        assert len(bench.host.switches) == 1

    run(tmp_path, scenario)


def test_what_started_again_is_switched_off_where_that_is_kept(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.switch(OFF)
        await bench.restart(77)
        assert bench.host.switches == [(11, False, None, False), (77, False, None, False)]
        (one,) = bench.section()
        assert (one["pid"], one["by"], one["again"]) == (77, "the service, [switch] keep", None)
        # And again, but not what somebody has switched on since.
        await bench.restart(78)
        assert [pid for pid, *_ in bench.host.switches] == [11, 77, 78]
        await bench.switch(SwitchOrder(on=True, vm="vm-1"))
        await bench.restart(79)
        assert [(pid, on) for pid, on, *_ in bench.host.switches][3:] == [(78, True)]

    run(tmp_path, scenario, keep=True)


def test_where_nothing_is_merged_it_is_found_all_the_same(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.host.counters["pages_shared"] = 0
        bench.host.running = [process(11, "vm-1", 0, **VM)]
        await bench.seconds(30)
        assert bench.numa.surveys == 1
        await bench.switch(OFF)
        await bench.restart(77)
        assert [pid for pid, *_ in bench.host.switches] == [11, 77]
        # Not more often than surveys are taken otherwise.
        taken = bench.numa.surveys
        await bench.seconds(50)
        assert bench.numa.surveys - taken <= 5

    run(tmp_path, scenario, keep=True)


def test_what_can_not_be_switched_again_is_tried_at_the_next_survey(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.switch(OFF)
        bench.host.switch_outcomes = [Denied("switching", "no permission")]
        await bench.restart(77)
        await bench.seconds(25)
        assert [pid for pid, *_ in bench.host.switches] == [11, 77, 77]
        assert len(bench.events(Event.STARTED_AGAIN)) == 1
        assert bench.section()[0]["pid"] == 77

    run(tmp_path, scenario, keep=True)


def test_what_is_not_mergeable_any_more_is_left_alone(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.switch(OFF)
        (before,) = bench.host.running
        bench.host.gone.add(before.id)
        bench.host.running = [process(77, "vm-1", 0, classes=frozenset({ProcessClass.NOT_ELIGIBLE}), **VM)]
        await bench.seconds(30)
        assert len(bench.host.switches) == 1
        assert (bench.section()[0]["ended"], bench.section()[0]["again"]) == (True, None)

    run(tmp_path, scenario, keep=True)


def test_records_of_commands_are_found(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.seconds(5)
        journal = SwitchJournal(tmp_path, bench.host.identity)
        journal.note(record(11, done=False))
        await bench.seconds(1)
        assert [(one["pid"], one["done"]) for one in bench.section()] == [(11, False)]
        assert bench.events(Event.SWITCHED) == []
        changes = bench.changes
        journal.note(record(11))
        await bench.seconds(1)
        assert [(one["pid"], one["done"]) for one in bench.section()] == [(11, True)]
        (said,) = bench.events(Event.SWITCHED)
        assert said.startswith("merging was switched off for ")
        assert said.endswith(f"({record(11).by})")
        assert bench.changes > changes
        # Those that are known, and one's own, are told once.
        await bench.seconds(30)
        await bench.switch(dataclasses.replace(OFF, on=True))
        await bench.seconds(30)
        assert len(bench.events(Event.SWITCHED)) == 2
        assert bench.switches.counts()["inject"] == {"done": 1, "left": 0, "failed": 0}

    run(tmp_path, scenario)


def test_switches_are_counted(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        process_id = bench.host.find(11)
        bench.host.switch_outcomes = [
            switched(process_id, on=False),
            switched(process_id, on=False, method=Method.QMP, left=("firmware",)),
            switched(process_id, on=False, method=Method.QMP, after=True),
        ]
        for _ in range(3):
            await bench.switch(OFF)
        bench.host.switch_outcomes = [Denied("switching", "no permission")] * 2
        for method in (None, Method.INJECT):
            with pytest.raises(Denied):
                await bench.switch(dataclasses.replace(OFF, method=method))
        assert bench.switches.counts() == {
            "qmp": {"done": 0, "left": 1, "failed": 1},
            "inject": {"done": 1, "left": 0, "failed": 1},
            "auto": {"failed": 1},
        }

    run(tmp_path, scenario)


def test_a_damaged_file_is_logged(tmp_path: Path) -> None:
    (tmp_path / "switched-engine.json").write_text("no")
    (tmp_path / "switched-kernel.json").write_text("no")

    async def scenario(bench: Bench) -> None:
        assert "who was switched could not be understood" in bench.events(Event.STATE_DAMAGED)[0]

    run(tmp_path, scenario)
