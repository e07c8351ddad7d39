# SPDX-License-Identifier: GPL-2.0-or-later
"""A burst of `adaptive`: a few full scans in which ksmd is quick. What it is for, how far it is, what it brings.

It peeks at first, and looks then (`ksmd_ctl.control.policies.adaptive`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.control.policies.change import grown, tracked_pages
from ksmd_ctl.control.policies.debts import freed_by_splits, merged_pages
from ksmd_ctl.control.policies.figures import count, seconds
from ksmd_ctl.control.policies.pace import LOOK, PEEK
from ksmd_ctl.control.policies.pulse import LOOKS
from ksmd_ctl.host.sample import Sample

__all__ = ["HUGE_PAGE_WORTH", "PEEKS", "Burst", "Outcome", "Verdict"]

#: Full scans of a peek, one of them half done when it begins.
PEEKS: Final = 2
#: What is lost with a huge page, in pages: a sixteenth of its 512. Its memory is not lost, but the reach of a TLB entry
#: is; who merges less than that of it has gained nothing.
HUGE_PAGE_WORTH: Final = 32
# After so long it shows whether pages that had been written stay merged.
_LASTING_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Burst:
    """One burst.

    :ivar start: the sample at which it began
    :ivar scan: the sample at which the full scan began that is judged next
    :ivar older: the one before: what came later was not looked at twice
    :ivar owed, kind: what it is for
    :ivar cause: why it began, in words; empty where it only waits for the first page that ksmd may scan
    :ivar looking: the sample at which it began to look, None while it peeks
    :ivar looks: full scans to look, the one that runs among them
    :ivar blind: nobody knows how much there is to scan
    :ivar before: the sample before
    :ivar known: the least number of pages that ksmd kept records of since it began, None at the beginning
    :ivar again: the sample at which it began to look once more, None where it did not
    :ivar gone: merged pages that went away with their processes
    :ivar freed: pages of zeroes that splits of huge pages freed
    """

    start: Sample
    scan: Sample
    older: Sample
    owed: tuple[float, ...]
    kind: int
    cause: str
    looking: Sample | None = None
    looks: int = LOOKS
    blind: bool = False
    before: Sample | None = None
    known: float | None = None
    gone: float = 0.0
    freed: float = 0.0
    again: Sample | None = None

    def met(self, sample: Sample) -> Burst:
        """Take a sample in: ksmd drops its records of processes that ended as it comes to them, in a burst mostly."""
        before = self.before or self.start
        tracked, earlier = tracked_pages(sample) or 0.0, tracked_pages(before) or 0.0
        apart = merged_pages(before) - merged_pages(sample)
        return replace(
            self,
            before=sample,
            known=min(tracked, earlier if self.known is None else self.known),
            # Pages that come apart because they are written stay on record: they are not gone.
            gone=self.gone + max(0.0, min(apart, earlier - tracked)),
            freed=self.freed + freed_by_splits(before, sample),
        )

    @property
    def mode(self) -> str:
        return PEEK if self.looking is None else LOOK

    def scans(self, sample: Sample) -> float | None:
        """Full scans that have ended in it; None where nobody counts them, below 0 after everything was un-merged."""
        now, began = sample.number("full_scans"), self.start.number("full_scans")
        return None if now is None or began is None else now - began

    def looked(self, sample: Sample) -> bool:
        """Whether it has looked at every page."""
        return self.looking is not None and (grown(self.looking, sample, "full_scans") or 0) >= self.looks

    def found(self, sample: Sample) -> float:
        """Pages that ksmd has newly found in it."""
        known = (tracked_pages(self.start) or 0) if self.known is None else self.known
        return max(0.0, (tracked_pages(sample) or 0) - known)

    def gained(self, sample: Sample) -> float:
        """Pages that it freed: merged ones, and zeroes of huge pages; below 0 where more came apart meanwhile."""
        return merged_pages(sample) - self._merged + self.freed

    @property
    def _merged(self) -> float:
        """Merged pages that it began with, but for those that went away."""
        return merged_pages(self.start) - self.gone

    def used(self, sample: Sample) -> float | None:
        """Seconds of ksmd's time that it took."""
        return grown(self.start, sample, "ksmd_cpu_seconds")

    def outcome(self, sample: Sample) -> Outcome:
        """What it brought, where it ends with a sample."""
        return Outcome(
            sample.time_seconds - self.start.time_seconds,
            self.used(sample),
            self.gained(sample) - self.freed,
            grown(self.start, sample, "thp_split_page") or 0.0,
            self.freed,
        )

    def verdict(self, sample: Sample, owed: tuple[float, ...]) -> Verdict:
        """What is to be judged later, where it ends with a sample."""
        return Verdict(sample.time_seconds + _LASTING_SECONDS, self._merged, owed)

    def text(self, sample: Sample) -> str:
        """Why it began, and how far it is."""
        scans = self.scans(sample)
        doing = "look at all pages" if self.mode == LOOK else "quick check"
        done = f", {scans:.0f} full scan{'' if round(scans) == 1 else 's'} done" if scans else ""
        return f"{self.cause}; {doing}{done}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a burst brought.

    :ivar took: seconds from beginning to end
    :ivar used: seconds of ksmd's time, None where that can't be had
    :ivar merged: pages; below 0 where more came apart meanwhile
    :ivar split: huge pages that were split
    :ivar freed: pages of zeroes in these that the kernel gave back: un-merging doesn't undo that
    """

    took: float
    used: float | None
    merged: float
    split: float
    freed: float = 0.0

    @property
    def gained(self) -> float:
        """Pages, less what the huge pages were worth."""
        return self.merged + self.freed - self.split * HUGE_PAGE_WORTH

    @property
    def pages(self) -> int:
        return round(max(0.0, self.merged))

    def text(self) -> str:
        """What it brought, in words."""
        text = f"the last burst merged {count(max(0.0, self.merged))} pages in {seconds(self.took)}"
        if self.used is not None:
            text += f", {seconds(self.used)} of ksmd's time"
        if self.freed >= self.split * HUGE_PAGE_WORTH and self.split:
            text += f", and split {count(self.split)} huge pages, which freed {count(self.freed)} pages of zeroes"
        elif self.split:
            text += f", and split {count(self.split)} huge pages, each of which counts as {HUGE_PAGE_WORTH} lost"
        return text


@dataclass(frozen=True, slots=True)
class Verdict:
    """Merged pages that had been written are judged later: a program may write them again at once."""

    at: float
    merged: float
    owed: tuple[float, ...]

    def gained(self, sample: Sample) -> float:
        """Pages that have stayed merged."""
        return merged_pages(sample) - self.merged
