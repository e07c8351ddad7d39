# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging saves: the one definition, which docs/saving.md explains, and whether the counters still say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ksmd_ctl.host.knobs import RUN_OFFLINE
from ksmd_ctl.host.memory import PAGE_ITEM_BYTES
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import counter_delta, tracked_pages


@dataclass(frozen=True, slots=True)
class Saving:
    """What a host saves, and what it is made of. ``saved_bytes`` is the sum of the first two less the third.

    :ivar freed_bytes: by merged pages: `pages_sharing`, every mapping but the first of each KSM page
    :ivar zero_bytes: by pages of zeroes that ksmd replaced by the zero page; 0 before 6.6, where nothing counts them
    :ivar records_bytes: what ksmd keeps about pages, merged or not
    """

    freed_bytes: int
    zero_bytes: int
    records_bytes: int

    @property
    def saved_bytes(self) -> int:
        return self.freed_bytes + self.zero_bytes - self.records_bytes


def saving(sample: Sample, page_size_bytes: int) -> Saving | None:
    """The saving by the kernel's counters (mm/ksm.c: ksm_general_profit); None where they don't tell.

    ksmd's records are what general_profit leaves out of the saving; before 6.4, and where counters that were read one
    after the other don't agree, they are calculated from the pages that ksmd has seen.
    """
    sharing, tracked = sample.number("pages_sharing"), tracked_pages(sample)
    if sharing is None:
        return None
    freed = int(sharing) * page_size_bytes
    # The kernel shows this count signed, and it may be below 0.
    zero = max(0, int(sample.number("ksm_zero_pages") or 0)) * page_size_bytes
    profit = sample.number("general_profit")
    if profit is not None and (records := freed + zero - int(profit)) >= 0:
        return Saving(freed, zero, records)
    return None if tracked is None else Saving(freed, zero, tracked * PAGE_ITEM_BYTES)


def saved_frames_bytes(
    found: Saving | None, counters: Counters, split_zero_pages: int | None, page_size_bytes: int
) -> int | None:
    """What is saved in frames: by the kernel's counters, and by splits of huge pages, which these do not have.

    None where one of both isn't known, or the counters are stale.
    """
    if found is None or counters.stale or split_zero_pages is None:
        return None
    return found.saved_bytes + split_zero_pages * page_size_bytes


def least_saved_bytes(saved_bytes: int, forked_pages: int, page_size_bytes: int, forked_places: int = 0) -> int:
    """The least that is saved: without the merged pages of forks of one another, which fork may have shared anyway.

    :param saved_bytes: by the kernel's counters, which is the most
    :param forked_pages: merged pages (mappings) of all processes that are forks of one another
    :param forked_places: at how many places they map them, where contents were compared: one address is one place for
        all of them, and fork shares only what lies at one place
    """
    shared_bytes = max(0, forked_pages - forked_places) * page_size_bytes
    return min(saved_bytes, max(0, saved_bytes - shared_bytes))


def merged_pages(sample: Sample) -> int | None:
    """Mappings that were merged, zero pages not among them."""
    shared, sharing = sample.number("pages_shared"), sample.number("pages_sharing")
    return None if shared is None or sharing is None else int(shared) + int(sharing)


@dataclass(frozen=True, slots=True)
class Counters:
    """Whether KSM's counters say what is merged.

    ksmd itself counts a page out when it comes by. While it is stopped, what is written, un-merged or freed stays in
    pages_shared, pages_sharing, general_profit and every ksm_stat.

    :ivar stale: pages that are not merged any more are counted; None where that can't be told
    :ivar gone_pages: so many at least, None where no number is known
    """

    stale: bool | None
    gone_pages: int | None

    @property
    def text(self) -> str:
        """Why figures of the counters are out of date, or may be, in words; empty where they are not."""
        if self.stale is False:
            return ""
        if self.stale is None:
            return (
                "ksmd is stopped. Pages un-merged since then may still be counted. The figures are correct after two "
                "full scans (run = 1)."
            )
        if self.gone_pages is None:
            return "pages that were un-merged while ksmd was stopped are still counted as merged"
        pages = "1 page" if self.gone_pages == 1 else f"{self.gone_pages:,} pages"
        return f"ksmd is stopped, and {pages} or more of these are not merged any more"


CURRENT: Final = Counters(False, 0)
#: ksmd is stopped, and nobody saw what happened since.
NOBODY_SAW: Final = Counters(None, None)


class CountersWatch:
    """Watches from sample to sample what happens while ksmd is stopped.

    cow_ksm in /proc/vmstat (since 5.19) counts each KSM page that is copied because somebody writes or un-merges it,
    at once and whoever does it. Of processes that ended only a look at all others tells. Their page tables (smaps,
    since 6.7) tell everything, also where nobody saw ksmd stop.
    """

    def __init__(self) -> None:
        self._latest: Sample | None = None
        # The last sample before the stop (None where ksmd was stopped from the beginning), and the first one after it.
        self._before: Sample | None = None
        self._stopped: Sample | None = None
        # What full_scans reads once ksmd has come by everything that was un-merged while it was stopped.
        self._until_scans: float | None = None

    def add(self, sample: Sample) -> None:
        """Another sample."""
        run = sample.number("run")
        if run is None:
            return
        if not _counted(sample):
            self._until_scans = self._stopped = None
            self._before = sample
        elif int(run) & ~RUN_OFFLINE == 1:
            scans, until = sample.number("full_scans"), self._until_scans
            if self._copied():
                # The scan that is under way may have passed some of them already.
                self._until_scans = None if scans is None else scans + 2
            elif until is not None and (scans is None or not until - 2 <= scans < until):
                self._until_scans = None
            self._before, self._stopped = sample, None
        elif self._stopped is None:
            self._stopped = sample
        self._latest = sample

    def counters(
        self, looked_at: float | None = None, merging_pages: int | None = None, mapped_pages: int | None = None
    ) -> Counters:
        """Whether the counters of the latest sample are stale.

        :param looked_at: when all processes were looked at, by `Host.clock`
        :param merging_pages: how many merged pages these had by the kernel's count of each
        :param mapped_pages: how many KSM pages they mapped by their page tables, which are never stale
        """
        stopped, latest = self._stopped, self._latest
        if stopped is None or latest is None:
            return CURRENT if self._until_scans is None else Counters(True, None)
        if self._until_scans is not None:
            return Counters(True, None)
        counted, copied = merged_pages(latest), self._copied()
        seen = merging_pages if mapped_pages is None else mapped_pages
        missing = 0
        if seen is not None and counted is not None and (looked_at or 0.0) >= stopped.time_seconds:
            missing = max(0, counted - seen)
            if mapped_pages == counted and not copied:
                return CURRENT
        gone = max(copied or 0, missing)
        if gone:
            # Pages that were copied more than once, or counted out before, make more than there are.
            return Counters(True, gone if counted is None else min(gone, counted))
        return NOBODY_SAW if self._before is None or copied is None else CURRENT

    def _copied(self) -> int | None:
        """KSM pages that were copied since the stop, None where that isn't known."""
        if self._stopped is None or self._latest is None:
            return None
        copied = counter_delta(self._before or self._stopped, self._latest, "cow_ksm")
        return None if copied is None else int(copied)


def _counted(sample: Sample) -> bool:
    return any(sample.number(name) for name in ("pages_shared", "pages_sharing", "ksm_zero_pages"))
