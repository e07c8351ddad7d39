# SPDX-License-Identifier: GPL-2.0-or-later
"""From the samples of a run to its figures, and from the figures of all policies to a verdict. Pure.

*Time to 95 %* of an arrival: from the moment that its memory is filled to the first sample in which 95 % is saved of
what the oracle says for all who are there at that sample. Arrivals overlap: others of the same moment that come
after it raise the mark for it, too. It ends where the next moment begins, which is long after; an arrival that has
not got there until then never did, and counts as that long in a mean.

*The best* of some policies: the one that lost least of what could be saved over time; of equals, the one with less CPU.
Time to 95 % would not do: where nobody gets there, who saves nothing would be the best.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.policy.latency import Latency
from benchmarks.policy.oracle import HugePages

__all__ = [
    "Arrival",
    "Run",
    "Sample",
    "Step",
    "Total",
    "Verdict",
    "area",
    "best_of",
    "end_share",
    "lost_share",
    "mean_time",
    "oracle_at",
    "time_to_share",
    "verdict",
]

SHARE = 0.95
#: The marks. What is saved at the end, of what could be; arrivals after which nobody else is sooner; CPU seconds, of
#: the best other's; huge pages with few mergeable pages that are left; p99 of the neighbours, of that with KSM off.
END = 0.99
IN_TIME = 0.9
CPU = 0.5
KEPT = 0.8
LATENCY = 1.2
#: The last seconds, over whose samples the end's saving is a mean.
END_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What a run looked like at one time.

    :ivar at: seconds since the script began
    :ivar saved: frames that the tenants do not take, though they hold pages for them
    :ivar counted: what the kernel's counters say (pages_sharing and ksm_zero_pages); they lag behind, and don't have
        the zeroes that splits of huge pages freed
    :ivar huge_pages: how many the tenants have
    :ivar ksmd: CPU seconds of ksmd since the script began
    :ivar service: CPU seconds of the service or script, with all that it started
    """

    at: float
    saved: int
    counted: int
    huge_pages: int
    ksmd: float
    service: float
    full_scans: int
    run: int
    pages_to_scan: int
    sleep_millisecs: int
    smart_scan: int


@dataclass(frozen=True, slots=True)
class Step:
    """From `at` on, so many frames could be saved of so many pages."""

    at: float
    pages: int
    saving: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """:ivar filled: when its memory was filled; :ivar until: when the next moment begins"""

    tenant: int
    filled: float
    until: float


@dataclass(frozen=True, slots=True)
class Run:
    """One policy through one script.

    :ivar huge_pages: what is left of them at the end
    :ivar latency: what the neighbours measured
    :ivar others: CPU seconds of everything else on the host, tenants, neighbours and the measuring among it
    :ivar zeroes_free: whether the oracle took it that zeroes need no frame
    :ivar not_huge: huge pages that the host could not give to somebody who wanted one (thp_fault_fallback)
    """

    policy: str
    samples: Sequence[Sample]
    steps: Sequence[Step]
    arrivals: Sequence[Arrival]
    huge_pages: HugePages
    latency: Latency
    others: float = 0.0
    not_huge: int = 0
    zeroes_free: bool = False

    @property
    def cpu(self) -> float:
        """CPU seconds of ksmd and of the service together."""
        return self.samples[-1].ksmd + self.samples[-1].service

    def times(self) -> list[float | None]:
        """Time to 95 % of each arrival; None: never."""
        return [time_to_share(self.samples, self.steps, arrival) for arrival in self.arrivals]


def oracle_at(steps: Sequence[Step], at: float) -> int:
    """What could be saved at that time."""
    index = bisect_right([step.at for step in steps], at)
    return steps[index - 1].saving if index else 0


def area(samples: Sequence[Sample], steps: Sequence[Step]) -> tuple[float, float]:
    """Page-seconds lost against the oracle, and page-seconds that could be saved at all.

    Each sample stands for the time until the next one. What goes beyond the oracle makes good for nothing.
    """
    lost = could = 0.0
    for sample, following in pairwise(samples):
        oracle, seconds = oracle_at(steps, sample.at), following.at - sample.at
        lost += max(0, oracle - max(0, sample.saved)) * seconds
        could += oracle * seconds
    return lost, could


def end_share(samples: Sequence[Sample], steps: Sequence[Step]) -> float:
    """What is saved at the end, as a share of what could be."""
    end = samples[-1].at - END_SECONDS
    return statistics.mean(sample.saved / max(1, oracle_at(steps, sample.at)) for sample in samples if sample.at >= end)


