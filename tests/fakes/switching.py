# SPDX-License-Identifier: GPL-2.0-or-later
"""A host whose processes can be switched."""

from __future__ import annotations

from collections.abc import Callable

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.memory import HomeRange, Inventory, ProcessClass, ProcessId, ProcessMemory, UnmergeDemand
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from tests.fakes.host import FakeHost, FakeOperation

PAGE = 4096


class SwitchHost(FakeHost):
    """Processes have a range each, at their pid's address; which are `running` has to be said by the test.

    :ivar units: processes of units, by pid
    :ivar switches: what was asked for: pid, on, method, dry run
    :ivar switch_outcomes: what comes of the next ones; then they are done
    :ivar asked: the same as requests
    :ivar room_bytes: what un-merging may take
    :ivar before_switch: called before each
    """

    def __init__(self) -> None:
        super().__init__()
        self.units: dict[str, list[int]] = {}
        self.switches: list[tuple[int, bool, Method | None, bool]] = []
        self.switch_outcomes: list[SwitchResult | KsmdError] = []
        self.asked: list[Switch] = []
        self.room_bytes = 1 << 30
        self.before_switch: Callable[[], object] = lambda: None

    def unit_members(self, unit: str) -> FakeOperation[tuple[ProcessId, ...]]:
        return FakeOperation(tuple(ProcessId(pid, 100 * pid) for pid in self.units.get(unit, [])))

    def inventory(self, floor_bytes: int) -> FakeOperation[Inventory]:
        memories = tuple(
            ProcessMemory(one.id, one.name, one.unit, one.classes, one.merged_pages, (self._range(one.id.pid),))
            for one in self.running
            if ProcessClass.MERGEABLE in one.classes
        )
        grows = sum(memory.merged_pages for memory in memories) * PAGE
        return FakeOperation(Inventory(self.topology(), memories, (UnmergeDemand("host", grows, self.room_bytes),)))

    def _range(self, pid: int) -> HomeRange:
        pages = next(one.merged_pages for one in self.running if one.id.pid == pid)
        return HomeRange(pid << 24, (pid << 24) + pages * PAGE, 0, {0: pages}, pages)

    def switch(
        self,
        request: Switch,
        method: Method | None,
        deadline_seconds: float,
        *,
        dry_run: bool = False,
    ) -> FakeOperation[SwitchResult]:
        self.before_switch()
        self.switches.append((request.process.pid, request.on, method, dry_run))
        self.asked.append(request)
        if self.switch_outcomes:
            return FakeOperation(self.switch_outcomes.pop(0))
        merged = 0 if request.on else sum(one.merged_pages for one in self.running if one.id == request.process)
        return FakeOperation(switched(request.process, on=request.on, unmerged_pages=merged))


def switched(process: ProcessId, *, on: bool, **more: object) -> SwitchResult:
    """What comes of a switch that is done."""
    fields: dict[str, object] = {
        "process": process,
        "on": on,
        "method": Method.INJECT,
        "how": "prctl(PR_SET_MEMORY_MERGE)",
        "before": not on,
        "after": on,
        "mergeable_bytes": PAGE if on else 0,
        "merging_pages": 0,
        "stopped_seconds": 0.002,
        "left": (),
    }
    return SwitchResult(**(fields | more))  # type: ignore[arg-type]
