# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that could be merged and is not, or does not stay merged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import (
    ATTEMPTS,
    CONTENTS,
    PROCESSES,
    SERVICE,
    Advised,
    Snapshot,
    largest,
    source_of,
)
from ksmd_ctl.doctor.switched import full_scan_seconds
from ksmd_ctl.figures import HUGE_PAGE_PAGES
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.reports.document import part, text

#: A smaller share is not reported.
_WORTH: Final = 0.01
_WORTH_PAGES: Final = 32
#: smart_scan looks at a page in every ninth scan at the latest (mm/ksm.c:skip_age).
_SKIP_CYCLE: Final = 9
_SMALL_LIMIT: Final = 64
#: Huge pages that khugepaged makes in a second at its own settings at most: 4096 pages each 10 s.
_KHUGEPAGED_RATE: Final = 0.8
#: Scans after which ksmd has looked at every page that it doesn't skip.
_LOOKS: Final = 3
#: Of what was to come together: if so much is not merged still, it did not help; if more came since, it may be new.
_STILL: Final = 0.8
#: The longest look there is (--interval).
_LONGEST_LOOK_SECONDS: Final = 600
#: How many huge pages are split in a scan, and scans for one, where they are split one by one.
_ONE_A_SCAN: Final = 2
#: Fewer huge pages are soon split.
_MANY_HUGE_PAGES: Final = 32
#: Copies that came from swap are merged again in so long, or it is reported.
_SOON_SECONDS: Final = 60.0


