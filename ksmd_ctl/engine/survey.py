# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be seen of the simulated machine: its processes, what would be over if everything un-merged, equal contents
that are not one page, which are compared without a tree, and who shares frames with whom.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from ksmd_ctl.engine.machine import Machine, Process
from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, Page, SwapEntry, ZeroPte
from ksmd_ctl.engine.mm import Vma
from ksmd_ctl.engine.state import KSM_RUN_OFFLINE, RMAP_ITEM_SIZE, folio_test_ksm, get_kpfn_nid, page_to_nid
from ksmd_ctl.host.duplicates import (
    NO_LIMIT,
    POLICY,
    DuplicateKsmPages,
    DuplicatePages,
    KsmPage,
    MergeRules,
    duplicate_ksm_pages,
)
from ksmd_ctl.host.memory import (
    Census,
    HomeRange,
    Inventory,
    KsmDetection,
    Node,
    ProcessClass,
    ProcessId,
    ProcessMemory,
    Range,
    SplitBlocks,
    Survey,
    Topology,
    UnmergeDemand,
)
from ksmd_ctl.host.memory import Process as HostProcess
from ksmd_ctl.host.sample import NodeMemory
from ksmd_ctl.host.sharing import Sharing, SharingTally

NOT_WRITABLE = "the mapping can't be written"


def describe(machine: Machine, process: Process) -> HostProcess:
    """A process as KSM sees it. A range's home is its policy's node."""
    mm, features = process.mm, machine.ksm.profile
    nodes: Counter[int] = Counter()
    remote: Counter[int] = Counter()
    resident: Counter[int] = Counter()
    homes = set()
    walked = swapped = zero = 0
    for vma in mm.vmas:
        home = mm.policy if vma.policy is None else vma.policy
        if vma.mergeable:
            homes.add(home)
            present = sum(isinstance(pte, Page) for pte in vma.ptes)
            away = sum(isinstance(pte, SwapEntry) for pte in vma.ptes)
            walked += len(vma.ptes) << PAGE_SHIFT if present or away else 0
            resident.update(page_to_nid(pte) for pte in vma.ptes if isinstance(pte, Page))
            swapped += away << PAGE_SHIFT
            zero += sum(isinstance(pte, ZeroPte) for pte in vma.ptes)
        there = Counter(page_to_nid(pte) for pte in vma.ptes if isinstance(pte, Page) and folio_test_ksm(pte))
        nodes.update(there)
        remote.update({node: count for node, count in there.items() if home is not None and node != home})
    merged = [pte for vma in mm.vmas for pte in vma.ptes if isinstance(pte, Page) and folio_test_ksm(pte)]
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
        resident_bytes=resident.total() << PAGE_SHIFT,
        swapped_bytes=swapped,
        file_bytes=0,
        mergeable_mappings=sum(vma.mergeable for vma in mm.vmas),
        zero_mapped_pages=zero,
        split_zero_pages=0,
        huge_bytes=0,
        split_blocks=SplitBlocks(),
        ksm_mapped_pages=len(merged) if features.smart_scan else None,
        sharing_bytes=round(sum(PAGE_SIZE - PAGE_SIZE / page.mapcount for page in merged)),
        resident_nodes=dict(sorted(resident.items())),
        machine=process.machine,
    )


def processes(machine: Machine) -> tuple[HostProcess, ...]:
    """Every process that has memory."""
    return tuple(describe(machine, process) for process in machine.processes.values() if process.mm.vmas)


def survey(machine: Machine, time_seconds: float) -> Survey:
    """Nodes, processes and KSM pages."""
    nodes = [node for node in machine.memory.nodes if node.online]
    pages = {node.nid: sum(map(folio_test_ksm, node.pages())) for node in nodes}
    census = Census(time_seconds, pages, pages, pages, True, KsmDetection.ENGINE, 0.0)
    found = processes(machine)
    growth: Counter[int | None] = Counter()
    for process in found:
        growth[process.home] += sum(process.nodes.values()) + (process.zero_pages or 0)
    demands = unmerge_demands(growth, pages, node_memory(machine))
    seen = topology(machine)
    return Survey(
        found, time_seconds=time_seconds, topology=seen, census=census, lacking="", demands=demands, cpu_seconds=0.0
    )


