# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether it is worth it: what is saved, told truly, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import CONTENTS, PROCESSES, ProcessView, Snapshot, figures_of, largest, source_of
from ksmd_ctl.figures import LOW_YIELD_PAGES
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.reports.document import number, part
from ksmd_ctl.reports.saving import least_saved_bytes

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
#: Before so many full scans nothing can be said: items are there before anything is merged.
_SETTLED_SCANS: Final = 3
#: Of a CPU, below which scanning is cheap whatever it brings; and for each GiB saved, above which it is dear.
_CHEAP_RATIO: Final = 0.1
_DEAR_RATIO_PER_GIB: Final = 0.25
#: Fewer huge pages than these, 128 MiB, are not worth a change.
_BLOCKS: Final = 64
#: So much of ksmd's time for a page that it keeps a record of is not explained by comparing it: the dearest that was
#: measured is 7 us (findings F18).
_PAGE_SECONDS: Final = 6e-5
_LEAST_SCAN_SECONDS: Final = 0.1
#: Less empty address space costs nothing that one could notice.
_LEAST_HOLE_BYTES: Final = 1 << 30


def saved_range(seen: Snapshot) -> tuple[int, int] | None:
    """From and to how much is saved, in bytes, as docs/saving.md defines it; None where it isn't known."""
    saved = seen.saved_bytes
    if saved is None:
        return None
    related = sum(one.merging_pages for one in seen.processes if one.relatives)
    places = 0 if seen.duplicates is None else seen.duplicates.related_places
    return least_saved_bytes(saved, related, seen.page, places), saved


def forked(seen: Snapshot) -> Iterator[Finding]:
    """general_profit and pages_sharing count what fork shared anyway (findings F14, mm/ksm.c:stable_tree_append)."""
    family = [one for one in seen.processes if one.relatives and one.merging_pages]
    found = saved_range(seen)
    if not family or found is None or found[0] + seen.split_zero_bytes >= 0.9 * found[1]:
        return
    yield Finding.of(
        Code.FORKED,
        Severity.NOTE,
        "The kernel's figure of the saving may be too high: it counts what fork shares anyway",
        "KSM's saving is overstated for servers that fork: pages that they map at the same address may have been "
        "shared by fork before. MemAvailable with and without merging tells the real saving (docs/saving.md).",
        Figure("saved at least", found[0], PROCESSES, "bytes"),
        seen.saved_figure("saved at most"),
        Figure("forks of one another", len(family), PROCESSES, "processes"),
        Figure("their merged pages", sum(one.merging_pages for one in family), PROCESSES, "pages"),
        Figure("places where they map them", seen.duplicates.related_places, CONTENTS, "pages")
        if seen.duplicates
        else None,
    )


def zero_pages(seen: Snapshot) -> Iterator[Finding]:
    """Pages of zeroes that ksmd replaced: not in pages_sharing (findings F18), before 6.6 in no counter at all."""
    zeroes, saved = seen.reading("ksm_zero_pages"), seen.saved_bytes
    if seen.zeroes_uncounted:
        yield _uncounted(seen)
    elif zeroes and saved and zeroes * seen.page > 0.1 * saved:
        yield Finding.of(
            Code.ZERO_PAGES,
            Severity.NOTE,
            "Part of the saving is pages of zeroes, which pages_sharing does not show",
            "Nothing to do: a tool that shows pages_sharing alone shows too small a saving here.",
            seen.figure("ksm_zero_pages"),
            Figure("saved by them", int(zeroes) * seen.page, source_of("ksm_zero_pages"), "bytes"),
            seen.figure("pages_sharing"),
        )


def _uncounted(seen: Snapshot) -> Finding:
    mapping = [one for one in seen.processes if one.zero_mapped_pages]
    mapped = sum(one.zero_mapped_pages for one in mapping) * seen.page
    return Finding.of(
        Code.ZERO_PAGES,
        Severity.NOTE,
        "More is saved than this kernel counts: it has no counter for the pages of zeroes that ksmd replaces",
        "Nothing to do: the page tables show how many zero pages mergeable memory maps; pages that were only read "
        "are among these. Linux 6.6 and later count them.",
        seen.figure(Knob.USE_ZERO_PAGES),
        Figure("ksm_zero_pages", "this kernel does not have it", source_of("ksm_zero_pages")),
        Figure("zero pages that are mapped", mapped, PROCESSES, "bytes") if seen.listed is not None else None,
        *figures_of(mapping, "zero_mapped_pages", "pages"),
        seen.saved_figure("saved by the kernel's count"),
    )


