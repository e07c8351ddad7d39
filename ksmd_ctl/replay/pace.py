# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast ksmd was on a recorded host: what a page cost, and by how much longer than it should it slept. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final, NamedTuple

from ksmd_ctl.engine.machine import NS_PER_PAGE
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import Sample

# Of ksmd's CPU time the kernel tells hundredths of a second: in so long a time these are few.
_WINDOW_SECONDS: Final = 5.0
_LEAST_PAGES: Final = 100
# Where a recording has nothing to measure: in the order of what pages of several hundred MiB cost (docs/findings.md).
_COST_NS: Final = 3_000


class Speed(NamedTuple):
    """What a page costs, and how much later than after its sleep a batch begins, both in nanoseconds."""

    cost_ns: float
    delay_ns: float


_USUAL: Final = Speed(_COST_NS, 0.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """The speed over time.

    :ivar times: from when on each of `speeds` holds, ascending
    :ivar usual: where nothing was measured
    """

    times: Sequence[float]
    speeds: Sequence[Speed]
    usual: Speed = _USUAL

    def at(self, seconds: float) -> Speed:
        """The speed at a time: as measured then, else as measured last, else the usual one."""
        index = bisect_right(self.times, seconds) - 1
        return self.speeds[index] if index >= 0 else self.usual


#: On the simulated host.
SIMULATED: Final = Pace((), (), Speed(NS_PER_PAGE, 0.0))


def measure(samples: Sequence[Sample]) -> Pace:
    """The pace of a recording; before 6.6, where no counter tells how many pages were scanned, the usual one."""
    times, speeds = [], []
    first: Sample | None = None
    for before, sample in pairwise(samples):
        if not _steady(before, sample):
            first = None
            continue
        first = first or before
        if sample.time_seconds - first.time_seconds >= _WINDOW_SECONDS:
            if (speed := _speed(first, sample)) is not None:
                times.append(first.time_seconds)
                speeds.append(speed)
            first = None
    if not speeds:
        return Pace((), ())
    usual = Speed(median(one.cost_ns for one in speeds), median(one.delay_ns for one in speeds))
    return Pace(times, speeds, usual)


def _steady(before: Sample, sample: Sample) -> bool:
    """Whether ksmd worked from one sample to the next under the same knobs."""
    knobs = (Knob.RUN, Knob.PAGES_TO_SCAN, Knob.SLEEP_MILLISECS, Knob.ADVISOR_MODE)
    same = all(before.knob(knob) == sample.knob(knob) for knob in knobs)
    return same and sample.number(Knob.RUN) == 1


def _speed(first: Sample, last: Sample) -> Speed | None:
    pages, cpu, scans = (_grown(first, last, name) for name in ("pages_scanned", "ksmd_cpu_seconds", "full_scans"))
    batch, sleep = last.number(Knob.PAGES_TO_SCAN), last.number(Knob.SLEEP_MILLISECS)
    if pages is None or cpu is None or not batch or sleep is None or pages < _LEAST_PAGES:
        return None
    # A batch ends with the full scan that it is in.
    batches = scans * (pages / scans // batch + 1) if scans else pages / batch
    length = (last.time_seconds - first.time_seconds) * 1e9 / batches
    return Speed(cpu * 1e9 / pages, max(0.0, length - sleep * 1e6 - cpu * 1e9 / batches))


def _grown(first: Sample, last: Sample, name: str) -> float | None:
    before, now = first.number(name), last.number(name)
    return None if before is None or now is None or now < before else now - before