def inventory(machine: Machine, floor_bytes: int) -> Inventory:
    """What a plan to un-merge has to know; no cgroups are simulated."""
    memories = tuple(_memory(one) for one in machine.processes.values() if any(vma.mergeable for vma in one.mm.vmas))
    growth: Counter[int | None] = Counter()
    for item in (item for one in memories for item in one.ranges):
        growth[item.home] += item.merged_pages
    frames = Counter(node.nid for node in machine.memory.nodes for page in node.pages() if folio_test_ksm(page))
    return Inventory(topology(machine), memories, unmerge_demands(growth, frames, node_memory(machine), floor_bytes))


def _memory(process: Process) -> ProcessMemory:
    ranges = []
    for vma in process.mm.vmas:
        pages = [pte for pte in vma.ptes if isinstance(pte, Page)]
        if vma.mergeable and pages:
            home = process.mm.policy if vma.policy is None else vma.policy
            nodes = dict(sorted(Counter(map(page_to_nid, pages)).items()))
            ranges.append(HomeRange(vma.start, vma.end, home, nodes, sum(map(folio_test_ksm, pages))))
    return ProcessMemory(
        ProcessId(process.pid, process.start_time_ticks),
        process.name,
        process.unit,
        frozenset({ProcessClass.MERGEABLE}),
        sum(item.merged_pages for item in ranges),
        tuple(ranges),
    )


def unmerge_demands(
    growth: Mapping[int | None, int], frames: Mapping[int, int], memory: Mapping[int, NodeMemory], floor_bytes: int = 0
) -> tuple[UnmergeDemand, ...]:
    """The host and every node; what is most over comes first.

    :param growth: pages that un-merging takes, by their home
    :param frames: KSM pages by node, which come free
    """

    def demand(where: str, pages: int, free_bytes: int) -> UnmergeDemand:
        return UnmergeDemand(where, max(0, pages * PAGE_SIZE), max(0, free_bytes - floor_bytes))

    free = sum(node.free_bytes for node in memory.values())
    found = [demand("host", sum(growth.values()) - sum(frames.values()), free)]
    for number, node in memory.items():
        pages = growth.get(number, 0) + growth.get(None, 0) - frames.get(number, 0)
        found.append(demand(f"node {number}", pages, node.free_bytes))
    return tuple(sorted(found, key=lambda item: (-item.over_bytes, item.free_bytes - item.growth_bytes)))


def describe_range(machine: Machine, vma: Vma) -> Range:
    """A mapping."""
    pages = [pte for pte in vma.ptes if isinstance(pte, Page)]
    flags = {"rd", "mr", "mw", "me", "ac"}
    flags |= {"wr"} if vma.writable else set()
    flags |= {"mg"} if vma.mergeable else set()
    flags |= set() if vma.compatible else {"sh"}
    return Range(
        vma.start,
        vma.end,
        frozenset(flags),
        policy="default" if vma.policy is None else f"bind:{vma.policy}",
        policy_nodes=frozenset() if vma.policy is None else frozenset({vma.policy}),
        resident_pages=len(pages),
        anonymous_pages=len(pages),
        ksm_pages=sum(map(folio_test_ksm, pages)) if machine.ksm.profile.smart_scan else None,
    )


def node_memory(machine: Machine) -> dict[int, NodeMemory]:
    """The memory of the nodes that are online."""
    return {
        node.nid: NodeMemory(node.capacity * PAGE_SIZE, (node.capacity - node.used) * PAGE_SIZE)
        for node in machine.memory.nodes
        if node.online
    }


