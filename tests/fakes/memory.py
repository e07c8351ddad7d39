# SPDX-License-Identifier: GPL-2.0-or-later
"""A host for tests that has merged memory on two nodes: what is un-merged, moved, and where that leaves it."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ksmd_ctl.errors import KsmdError, NoSuchProcess, Rejected, Unmapped, errno_text
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.memory import HomeRange, Inventory, ProcessClass, ProcessId, ProcessMemory, Topology, UnmergeDemand
from ksmd_ctl.host.operation import Move, MoveResult, Unshare, UnsharedPart, UnsharePart, UnshareResult
from tests.fakes.host import FakeHost, FakeOperation

__all__ = ["Memory", "MergedHost"]

PAGE = 4096


@dataclass
class Memory:
    """A mapping: its home, the nodes of its pages, which of these are merged, and whether they can be un-merged."""

    start: int
    home: int | None
    nodes: list[int]
    merged: list[bool]
    writable: bool = True

    @property
    def end(self) -> int:
        return self.start + len(self.nodes) * PAGE


class MergedHost(FakeHost):
    """
    :ivar mappings: what there is, by pid
    :ivar limited: the memory cgroups above a process that have a limit, by pid
    :ivar free: what is free, by place
    :ivar interfere: called before each operation with its name; an error that it returns is what comes of it
    """

    def __init__(self, pages: int = 40, run: int = 1) -> None:
        super().__init__({Knob.RUN: run})
        self.mappings: dict[int, list[Memory]] = {}
        for pid, home in ((10, 0), (11, 1), (12, None)):
            # Merged across nodes: all on the first one.
            self.mappings[pid] = [Memory(0x1000 * pid * 256, home, [0] * pages, [True] * pages)]
        self.mappings[11].append(Memory(0x40000000, 1, [0] * pages, [True] * pages, writable=False))
        self.limited: dict[int, tuple[str, ...]] = {}
        self.free = {"host": 1 << 30, "node 0": 1 << 30, "node 1": 1 << 30}
        self.interfere: Callable[[str], KsmdError | None] = lambda _: None
        self.counters["pages_shared"] = 1
        self.counters["pages_sharing"] = 4 * pages - 1

    def _all(self) -> list[Memory]:
        return [item for items in self.mappings.values() for item in items]

    def merged_pages(self) -> int:
        """How many pages are merged, whatever the counters say."""
        return sum(sum(item.merged) for item in self._all())

    def merge(self) -> None:
        """ksmd comes by, if it runs."""
        if self.knobs[Knob.RUN] == 1 and self.knobs[Knob.PAGES_TO_SCAN] == 1:
            # It looks at one page, and merges nothing; but the search for it forgets what is merged no more.
            if not self.merged_pages():
                self.counters["pages_shared"] = self.counters["pages_sharing"] = 0
        elif self.knobs[Knob.RUN] == 1:
            for item in self._all():
                item.merged = [True] * len(item.merged)
            self.counters["pages_shared"] = 1
            self.counters["pages_sharing"] = self.merged_pages() - 1

    def at_home(self) -> bool:
        return all(item.home is None or set(item.nodes) <= {item.home} for item in self._all())

    # -- the interface ---------------------------------------------------------------------------------------

    def inventory(self, floor_bytes: int) -> FakeOperation[Inventory]:
        self.now += 0.1
        error = self.interfere("inventory")
        if error is not None:
            return FakeOperation(error)
        memories = tuple(
            ProcessMemory(
                ProcessId(pid, 100 * pid),
                f"p{pid}",
                "a.service",
                frozenset({ProcessClass.MERGEABLE}),
                sum(sum(item.merged) for item in items),
                tuple(
                    HomeRange(item.start, item.end, item.home, dict(Counter(item.nodes)), sum(item.merged))
                    for item in items
                ),
                self.limited.get(pid, ()),
            )
            for pid, items in self.mappings.items()
        )
        growth = self.merged_pages() * PAGE
        demands = tuple(
            UnmergeDemand(where, growth, max(0, free - (0 if where.startswith("/") else floor_bytes)))
            for where, free in self.free.items()
        )
        return FakeOperation(Inventory(Topology(self.nodes, numa=True), memories, demands))

    def unshare(self, request: Unshare, deadline_seconds: float) -> FakeOperation[UnshareResult]:
        self.now += 0.1
        done: list[UnsharedPart] = []
        for part in request.parts:
            error = self.interfere("unshare")
            if error is not None and not done:
                return FakeOperation(error)
            if error is not None:
                return FakeOperation(UnshareResult(tuple(done), str(error.why)))
            done.append(self._unshare(part))
            if done[-1].ended and len(request.parts) == 1:
                return FakeOperation(Unmapped("un-merging", f"nothing is mapped in {part.ranges}"))
        return FakeOperation(UnshareResult(tuple(done)))

    def _unshare(self, part: UnsharePart) -> UnsharedPart:
        mapped = self.mappings.get(part.process.pid, ())
        if not any(item.start < end and start < item.end for item in mapped for start, end in part.ranges):
            return UnsharedPart(0, {}, ended=True)
        done, left = 0, Counter[str]()
        for item in mapped:
            for index, merged in enumerate(item.merged):
                address = item.start + index * PAGE
                if not merged or not any(start <= address < end for start, end in part.ranges):
                    continue
                if not item.writable:
                    left["not writable"] += 1
                    continue
                item.merged[index] = False
                if part.to is not None:
                    item.nodes[index] = part.to
                done += 1
        return UnsharedPart(done, dict(left))

    def move(self, request: Move, deadline_seconds: float) -> FakeOperation[MoveResult]:
        self.now += 0.1
        error = self.interfere("move")
        if error is not None:
            return FakeOperation(error)
        if request.process.pid not in self.mappings:
            return FakeOperation(NoSuchProcess("moving", "it is gone"))
        moved = already = 0
        for item in self.mappings[request.process.pid]:
            for index, node in enumerate(item.nodes):
                address = item.start + index * PAGE
                if any(start <= address < end for start, end in request.ranges):
                    moved += node != request.to
                    already += node == request.to
                    item.nodes[index] = request.to
        return FakeOperation(MoveResult(moved, already, {}))

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> FakeOperation[KnobValue]:
        self.now += 0.1
        error = self.interfere(f"write {knob}")
        if error is not None:
            return FakeOperation(error)
        if KNOBS[knob].needs_unmerge and self.knobs[knob] != value and self.merged_pages():
            return FakeOperation(Rejected(f"writing {value} to {knob}", errno_text(errno.EBUSY), errno=errno.EBUSY))
        return super().write(knob, value, deadline_seconds)

    def put(self, knob: Knob, value: KnobValue) -> None:
        if knob is Knob.RUN and value == 2:
            # Whoever writes spreads what comes of it.
            for item in self._all():
                item.nodes = [index % 2 if merged else item.nodes[index] for index, merged in enumerate(item.merged)]
                item.merged = [False] * len(item.merged)
        super().put(knob, value)
