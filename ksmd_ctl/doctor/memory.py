# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory here that KSM can't merge, and why (mm/ksm.c:vma_ksm_compatible)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import PROCESSES, ProcessView, Snapshot, figures_of
from ksmd_ctl.doctor.units import in_a_unit
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.host.memory import ProcessClass

#: How many processes are named.
_NAMED: Final = 3
#: Of mergeable memory in swap: what is reported.
_SWAPPED_SHARE: Final = 0.05
#: Of a process's mergeable mappings, in page cache: what is reported. Every program maps some libraries.
_FILE_SHARE: Final = 0.5
_FILE_BYTES: Final = 8 << 20
#: Mergeable mappings of one process: a machine has some ten. vm.max_map_count is 65,530 by default.
_MANY_MAPPINGS: Final = 1000
_TOO_MANY_MAPPINGS: Final = 65_530 // 2
#: For each time that a page is mapped the kernel visits all adjacent mappings: twice to ask whether the page was used,
#: and once to take it out of the page tables (mm/ksm.c:rmap_walk_ksm).
_RMAP_VISITS: Final = 3
#: What a visit takes: 21 to 35 ns with 1,000 and 5,000 mappings, 51 to 65 with 20,000 (findings F34); and for how long
#: a page is locked so that it is told.
_RMAP_VISIT_SECONDS: Final = 25e-9
_RMAP_SECONDS: Final = 0.01
#: A max_page_sharing that costs 1.6 % of the saving; with less the doctor would report the limit itself.
_FEW_SHARERS: Final = 64


def nothing_mergeable(seen: Snapshot) -> Iterator[Finding]:
    """Nobody called madvise(MADV_MERGEABLE) or prctl(PR_SET_MEMORY_MERGE): ksmd has no mm to look at."""
    if seen.listed is None or seen.tracked or any(one.mergeable for one in seen.processes):
        return
    yield Finding.of(
        Code.NOTHING_MERGEABLE,
        Severity.BLOCKS,
        "There is no mergeable memory: no process has asked for any",
        "`ksmd-ctl merge on --pid P` (--unit U, --vm NAME) asks for it without a restart. QEMU asks itself unless it "
        "was started with mem-merge=off (libvirt: <nosharepages/>), and a program with prctl(PR_SET_MEMORY_MERGE) or "
        f"madvise(MADV_MERGEABLE). On shared memory both succeed and do nothing.{in_a_unit(seen)}",
        Figure("processes with mergeable memory", 0, PROCESSES),
        *(Figure(str(one), one.reason, PROCESSES) for one in seen.processes[:_NAMED]),
        seen.figure("pages_unshared"),
    )


@dataclass(frozen=True, slots=True)
class _Reach:
    """What a class means: where nothing of a process merges for it, and where only a part doesn't."""

    kind: ProcessClass
    code: Code
    severity: Severity
    title: str
    advice: str