def split_zeroes(seen: Snapshot) -> Iterator[Finding]:
    """Zeroes of huge pages that were split for merging are given back, and KSM counts none of them (findings F32)."""
    freed = seen.split_zero_bytes
    if freed < _MIB or freed <= 0.1 * (seen.saved_bytes or 0):
        return
    having = [one for one in seen.processes if one.split_zero_pages]
    yield Finding.of(
        Code.SPLIT_ZEROES,
        Severity.NOTE,
        "More is saved than KSM counts: huge pages were split for merging, and their pages of zeroes given back",
        "Un-merging does not undo that: a page comes back when it is written, and where khugepaged makes a huge page "
        "again. Memory that was only read is in this figure as well.",
        Figure("zero pages that KSM does not count", freed, PROCESSES, "bytes"),
        *figures_of(having, "split_zero_pages", "pages"),
        seen.figure("split_folio_pages", "pages"),
        seen.saved_figure("saved by the kernel's count"),
    )


def costs_more(seen: Snapshot) -> Iterator[Finding]:
    """All in all merging takes more than it saves: a struct ksm_rmap_item a page that is looked at."""
    saved = seen.saved_bytes
    settled = (seen.reading("full_scans") or 0) >= _SETTLED_SCANS
    if not seen.merging or saved is None or saved + seen.split_zero_bytes >= -_MIB or not settled:
        return
    yield Finding.of(
        Code.COSTS_MORE,
        Severity.COSTS,
        "KSM takes more memory than it saves",
        "ksmd keeps 64 bytes for each page that it looks at, and hardly any two pages are equal. Leave KSM off, or "
        "mark less memory as mergeable.",
        seen.saved_figure("saved by the kernel's count"),
        seen.figure("pages_sharing"),
        seen.figure("pages_unshared"),
        seen.figure("pages_volatile"),
        command=seen.set_command(run=2),
    )


def losing_processes(seen: Snapshot) -> Iterator[Finding]:
    """Processes whose pages ksmd keeps more about than merging them saves (ksm_process_profit below zero)."""
    if not seen.merging or (seen.reading("full_scans") or 0) < _SETTLED_SCANS:
        return
    losing = [
        one
        for one in seen.processes
        if one.saved_bytes is not None and one.saved_bytes + one.split_zero_pages * seen.page < -_MIB
    ]
    lost = -sum(one.saved_bytes or 0 for one in losing)
    if not losing or any(costs_more(seen)):
        return
    heavy = lost > 0.05 * max(0, seen.saved_bytes or 0)
    worst = sorted(losing, key=lambda one: one.saved_bytes or 0)[:3]
    yield Finding.of(
        Code.LOSING_PROCESSES,
        Severity.COSTS if heavy else Severity.NOTE,
        "Merging costs more than it saves for some processes",
        "Hardly any of their pages is equal to another one. Leave them out: `ksmd-ctl merge off --pid P` at once; for "
        "the next start mem-merge=off for a machine, no MemoryKSM= for a service.",
        *(Figure(str(one), one.saved_bytes or 0, PROCESSES, "bytes") for one in worst),
        Figure("all processes that lose", len(losing), PROCESSES, "processes"),
    )


def dear_scanning(seen: Snapshot) -> Iterator[Finding]:
    """ksmd's CPU time against what is saved, where nothing new is being merged."""
    ratio = number(part(seen.after, "derived"), "ksmd_cpu_ratio")
    saved = max(0, seen.saved_bytes or 0) + seen.split_zero_bytes
    if not seen.merging or ratio is None or ratio < _CHEAP_RATIO or seen.saved_bytes is None:
        return
    if any(holes_walked(seen)):
        return
    if seen.brought > 0.01 * seen.tracked or ratio * _GIB <= _DEAR_RATIO_PER_GIB * saved:
        return
    slower = max(1, int((seen.reading(Knob.PAGES_TO_SCAN) or 100) * 0.02 / ratio))
    yield Finding.of(
        Code.DEAR_SCANNING,
        Severity.COSTS,
        "ksmd takes much of a CPU for what it saves, and finds nothing new",
        "Scan slower while there is nothing to find, or let the service's adaptive policy do that.",
        Figure("share of a CPU", ratio, source_of("ksmd_cpu_seconds"), "ratio"),
        seen.saved_figure("saved by the kernel's count"),
        seen.rise("pages_sharing"),
        seen.figure(Knob.PAGES_TO_SCAN),
        command=seen.set_command(pages_to_scan=slower),
    )


