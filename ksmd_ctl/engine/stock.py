# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that is mergeable on the simulated machine, and where it belongs: its policy's node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ksmd_ctl.engine.machine import Machine, Process
from ksmd_ctl.engine.memory import PAGE_SIZE, Page
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.host.memory import Exposure, HomeRange, Inventory, ProcessClass, ProcessId, Stock, Topology
from ksmd_ctl.host.sample import NodeMemory

__all__ = ["inventory"]


def inventory(machine: Machine, topology: Topology, memory: Mapping[int, NodeMemory], floor_bytes: int) -> Inventory:
    """What a plan to un-merge has to know; no cgroups are simulated."""
    stocks = tuple(
        _stock(process) for process in machine.processes.values() if any(v.mergeable for v in process.mm.vmas)
    )
    growth: Counter[int | None] = Counter()
    for stock in stocks:
        for item in stock.ranges:
            growth[item.home] += item.merged_pages * PAGE_SIZE
    frames = Counter(node.nid for node in machine.memory.nodes for page in node.pages() if folio_test_ksm(page))
    freed = frames.total() * PAGE_SIZE
    free = sum(node.free_bytes for node in memory.values())
    found = [Exposure("host", max(0, growth.total() - freed), max(0, free - floor_bytes))]
    for number, node in memory.items():
        size = growth[number] + growth[None] - frames[number] * PAGE_SIZE
        found.append(Exposure(f"node {number}", max(0, size), max(0, node.free_bytes - floor_bytes)))
    found.sort(key=lambda item: (-item.over_bytes, item.free_bytes - item.growth_bytes))
    return Inventory(topology, stocks, tuple(found))


def _stock(process: Process) -> Stock:
    ranges = []
    for vma in process.mm.vmas:
        pages = [pte for pte in vma.ptes if isinstance(pte, Page)]
        if vma.mergeable and pages:
            home = process.mm.policy if vma.policy is None else vma.policy
            nodes = dict(sorted(Counter(map(page_to_nid, pages)).items()))
            ranges.append(HomeRange(vma.start, vma.end, home, nodes, sum(map(folio_test_ksm, pages))))
    return Stock(
        ProcessId(process.pid, process.start_time_ticks),
        process.name,
        process.unit,
        frozenset({ProcessClass.MERGEABLE}),
        sum(item.merged_pages for item in ranges),
        tuple(ranges),
    )
