# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "kernel"``: the kernel's advisor, or its algorithm done here.

Done here is what a kernel lacks, or where its advisor leaves ksmd at a crawl.

Source: mm/ksm.c, ``scan_time_advisor`` (6.8). At the end of each full scan pages_to_scan is set so that one takes
`target_scan_time`, within a share of a CPU that is at least 10 % and at most `max_cpu`, and under
`max_pages_to_scan`; `min_pages_to_scan` is where it begins, not a limit. The figures are of the last full scan alone.

Done here, it counts the CPU time since the last evaluation from the first one on. The kernel's counts all that ksmd has
used since boot at first, takes that for one scan's, and goes down to 10 pages a batch (findings F12).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ksmd_ctl.figures import rough_count, rough_percent, rough_seconds
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import tracked_pages
from ksmd_ctl.policies.policy import Intervention, Policy, PolicyDecision, Reason

#: What sleep_millisecs is under this policy: the kernel's default.
SLEEP_MILLISECS: Final = 20
_LEAST_CPU: Final = 0.1
_EWMA_WEIGHT: Final = 0.3
# A speed from which a full scan takes longer than so many times the target is a crawl.
_CRAWL: Final = 1.5
# How long it has to look like one: the advisor decides at the end of a scan, and the next may be better.
_CRAWL_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Aim:
    """What is aimed at: seconds, a share of one CPU, pages a batch."""

    target_scan_time: int
    max_cpu: float
    min_pages_to_scan: int
    max_pages_to_scan: int


def scan_time_step(
    aim: Aim, pages_to_scan: float, scan_seconds: float, last_scan_seconds: float, change: float, cpu_ratio: float
) -> tuple[int, float]:
    """pages_to_scan after a full scan, and the smoothed change of its duration for the next one.

    The kernel's whole seconds and percents are fractions here; otherwise it is the kernel's formula.
    """
    change = (1 - _EWMA_WEIGHT) * change + _EWMA_WEIGHT * scan_seconds / last_scan_seconds
    pages = pages_to_scan * scan_seconds / aim.target_scan_time * change
    per_cpu = pages_to_scan / max(cpu_ratio, 0.01)
    pages = max(min(pages, per_cpu * aim.max_cpu), per_cpu * _LEAST_CPU)
    return int(min(max(1, pages), aim.max_pages_to_scan)), change


