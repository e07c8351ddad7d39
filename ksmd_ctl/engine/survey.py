# SPDX-License-Identifier: GPL-2.0-or-later
"""The simulated machine's processes as a host shows them, and what would be over if everything un-merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ksmd_ctl.engine.machine import Machine, Process
from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, Page, SwapEntry, ZeroPte
from ksmd_ctl.engine.state import RMAP_ITEM_SIZE, folio_test_ksm, page_to_nid
from ksmd_ctl.host.memory import Census, Exposure, ProcessClass, ProcessId
from ksmd_ctl.host.memory import Process as HostProcess
from ksmd_ctl.host.sample import NodeMemory


def describe(machine: Machine, process: Process) -> HostProcess:
    """A process as KSM sees it. A range's home is its policy's node."""
    mm, features = process.mm, machine.ksm.profile
    nodes: Counter[int] = Counter()
    remote: Counter[int] = Counter()
    homes = set()
    walked = resident = swapped = zero = 0
    for vma in mm.vmas:
        home = mm.policy if vma.policy is None else vma.policy
        if vma.mergeable:
            homes.add(home)
            present = sum(isinstance(pte, Page) for pte in vma.ptes)
            away = sum(isinstance(pte, SwapEntry) for pte in vma.ptes)
            walked += len(vma.ptes) << PAGE_SHIFT if present or away else 0
            resident += present << PAGE_SHIFT
            swapped += away << PAGE_SHIFT
            zero += sum(isinstance(pte, ZeroPte) for pte in vma.ptes)
        there = Counter(page_to_nid(pte) for pte in vma.ptes if isinstance(pte, Page) and folio_test_ksm(pte))
        nodes.update(there)
        remote.update({node: count for node, count in there.items() if home is not None and node != home})
    profit = (mm.ksm_merging_pages + mm.ksm_zero_pages) * PAGE_SIZE - mm.ksm_rmap_items * RMAP_ITEM_SIZE
    return HostProcess(
        id=ProcessId(process.pid, process.start_time_ticks),
        name=process.name,
        group=process.name,
        unit=process.unit,
        classes=frozenset({ProcessClass.MERGEABLE if homes else ProcessClass.NOT_ELIGIBLE}),
        reason="it has mergeable memory" if homes else "nothing marked its memory as mergeable",
        merging_pages=mm.ksm_merging_pages if features.merging_pages else None,
        zero_pages=mm.ksm_zero_pages if features.process_profit else None,
        rmap_items=mm.ksm_rmap_items if features.merging_pages else None,
        profit_bytes=profit if features.process_profit else None,
        nodes=dict(sorted(nodes.items())),
        home=homes.pop() if len(homes) == 1 else None,
        remote_pages=remote.total(),
        remote_nodes=dict(sorted(remote.items())),
        walked_bytes=walked,
        resident_bytes=resident,
        swapped_bytes=swapped,
        file_bytes=0,
        mergeable_mappings=sum(vma.mergeable for vma in mm.vmas),
        zero_mapped_pages=zero,
    )


def exposures(
    processes: Iterable[HostProcess], census: Census, memory: Mapping[int, NodeMemory]
) -> tuple[Exposure, ...]:
    """The host and every node: how much each would grow if everything un-merged; what is most over comes first."""
    growth: Counter[int] = Counter()
    anywhere = 0
    for process in processes:
        size = (sum(process.nodes.values()) + (process.zero_pages or 0)) * PAGE_SIZE
        if process.home is None:
            anywhere += size
        else:
            growth[process.home] += size
    freed = sum(census.pages.values()) * PAGE_SIZE
    total = max(0, growth.total() + anywhere - freed)
    found = [Exposure("host", total, sum(node.free_bytes for node in memory.values()))]
    for number, node in memory.items():
        size = growth[number] + anywhere - census.pages.get(number, 0) * PAGE_SIZE
        found.append(Exposure(f"node {number}", max(0, size), node.free_bytes))
    return tuple(sorted(found, key=lambda item: (-item.over_bytes, item.free_bytes - item.growth_bytes)))