def unexplained_dups(seen: Snapshot) -> int:
    """KSM pages in chains that max_page_sharing does not explain, at least.

    Of the dups of a chain all but one are full where the limit made them (mm/ksm.c:is_page_sharing_candidate).
    """
    dups, chains = seen.reading("stable_node_dups"), seen.reading("stable_node_chains")
    limit = seen.reading(Knob.MAX_PAGE_SHARING)
    if not dups or chains is None or not limit:
        return 0
    return max(0, int(dups - chains - seen.merged_pages // limit))


def unmerged_pages(seen: Snapshot) -> int:
    """Equal pages that are not merged, by contents, without those that twins account for; 0 where they are few."""
    return 0 if seen.duplicates is None else _worth(seen, seen.duplicates.pages - unexplained_dups(seen))


def _worth(seen: Snapshot, pages: int) -> int:
    frames = 0 if seen.duplicates is None else seen.duplicates.frames
    return pages if pages >= max(_WORTH_PAGES, _WORTH * frames) else 0


def _standing(seen: Snapshot) -> bool:
    # Nothing to speak of was merged in the meantime, or split: equal pages in one huge page are not merged before that.
    return seen.brought <= _WORTH * unmerged_pages(seen)


def _skipping(seen: Snapshot) -> bool:
    return seen.reading(Knob.SMART_SCAN) == 1 and bool(seen.delta("pages_skipped"))


def _refused(seen: Snapshot) -> int | None:
    """About how many of the equal pages the kernel refused to merge; None where that could not be counted."""
    if seen.attempts is None:
        return None
    scans = seen.delta("full_scans") or 0
    # So often each was tried at least: rather too many are said to be held than an advice given that brings nothing.
    times = scans // _SKIP_CYCLE if _skipping(seen) else scans
    return min(unmerged_pages(seen), round(seen.attempts.refused / max(1, times)))


def _smart_scan_pages(seen: Snapshot) -> int:
    """Equal pages that smart_scan may keep from being merged: by the service's count, else those that ksmd skips."""
    counted = seen.unmerged("smart_scan")
    return _worth(seen, unmerged_pages(seen) - (_refused(seen) or 0)) if counted is None else counted


def _brought_nothing(seen: Snapshot) -> bool:
    """Whether smart_scan was off for a while, as advised here, and as many pages are not merged as before."""
    advised, last = seen.advised.get(Code.SMART_SCAN), seen.last_change
    if advised is None or not _STILL <= _smart_scan_pages(seen) / max(1, advised.pages) <= 1 / _STILL:
        return False
    other = text(last, "id") not in ("", advised.change) and text(last, "result") == "done"
    return advised.vain or (other and Knob.SMART_SCAN in part(last, "knobs"))


def remember(seen: Snapshot, findings: Iterable[Finding]) -> dict[str, Advised]:
    """What to keep for the next time, so that an advice that brought nothing isn't given again."""
    kept = dict(seen.advised)
    pulses = [one for one in findings if one.code is Code.SMART_SCAN and f"{Knob.SMART_SCAN}=0" in one.command]
    if _brought_nothing(seen):
        kept[Code.SMART_SCAN] = replace(kept[Code.SMART_SCAN], vain=True)
    elif pulses:
        kept[Code.SMART_SCAN] = Advised(_smart_scan_pages(seen), text(seen.last_change, "id"))
    return kept


def _attempts(seen: Snapshot) -> tuple[Figure, ...]:
    """What ksmd tried, as evidence."""
    if seen.attempts is None:
        return ()
    return (
        Figure("merges that ksmd tried", seen.attempts.tried, ATTEMPTS),
        Figure("of them refused by the kernel", seen.attempts.refused, ATTEMPTS),
    )


def smart_scan(seen: Snapshot) -> Iterator[Finding]:
    """smart_scan skips pages whose phases never meet (findings F2 and F13, mm/ksm.c:should_skip_rmap_item)."""
    if not seen.merging or seen.reading(Knob.SMART_SCAN) != 1:
        return
    counted, pages = seen.unmerged("smart_scan"), _smart_scan_pages(seen)
    if not pages or _brought_nothing(seen) or (counted is None and not (_skipping(seen) and _standing(seen))):
        return
    scans = seen.delta("full_scans") or 0
    sure = counted is not None or scans >= _SKIP_CYCLE
    if not sure and _worth(seen, _refused(seen) or 0):
        # What of the rest is held, too, is not known yet.
        return
    scan = full_scan_seconds(seen) or 1.0
    pause, watch = max(1, math.ceil(4 * scan)), math.ceil((_SKIP_CYCLE + 1) * scan)
    # Looking longer tells more, where that is possible.
    wait = not sure and watch <= _LONGEST_LOOK_SECONDS
    yield Finding.of(
        Code.SMART_SCAN,
        Severity.LOSES if sure else Severity.NOTE,
        "Identical pages are not merged, and smart_scan skips pages" + ("" if sure else " (or they have just arrived)"),
        "With smart_scan, ksmd looks at each page at least once in nine full scans. Watch for that long to find out "
        "whether something holds these pages."
        if wait
        else "smart_scan skips pages that did not merge, and two pages that are skipped in turns are never compared. "
        "A few scans without it merge them; the service does that by itself with healing.smart_scan = true."
        + (
            ""
            if seen.attempts
            else " Pages that are not merged after that are held by something (vmsplice, io_uring, O_DIRECT)."
        ),
        Figure("identical pages that are not merged", pages, CONTENTS if counted is None else SERVICE, "pages"),
        Figure("to be saved at least", pages * seen.page, CONTENTS if counted is None else SERVICE, "bytes"),
        seen.rise("pages_skipped"),
        seen.rise("pages_sharing"),
        seen.rise("full_scans"),
        *_attempts(seen),
        command=f"ksmd-ctl doctor --interval {watch}" if wait else seen.pulse_command(Knob.SMART_SCAN, 0, pause),
    )


def held_pages(seen: Snapshot) -> Iterator[Finding]:
    """Equal pages are looked at and not merged: write_protect_page refuses those that have a reference more (F18)."""
    pages, refused = unmerged_pages(seen), _refused(seen)
    if not seen.merging or not pages or not _standing(seen):
        return
    held = _worth(seen, refused or 0)
    # Without smart_scan, or with the service's pulses, ksmd has looked at all of them.
    looked_at = (seen.delta("full_scans") or 0) >= _LOOKS
    left = looked_at and (not _skipping(seen) or seen.unmerged("smart_scan") == 0)
    if not (held or left or _brought_nothing(seen)):
        return
    changing = refused is not None and not held
    yield Finding.of(
        Code.HELD_PAGES,
        Severity.LOSES,
        "ksmd tries to merge identical pages and the kernel refuses it: something holds them"
        if held
        else "ksmd doesn't merge identical pages: they change all the time"
        if changing
        else "ksmd looks at identical pages and can't merge them: something holds them, or they change all the time",
        "They are equal only from time to time. ksmd rightly leaves pages alone that change from one scan to the next."
        if changing
        else "Pages that a pipe (vmsplice), a device, O_DIRECT or io_uring holds don't merge until they are "
        "released; smart_scan is not the cause. `ksmd-ctl processes` shows which processes have much memory "
        "that is not merged.",
        Figure("identical pages that are not merged", pages, CONTENTS, "pages"),
        Figure("held of these, about", held, ATTEMPTS, "pages") if held else None,
        seen.rise("full_scans"),
        seen.rise("pages_sharing"),
        seen.figure("pages_volatile"),
        *_attempts(seen),
        Figure("not merged before smart_scan was off last", seen.advised[Code.SMART_SCAN].pages, SERVICE, "pages")
        if _brought_nothing(seen)
        else None,
        command="" if changing else "ksmd-ctl processes",
    )


def twins(seen: Snapshot) -> Iterator[Finding]:
    """KSM pages with one content that never become one: migrated (findings F1), or left over from full ones."""
    counted, pages = seen.unmerged("twins"), unexplained_dups(seen)
    duplicates = seen.duplicates
    if counted is not None:
        pages = counted
    elif duplicates is not None and duplicates.complete:
        # A chain may hold stale ones until it is pruned: contents tell.
        pages = min(pages, duplicates.pages)
    if not pages or pages < _WORTH * (seen.reading("pages_sharing") or 0):
        return
    yield Finding.of(
        Code.TWINS,
        Severity.LOSES,
        "Several KSM pages have the same content, and the kernel never merges them with each other",
        "They were moved to one node, or had reached max_page_sharing once and no longer do. Once they are "
        "un-merged, ksmd merges them into one. The service does that with healing.twins = true; `ksmd-ctl unmerge` "
        "does it for one process at a time.",
        Figure(
            "superfluous copies, at least",
            pages,
            SERVICE if counted is not None else source_of("stable_node_dups"),
            "pages",
        ),
        seen.figure("stable_node_dups"),
        seen.figure("stable_node_chains"),
        seen.figure(Knob.MAX_PAGE_SHARING),
        seen.figure("pages_sharing"),
        command=_unmerge_command(seen),
    )


def _unmerge_command(seen: Snapshot) -> str:
    if seen.manages:
        healed = part(seen.after, "healing").get("allowed") is True
        return "" if healed else seen.configure_command({"healing.twins": True})
    merged = [one for one in seen.processes if one.merging_pages]
    return f"ksmd-ctl unmerge --pid {largest(merged, 'merging_pages', 1)[0].pid}" if merged else ""


def sharing_limit(seen: Snapshot) -> Iterator[Finding]:
    """max_page_sharing is small: a content needs a KSM page for every so many mappings (mm/ksm.c:stable_node_dup)."""
    limit, dups = seen.reading(Knob.MAX_PAGE_SHARING), seen.reading("stable_node_dups")
    default = int(KNOBS[Knob.MAX_PAGE_SHARING].default)
    if not limit or not dups or limit >= _SMALL_LIMIT:
        return
    pages = int(dups * (1 - limit / default))
    if pages >= max(_WORTH_PAGES, _WORTH * (seen.reading("pages_sharing") or 0)):
        yield Finding.of(
            Code.SHARING_LIMIT,
            Severity.LOSES,
            f"max_page_sharing is small: the kernel keeps a copy for every {limit:.0f} mappings of the same contents",
            f"The kernel's default is {default}. To change it everything has to be un-merged once; the plan says what "
            "that takes.",
            seen.figure(Knob.MAX_PAGE_SHARING),
            seen.figure("stable_node_dups"),
            Figure("the default would save", pages, source_of("stable_node_dups"), "pages"),
            command=f"{seen.set_command(max_page_sharing=default)} --dry-run"
            if seen.wanted(Knob.MAX_PAGE_SHARING) is None
            else seen.set_command(max_page_sharing=default),
        )


def khugepaged(seen: Snapshot) -> Iterator[Finding]:
    """khugepaged takes merged ranges back, and ksmd splits them again (findings F17, collapse_huge_page)."""
    made, split = seen.delta("thp_collapse_alloc") or 0, seen.delta("thp_split_page") or 0
    left = seen.unmerged("khugepaged")
    if seen.merging and seen.merged_pages and min(made, split) > 2 * _KHUGEPAGED_RATE * seen.seconds:
        yield Finding.of(
            Code.KHUGEPAGED,
            Severity.COSTS,
            "khugepaged makes huge pages of merged ranges, and ksmd splits them again",
            "Keep khugepaged from collapsing ranges that hold shared pages.",
            Figure("identical pages that are not merged", left, SERVICE, "pages") if left else None,
            seen.rise("thp_collapse_alloc"),
            seen.rise("thp_split_page"),
            seen.rise("cow_ksm"),
            command="echo 0 > /sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_shared",
        )


def slow_splits(seen: Snapshot) -> Iterator[Finding]:
    """ksmd splits one huge page with zeroes a scan (findings F36, mm/ksm.c:unstable_tree_search_insert)."""
    huge = sum(one.huge_bytes or 0 for one in seen.processes) // (HUGE_PAGE_PAGES * seen.page)
    freed = sum(one.split_zero_pages or 0 for one in seen.processes)
    if not (seen.merging and seen.reading(Knob.USE_ZERO_PAGES) == 0 and freed and huge >= _MANY_HUGE_PAGES):
        return
    if text(part(seen.after, "domains"), "mode") == "nodes":
        # The zero page is one for all domains, so it stays at 0 (docs/domains.md).
        return
    counters = "full_scans", "thp_split_page"
    ever, lately = [seen.reading(name) for name in counters], [seen.delta(name) for name in counters]
    if not (_one_by_one(*ever) or _one_by_one(*lately)) or (seen.duplicates is not None and not unmerged_pages(seen)):
        return
    yield Finding.of(
        Code.SLOW_SPLITS,
        Severity.LOSES,
        "ksmd splits only one huge page with pages of zeroes in each full scan",
        "The split frees the pages of zeroes, also the one that ksmd has in its unstable tree. For the rest of the "
        "scan this entry ends every search for pages of zeroes. With use_zero_pages = 1 ksmd splits all huge pages "
        "that hold some in one scan.",
        seen.figure("full_scans"),
        seen.figure("thp_split_page"),
        Figure("huge pages left in mergeable memory", huge, PROCESSES),
        Figure("identical pages that are not merged", unmerged_pages(seen), CONTENTS, "pages")
        if seen.duplicates is not None
        else None,
        Figure("pages of zeroes that splits freed", freed, PROCESSES, "pages"),
        seen.figure(Knob.USE_ZERO_PAGES),
        command=seen.set_command(use_zero_pages=1),
    )


def _one_by_one(scans: float | None, splits: float | None) -> bool:
    if scans is None or splits is None or scans < _ONE_A_SCAN:
        return False
    return scans / _ONE_A_SCAN <= splits <= scans * _ONE_A_SCAN


def swap_copies(seen: Snapshot) -> Iterator[Finding]:
    """Merged pages come back from swap as a copy for each who maps them (findings F16, ksm_might_need_to_copy)."""
    copies, left, scan = seen.delta("ksm_swpin_copy"), seen.unmerged("swapin"), full_scan_seconds(seen)
    if not (copies or left) or (seen.merging and scan is not None and scan < _SOON_SECONDS):
        return
    yield Finding.of(
        Code.SWAP_COPIES,
        Severity.LOSES,
        "Merged pages come back from swap as copies, "
        + ("and ksmd merges them only after a long time" if seen.merging else "and they stay copies while KSM is off"),
        "Two full scans merge them again: scan faster while this goes on.",
        seen.rise("ksm_swpin_copy"),
        Figure("copies that ksmd has not scanned twice", left, SERVICE, "pages") if left else None,
        seen.figure("pages_sharing"),
        seen.figure(Knob.RUN),
        command=seen.set_command(pages_to_scan=10 * int(seen.reading(Knob.PAGES_TO_SCAN) or 100))
        if seen.merging
        else seen.set_command(run=1),
    )
