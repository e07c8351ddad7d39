# SPDX-License-Identifier: GPL-2.0-or-later
"""A look at the contents of the simulated machine's pages, for a sample of them (`ksmd_ctl.host.page_sample`)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE, ZERO_CONTENT, Page, ZeroPte
from ksmd_ctl.engine.state import page_to_nid
from ksmd_ctl.engine.survey import describe
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.page_sample import (
    ZERO_FRAME,
    LookSteps,
    PageLook,
    ProcessCounts,
    ProcessPages,
    SampledPage,
    Selection,
    equal_pages,
)


class EnginePages:
    """`ksmd_ctl.host.page_sample.PageSampler` of a simulated machine.

    :param clock: of its host
    """

    def __init__(self, machine: Machine, selection: Selection, clock: Callable[[], float]) -> None:
        self._machine = machine
        self._selection = selection
        self._clock = clock

    def pages(self) -> int:
        return sum(node.used for node in self._machine.memory.nodes)

    def counts(self, known: Collection[ProcessId]) -> Mapping[ProcessId, ProcessCounts]:
        return {
            ProcessId(one.pid, one.start_time_ticks): ProcessCounts(
                sum(isinstance(entry, Page) for vma in one.mm.vmas for entry in vma.ptes),
                one.mm.ksm_rmap_items,
                one.mm.ksm_merging_pages,
            )
            for one in self._machine.processes.values()
        }

    def look(self, *, zero_pages: bool = False) -> LookSteps:
        began, cpu = self._clock(), time.process_time()
        number, may_keep = self._selection.number, self._selection.may_keep
        found = []
        counts: Counter[int] = Counter()
        for process in list(self._machine.processes.values()):
            one = ProcessPages(ProcessId(process.pid, process.start_time_ticks), process.name, self._clock())
            one.about = describe(self._machine, process)
            one.merging_pages = process.mm.ksm_merging_pages
            for vma in process.mm.vmas:
                if vma.anon_vma is not None:
                    one.family = id(vma.anon_vma.root)
                for index, page in enumerate(vma.ptes if vma.mergeable else ()):
                    address = vma.start + index * PAGE_SIZE
                    if isinstance(page, Page):
                        frame = page.pfn + 1 if page.mapcount > 1 else 0
                        seen = SampledPage(number(page.content), page_to_nid(page), frame)
                    elif isinstance(page, ZeroPte) and zero_pages:
                        seen = SampledPage(number(ZERO_CONTENT), 0, ZERO_FRAME)
                    else:
                        continue
                    one.pages += 1
                    counts[seen.number] += 1
                    if may_keep(seen.number, process.pid, address):
                        one.sampled[address] = seen
            if one.pages:
                found.append(one)
        self._selection.settle(tuple(found))
        yield
        equal = equal_pages(counts) if self._selection.one_in > 1 else None
        return PageLook(began, self._clock(), time.process_time() - cpu, tuple(found), equal=equal)