def time_to_share(samples: Sequence[Sample], steps: Sequence[Step], arrival: Arrival) -> float | None:
    """Seconds until 95 % are saved; None where it never came to that."""
    for sample in samples:
        if arrival.filled <= sample.at < arrival.until and sample.saved >= SHARE * oracle_at(steps, sample.at):
            return sample.at - arrival.filled
    return None


def mean_time(run: Run) -> float:
    """Mean time to 95 %, where never counts as the whole time that there was."""
    return statistics.mean(
        arrival.until - arrival.filled if time is None else time
        for arrival, time in zip(run.arrivals, run.times(), strict=True)
    )


def best_of(runs: Sequence[Run]) -> Run:
    """The one that lost least, as a share of what could be saved."""
    return min(runs, key=lambda run: (lost_share(run), run.cpu))


def lost_share(run: Run) -> float:
    """Page-seconds lost, as a share of those that could be saved."""
    lost, could = area(run.samples, run.steps)
    return lost / max(could, 1e-9)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One run against the others of the same script.

    :ivar in_time: arrivals at which nobody else was sooner
    :ivar late: seconds that it came after the soonest, at the worst of its arrivals; 0: never later
    :ivar peer: the best of the others
    :ivar cpu: its CPU seconds as a share of the peer's
    :ivar ksmd: the same of ksmd alone
    :ivar end: what it ends with, as a share of what could be saved
    :ivar few_saving: what could be saved at most in huge pages with few mergeable pages, as a share of all
    :ivar latency: the neighbours' p99 as a multiple of that with KSM off; None where there was no such run
    """

    arrivals: int
    in_time: int
    late: float
    peer: str
    cpu: float
    ksmd: float
    end: float
    huge_pages: HugePages
    few_saving: float
    latency: float | None


def verdict(run: Run, others: Sequence[Run], off: Run | None, interval: float) -> Verdict:
    """`run` against the others; who is sooner by less than the interval of the samples is not sooner."""
    in_time, late = 0, 0.0
    columns = [other.times() for other in others]
    for number, (arrival, time) in enumerate(zip(run.arrivals, run.times(), strict=True)):
        best = min((other for column in columns if (other := column[number]) is not None), default=None)
        if best is None or (time is not None and time <= best + interval):
            in_time += 1
        else:
            late = max(late, (arrival.until - arrival.filled if time is None else time) - best)
    peer = best_of(others)
    return Verdict(
        arrivals=len(run.arrivals),
        in_time=in_time,
        late=late,
        peer=peer.policy,
        cpu=run.cpu / max(peer.cpu, 1e-9),
        ksmd=run.samples[-1].ksmd / max(peer.samples[-1].ksmd, 1e-9),
        end=end_share(run.samples, run.steps),
        huge_pages=run.huge_pages,
        few_saving=run.huge_pages.few_mergeable / max(1, run.steps[-1].saving),
        latency=None if off is None else run.latency.p99 / off.latency.p99,
    )


@dataclass(frozen=True, slots=True)
class Total:
    """Verdicts over some scripts together."""

    verdicts: Sequence[Verdict]

    @property
    def arrivals(self) -> int:
        return sum(verdict.arrivals for verdict in self.verdicts)

    @property
    def in_time(self) -> int:
        return sum(verdict.in_time for verdict in self.verdicts)

    @property
    def few_before(self) -> int:
        return sum(verdict.huge_pages.few_before for verdict in self.verdicts)

    @property
    def few_end(self) -> int:
        return sum(verdict.huge_pages.few_end for verdict in self.verdicts)

    @property
    def latencies(self) -> Sequence[float]:
        """Of scripts that were also run with KSM off."""
        return [verdict.latency for verdict in self.verdicts if verdict.latency is not None]

    @property
    def held(self) -> Mapping[str, bool | None]:
        """Which marks are reached; None where there was nothing to judge.

        The end and the latency in every script; CPU time in the mean; arrivals and huge pages of all scripts together.
        """
        return {
            "end": all(verdict.end >= END for verdict in self.verdicts),
            "time": self.in_time >= IN_TIME * self.arrivals,
            "cpu": statistics.mean(verdict.cpu for verdict in self.verdicts) <= CPU,
            "huge_pages": self.few_end >= KEPT * self.few_before if self.few_before else None,
            "latency": all(latency <= LATENCY for latency in self.latencies) if self.latencies else None,
        }
