# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging would save on the simulated machine: told from its memory, not by its ksmd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import ZERO_CONTENT, Page, ZeroPte
from ksmd_ctl.engine.mm import Vma
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.engine.survey import processes
from ksmd_ctl.host.duplicates import NO_LIMIT
from ksmd_ctl.host.estimate import Contents, Estimate, PageKind, Rules, Stability
from ksmd_ctl.host.memory import Process
from ksmd_ctl.host.merging import estimate, of_those_left
from ksmd_ctl.host.sampling import EXACTLY_ALL, Bounds


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


def running(machine: Machine, process: Process) -> bool:
    """Whether a process that was found is there still."""
    now = machine.processes.get(process.id.pid)
    return now is not None and now.start_time_ticks == process.id.start_time_ticks


#: A page table entry: the number of its process, its mapping, and its place there.
_Mapping = tuple[int, Vma, int]


def look(
    machine: Machine,
    found: Sequence[Process],
    *,
    more: bool = False,
    domain_of: Sequence[str] | None = None,
    wait: Callable[[], None] | None = None,
) -> Estimate:
    """The estimate of memory of these processes.

    :param wait: lets time pass until a second look; None for one look
    """
    mappings: dict[Page, list[_Mapping]] = {}
    marked: set[Page] = set()
    mapped: Counter[tuple[int, bool]] = Counter()
    for owner, process in enumerate(found):
        for vma in machine.processes[process.id.pid].mm.vmas:
            if not vma.compatible or not (vma.mergeable or more):
                continue
            for index, page in enumerate(vma.ptes):
                if isinstance(page, Page):
                    mappings.setdefault(page, []).append((owner, vma, index))
                    mapped[owner, vma.mergeable] += 1
                    if vma.mergeable:
                        marked.add(page)
    numbers: dict[PageKind, int] = {}
    contents: dict[bytes, list[int]] = {}
    pages: dict[bytes, list[tuple[bool, list[_Mapping]]]] = {}
    frees = machine.ksm.profile.split_frees_zeroes
    for page, those in mappings.items():
        merged = folio_test_ksm(page)
        kind = PageKind(
            page_to_nid(page),
            tuple(owner for owner, _, _ in those),
            places=len(those) if merged else 1,
            marked=page in marked,
            split_frees=frees and page.folio is not None and page.content == ZERO_CONTENT,
        )
        contents.setdefault(page.content, []).append(numbers.setdefault(kind, len(numbers)))
        pages.setdefault(page.content, []).append((merged, those))
    zeroes = Counter(contents.pop(ZERO_CONTENT, ()))
    sets = Counter(tuple(sorted(Counter(kinds).items())) for kinds in contents.values())
    now, stable = rules(machine), None
    counted: Mapping[tuple[int, bool], int] = mapped
    if wait is not None:
        wait()
        there = [running(machine, process) for process in found]
        counted, stable = of_those_left(mapped, _stability(pages, there, now.max_page_sharing), there)
    return estimate(
        Contents(list(numbers), sets, zeroes=zeroes),
        counted,
        now,
        len(found),
        more=more,
        domain_of=domain_of,
        stable=stable,
    )


def _stability(
    pages: Mapping[bytes, Sequence[tuple[bool, Sequence[_Mapping]]]], there: Sequence[bool], limit: int
) -> Stability:
    """What of the pages is as it was; all were looked at twice, so it is exact.

    :param pages: by their content, whether KSM had merged each, and its mappings
    :param there: whether each process is
    """

    def same(one: _Mapping, content: bytes) -> bool:
        owner, vma, index = one
        if not there[owner] or index >= len(vma.ptes):
            return False
        entry = vma.ptes[index]
        # What became the zero page meanwhile has its content still.
        return (
            entry.content == content
            if isinstance(entry, Page)
            else isinstance(entry, ZeroPte) and (content == ZERO_CONTENT)
        )

    whole = left = 0
    before, after = [0.0] * len(there), [0.0] * len(there)
    zeroes = EXACTLY_ALL
    for content, some in pages.items():
        stay = [(merged, [one for one in those if same(one, content)]) for merged, those in some]
        if content == ZERO_CONTENT:
            zeroes = _exactly(sum(bool(those) for _, those in stay), len(some))
            continue
        freed, freed_later = _freed(some, limit), _freed(stay, limit)
        whole += freed
        left += freed_later
        for which, part, into in ((some, freed, before), (stay, freed_later, after)):
            count = sum(bool(those) for _, those in which)
            for _, those in which:
                for owner, _, _ in those:
                    into[owner] += part / count / len(those)
    owners = {owner: min(1.0, after[owner] / part) for owner, part in enumerate(before) if part}
    return Stability(_exactly(left, whole), zeroes, owners)


def _freed(pages: Iterable[tuple[bool, Sequence[_Mapping]]], limit: int) -> int:
    """Frames that come free of a content's pages, of which some may have no mapping any more."""
    places = mapped = 0
    for merged, those in pages:
        places += len(those) if merged else bool(those)
        mapped += len(those)
    return max(0, places - -(-mapped // limit))


def _exactly(part: int, whole: int) -> Bounds:
    return Bounds(part / whole, part / whole, part / whole) if whole else EXACTLY_ALL
