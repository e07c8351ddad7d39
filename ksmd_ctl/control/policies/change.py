# SPDX-License-Identifier: GPL-2.0-or-later
"""How readings change from sample to sample."""

from __future__ import annotations

from ksmd_ctl.host.sample import Sample

__all__ = ["TRACKED", "grown", "tracked_pages"]

#: Every page that ksmd has seen and that is still there is counted in one of these.
TRACKED = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")


def grown(before: Sample | None, after: Sample, name: str) -> float | None:
    """By how much a counter grew; None where that isn't known, as after it began again."""
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
