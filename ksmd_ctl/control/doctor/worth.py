# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether it is worth it: what is saved, told truly, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ksmd_ctl.control.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.control.doctor.holes import holes_walked
from ksmd_ctl.control.doctor.look import CONTENTS, PROCESSES, Look, largest, source_of
from ksmd_ctl.control.document import number, part
from ksmd_ctl.control.saving import least_saved_bytes
from ksmd_ctl.knobs import Knob

__all__ = [
    "costs_more",
    "dear_scanning",
    "forked",
    "huge_pages_split",
    "losing_processes",
    "saved_range",
    "split_zeroes",
    "zero_pages",
]

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
#: Before so many full scans nothing can be said: items are there before anything is merged.
_SETTLED_SCANS: Final = 3
#: Of a CPU, below which scanning is cheap whatever it brings; and for each GiB saved, above which it is dear.
_CHEAP_RATIO: Final = 0.1
_DEAR_RATIO_PER_GIB: Final = 0.25
#: Merged pages in a block, below which losing a huge page for them is a bad bargain: a sixteenth of it.
_FEW_PAGES: Final = 32
_BLOCKS: Final = 64


def saved_range(look: Look) -> tuple[int, int] | None:
    """From and to how much is saved, in bytes, as docs/saving.md defines it; None where it isn't known."""
    saved = look.saved_bytes
    if saved is None:
        return None
    related = sum(one.merging_pages for one in look.patients if one.relatives)
    places = 0 if look.likeness is None else look.likeness.related_places
    return least_saved_bytes(saved, related, look.page, places), saved


def forked(look: Look) -> Iterator[Finding]:
    """general_profit and pages_sharing count what fork shared anyway (findings F14, mm/ksm.c:stable_tree_append)."""
    family = [one for one in look.patients if one.relatives and one.merging_pages]
    found = saved_range(look)
    if not family or found is None or found[0] + look.split_zero_bytes >= 0.9 * found[1]:
        return
    yield Finding(
        Code.FORKED,
        Severity.NOTE,
        "The kernel's figure of the saving may be too high: it counts what fork shares anyway",
        (
            Figure("saved at least", found[0], PROCESSES, "bytes"),
            look.saved_figure("saved at most"),
            Figure("forks of one another", len(family), PROCESSES, "processes"),
            Figure("their merged pages", sum(one.merging_pages for one in family), PROCESSES, "pages"),
            *(
                [Figure("places where they map them", look.likeness.related_places, CONTENTS, "pages")]
                if look.likeness
                else []
            ),
        ),
        "KSM's saving is overstated for servers that fork: pages that they map at the same address may have been "
        "shared by fork before. MemAvailable with and without merging tells the real saving (docs/saving.md).",
    )


def zero_pages(look: Look) -> Iterator[Finding]:
    """Pages of zeroes that ksmd replaced: not in pages_sharing (findings F18), before 6.6 in no counter at all."""
    zeroes, saved = look.reading("ksm_zero_pages"), look.saved_bytes
    if look.zeroes_uncounted:
        yield _uncounted(look)
    elif zeroes and saved and zeroes * look.page > 0.1 * saved:
        yield Finding(
            Code.ZERO_PAGES,
            Severity.NOTE,
            "Part of the saving is pages of zeroes, which pages_sharing does not show",
            (
                look.figure("ksm_zero_pages"),
                Figure("saved by them", int(zeroes) * look.page, source_of("ksm_zero_pages"), "bytes"),
                look.figure("pages_sharing"),
            ),
            "Nothing to do: a tool that shows pages_sharing alone shows too small a saving here.",
        )


def _uncounted(look: Look) -> Finding:
    mapping = [one for one in look.patients if one.split_zero_pages]
    known = look.processes is not None
    return Finding(
        Code.ZERO_PAGES,
        Severity.NOTE,
        "More is saved than this kernel counts: it has no counter for the pages of zeroes that ksmd replaces",
        (
            look.figure(Knob.USE_ZERO_PAGES),
            Figure("ksm_zero_pages", "this kernel does not have it", source_of("ksm_zero_pages")),
            *([Figure("zero pages that are mapped", look.split_zero_bytes, PROCESSES, "bytes")] if known else []),
            *(
                Figure(str(one), one.split_zero_pages, PROCESSES, "pages")
                for one in largest(mapping, "split_zero_pages")
            ),
            look.saved_figure("saved by the kernel's count"),
        ),
        "Nothing to do: the page tables show how many zero pages mergeable memory maps; pages that were only read "
        "are among these. Linux 6.6 and later count them.",
    )


def split_zeroes(look: Look) -> Iterator[Finding]:
    """Zeroes of huge pages that were split for merging are given back, and KSM counts none of them (findings F32)."""
    freed = look.split_zero_bytes
    # Where ksmd's own aren't counted, nothing tells these from them.
    if look.zeroes_uncounted:
        return
    if freed < _MIB or freed <= 0.1 * (look.saved_bytes or 0) or not look.reading("thp_split_page"):
        return
    having = [one for one in look.patients if one.split_zero_pages]
    yield Finding(
        Code.SPLIT_ZEROES,
        Severity.NOTE,
        "More is saved than KSM counts: huge pages were split for merging, and their pages of zeroes given back",
        (
            Figure("zero pages that KSM does not count", freed, PROCESSES, "bytes"),
            *(
                Figure(str(one), one.split_zero_pages, PROCESSES, "pages")
                for one in largest(having, "split_zero_pages")
            ),
            look.figure("thp_split_page"),
            look.saved_figure("saved by the kernel's count"),
        ),
        "Un-merging does not undo that: a page comes back when it is written, and where khugepaged makes a huge page "
        "again. Memory that was only read is in this figure as well.",
    )