def huge_pages_split(seen: Snapshot) -> Iterator[Finding]:
    """ksmd splits a huge page where a page of it merges (mm/ksm.c:split_huge_page); few merged pages lose many."""
    having = [one for one in seen.processes if one.low_yield_blocks]
    blocks = sum(one.low_yield_blocks for one in having)
    if not any(one.huge_bytes for one in seen.processes) and not seen.reading("split_folio_pages"):
        return
    if blocks < _BLOCKS:
        return
    worst = largest(having, "low_yield_blocks")
    ways = "; ".join(dict.fromkeys(_way_out(one) for one in worst))
    yield Finding.of(
        Code.HUGE_PAGES_SPLIT,
        Severity.COSTS,
        "Few merged pages cost many huge pages",
        f"Merging prevents these huge pages for fewer than {LOW_YIELD_PAGES} pages each, which makes every access "
        f"slower. Leave out of merging what gains so little: {ways}. Then `ksmd-ctl collapse` gives the huge pages "
        "back (docs/huge-pages.md).",
        Figure("huge pages prevented", blocks, PROCESSES),
        Figure("merged and freed pages in each", sum(one.low_yield_pages for one in having) / blocks, PROCESSES),
        *(
            Figure(f"{one}: {what}", count, PROCESSES, unit)
            for one in worst
            for what, count, unit in (
                ("huge pages prevented", one.low_yield_blocks, ""),
                ("saved by that", one.low_yield_pages, "pages"),
            )
        ),
        command="ksmd-ctl processes",
    )


def _way_out(one: ProcessView) -> str:
    """How a process is left out of merging from its next start on, as a phrase."""
    unit = f"MemoryKSM=no for {one.unit or one.name}"
    if "madvise" not in one.reason and "prctl" in one.reason:
        return unit
    if "qemu" in one.name or "kvm" in one.name:
        return "mem-merge=off in QEMU's -machine (libvirt: <nosharepages/> in <memoryBacking>)"
    program = f"no madvise(MADV_MERGEABLE) in {one.name}"
    return f"{unit}, or {program}" if "prctl" in one.reason else program


@dataclass(frozen=True, slots=True)
class Walk:
    """What a full scan costs beside mappings that are mostly empty.

    :ivar seconds: ksmd's time for a full scan, at least
    :ivar empty: whether walking empty address space is what it goes for
    :ivar processes: those with most of it, the one with most first
    """

    seconds: float
    empty: bool
    processes: tuple[ProcessView, ...]


def walk(seen: Snapshot) -> Walk | None:
    """What a full scan costs; None where nobody has such mappings, or that was not to be seen."""
    sparse = [one for one in largest(seen.processes, "hole_bytes") if one.hole_bytes >= _LEAST_HOLE_BYTES]
    used, scans = seen.delta("ksmd_cpu_seconds"), seen.delta("full_scans")
    if not sparse or not seen.merging or used is None or scans is None:
        return None
    # One that has not ended yet has cost that much at least.
    seconds = used / max(1, scans)
    empty = seconds >= max(_LEAST_SCAN_SECONDS, _PAGE_SECONDS * seen.mergeable_pages)
    return Walk(seconds, empty, tuple(sparse)) if scans or empty else None


def holes_walked(seen: Snapshot) -> Iterator[Finding]:
    """Kernels that look at every page of a mapping, there or not (mm/ksm.c:scan_get_next_rmap_item, findings F11)."""
    found = walk(seen)
    if found is None or not found.empty:
        return
    yield Finding.of(
        Code.HOLES_WALKED,
        Severity.COSTS,
        "ksmd walks empty address space in each full scan: this kernel looks at every page of a mapping, present or "
        "not",
        "A smaller pages_to_scan does not help: the walk is done within one batch, and a write of run waits for it. "
        "Have the program mark only the memory that it uses, leave it out of merging, or use a kernel that skips "
        'empty address space. policy = "adaptive" lets ksmd rest after each walk, so that it keeps to its share.',
        Figure("ksmd's time for a full scan, at least", found.seconds, source_of("ksmd_cpu_seconds"), "seconds"),
        Figure("pages to scan", seen.mergeable_pages, PROCESSES, "pages"),
        *figures_of(found.processes, "hole_bytes", "bytes", "{}: empty mergeable address space"),
        command="ksmd-ctl processes",
    )
