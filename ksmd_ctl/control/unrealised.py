# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that could be merged and are not, besides twins: copies that swap made, and what an advisor at a crawl leaves.

Values and what they become: no clock, no host. Under every policy, for counting changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.control.policies.change import grown, tracked_pages
from ksmd_ctl.host.memory import Likeness
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import Knob

__all__ = ["Copies", "Crawl", "LookAtContents"]

#: The rest of the scan that runs, and two full ones: the copies are new pages.
SCANS: Final = 3
#: A speed from which a full scan takes longer than so many times what the advisor aims at is a crawl.
_CRAWL: Final = 2.0
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
        # run = 2 begins to count scans anew.
        kept = [(min(when, scans), pages) for when, pages in self.waiting if scans < when + SCANS]
        copied = grown(self.before, sample, "ksm_swpin_copy")
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
    """Compare contents, as in `ksmd_ctl.host.interface.Host.likeness`."""

    budget_frames: int


@dataclass(frozen=True, slots=True)
class Crawl:
    """What is alike and apart while the kernel's advisor has ksmd at a crawl (findings F12), by contents.

    No counter tells it: ksmd doesn't know the pages yet that it has not come to.

    :ivar due: when to look next, at the earliest; and what a look may cost
    :ivar mergeable: pages that a full scan has to pass, by the latest look
    :ivar apart: of these, how many are more than there need be; None while that is not known
    """

    due: float = 0.0
    frames: int = _FIRST_FRAMES
    mergeable: int = 0
    apart: int | None = None

    def step(self, sample: Sample, cpu_share: float) -> tuple[Crawl, LookAtContents | None]:
        """Take a sample in: what it has become, and whether to look now.

        :param cpu_share: of one CPU, that looking may take; 0: never look
        """
        if not _slowed(sample):
            return replace(self, apart=0, mergeable=0) if _advisable(sample) else replace(self, apart=None), None
        if not cpu_share or sample.time_seconds < self.due:
            return self, None
        return self, LookAtContents(self.frames)

    def took(self, came: Likeness | None, sample: Sample, cpu_share: float, interval_seconds: float) -> Crawl:
        """Take a look in, None where it failed."""
        if came is None:
            return replace(self, apart=None, due=sample.time_seconds + interval_seconds)
        pages = max(came.mergeable_pages, tracked_pages(sample) or 0)
        # What a look takes is paid for by waiting; as many as can be paid for in an interval are looked at next time.
        cost = came.cpu_seconds / max(1, came.frames)
        affordable = round(cpu_share * interval_seconds / cost) if cost and cpu_share else _MOST_FRAMES
        return replace(
            self,
            due=sample.time_seconds + max(interval_seconds, came.cpu_seconds / cpu_share if cpu_share else 0.0),
            frames=max(_FIRST_FRAMES, min(affordable, _MOST_FRAMES)),
            mergeable=pages,
            # Where it is soon at the end nothing is lost by it.
            apart=came.apart if _seconds(sample, pages) > _CRAWL * _target(sample) else 0,
        )


def _advisable(sample: Sample) -> bool:
    # A kernel that has an advisor: then what it has cost is known to be nothing while it is off.
    return isinstance(sample.readings.get(Knob.ADVISOR_MODE), str)


def _slowed(sample: Sample) -> bool:
    pages, least = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.ADVISOR_MIN_PAGES_TO_SCAN)
    advised = sample.knob(Knob.ADVISOR_MODE) == "scan-time" and sample.knob(Knob.RUN) == 1
    return advised and pages is not None and least is not None and pages < least


def _seconds(sample: Sample, pages: int) -> float:
    """How long a full scan takes at this speed, as far as ksmd sleeps."""
    batch, sleep = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.SLEEP_MILLISECS) or 0.0
    return pages / batch * sleep / 1000 if batch else float("inf")


def _target(sample: Sample) -> float:
    return sample.number(Knob.ADVISOR_TARGET_SCAN_TIME) or 200.0