_REACHES: Final = (
    _Reach(
        ProcessClass.SHARED,
        Code.SHARED_MEMORY,
        Severity.LOSES,
        "Memory that is shared (memfd, share=on, vhost-user, tmpfs) is never merged",
        "Only private anonymous memory merges; madvise(MADV_MERGEABLE) on shared memory succeeds and does nothing, so "
        "that a monitor's own option for merging (mergeable=on) has no effect there. A machine that needs neither "
        "vhost-user nor virtiofs can be started without share=on (libvirt: no <access mode='shared'/>, no "
        "<source type='memfd'/>).",
    ),
    _Reach(
        ProcessClass.HUGETLB,
        Code.HUGETLB,
        Severity.LOSES,
        "Memory on hugetlbfs is never merged",
        "Choose one for each machine: reserved huge pages, or merging. Transparent huge pages do merge; they are split "
        "where a part of one is equal to another page.",
    ),
    _Reach(
        ProcessClass.PINNED,
        Code.PINNED,
        Severity.LOSES,
        "Memory is pinned, and pinned pages are never merged",
        "A device that is passed through (VFIO), RDMA and io_uring's registered buffers pin it. Don't expect "
        "merging to save memory with such machines, or give them virtio devices.",
    ),
    _Reach(
        ProcessClass.ENCRYPTED,
        Code.ENCRYPTED,
        Severity.NOTE,
        "Memory is encrypted or private to the guest: no two pages are equal to KSM",
        "Nothing can be done, and this is intended. Don't expect merging to save memory with such machines.",
    ),
    _Reach(
        ProcessClass.MIGRATING,
        Code.MIGRATING,
        Severity.NOTE,
        "A machine is being migrated or saved",
        "It merges again by itself when that is over; until then it is neither moved nor un-merged.",
    ),
    _Reach(
        ProcessClass.USERFAULTFD,
        Code.USERFAULTFD,
        Severity.NOTE,
        "userfaultfd watches memory",
        "It is left alone as long as that lasts: un-merging it from outside would wait for its handler.",
    ),
)


def guests_out_of_reach(seen: Snapshot) -> Iterator[Finding]:
    """Processes that one would expect to merge, and why they don't, or only in part: their classes."""
    for reach in _REACHES:
        processes = seen.of_class(reach.kind)
        if not processes:
            continue
        merging = any(one.merging_pages for one in processes)
        outside = [one for one in processes if not one.mergeable]
        # Of one that is mergeable too, a part merges: that is a note. A pin concerns all of it.
        whole = outside or (processes if reach.kind is ProcessClass.PINNED and not merging else [])
        severity = reach.severity if whole else Severity.NOTE
        yield Finding.of(
            reach.code,
            severity,
            reach.title,
            reach.advice,
            *_named(whole or processes),
        )
    asked = {reach.kind.value for reach in _REACHES}
    silent = [one for one in seen.of_class(ProcessClass.NOT_ELIGIBLE) if not one.classes & asked]
    if silent and any(one.mergeable for one in seen.processes):
        yield Finding.of(
            Code.NOT_ASKED,
            Severity.NOTE,
            "Virtual machines that have not asked for merging",
            "If they should merge: `ksmd-ctl merge on --vm NAME` at once, and no mem-merge=off (libvirt: no "
            "<nosharepages/>) for the next start.",
            *_named(silent),
        )


def _named(processes: list[ProcessView]) -> tuple[Figure, ...]:
    figures = tuple(Figure(str(one), one.reason, PROCESSES) for one in processes[:_NAMED])
    if len(processes) > _NAMED:
        figures += (Figure("others like them", len(processes) - _NAMED, PROCESSES),)
    return figures


def swapped(seen: Snapshot) -> Iterator[Finding]:
    """Mergeable memory in swap: mm/ksm.c scans what is present, and what comes back comes unmerged (findings F16)."""
    away = sum(one.swapped_bytes for one in seen.processes)
    total = away + sum(one.resident_bytes for one in seen.processes)
    if away and away >= _SWAPPED_SHARE * total:
        yield Finding.of(
            Code.SWAPPED,
            Severity.COSTS,
            "Mergeable memory is in swap, where nothing merges",
            "It comes back unmerged, one copy for each process that maps it. Scan faster while memory is short, so "
            "that merging frees memory before swapping is needed.",
            Figure("swapped out", away, PROCESSES, "bytes"),
            Figure("of mergeable memory", away / total, PROCESSES, "ratio"),
            *figures_of([one for one in seen.processes if one.swapped_bytes], "swapped_bytes", "bytes"),
        )


