# SPDX-License-Identifier: GPL-2.0-or-later
"""A burst of `adaptive`: a few scans of all pages, one after the other, in which ksmd is quick.

- `Burst` follows one from its start: how far it is, what it found and gained, when the scan that runs will end.
- `Outcome` is what it gained, and `PendingGain` what is judged a minute later.
- `ScanCosts` has the measured CPU time of a scan, and estimates that of a burst.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.figures import HUGE_PAGE_PAGES, rough_count, rough_seconds
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.backlog import INITIAL_HIT_RATES, Backlog, Kind
from ksmd_ctl.policies.counters import counter_delta, freed_by_splits, saved_pages, split_pages, tracked_pages
from ksmd_ctl.policies.knob_recovery import FULL_SCANS
from ksmd_ctl.policies.scan_rate import ScanMode

#: Cost of splitting a huge page, in pages: a sixteenth of its 512. Its memory stays, but a TLB entry reaches less far;
#: merging fewer pages in it than that gains nothing.
HUGE_PAGE_WORTH: Final = 32
# After this time it is known whether pages that had been written stay merged.
_JUDGED_AFTER_SECONDS: Final = 60.0
# After this time, and with less than this share of a CPU, ksmd has nothing to scan.
_INACTIVE_SECONDS: Final = 3.0
_INACTIVE_SHARE: Final = 0.05
# A smaller progress says little about when a scan ends.
_TELLING_PROGRESS: Final = 0.25

# ksmd is starved if it gets less than this share of its share for so long.
_STARVED_SHARE: Final = 0.25
_STARVED_SECONDS: Final = 0.5

# Seconds of ksmd's time for a page, before anything was measured.
_FIRST_COSTS: Final[Mapping[ScanMode, float]] = {ScanMode.QUICK: 1.5e-6, ScanMode.FULL: 3e-6}
# A page never costs more than this; CPU time beyond it was not spent on pages.
_HIGHEST_COST: Final = 5e-5
# Less CPU time than this can't be told from noise.
_LEAST_CPU_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Burst:
    """One burst.

    :ivar start: the sample at which it began
    :ivar scan: the sample at which the scan of all pages began that runs
    :ivar older: the same of the scan before: pages that came later were not scanned twice
    :ivar backlog: candidates when it began, by kind
    :ivar kind: the kind that it is for
    :ivar cause: why it began, in words
    :ivar full_since: the sample at which its full scans began (smart_scan off), None in the quick scan
    :ivar full_scans: full scans to do, the one that runs included
    :ivar blind: how much there is to scan was not known when it began
    :ivar before: the sample before
    :ivar known: the least number of pages that ksmd kept records of since it began, None at the beginning
    :ivar again: the sample at which one more full scan began, for pages that had changed; None where there is none
    :ivar gone: merged pages that went away with their processes
    :ivar freed: zero pages that splits of huge pages freed
    :ivar unnoticed: written pages that counted as merged ones when it began
    :ivar changed: pages that had changed, for which the full scan that runs was begun
    :ivar look: it only looks whether there is anything to merge
    :ivar fed: the latest sample up to which ksmd got its share of a CPU, None for the start
    :ivar starved: once it did not: as an idle task (SCHED_IDLE) ksmd waits for all others
    """

    start: Sample
    scan: Sample
    older: Sample
    backlog: Mapping[Kind, float]
    kind: Kind
    cause: str
    full_since: Sample | None = None
    full_scans: int = FULL_SCANS
    blind: bool = False
    before: Sample | None = None
    known: float | None = None
    gone: float = 0.0
    freed: float = 0.0
    again: Sample | None = None
    unnoticed: float = 0.0
    changed: float = 0.0
    look: bool = False
    fed: Sample | None = None
    starved: bool = False

    def step(self, sample: Sample, share: float = 0.0) -> Burst:
        """The burst after another sample. ksmd drops records of processes that ended as it meets them, mostly here.

        :param share: what of a CPU the knobs were for
        """
        before, fed = self.before or self.start, self._fed(sample, share)
        tracked, earlier = tracked_pages(sample) or 0.0, tracked_pages(before) or 0.0
        unmerged = saved_pages(before) - saved_pages(sample)
        after = replace(
            self,
            before=sample,
            known=min(tracked, earlier if self.known is None else self.known),
            # Pages that are un-merged because they are written stay on record: they are not gone.
            gone=self.gone + max(0.0, min(unmerged, earlier - tracked)),
            freed=self.freed + freed_by_splits(before, sample),
            fed=fed,
            starved=self.starved or sample.time_seconds - fed.time_seconds >= _STARVED_SECONDS,
        )
        return replace(after, scan=sample, older=self.scan) if self.scan_ended(sample) else after

    def _fed(self, sample: Sample, share: float) -> Sample:
        since = self.fed or self.start
        used = counter_delta(since, sample, "ksmd_cpu_seconds")
        least = _STARVED_SHARE * share * (sample.time_seconds - since.time_seconds)
        return sample if used is None or used >= least else since

    def scan_ended(self, sample: Sample) -> bool:
        """Whether the scan that ran has ended by a sample."""
        scans = sample.number("full_scans")
        return scans is not None and scans != self.scan.number("full_scans")

    def idle(self, sample: Sample) -> bool:
        """Whether ksmd has nothing to scan: it knows of no page, ends no scan, and takes no CPU time."""
        passed = sample.time_seconds - self.scan.time_seconds
        used = counter_delta(self.scan, sample, "ksmd_cpu_seconds") or 0.0
        return not tracked_pages(sample) and passed >= _INACTIVE_SECONDS and used < _INACTIVE_SHARE * passed

    @property
    def mode(self) -> ScanMode:
        return ScanMode.QUICK if self.full_since is None else ScanMode.FULL

    def scans(self, sample: Sample) -> float | None:
        """Scans of all pages that have ended in it; None where they can't be counted, below 0 after an un-merging."""
        now, began = sample.number("full_scans"), self.start.number("full_scans")
        return None if now is None or began is None else now - began

    def full_scans_left(self, sample: Sample) -> float:
        """Full scans that have not ended, the one that runs included."""
        return self.full_scans - (counter_delta(self.full_since, sample, "full_scans") or 0)

    def changed_pages(self, sample: Sample) -> float:
        """Pages that had changed, as the scan of all pages says that has just ended, but for the newly found.

        smart_scan skips most old pages, which then count as volatile, too: those that it scanned stand for them.
        """
        skipped = counter_delta(self.scan, sample, "pages_skipped") or 0.0
        changed = max(0.0, (sample.number("pages_volatile") or 0.0) - skipped - self.found(sample))
        scanned = changed + (sample.number("pages_unshared") or 0.0)
        return changed * (1 + skipped / max(scanned, 1.0))

    def full_scans_done(self, sample: Sample) -> bool:
        """Whether all its full scans have ended."""
        return self.full_since is not None and self.full_scans_left(sample) <= 0

    def found(self, sample: Sample) -> float:
        """Pages of which ksmd has made records in it."""
        known = (tracked_pages(self.start) or 0) if self.known is None else self.known
        return max(0.0, (tracked_pages(sample) or 0) - known)

    def gained(self, sample: Sample) -> float:
        """Pages that it freed: merged ones, and zero pages of huge pages; below 0 where more were un-merged."""
        return saved_pages(sample) - self._merged_before + self.freed

    @property
    def _merged_before(self) -> float:
        """Pages that were merged at its start and have not gone away."""
        return saved_pages(self.start) - self.gone - self.unnoticed

    def used(self, sample: Sample) -> float | None:
        """Seconds of ksmd's time that it took."""
        return counter_delta(self.start, sample, "ksmd_cpu_seconds")

    def remaining(self, sample: Sample, usual: float) -> tuple[float, float]:
        """Seconds until the scan that runs seems to end, and seconds for a whole one.

        :param usual: seconds for a whole one, if its progress says nothing yet
        """
        # The first one may have begun in the background, a long time ago.
        since = self.scan if self.scan.time_seconds > self.start.time_seconds else self.start
        passed, done = sample.time_seconds - since.time_seconds, scan_progress(self.scan, sample)
        if done is None:
            return usual - passed, usual
        begun = scan_progress(self.scan, since) or 0.0
        whole = passed / (done - begun) if done - begun > _TELLING_PROGRESS else usual
        return whole * (1 - done), whole

    def outcome(self, sample: Sample) -> Outcome:
        """What it gained, if it ends with a sample."""
        return Outcome(
            sample.time_seconds - self.start.time_seconds,
            self.used(sample),
            self.gained(sample) - self.freed,
            (split_pages(self.start, sample) or 0.0) / HUGE_PAGE_PAGES,
            self.freed,
        )

    def pending_gain(self, sample: Sample, written: float) -> PendingGain:
        """What is judged later, if it ends with a sample."""
        return PendingGain(sample.time_seconds + _JUDGED_AFTER_SECONDS, self._merged_before, written)

    def text(self, sample: Sample) -> str:
        """Why it began, and how far it is."""
        scans = self.scans(sample)
        doing = "full scan" if self.mode is ScanMode.FULL else "quick scan"
        done = f", {scans:.0f} scan{'' if round(scans) == 1 else 's'} done" if scans else ""
        return f"{self.cause}; {doing}{done}"


