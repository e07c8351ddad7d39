# SPDX-License-Identifier: GPL-2.0-or-later
"""Quantities that policies take from one sample, or from the difference of two."""

from __future__ import annotations

from typing import Final

from ksmd_ctl.figures import HUGE_PAGE_PAGES
from ksmd_ctl.host.sample import Sample

#: Every page that ksmd has scanned and that still exists is counted in one of these.
TRACKED: Final = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")


def counter_delta(before: Sample | None, after: Sample, name: str) -> float | None:
    """Increase of a counter between two samples; None where it is unknown, as after the counter was reset."""
    if before is None:
        return None
    first, last = before.number(name), after.number(name)
    return None if first is None or last is None or last < first else last - first


def tracked_pages(sample: Sample) -> int | None:
    """Pages that ksmd keeps an rmap_item for."""
    total = 0.0
    for name in TRACKED:
        value = sample.number(name)
        if value is None:
            return None
        total += value
    return int(total)


def saved_pages(sample: Sample) -> float:
    """Pages that merging saves, by the kernel's counters; zero pages that ksmd replaced are included."""
    return (sample.number("pages_sharing") or 0.0) + max(0.0, sample.number("ksm_zero_pages") or 0.0)


def anonymous_pages(sample: Sample) -> float | None:
    """Anonymous pages as processes see them: a merged page counts once for each mapping."""
    mapped = sample.number("nr_anon_pages")
    return None if mapped is None else mapped + saved_pages(sample)


def split_pages(before: Sample | None, after: Sample) -> float | None:
    """Pages of the huge pages of all sizes that were split between two samples; where only those of the largest size
    are counted, of these."""
    pages = counter_delta(before, after, "split_folio_pages")
    if pages is not None:
        return pages
    largest = counter_delta(before, after, "thp_split_page")
    return None if largest is None else largest * HUGE_PAGE_PAGES


def freed_by_splits(before: Sample, sample: Sample) -> float:
    """Zero pages that splits of huge pages freed between two samples; no counter of KSM has them (findings F32).

    A split changes anonymous memory only by these pages. Memory that programs freed at the same time can't be told
    from them; it counts for no more than was split, as a huge page of zeroes only is freed whole.
    """
    first, last = anonymous_pages(before), anonymous_pages(sample)
    split = split_pages(before, sample)
    if first is None or last is None or not split:
        return 0.0
    return max(0.0, min(first - last, split))


def gained_pages(before: Sample, sample: Sample) -> float:
    """Pages that merging freed between two samples; below 0 where more pages were un-merged."""
    return saved_pages(sample) - saved_pages(before) + freed_by_splits(before, sample)
