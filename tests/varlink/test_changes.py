# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans, changes and un-merging over the socket: what is asked for, by whom, and what is no question at all."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.daemon.varlink import INTERFACE, ControlServer
from ksmd_ctl.daemon.varlink_socket import Authority
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.switching import Method
from ksmd_ctl.transactions.collapsing import CollapseOrder
from ksmd_ctl.transactions.switching import SwitchOrder
from ksmd_ctl.transactions.unmerging import UnmergeOrder
from tests.varlink.wire import Client, FakeJob, FakeJobs, FakeService, Report, served

SET, PLAN, UNMERGE, COLLAPSE, MERGE = (
    f"{INTERFACE}.{name}" for name in ("Set", "Plan", "Unmerge", "Collapse", "Merge")
)
PROGRESS = {"progress": {"phase": "unshare"}, "transaction": None}
RESULT = {"progress": None, "transaction": {"result": "done"}}


class FakeChanges(FakeJobs):
    async def plan(self, wanted: Mapping[Knob, KnobValue]) -> Mapping[str, object]:
        return await self.begin(("plan", wanted))

    async def set(
        self, wanted: Mapping[Knob, KnobValue], wait_seconds: float, who: str, report: Report, *, force: bool = False
    ) -> Mapping[str, object]:
        return await self.begin(("set", wanted, wait_seconds, who, force), report)

    async def unmerge(self, order: UnmergeOrder, report: Report) -> Mapping[str, object]:
        return await self.begin(order, report)

    async def collapse(self, order: CollapseOrder, report: Report) -> Mapping[str, object]:
        return await self.begin(order, report)

    async def switch(self, order: SwitchOrder, by: str, report: Report) -> Mapping[str, object]:
        return await self.begin((order, by), report)


class Changing(FakeService):
    """A service that has transactions."""

    def __init__(self) -> None:
        super().__init__()
        self.transactions = self.switches = FakeChanges(self.tasks)


async def begun(service: Changing) -> FakeJob:
    while not service.transactions.jobs:
        await asyncio.sleep(0)
    return service.transactions.jobs[0]


def play(folder: Path, scenario: Any, **more: Any) -> None:
    async def with_changes(server: ControlServer, _: FakeService, path: Path) -> None:
        service = Changing()
        server.service = service
        try:
            await scenario(service, path)
        finally:
            service.tasks.close()

    assert served(folder / "s", with_changes, **more) == []


def test_a_change_with_progress_and_its_end(tmp_path: Path) -> None:
    async def scenario(service: Changing, path: Path) -> None:
        client = await Client.connect(path)
        knobs = {"merge_across_nodes": 0, "smart_scan": True}
        client.call(SET, parameters={"knobs": knobs, "wait_seconds": 5}, more=True)
        job = await begun(service)
        who = f"ksmd-ctl set merge_across_nodes=0 smart_scan=1, pid {os.getpid()}, uid {os.getuid()}"
        assert job.asked == ("set", {Knob.MERGE_ACROSS_NODES: 0, Knob.SMART_SCAN: 1}, 5.0, who, False)
        job.progress(PROGRESS)
        assert await client.reply() == {"parameters": PROGRESS, "continues": True}
        job.done(RESULT)
        assert await client.reply() == {"parameters": RESULT}
        assert not job.cancelled

    play(tmp_path, scenario)


def test_a_switch(tmp_path: Path) -> None:
    async def scenario(service: Changing, path: Path) -> None:
        client = await Client.connect(path)
        ranges = [{"start": 4096, "end": 8192}]
        client.call(MERGE, parameters={"on": True, "pid": 7, "ranges": ranges, "method": "inject"})
        job = await begun(service)
        by = f"ksmd-ctl merge on --pid 7, pid {os.getpid()}, uid {os.getuid()}"
        assert job.asked == (SwitchOrder(True, 7, ranges=((4096, 8192),), method=Method.INJECT), by)
        job.done({"result": {}, "progress": None})
        assert await client.reply() == {"parameters": {"result": {}, "progress": None}}

    play(tmp_path, scenario)


