# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of what is mergeable on the simulated machine is alike and yet apart: all of it is compared."""

from __future__ import annotations

import math
from collections import Counter

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import Page
from ksmd_ctl.engine.state import get_kpfn_nid
from ksmd_ctl.host.memory import Likeness

__all__ = ["likeness"]


def likeness(machine: Machine) -> Likeness:
    """Frames of one content and node, less those that max_page_sharing asks for."""
    ksm = machine.ksm
    pages = [
        pte
        for process in machine.processes.values()
        for vma in process.mm.vmas
        if vma.mergeable
        for pte in vma.ptes
        if isinstance(pte, Page)
    ]
    frames: dict[tuple[int, bytes], set[int]] = {}
    mappings: Counter[tuple[int, bytes]] = Counter()
    for page in pages:
        key = (get_kpfn_nid(ksm, page.pfn), page.content)
        frames.setdefault(key, set()).add(page.pfn)
        mappings[key] += 1
    apart = sum(max(0, len(found) - math.ceil(mappings[key] / ksm.max_page_sharing)) for key, found in frames.items())
    return Likeness(len(pages), sum(map(len, frames.values())), apart, True, 0.0)
