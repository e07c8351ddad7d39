# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that could be merged and are not, besides twins: copies that swap made, and what is alike and apart meanwhile.

Values and what they become: no clock, no host. Under every policy, for counting changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.control.policies.counters import counter_delta, tracked_pages
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.host.memory import CONTENTS_PAUSE_SECONDS
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import Knob

ADVISOR: Final = "advisor"
KHUGEPAGED: Final = "khugepaged"
#: The rest of the scan that runs, and two full ones: the copies are new pages.
SCANS: Final = 3
#: A speed from which a full scan takes longer than so many times what the advisor aims at is a crawl.
_CRAWL: Final = 2.0
#: Huge pages that khugepaged makes in a second at its own settings at most: 4096 pages each 10 s. Twice that is churn.
_CHURN_RATE: Final = 2 * 0.8
_CHURN_SECONDS: Final = 10.0
#: Pages whose contents are compared at first, 256 MiB; and at most: 4 GiB.
_FIRST_FRAMES: Final = 1 << 16
_MOST_FRAMES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Copies:
    """Pages that swap has copied and that ksmd has not passed twice since (findings F16, ksm_might_need_to_copy).

    :ivar before: the latest sample in which both counters could be read
    :ivar waiting: full_scans when they were copied, and how many were
    """

    before: Sample | None = None
    waiting: tuple[tuple[float, float], ...] = ()

    def step(self, sample: Sample) -> Copies:
        """Take a sample in."""
        scans = sample.number("full_scans")
        if scans is None or sample.number("ksm_swpin_copy") is None:
            return self
        copied = counter_delta(self.before, sample, "ksm_swpin_copy")
        if copied == 0 and not self.waiting:
            return self
        # run = 2 begins to count scans anew.
        kept = [(min(when, scans), pages) for when, pages in self.waiting if scans < when + SCANS]
        if copied:
            kept.append((scans, copied))
        return replace(self, before=sample, waiting=_together(kept))

    @property
    def pages(self) -> int | None:
        """How many there are; None where this kernel doesn't count them."""
        return None if self.before is None else round(sum(pages for _, pages in self.waiting))


def _together(found: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    by_scan: dict[float, float] = {}
    for when, pages in found:
        by_scan[when] = by_scan.get(when, 0.0) + pages
    return tuple(by_scan.items())


@dataclass(frozen=True, slots=True)
class LookAtContents:
    """Compare contents, as in `ksmd_ctl.host.interface.Host.duplicates`."""

    budget_frames: int


@dataclass(frozen=True, slots=True)
class Apart:
    """What is alike and apart, by contents, while something is known to keep ksmd from it. Else nobody looks.

    The kernel's advisor at a crawl (findings F12): ksmd doesn't know the pages yet that it has not come to.
    khugepaged (F17), which makes huge pages of merged ranges as quickly as ksmd splits them.

    :ivar due: when to look next, at the earliest; `frames` is how many
    :ivar pages: by reason, how many are more than there need be; None while that is not known
    :ivar marked: the sample since which huge pages are counted; `churn` is whether they came and went before it
    """

    due: float = 0.0
    frames: int = _FIRST_FRAMES
    pages: Mapping[str, int | None] = field(default_factory=lambda: {ADVISOR: None, KHUGEPAGED: None})
    marked: Sample | None = None
    churn: bool | None = None

    def step(self, sample: Sample, cpu_share: float) -> tuple[Apart, LookAtContents | None]:
        """Take a sample in: what it has become, and whether to look now.

        :param cpu_share: of one CPU, that looking may take; 0: never look
        """
        after = self._counted(sample)
        reason = after.reason(sample)
        # What can be told to do no harm now costs nothing.
        harmless = {
            ADVISOR: isinstance(sample.readings.get(Knob.ADVISOR_MODE), str),
            KHUGEPAGED: after.churn is not None,
        }
        pages = {one: self.pages[one] if one == reason else 0 if harmless[one] else None for one in self.pages}
        if pages != self.pages:
            after = replace(after, pages=pages)
        due = bool(reason) and cpu_share > 0 and sample.time_seconds >= self.due
        return after, LookAtContents(self.frames) if due else None

    def reason(self, sample: Sample) -> str:
        """What keeps ksmd from merging now; empty for nothing."""
        if sample.knob(Knob.RUN) != 1:
            return ""
        return ADVISOR if _slowed(sample) else KHUGEPAGED if self.churn else ""

    def took(self, came: DuplicatePages | None, sample: Sample, cpu_share: float, interval_seconds: float) -> Apart:
        """Take a look in, None where it failed."""
        reason = self.reason(sample)
        interval_seconds = max(interval_seconds, CONTENTS_PAUSE_SECONDS)
        if came is None:
            pages = {one: None if one == reason else count for one, count in self.pages.items()}
            return replace(self, pages=pages, due=sample.time_seconds + interval_seconds)
        found = came.pages
        if reason == ADVISOR:
            passed = max(came.mergeable_pages, tracked_pages(sample) or 0)
            # Where it is soon at the end nothing is lost by it.
            found = found if _seconds(sample, passed) > _CRAWL * _target(sample) else 0
        # What a look takes is paid for by waiting; as many as can be paid for in an interval are looked at next time.
        cost = came.cpu_seconds / max(1, came.frames)
        affordable = round(cpu_share * interval_seconds / cost) if cost and cpu_share else _MOST_FRAMES
        return replace(
            self,
            due=sample.time_seconds + max(interval_seconds, came.cpu_seconds / cpu_share if cpu_share else 0.0),
            frames=max(_FIRST_FRAMES, min(affordable, _MOST_FRAMES)),
            pages={one: found if one == reason else count for one, count in self.pages.items()},
        )

    def _counted(self, sample: Sample) -> Apart:
        marked = self.marked
        if marked is None:
            return replace(self, marked=sample)
        passed = sample.time_seconds - marked.time_seconds
        if passed < _CHURN_SECONDS:
            return self
        made = counter_delta(marked, sample, "thp_collapse_alloc")
        split = counter_delta(marked, sample, "thp_split_page")
        known = made is not None and split is not None
        churn = min(made or 0.0, split or 0.0) > _CHURN_RATE * passed if known else None
        return replace(self, marked=sample, churn=churn)


def _slowed(sample: Sample) -> bool:
    pages, least = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.ADVISOR_MIN_PAGES_TO_SCAN)
    return sample.knob(Knob.ADVISOR_MODE) == "scan-time" and pages is not None and least is not None and pages < least


def _seconds(sample: Sample, pages: int) -> float:
    """How long a full scan takes at this speed, as far as ksmd sleeps."""
    batch, sleep = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.SLEEP_MILLISECS) or 0.0
    return pages / batch * sleep / 1000 if batch else float("inf")


def _target(sample: Sample) -> float:
    return sample.number(Knob.ADVISOR_TARGET_SCAN_TIME) or 200.0
