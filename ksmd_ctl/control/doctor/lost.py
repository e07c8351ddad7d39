# SPDX-License-Identifier: GPL-2.0-or-later
"""What is left on the table: memory that could be merged and isn't, or doesn't stay so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from ksmd_ctl.control.doctor.advised import Advised
from ksmd_ctl.control.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.control.doctor.look import ATTEMPTS, CONTENTS, SERVICE, Look, largest, source_of
from ksmd_ctl.control.doctor.switched import full_scan_seconds
from ksmd_ctl.control.document import part, text
from ksmd_ctl.knobs import KNOBS, Knob

__all__ = [
    "duplicates",
    "held_pages",
    "khugepaged",
    "remember",
    "sharing_limit",
    "smart_scan",
    "swap_copies",
    "twins",
]

#: Less than this share is not worth a word.
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
#: Copies that came from swap are merged again in so long, or it is worth a word.
_SOON_SECONDS: Final = 60.0


def unexplained_dups(look: Look) -> int:
    """KSM pages in chains that max_page_sharing does not explain, at least.

    Of the dups of a chain all but one are full where the limit made them (mm/ksm.c:is_page_sharing_candidate).
    """
    dups, chains = look.reading("stable_node_dups"), look.reading("stable_node_chains")
    limit = look.reading(Knob.MAX_PAGE_SHARING)
    if not dups or chains is None or not limit:
        return 0
    return max(0, int(dups - chains - look.merged_pages // limit))


def duplicates(look: Look) -> int:
    """Equal pages that are not merged, by contents, without those that twins account for; 0 where they are few."""
    likeness = look.likeness
    return 0 if likeness is None else _worth(look, likeness.apart - unexplained_dups(look))


def _worth(look: Look, pages: int) -> int:
    frames = 0 if look.likeness is None else look.likeness.frames
    return pages if pages >= max(_WORTH_PAGES, _WORTH * frames) else 0


def _standing(look: Look) -> bool:
    # Nothing to speak of was merged in the meantime.
    return look.grown("pages_sharing") <= _WORTH * duplicates(look)


def _skipping(look: Look) -> bool:
    return look.reading(Knob.SMART_SCAN) == 1 and bool(look.delta("pages_skipped"))


def _refused(look: Look) -> int | None:
    """About how many of the equal pages the kernel refused to merge; None where that could not be counted."""
    if look.attempts is None:
        return None
    scans = look.delta("full_scans") or 0
    # So often each was tried at least: rather too many are said to be held than an advice given that brings nothing.
    times = scans // _SKIP_CYCLE if _skipping(look) else scans
    return min(duplicates(look), round(look.attempts.refused / max(1, times)))


def _smart_scan_pages(look: Look) -> int:
    """Equal pages that smart_scan may keep apart: as the service says, else those that ksmd doesn't even try."""
    healing = look.healing("smart_scan")
    return _worth(look, duplicates(look) - (_refused(look) or 0)) if healing is None else healing


def _brought_nothing(look: Look) -> bool:
    """Whether smart_scan was off for a while, as advised here, and as many pages are not merged as before."""
    advised, last = look.advised.get(Code.SMART_SCAN), look.last_change
    if advised is None or not _STILL <= _smart_scan_pages(look) / max(1, advised.pages) <= 1 / _STILL:
        return False
    other = text(last, "id") not in ("", advised.change) and text(last, "result") == "done"
    return advised.vain or (other and Knob.SMART_SCAN in part(last, "knobs"))


def remember(look: Look, findings: Iterable[Finding]) -> dict[str, Advised]:
    """What to keep for the next time, so that an advice that brought nothing isn't given again."""
    kept = dict(look.advised)
    pulses = [one for one in findings if one.code is Code.SMART_SCAN and f"{Knob.SMART_SCAN}=0" in one.command]
    if _brought_nothing(look):
        kept[Code.SMART_SCAN] = replace(kept[Code.SMART_SCAN], vain=True)
    elif pulses:
        kept[Code.SMART_SCAN] = Advised(_smart_scan_pages(look), text(look.last_change, "id"))
    return kept


def _attempts(look: Look) -> tuple[Figure, ...]:
    """What ksmd tried, as evidence."""
    if look.attempts is None:
        return ()
    return (
        Figure("merges that ksmd tried", look.attempts.tried, ATTEMPTS),
        Figure("of them refused by the kernel", look.attempts.refused, ATTEMPTS),
    )