@dataclass(frozen=True, slots=True)
class ScanTime:
    """The algorithm done here.

    :ivar why: why here and not by the kernel
    :ivar recovered: what led here, for the figures
    """

    fresh: ClassVar = False
    aim: Aim
    why: str = "this kernel has no advisor"
    recovered: Intervention | None = None
    pages: int = 0
    change: float = 0.0
    scan_seconds: float = 0.0
    full_scans: float | None = None
    scanned_at: float = 0.0
    cpu_seconds: float | None = None
    reason: Reason | None = None

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Decide at the end of each full scan."""
        after = self._evaluated(sample)
        assert after.reason is not None
        knobs: dict[Knob, KnobValue] = {
            Knob.RUN: 1,
            Knob.ADVISOR_MODE: "none",
            Knob.SLEEP_MILLISECS: SLEEP_MILLISECS,
            Knob.PAGES_TO_SCAN: after.pages,
        }
        recovered = {} if self.recovered is None else {"advisor": self.recovered}
        return after, PolicyDecision(
            knobs, (after.reason, Reason("advisor", f"done here: {self.why}")), "here", None, recovered
        )

    def _evaluated(self, sample: Sample) -> ScanTime:
        scans, cpu, now = sample.number("full_scans"), sample.number("ksmd_cpu_seconds"), sample.time_seconds
        if self.full_scans is None or scans is None or scans < self.full_scans:
            pages = self.pages or self.aim.min_pages_to_scan
            reason = Reason("speed", f"{rough_count(pages)}, until a full scan has shown how long one takes")
            return replace(
                self,
                pages=pages,
                full_scans=scans,
                scanned_at=now,
                cpu_seconds=cpu,
                change=0.0,
                scan_seconds=0.0,
                reason=reason,
            )
        if scans == self.full_scans:
            return self
        took = max(0.001, (now - self.scanned_at) / (scans - self.full_scans))
        known = cpu is not None and self.cpu_seconds is not None and cpu >= self.cpu_seconds
        ratio = (cpu - self.cpu_seconds) / max(0.001, now - self.scanned_at) if known else self.aim.max_cpu  # type: ignore[operator]
        pages, change = scan_time_step(self.aim, self.pages, took, self.scan_seconds or took, self.change, ratio)
        text = (
            f"{rough_count(pages)}: the last full scan took {rough_seconds(took)} of {self.aim.target_scan_time} s "
            f"wanted, and ksmd {rough_percent(ratio)} of a CPU; {rough_percent(_LEAST_CPU)} to "
            f"{rough_percent(self.aim.max_cpu)} are allowed"
        )
        return replace(
            self,
            pages=pages,
            change=change,
            scan_seconds=took,
            full_scans=scans,
            scanned_at=now,
            cpu_seconds=cpu,
            reason=Reason("speed", text),
        )


@dataclass(frozen=True, slots=True)
class Advised:
    """The kernel's advisor, watched.

    :ivar take_over: replace it where it is at a crawl
    :ivar crawling_since: since when it looks like a crawl
    """

    fresh: ClassVar = False
    aim: Aim
    take_over: bool = True
    crawling_since: float | None = None

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Have the kernel do it, and see whether it does."""
        if isinstance(sample.readings.get(Knob.ADVISOR_MODE), str):
            crawl = self._crawl(sample)
            if not crawl:
                after = self if self.crawling_since is None else replace(self, crawling_since=None)
                return after, self._decision(sample, "")
            since = sample.time_seconds if self.crawling_since is None else self.crawling_since
            if not self.take_over or sample.time_seconds - since < _CRAWL_SECONDS:
                return replace(self, crawling_since=since), self._decision(sample, crawl)
            why = f"the kernel's advisor made ksmd very slow: {crawl} (findings F12)"
            return ScanTime(self.aim, why, Intervention(1)).step(sample)
        return ScanTime(self.aim).step(sample)

    def _decision(self, sample: Sample, crawl: str) -> PolicyDecision:
        pages = sample.number("pages_to_scan")
        text = (
            f"the kernel's advisor sets pages_to_scan (now {rough_count(pages)})"
            if pages is not None
            else "the kernel's advisor is on"
        )
        text += f", so that a full scan takes {self.aim.target_scan_time} s"
        reasons = [Reason("advisor", text)]
        if crawl:
            then = f"it is taken over after {_CRAWL_SECONDS:.0f} s" if self.take_over else "[healing] advisor = false"
            reasons.append(Reason("crawl", f"{crawl}; {then}"))
        knobs: dict[Knob, KnobValue] = {
            Knob.RUN: 1,
            Knob.SLEEP_MILLISECS: SLEEP_MILLISECS,
            Knob.ADVISOR_MODE: "scan-time",
            Knob.ADVISOR_MAX_CPU: round(100 * self.aim.max_cpu),
            Knob.ADVISOR_MIN_PAGES_TO_SCAN: self.aim.min_pages_to_scan,
            Knob.ADVISOR_MAX_PAGES_TO_SCAN: self.aim.max_pages_to_scan,
            Knob.ADVISOR_TARGET_SCAN_TIME: self.aim.target_scan_time,
        }
        return PolicyDecision(knobs, tuple(reasons), "kernel")

    def _crawl(self, sample: Sample) -> str:
        """Why this is a crawl, empty if it isn't."""
        pages, tracked = sample.number("pages_to_scan"), tracked_pages(sample)
        if sample.knob(Knob.ADVISOR_MODE) != "scan-time" or not pages or not tracked:
            return ""
        takes = tracked / pages * SLEEP_MILLISECS / 1000
        if pages >= self.aim.min_pages_to_scan or takes <= _CRAWL * self.aim.target_scan_time:
            return ""
        return (
            f"pages_to_scan is {rough_count(pages)}, so a full scan of {rough_count(tracked)} pages takes "
            f"{rough_seconds(takes)} or more, and {self.aim.target_scan_time} s are wanted"
        )