def test_who_may_only_read_may_plan_and_not_change(tmp_path: Path) -> None:
    async def scenario(service: Changing, path: Path) -> None:
        client = await Client.connect(path)
        changes = ((SET, {"knobs": {"run": 1}}), (UNMERGE, {"pid": 7}), (COLLAPSE, {"pid": 7}))
        # A dry run of a switch connects to a monitor.
        switches = ((MERGE, {"on": False, "pid": 7}), (MERGE, {"on": False, "pid": 7, "dry_run": True}))
        for method, parameters in (*changes, *switches):
            client.call(method, parameters=parameters)
            assert (await client.reply())["error"] == f"{INTERFACE}.PermissionDenied"
        assert service.transactions.jobs == []
        client.call(PLAN, parameters={"knobs": {"run": "1"}})
        job = await begun(service)
        assert job.asked == ("plan", {Knob.RUN: 1})
        job.done({"plan": {}})
        assert await client.reply() == {"parameters": {"plan": {}}}
        client.call(UNMERGE, parameters={"unit": "a.service", "to": 1, "dry_run": True})
        while len(service.transactions.jobs) < 2:
            await asyncio.sleep(0)
        assert service.transactions.jobs[1].asked == UnmergeOrder(None, "a.service", 1, True)
        service.transactions.jobs[1].done({"result": {}})
        await client.reply()
        client.call(COLLAPSE, parameters={"pid": 7, "dry_run": True})
        while len(service.transactions.jobs) < 3:
            await asyncio.sleep(0)
        assert service.transactions.jobs[2].asked == CollapseOrder(7, "", 32, True)

    class Nobody(Authority):
        def may_change(self, peer: object) -> bool:
            return False

    play(tmp_path, scenario, authority=Nobody())


@pytest.mark.parametrize(
    ("method", "parameters", "wrong"),
    [
        (SET, {}, "knobs"),
        (MERGE, {"pid": 7}, "on"),
        (MERGE, {"on": True, "pid": 7, "method": "gdb"}, "method"),
        (MERGE, {"on": True, "pid": 7, "ranges": [{"start": 0}]}, "ranges"),
        (SET, {"knobs": [1]}, "knobs"),
        (SET, {"knobs": {"run": 1}, "wait_seconds": -1}, "wait_seconds"),
        (SET, {"knobs": {"run": 1}, "wait_seconds": True}, "wait_seconds"),
        (SET, {"knobs": {"run": 1}, "force": 1}, "force"),
        (UNMERGE, {"pid": "7"}, "pid"),
        (UNMERGE, {"pid": 7, "to": True}, "to"),
        (UNMERGE, {"unit": 7}, "unit"),
        (UNMERGE, {"unit": "a", "dry_run": 1}, "dry_run"),
    ],
)
def test_wrong_parameters_are_named(tmp_path: Path, method: str, parameters: dict[str, object], wrong: str) -> None:
    async def scenario(service: Changing, path: Path) -> None:
        client = await Client.connect(path)
        client.call(method, parameters=parameters)
        reply = await client.reply()
        assert reply["error"] == "org.varlink.service.InvalidParameter"
        assert reply["parameters"] == {"parameter": wrong}
        assert service.transactions.jobs == []

    play(tmp_path, scenario)


@pytest.mark.parametrize("knobs", [{"run": 7}, {"walk": 1}, {}, {"run": None}, {"run": [1]}])
def test_knobs_that_can_not_be_meant_fail_with_the_reason(tmp_path: Path, knobs: dict[str, object]) -> None:
    async def scenario(service: Changing, path: Path) -> None:
        client = await Client.connect(path)
        client.call(SET, parameters={"knobs": knobs})
        reply = await client.reply()
        assert reply["error"] == f"{INTERFACE}.Failed"
        assert reply["parameters"]["exit_code"] == 2
        assert service.transactions.jobs == []

    play(tmp_path, scenario)


def test_whoever_hangs_up_has_it_abandoned(tmp_path: Path) -> None:
    async def scenario(service: Changing, path: Path) -> None:
        client = await Client.connect(path)
        client.call(SET, parameters={"knobs": {"run": 1}})
        job = await begun(service)
        assert not job.cancelled
        client.writer.close()
        for _ in range(1000):
            if job.cancelled:
                break
            await asyncio.sleep(0.001)
        assert job.cancelled

    play(tmp_path, scenario)