def file_pages(seen: Snapshot) -> Iterator[Finding]:
    """Private mappings of files, as of machines that start from a snapshot: their page cache is never merged."""
    mapping = [
        one
        for one in seen.processes
        if one.file_bytes >= max(_FILE_BYTES, _FILE_SHARE * (one.file_bytes + one.resident_bytes))
    ]
    if mapping:
        yield Finding.of(
            Code.FILE_PAGES,
            Severity.NOTE,
            "Much of the memory that is marked as mergeable is page cache of files, which never merges",
            "Page cache is in memory once, however many processes map the file: there is nothing to save. A page "
            "can merge once the process has written to it, because it is then the process's own.",
            *figures_of(mapping, "file_bytes", "bytes", "{}: of files"),
            Figure("their anonymous memory", sum(one.resident_bytes for one in mapping), PROCESSES, "bytes"),
        )


def many_mappings(seen: Snapshot) -> Iterator[Finding]:
    """Thousands of mergeable mappings, as prctl makes them before 6.17: adjacent ones aren't joined (mm/vma.c)."""
    having = [one for one in seen.processes if one.mergeable_mappings >= _MANY_MAPPINGS]
    if having:
        most = max(one.mergeable_mappings for one in having)
        yield Finding.of(
            Code.MANY_MAPPINGS,
            Severity.COSTS if most >= _TOO_MANY_MAPPINGS else Severity.NOTE,
            "A process has thousands of mergeable mappings",
            "Before Linux 6.17 the kernel doesn't join adjacent mappings of a process that is mergeable as a whole by "
            "prctl(PR_SET_MEMORY_MERGE), as with MemoryKSM=yes; mprotect() page by page makes many, too. Each costs "
            "memory and time, un-merging has to go through all, and beyond vm.max_map_count (65,530 by default) the "
            "process can't map any more. Leave such a service out (MemoryKSM=no), or raise the limit.",
            *figures_of(having, "mergeable_mappings", "mappings"),
            Figure("processes with that many", len(having), PROCESSES),
            command="sysctl vm.max_map_count",
        )


def long_rmap_walks(seen: Snapshot) -> Iterator[Finding]:
    """Merged pages of a process with many adjacent mappings, whose mappings the kernel takes long to find."""
    limit = int(seen.reading(Knob.MAX_PAGE_SHARING) or KNOBS[Knob.MAX_PAGE_SHARING].default)

    def times(one: ProcessView) -> int:
        return min(limit, one.merging_pages if one.page_mappings is None else one.page_mappings)

    def seconds(one: ProcessView) -> float:
        return _RMAP_VISITS * one.adjacent_mappings * times(one) * _RMAP_VISIT_SECONDS

    having = sorted((one for one in seen.processes if seconds(one) >= _RMAP_SECONDS), key=seconds, reverse=True)
    if not having:
        return
    worst = having[0]
    mapped = "mappings of one of its merged pages" if worst.page_mappings is not None else "at most so many of one page"
    yield Finding.of(
        Code.LONG_RMAP_WALKS,
        Severity.COSTS,
        "The kernel takes long to find the mappings of a merged page, because a process has very many mappings",
        "When the kernel reclaims or moves such a page it visits all adjacent mappings of the process for each time "
        "that the page is mapped. It holds the page's lock meanwhile, and in turns the lock that the process needs to "
        "map and unmap memory. Fewer mappings help most (mprotect() and madvise() page by page make many), and a lower "
        "max_page_sharing shortens it in proportion, at the price of more copies.",
        Figure(f"{worst}: adjacent mappings", worst.adjacent_mappings, PROCESSES),
        Figure(mapped, times(worst), PROCESSES),
        Figure(
            "reclaiming this page takes about",
            seconds(worst),
            f"{_RMAP_VISIT_SECONDS * 1e9:.0f} ns a visit, measured on Linux 6.18",
            "seconds",
        ),
        Figure("processes with such pages", len(having), PROCESSES),
        seen.figure(Knob.MAX_PAGE_SHARING),
        command=f"ksmd-ctl set max_page_sharing={_FEW_SHARERS} --dry-run" if limit > _FEW_SHARERS else "",
    )