def scan_progress(scan: Sample, sample: Sample) -> float | None:
    """Progress, 0 to 1, of the scan that began at a sample; None before 6.7, which doesn't count skipped pages."""
    scanned, skipped = counter_delta(scan, sample, "pages_scanned"), counter_delta(scan, sample, "pages_skipped")
    tracked = tracked_pages(sample)
    return None if scanned is None or skipped is None or not tracked else min((scanned + skipped) / tracked, 1.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a burst gained.

    :ivar took: seconds from beginning to end
    :ivar used: seconds of ksmd's time, None where that is unknown
    :ivar merged: pages; below 0 where more were un-merged meanwhile
    :ivar split: huge pages that were split, smaller ones as parts of one
    :ivar freed: zero pages of these that the kernel gave back; un-merging doesn't undo that
    """

    took: float
    used: float | None
    merged: float
    split: float
    freed: float = 0.0

    @property
    def gained(self) -> float:
        """Pages, less the cost of the split huge pages."""
        return self.merged + self.freed - self.split * HUGE_PAGE_WORTH

    @property
    def pages(self) -> int:
        return round(max(0.0, self.merged))

    def text(self) -> str:
        """The outcome in words."""
        text = f"the last burst merged {rough_count(max(0.0, self.merged))} pages in {rough_seconds(self.took)}"
        if self.used is not None:
            text += f", {rough_seconds(self.used)} of ksmd's time"
        split = f"{rough_count(self.split)} huge pages"
        if not round(self.split):
            return text
        if self.freed >= self.split * HUGE_PAGE_WORTH:
            text += f", and split {split}, which freed {rough_count(self.freed)} pages of zeroes"
        else:
            text += f", and split {split}, each of which counts as {HUGE_PAGE_WORTH} lost"
        return text


@dataclass(frozen=True, slots=True)
class PendingGain:
    """Written pages that merged again are judged later, because a program may write them again at once.

    :ivar at: when
    :ivar merged: merged pages before the burst
    :ivar written: the candidates of the burst
    """

    at: float
    merged: float
    written: float

    def gained(self, sample: Sample) -> float:
        """Pages that have stayed merged."""
        return saved_pages(sample) - self.merged


@dataclass(frozen=True, slots=True)
class ScanCosts:
    """Measured CPU time of scans of all pages, by the number of pages that ksmd tracks.

    With smart_scan on, most of these pages are skipped, so this differs from the cost of a page of pages_to_scan, which
    `ksmd_ctl.policies.scan_rate` measures.

    :ivar page: seconds of ksmd's time for a tracked page, by mode
    :ivar walk: seconds of a scan spent on no page: some kernels walk empty address space (findings F11)
    """

    page: Mapping[ScanMode, float] = field(default_factory=lambda: _FIRST_COSTS)
    walk: float = 0.0

    def measured(self, mode: ScanMode, before: Sample, sample: Sample) -> ScanCosts:
        """The costs after scans have ended between two samples."""
        tracked, scans = tracked_pages(sample), counter_delta(before, sample, "full_scans")
        used = counter_delta(before, sample, "ksmd_cpu_seconds")
        if not tracked or not scans or used is None or used < _LEAST_CPU_SECONDS:
            return self
        scan = used / scans
        if scan > tracked * _HIGHEST_COST:
            return replace(self, walk=scan - tracked * self.page[mode])
        walk = min(self.walk, scan)
        cost = max((scan - walk) / tracked, 1e-7)
        return replace(self, page={**self.page, mode: (self.page[mode] + cost) / 2}, walk=walk)

    def scan(self, mode: ScanMode, pages: float) -> float:
        """Seconds of ksmd's time for a scan of so many tracked pages."""
        return pages * self.page[mode] + self.walk

    def burst(self, backlog: Backlog, sample: Sample) -> float:
        """Seconds of ksmd's time that a burst would take now."""
        candidates, main = backlog.pages, backlog.main
        untracked = candidates[Kind.NEW] * backlog.hit_rates[Kind.NEW] - candidates[Kind.FOUND]
        pages = (tracked_pages(sample) or 0) + max(0.0, untracked)
        # A full scan follows only where the quick scan found enough.
        full = min(1.0, main.hit_rate / INITIAL_HIT_RATES[main.kind])
        return pages * (self.page[ScanMode.QUICK] + full * self.page[ScanMode.FULL]) + self.walk * (1 + full)
