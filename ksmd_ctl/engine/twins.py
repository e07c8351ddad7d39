# SPDX-License-Identifier: GPL-2.0-or-later
"""KSM pages of the simulated machine that are twins: as the running kernel's host finds them, without a tree."""

from __future__ import annotations

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, Page
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.host.memory import KsmWitness, ProcessId, Twins
from ksmd_ctl.twins import TwinFrame, judge, parts_of

__all__ = ["twins"]

NOT_WRITABLE = "the mapping can't be written"
POLICY = "its mapping's own policy takes what is un-merged to another node"
# Before max_page_sharing.
_NO_LIMIT = 1 << 30


def twins(machine: Machine, began: float, most_pages: int) -> Twins:
    """What there is; `most_pages` as in `ksmd_ctl.host.interface.Host.twins`."""
    across = machine.show("merge_across_nodes").strip() == "1"
    limit = int(machine.show("max_page_sharing")) if machine.ksm.profile.chains else _NO_LIMIT
    stuck: dict[Page, str] = {}
    mappings: dict[Page, list[tuple[ProcessId, int]]] = {}
    for process in machine.processes.values():
        owner = ProcessId(process.pid, process.start_time_ticks)
        for vma in process.mm.vmas:
            for index, page in enumerate(vma.ptes):
                if not (isinstance(page, Page) and folio_test_ksm(page)):
                    continue
                mappings.setdefault(page, []).append((owner, vma.start + (index << PAGE_SHIFT)))
                if not vma.writable:
                    stuck[page] = NOT_WRITABLE
                elif not across and vma.policy not in (None, page_to_nid(page)):
                    stuck.setdefault(page, POLICY)
    groups: dict[tuple[bytes, int], list[TwinFrame]] = {}
    for page in mappings:
        key = page.content, 0 if across else page_to_nid(page)
        groups.setdefault(key, []).append(TwinFrame(page.pfn, page.mapcount, stuck.get(page, "")))
    verdict = judge(groups.values(), limit, most_pages)
    chosen = set(verdict.chosen)
    parts = parts_of(
        (
            (process, page_to_nid(page), address)
            for page, where in mappings.items()
            if page.pfn in chosen
            for process, address in where
        ),
        PAGE_SIZE,
    )
    return Twins(
        time_seconds=began,
        frames=len(mappings),
        unrealised=verdict.unrealised,
        left=verdict.left,
        parts=parts,
        part_pages=verdict.pages,
        part_frames=len(chosen),
        complete=True,
        witness=KsmWitness.ENGINE,
        cpu_seconds=0.0,
    )
