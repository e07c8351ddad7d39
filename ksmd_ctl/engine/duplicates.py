# SPDX-License-Identifier: GPL-2.0-or-later
"""Equal contents of the simulated machine that are not one page: all are compared, without a tree."""

from __future__ import annotations

import math
from collections import Counter

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, Page
from ksmd_ctl.engine.state import folio_test_ksm, get_kpfn_nid, page_to_nid
from ksmd_ctl.host.duplicates import (
    NO_LIMIT,
    POLICY,
    DuplicateKsmPages,
    DuplicatePages,
    KsmPage,
    MergeRules,
    duplicate_ksm_pages,
)
from ksmd_ctl.host.memory import KsmDetection, ProcessId

__all__ = ["NOT_WRITABLE", "find_duplicate_ksm_pages", "find_duplicates"]

NOT_WRITABLE = "the mapping can't be written"


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
