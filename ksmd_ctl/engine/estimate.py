# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging would save on the simulated machine: told from its memory, not by its ksmd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import ZERO_CONTENT, Page
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.engine.survey import processes
from ksmd_ctl.host.duplicates import NO_LIMIT
from ksmd_ctl.host.estimate import Contents, Estimate, PageKind, Rules, Stability
from ksmd_ctl.host.memory import Process
from ksmd_ctl.host.merging import estimate


def rules(machine: Machine) -> Rules:
    """What its knobs say now."""
    profile = machine.ksm.profile
    return Rules(
        max_page_sharing=int(machine.show("max_page_sharing")) if profile.chains else NO_LIMIT,
        merge_across_nodes=machine.show("merge_across_nodes").strip() == "1",
        use_zero_pages=profile.zero_pages and machine.show("use_zero_pages").strip() == "1",
        nodes=sum(node.online for node in machine.memory.nodes),
    )


def chosen(machine: Machine, wanted: Callable[[Process], bool], *, more: bool) -> list[Process]:
    """The processes with memory that can be merged, of those that are wanted.

    :param more: also with memory that nobody has marked
    """
    able = {
        process.pid
        for process in machine.processes.values()
        if any((vma.mergeable or more) and vma.compatible for vma in process.mm.vmas)
    }
    return [process for process in processes(machine) if process.id.pid in able and wanted(process)]


def look(
    machine: Machine, found: Sequence[Process], *, more: bool = False, domain_of: Sequence[str] | None = None
) -> Estimate:
    """The estimate of memory of these processes; time stands still, so nothing changes between two looks."""
    mappings: dict[Page, list[int]] = {}
    marked: set[Page] = set()
    mapped: Counter[tuple[int, bool]] = Counter()
    for owner, process in enumerate(found):
        for vma in machine.processes[process.id.pid].mm.vmas:
            if not vma.compatible or not (vma.mergeable or more):
                continue
            for page in vma.ptes:
                if isinstance(page, Page):
                    mappings.setdefault(page, []).append(owner)
                    mapped[owner, vma.mergeable] += 1
                    if vma.mergeable:
                        marked.add(page)
    numbers: dict[PageKind, int] = {}
    contents: dict[bytes, list[int]] = {}
    frees = machine.ksm.profile.split_frees_zeroes
    for page, owners in mappings.items():
        kind = PageKind(
            page_to_nid(page),
            tuple(owners),
            places=len(owners) if folio_test_ksm(page) else 1,
            marked=page in marked,
            split_frees=frees and page.folio is not None and page.content == ZERO_CONTENT,
        )
        contents.setdefault(page.content, []).append(numbers.setdefault(kind, len(numbers)))
    zeroes = Counter(contents.pop(ZERO_CONTENT, ()))
    sets = Counter(tuple(sorted(Counter(kinds).items())) for kinds in contents.values())
    return estimate(
        Contents(list(numbers), sets, zeroes=zeroes),
        mapped,
        rules(machine),
        len(found),
        more=more,
        domain_of=domain_of,
        stable=Stability(),
    )