def smart_scan(look: Look) -> Iterator[Finding]:
    """smart_scan skips pages whose phases never meet (findings F2 and F13, mm/ksm.c:should_skip_rmap_item)."""
    if not look.merging or look.reading(Knob.SMART_SCAN) != 1:
        return
    healing, pages = look.healing("smart_scan"), _smart_scan_pages(look)
    if not pages or _brought_nothing(look) or (healing is None and not (_skipping(look) and _standing(look))):
        return
    scans = look.delta("full_scans") or 0
    sure = healing is not None or scans >= _SKIP_CYCLE
    if not sure and _worth(look, _refused(look) or 0):
        # What of the rest is held, too, is not known yet.
        return
    scan = full_scan_seconds(look) or 1.0
    pause, watch = max(1, math.ceil(4 * scan)), math.ceil((_SKIP_CYCLE + 1) * scan)
    # Looking longer tells more, where that is possible.
    wait = not sure and watch <= _LONGEST_LOOK_SECONDS
    yield Finding(
        Code.SMART_SCAN,
        Severity.LOSES if sure else Severity.NOTE,
        "Equal pages stay apart, and smart_scan skips pages" + ("" if sure else " (or they have just arrived)"),
        (
            Figure("equal and not merged", pages, CONTENTS if healing is None else SERVICE, "pages"),
            Figure("to be saved at least", pages * look.page, CONTENTS if healing is None else SERVICE, "bytes"),
            look.rise("pages_skipped"),
            look.rise("pages_sharing"),
            look.rise("full_scans"),
            *_attempts(look),
        ),
        "With smart_scan, ksmd looks at each page at least once in nine full scans. Watch for that long to find out "
        "whether something holds these pages."
        if wait
        else "smart_scan skips pages that did not merge, and two pages that are skipped in turns never meet. A few "
        "scans without it bring them together; the service does that by itself with healing.smart_scan = true."
        + (
            ""
            if look.attempts
            else " Pages that are not merged after that are held by something (vmsplice, io_uring, O_DIRECT)."
        ),
        f"ksmd-ctl doctor --interval {watch}" if wait else look.pulse_command(Knob.SMART_SCAN, 0, pause),
    )


def held_pages(look: Look) -> Iterator[Finding]:
    """Equal pages are looked at and not merged: write_protect_page refuses those that have a reference more (F18)."""
    pages, refused = duplicates(look), _refused(look)
    if not look.merging or not pages or not _standing(look):
        return
    held = _worth(look, refused or 0)
    # Without smart_scan, or with the service's pulses, ksmd has looked at all of them.
    looked_at = (look.delta("full_scans") or 0) >= _LOOKS
    left = looked_at and (not _skipping(look) or look.healing("smart_scan") == 0)
    if not (held or left or _brought_nothing(look)):
        return
    changing = refused is not None and not held
    yield Finding(
        Code.HELD_PAGES,
        Severity.LOSES,
        "ksmd tries to merge equal pages and the kernel refuses it: something holds them"
        if held
        else "ksmd doesn't merge equal pages: they change all the time"
        if changing
        else "ksmd looks at equal pages and can't merge them: something holds them, or they change all the time",
        (
            Figure("equal and not merged", pages, CONTENTS, "pages"),
            *([Figure("held of these, about", held, ATTEMPTS, "pages")] if held else []),
            look.rise("full_scans"),
            look.rise("pages_sharing"),
            look.figure("pages_volatile"),
            *_attempts(look),
            *([_tried_before(look)] if _brought_nothing(look) else []),
        ),
        "They are equal only from time to time. ksmd rightly leaves pages alone that change from one scan to the next."
        if changing
        else "Pages that a pipe (vmsplice), a device, O_DIRECT or io_uring holds don't merge until they are "
        "released; smart_scan is not the cause. `ksmd-ctl processes` shows which processes have much memory "
        "that is not merged.",
        "" if changing else "ksmd-ctl processes",
    )


def _tried_before(look: Look) -> Figure:
    advised = look.advised[Code.SMART_SCAN]
    return Figure("not merged before smart_scan was off last", advised.pages, SERVICE, "pages")