def topology(machine: Machine) -> Topology:
    """The nodes that are online: one CPU on each, all as far from one another."""
    online = [node for node in machine.memory.nodes if node.online]
    nodes = tuple(
        Node(
            node.nid,
            frozenset({node.nid}),
            node.capacity * PAGE_SIZE,
            {other.nid: 10 if other is node else 20 for other in online},
        )
        for node in online
    )
    return Topology(nodes, numa=True, going_offline=bool(machine.ksm.run & KSM_RUN_OFFLINE))


# -- duplicates ----------------------------------------------------------------------------------------------------


def find_duplicates(machine: Machine) -> DuplicatePages:
    """Frames of one content and node beyond those that max_page_sharing requires."""
    ksm = machine.ksm
    vmas = (vma for process in machine.processes.values() for vma in process.mm.vmas if vma.mergeable)
    pages = [pte for vma in vmas for pte in vma.ptes if isinstance(pte, Page)]
    mappings = Counter((get_kpfn_nid(ksm, page.pfn), page.content) for page in pages)
    frames = Counter((get_kpfn_nid(ksm, page.pfn), page.content) for page in set(pages))
    surplus = (max(0, count - math.ceil(mappings[key] / ksm.max_page_sharing)) for key, count in frames.items())
    return DuplicatePages(len(pages), frames.total(), sum(surplus), True, 0.0)


def find_duplicate_ksm_pages(machine: Machine, began: float, most_pages: int) -> DuplicateKsmPages:
    """`ksmd_ctl.host.interface.Host.duplicate_ksm_pages`."""
    across = machine.show("merge_across_nodes").strip() == "1"
    limit = int(machine.show("max_page_sharing")) if machine.ksm.profile.chains else NO_LIMIT
    found: dict[Page, KsmPage] = {}
    mappings = []
    for process in machine.processes.values():
        owner = ProcessId(process.pid, process.start_time_ticks)
        for vma in process.mm.vmas:
            for index, page in enumerate(vma.ptes):
                if not (isinstance(page, Page) and folio_test_ksm(page)):
                    continue
                ksm_page = found.setdefault(page, KsmPage(page.pfn, page_to_nid(page), page.mapcount))
                mappings.append((page.pfn, owner, vma.start + (index << PAGE_SHIFT)))
                if not vma.writable:
                    ksm_page.stuck = NOT_WRITABLE
                elif not across and vma.policy not in (None, ksm_page.node):
                    ksm_page.stuck = ksm_page.stuck or POLICY
    return duplicate_ksm_pages(
        ((page.content, ksm_page) for page, ksm_page in found.items()),
        mappings,
        MergeRules(across, limit),
        most_pages,
        page_size=PAGE_SIZE,
        time_seconds=began,
        detection=KsmDetection.ENGINE,
    )


# -- who shares with whom ------------------------------------------------------------------------------------------


def sharing(machine: Machine, groups: Sequence[Sequence[ProcessId]], began: float) -> Sharing:
    """`ksmd_ctl.host.interface.Host.sharing`, all frames counted."""
    mappings: dict[Page, Counter[int]] = {}
    gone = []
    for number, group in enumerate(groups):
        for one in group:
            process = machine.processes.get(one.pid)
            if process is None or process.start_time_ticks != one.start_time_ticks:
                gone.append(one.pid)
                continue
            for pte in (pte for vma in process.mm.vmas if vma.mergeable for pte in vma.ptes):
                if isinstance(pte, Page):
                    mappings.setdefault(pte, Counter())[number] += 1
    tally = SharingTally()
    for page, times in mappings.items():
        tally.add(times, unseen=page.mapcount - times.total(), merged=folio_test_ksm(page))
    alone = tuple(tally.alone.get(number, 0) for number in range(len(groups)))
    return Sharing(began, tally.sets(), alone, 1.0, True, KsmDetection.ENGINE, gone=tuple(sorted(gone)))