def costs_more(look: Look) -> Iterator[Finding]:
    """All in all merging takes more than it saves: a struct ksm_rmap_item a page that is looked at."""
    saved = look.saved_bytes
    settled = (look.reading("full_scans") or 0) >= _SETTLED_SCANS
    if not look.merging or saved is None or saved + look.split_zero_bytes >= -_MIB or not settled:
        return
    yield Finding(
        Code.COSTS_MORE,
        Severity.COSTS,
        "KSM takes more memory than it saves",
        (
            look.saved_figure("saved"),
            look.figure("pages_sharing"),
            look.figure("pages_unshared"),
            look.figure("pages_volatile"),
        ),
        "ksmd keeps 64 bytes for each page that it looks at, and hardly any two pages are equal. Leave KSM off, or "
        "mark less memory as mergeable.",
        look.set_command(run=2),
    )


def losing_processes(look: Look) -> Iterator[Finding]:
    """Processes whose pages ksmd keeps more about than merging them saves (ksm_process_profit below zero)."""
    if not look.merging or (look.reading("full_scans") or 0) < _SETTLED_SCANS:
        return
    losing = [
        one
        for one in look.patients
        if one.saved_bytes is not None and one.saved_bytes + one.split_zero_pages * look.page < -_MIB
    ]
    lost = -sum(one.saved_bytes or 0 for one in losing)
    if not losing or any(True for _ in costs_more(look)):
        return
    heavy = lost > 0.05 * max(0, look.saved_bytes or 0)
    worst = sorted(losing, key=lambda one: one.saved_bytes or 0)[:3]
    yield Finding(
        Code.LOSING_PROCESSES,
        Severity.COSTS if heavy else Severity.NOTE,
        "Merging costs more than it saves for some processes",
        (
            *(Figure(str(one), one.saved_bytes or 0, PROCESSES, "bytes") for one in worst),
            Figure("all processes that lose", len(losing), PROCESSES, "processes"),
        ),
        "Hardly any of their pages is equal to another one. Leave them out: mem-merge=off for a machine, no "
        "MemoryKSM= for a service.",
    )


def dear_scanning(look: Look) -> Iterator[Finding]:
    """ksmd's CPU time against what is saved, where nothing new is being merged."""
    ratio = number(part(look.after, "derived"), "ksmd_cpu_ratio")
    saved = max(0, look.saved_bytes or 0) + look.split_zero_bytes
    if not look.merging or ratio is None or ratio < _CHEAP_RATIO or look.saved_bytes is None:
        return
    if any(True for _ in holes_walked(look)):
        return
    brings = look.grown("pages_sharing") + look.grown("ksm_zero_pages")
    if brings > 0.01 * look.tracked or ratio * _GIB <= _DEAR_RATIO_PER_GIB * saved:
        return
    slower = max(1, int((look.reading(Knob.PAGES_TO_SCAN) or 100) * 0.02 / ratio))
    yield Finding(
        Code.DEAR_SCANNING,
        Severity.COSTS,
        "ksmd takes much of a CPU for what it saves, and finds nothing new",
        (
            Figure("share of a CPU", ratio, source_of("ksmd_cpu_seconds"), "ratio"),
            look.saved_figure("saved"),
            look.rise("pages_sharing"),
            look.figure(Knob.PAGES_TO_SCAN),
        ),
        "Scan slower while there is nothing to find, or let the service's adaptive policy do that.",
        look.set_command(pages_to_scan=slower),
    )


def huge_pages_split(look: Look) -> Iterator[Finding]:
    """ksmd splits a huge page where a page of it merges (mm/ksm.c:split_huge_page); few merged pages lose many."""
    having = [one for one in look.patients if one.split_blocks and one.merging_pages]
    blocks = sum(one.split_blocks for one in having)
    pages = sum(one.merging_pages + one.split_zero_pages for one in having)
    if not any(one.huge_bytes for one in look.patients) and not look.reading("thp_split_page"):
        return
    if blocks < _BLOCKS or pages >= _FEW_PAGES * blocks:
        return
    yield Finding(
        Code.HUGE_PAGES_SPLIT,
        Severity.COSTS,
        "Few merged pages cost many huge pages",
        (
            Figure("huge pages prevented", blocks, PROCESSES),
            Figure("merged pages and freed zeroes in each", pages / blocks, PROCESSES),
            *(Figure(str(one), one.split_blocks, PROCESSES, "huge pages") for one in largest(having, "split_blocks")),
        ),
        "Each merged page keeps 2 MiB from being one huge page, which costs time at every access. Exclude machines "
        "that gain so little.",
        "ksmd-ctl processes",
    )
