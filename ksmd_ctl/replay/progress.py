# SPDX-License-Identifier: GPL-2.0-or-later
"""How far ksmd had come at each sample of a recording, and when it first came to each process. Pure.

Where the knobs are those of the recording, its replay needs no model of ksmd's speed: by each sample as many pages are
scanned as were, and a full scan ends between the same two samples.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ksmd_ctl.host.sample import Sample
from ksmd_ctl.recording.reader import ProcessSample


@dataclass(frozen=True, slots=True)
class Progress:
    """What ksmd had done at each sample, since the first.

    :ivar times: of the samples, ascending
    :ivar pages: that were scanned
    :ivar scans: full scans that were done
    :ivar cpu_seconds: of ksmd
    """

    times: Sequence[float]
    pages: Sequence[int]
    scans: Sequence[int]
    cpu_seconds: Sequence[float]

    def interval(self, seconds: float) -> int:
        """The number of the sample up to which a time belongs; the last one for all that is later."""
        return min(bisect_left(self.times, seconds), len(self.times) - 1)

    def pages_at(self, seconds: float) -> float:
        """How many pages were scanned by a time: between two samples at equal speed."""
        return _between(self.times, self.pages, seconds)

    def cpu_at(self, seconds: float) -> float:
        """ksmd's CPU seconds by a time, likewise."""
        return _between(self.times, self.cpu_seconds, seconds)

    def time_of(self, since: float, until: float, pages: float) -> float:
        """When so many pages were scanned, which was between two samples."""
        first, last = self.pages_at(since), self.pages_at(until)
        part = (pages - first) / (last - first) if last > first else 0.0
        return since + (until - since) * min(max(part, 0.0), 1.0)


def _between(times: Sequence[float], values: Sequence[float], seconds: float) -> float:
    index = bisect_right(times, seconds)
    if index in (0, len(times)):
        return values[0 if index == 0 else -1]
    begins, ends = times[index - 1], times[index]
    return values[index - 1] + (values[index] - values[index - 1]) * (seconds - begins) / (ends - begins)


def read_progress(samples: Sequence[Sample]) -> Progress | None:
    """The progress of a recording; None before 6.6, where no counter tells how many pages were scanned."""
    found: dict[str, list[float]] = {}
    for name in ("pages_scanned", "full_scans", "ksmd_cpu_seconds"):
        values = [sample.number(name) for sample in samples]
        grown = [0.0]
        for before, now in pairwise(values):
            if before is None or now is None:
                return None
            grown.append(grown[-1] + max(0.0, now - before))
        found[name] = grown
    times = [_as_exact(sample.time_seconds) for sample in samples]
    pages, scans, cpu = found.values()
    return Progress(times, [*map(int, pages)], [*map(int, scans)], cpu)


def _as_exact(seconds: float) -> float:
    """A time, as exact as the clock of the simulated host."""
    return round(seconds * 1e9) / 1e9


def first_reached(progress: Progress, counts: Iterable[ProcessSample]) -> Mapping[int, float]:
    """When ksmd first came to a process, by process; only of those that it did not know when they were first seen.

    By then so many pages had been scanned as at the sample that tells of the first rmap_items, less these.
    """
    before: dict[int, float] = {}
    found: dict[int, float] = {}
    for row in counts:
        if row.process in found or row.rmap_items is None:
            continue
        at = _as_exact(row.seconds)
        if row.rmap_items == 0:
            before[row.process] = at
        elif (since := before.get(row.process)) is not None:
            # What did not change is not in every sample.
            since = max(since, progress.times[max(0, progress.interval(at) - 1)])
            found[row.process] = progress.time_of(since, at, progress.pages_at(at) - row.rmap_items)
        else:
            # It was known before.
            found[row.process] = -1.0
    return {process: at for process, at in found.items() if at >= 0}