def twins(look: Look) -> Iterator[Finding]:
    """KSM pages with one content that never become one: migrated (findings F1), or left over from full ones."""
    healing, pages = look.healing("twins"), unexplained_dups(look)
    likeness = look.likeness
    if healing is not None:
        pages = healing
    elif likeness is not None and likeness.complete:
        # A chain may hold stale ones until it is pruned: contents tell.
        pages = min(pages, likeness.apart)
    if not pages or pages < _WORTH * (look.reading("pages_sharing") or 0):
        return
    yield Finding(
        Code.TWINS,
        Severity.LOSES,
        "Merged pages with one content are kept twice, and the kernel never joins them",
        (
            Figure(
                "superfluous copies, at least",
                pages,
                SERVICE if healing is not None else source_of("stable_node_dups"),
                "pages",
            ),
            look.figure("stable_node_dups"),
            look.figure("stable_node_chains"),
            look.figure(Knob.MAX_PAGE_SHARING),
            look.figure("pages_sharing"),
        ),
        "They were moved to one node, or had reached max_page_sharing once and no longer do. Once they are "
        "un-merged, ksmd merges them into one: the service's healing does that, or `ksmd-ctl unmerge` for one "
        "process at a time.",
        _unmerge_command(look),
    )


def _unmerge_command(look: Look) -> str:
    if look.manages:
        healed = part(look.after, "healing").get("allowed") is True
        return "" if healed else look.configure_command({"healing.twins": True})
    merged = [one for one in look.patients if one.merging_pages]
    return f"ksmd-ctl unmerge --pid {largest(merged, 'merging_pages', 1)[0].pid}" if merged else ""


def sharing_limit(look: Look) -> Iterator[Finding]:
    """max_page_sharing is small: a content needs a KSM page for every so many mappings (mm/ksm.c:stable_node_dup)."""
    limit, dups = look.reading(Knob.MAX_PAGE_SHARING), look.reading("stable_node_dups")
    default = int(KNOBS[Knob.MAX_PAGE_SHARING].default)
    if not limit or not dups or limit >= _SMALL_LIMIT:
        return
    pages = int(dups * (1 - limit / default))
    if pages >= max(_WORTH_PAGES, _WORTH * (look.reading("pages_sharing") or 0)):
        yield Finding(
            Code.SHARING_LIMIT,
            Severity.LOSES,
            f"max_page_sharing is small: the kernel keeps a copy for every {limit:.0f} mappings of the same contents",
            (
                look.figure(Knob.MAX_PAGE_SHARING),
                look.figure("stable_node_dups"),
                Figure("the default would save", pages, source_of("stable_node_dups"), "pages"),
            ),
            f"The kernel's default is {default}. To change it everything has to be un-merged once; the plan says what "
            "that takes.",
            f"{look.set_command(max_page_sharing=default)} --dry-run"
            if look.wanted(Knob.MAX_PAGE_SHARING) is None
            else look.set_command(max_page_sharing=default),
        )


def khugepaged(look: Look) -> Iterator[Finding]:
    """khugepaged takes merged ranges back, and ksmd splits them again (findings F17, collapse_huge_page)."""
    made, split = look.delta("thp_collapse_alloc") or 0, look.delta("thp_split_page") or 0
    left = look.healing("khugepaged")
    if look.merging and look.merged_pages and min(made, split) > 2 * _KHUGEPAGED_RATE * look.seconds:
        yield Finding(
            Code.KHUGEPAGED,
            Severity.COSTS,
            "khugepaged makes huge pages of merged ranges, and ksmd splits them again",
            (
                *([Figure("equal and not merged", left, SERVICE, "pages")] if left else []),
                look.rise("thp_collapse_alloc"),
                look.rise("thp_split_page"),
                look.rise("cow_ksm"),
            ),
            "Keep khugepaged from collapsing ranges that hold shared pages.",
            "echo 0 > /sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_shared",
        )


def swap_copies(look: Look) -> Iterator[Finding]:
    """Merged pages come back from swap as a copy for each who maps them (findings F16, ksm_might_need_to_copy)."""
    copies, left, scan = look.delta("ksm_swpin_copy"), look.healing("swapin"), full_scan_seconds(look)
    if not (copies or left) or (look.merging and scan is not None and scan < _SOON_SECONDS):
        return
    yield Finding(
        Code.SWAP_COPIES,
        Severity.LOSES,
        "Merged pages come back from swap as copies, "
        + ("and ksmd merges them only after a long time" if look.merging else "and they stay copies while KSM is off"),
        (
            look.rise("ksm_swpin_copy"),
            *([Figure("copies that ksmd has not scanned twice", left, SERVICE, "pages")] if left else []),
            look.figure("pages_sharing"),
            look.figure(Knob.RUN),
        ),
        "Two full scans merge them again: scan faster while this goes on.",
        look.set_command(pages_to_scan=10 * int(look.reading(Knob.PAGES_TO_SCAN) or 100))
        if look.merging
        else look.set_command(run=1),
    )
