# SPDX-License-Identifier: GPL-2.0-or-later
"""From a share of a CPU to pages_to_scan and sleep_millisecs, and what limits that share.

ksmd scans a batch and sleeps (mm/ksm.c, ``ksm_scan_thread``), so its share is the time of the batch divided by the time
of batch and sleep. The cost of a page is measured all the time: a unique page costs twenty times as much as a merged
one (findings F5). A batch is kept short, because writers of ``run`` wait until it ends.

- `ScanRate` has the knobs and the measured costs.
- `CpuBudget` makes ksmd rest where it has exceeded its share however small the batch is.
- `Pressure` says whether other tasks wait for a CPU or for memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Final

from ksmd_ctl.figures import rough_count, rough_percent, rough_seconds
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import counter_delta

#: pages_to_scan at most: 40 ms at the 5 us that a unique page takes in a large tree.
MOST_PAGES: Final = 8000
_LEAST_PAGES: Final = 16
_BATCH_SECONDS: Final = 0.04
_QUICK_SLEEP_SECONDS: Final = 0.01
# In the background ten batches a second are enough.
_SLOW_SLEEP_SECONDS: Final = 0.1
_SLOW_SHARE: Final = 0.1
# /proc/PID/stat counts in hundredths of a second: less CPU time than this can't be told from noise.
_WINDOW_CPU_SECONDS: Final = 0.1
# A window ends all the same after so long, or where so much CPU time was to be expected.
_WINDOW_SECONDS: Final = 15.0
_LEAST_WINDOW_CPU_SECONDS: Final = 0.05
_SHORTEST_SECONDS: Final = 0.5
# A smaller relative change is not worth a write.
_WORTH_WRITING: Final = 0.15
# A sleep takes longer than it says: it ends at a tick of the kernel's clock, and ksmd has to be woken.
_LAG_SECONDS: Final = 0.004

# Seconds of ksmd's time above its share that make it rest; pages_to_scan corrects less than that.
_EXCEEDED_SECONDS: Final = 0.5
_LONGEST_REST_SECONDS: Final = 6 * 3600.0
# ksmd is still in its batch where it took more than this share of the time since the last sample.
_BUSY: Final = 0.5
_WORTH_A_LONGER_REST: Final = 1.15

_SMOOTHING_SECONDS: Final = 10.0
# High pressure ends below this share of its limit.
_RELAXED: Final = 0.6


class ScanMode(Enum):
    """What ksmd scans, which decides what a page costs."""

    #: a quick scan of a burst, smart_scan on
    QUICK = auto()
    #: a full scan of a burst, smart_scan off
    FULL = auto()


# Costs before anything was measured (findings F5, F18).
_FIRST_COSTS: Final[Mapping[ScanMode, float]] = {
    ScanMode.QUICK: 2e-6,
    ScanMode.FULL: 3e-6,
}


@dataclass(frozen=True, slots=True)
class CpuBudget:
    """ksmd's CPU time against its share.

    Some kernels scan the whole of a mergeable mapping, populated or not (findings F11): ksmd then takes a second for
    each 40 GiB of empty address space, within one batch, whatever pages_to_scan is. Only a long sleep afterwards makes
    up for that. A write to sleep_millisecs wakes ksmd, so it is written during the batch, and then left alone.

    :ivar balance: seconds of ksmd's time; below 0 it has taken so much more than its share
    :ivar rest_seconds: how long it has to sleep now, 0 where it need not rest
    :ivar deepest: the lowest balance of this rest
    :ivar expected: how far the last rest's balance had fallen, as seconds above 0
    """

    before: Sample | None = None
    balance: float = 0.0
    rest_seconds: float = 0.0
    deepest: float = 0.0
    expected: float = 0.0

    def reset(self, sample: Sample) -> CpuBudget:
        """A new budget, for another share."""
        return CpuBudget(before=sample, expected=self.expected)

    def step(self, sample: Sample, share: float) -> CpuBudget:
        """The budget after another sample.

        :param share: what ksmd may take of a CPU
        """
        used = counter_delta(self.before, sample, "ksmd_cpu_seconds")
        passed = 0.0 if self.before is None else sample.time_seconds - self.before.time_seconds
        if used is None or passed <= 0:
            return self.reset(sample)
        # Unused time is not saved up.
        balance = min(0.0, self.balance + share * passed - used)
        after = replace(self, before=sample, balance=balance)
        if not self.rest_seconds:
            if balance > -_EXCEEDED_SECONDS:
                return after
            return replace(after, deepest=balance, rest_seconds=_rest(max(-balance, self.expected), share))
        if balance >= 0:
            return replace(after, rest_seconds=0.0, expected=-self.deepest)
        needed = _rest(-balance, share)
        if used > _BUSY * passed and needed > _WORTH_A_LONGER_REST * self.rest_seconds:
            after = replace(after, rest_seconds=needed)
        return replace(after, deepest=min(self.deepest, balance))

    def text(self) -> str:
        """Why it rests, in words."""
        rest, more = rough_seconds(self.rest_seconds), rough_seconds(-self.deepest)
        text = f"ksmd sleeps for {rest} because it used {more} more CPU time than its share"
        return f"{text}: this kernel may look at empty address space"


@dataclass(frozen=True, slots=True)
class ScanRate:
    """The knobs, and what was measured of their effect.

    :ivar share: the share of a CPU that the knobs are for
    :ivar costs: seconds of ksmd's time for a page of pages_to_scan, by mode
    :ivar trim: the error that remained, as a factor of pages
    :ivar measured: the share in the last window, None before one has ended
    :ivar since: the sample at which the window began
    """

    pages: int = _LEAST_PAGES
    sleep_millisecs: int = 100
    share: float = 0.0
    mode: ScanMode = ScanMode.QUICK
    costs: Mapping[ScanMode, float] = field(default_factory=lambda: _FIRST_COSTS)
    trim: float = 1.0
    measured: float | None = None
    since: Sample | None = None
    budget: CpuBudget = field(default_factory=CpuBudget)

    @property
    def cost(self) -> float:
        """Seconds of ksmd's time for a page of pages_to_scan in this mode."""
        return self.costs[self.mode]

    def step(self, sample: Sample, share: float, mode: ScanMode) -> ScanRate:
        """The knobs for a share of a CPU after another sample."""
        if not share:
            return replace(self, share=share, pages=0, trim=1.0, measured=None, since=None)
        after = self._measured(sample)
        if after.since is None or mode is not after.mode or abs(share - after.share) > 0.25 * after.share:
            # The errors of the last share and mode say nothing about these.
            budget = self.budget.reset(sample)
            after = replace(after, share=share, mode=mode, trim=1.0, measured=None, since=sample, budget=budget)
            return after._adjusted()
        rested, budget = self.budget.rest_seconds, self.budget.step(sample, share)
        after = replace(after, budget=budget)
        if budget.rest_seconds:
            return replace(after, sleep_millisecs=round(1000 * budget.rest_seconds), since=sample)
        if rested:
            return replace(after, trim=1.0, measured=None, since=sample)._adjusted()
        if after.since is sample:
            new = replace(after, share=share)._adjusted()
            if _differs(new.pages, self.pages) or _differs(new.sleep_millisecs, self.sleep_millisecs):
                return new
        return after

    def _measured(self, sample: Sample) -> ScanRate:
        if self.since is None:
            return self
        passed = sample.time_seconds - self.since.time_seconds
        used = counter_delta(self.since, sample, "ksmd_cpu_seconds")
        if used is None or passed <= 0:
            # Without ksmd's CPU time the first costs stand.
            return replace(self, since=sample, measured=None)
        longest = max(_WINDOW_SECONDS, _LEAST_WINDOW_CPU_SECONDS / max(self.share, 1e-4))
        if passed < _SHORTEST_SECONDS or (used < _WINDOW_CPU_SECONDS and passed < longest):
            return self
        measured = used / passed
        cost = self._page_cost(sample, used, measured)
        batch = self.pages * cost
        wrong = batch / (batch + self.sleep_millisecs / 1000 + _LAG_SECONDS) / measured if measured > 0 else 1.0
        trim = min(max(self.trim + (wrong - self.trim) * 0.5, 0.25), 3.0)
        return replace(
            self,
            costs={**self.costs, self.mode: cost},
            trim=trim,
            measured=measured,
            since=sample,
        )

    def _page_cost(self, sample: Sample, used: float, measured: float) -> float:
        scanned = counter_delta(self.since, sample, "pages_scanned")
        cost = self.cost
        if scanned:
            # In a window that the clock cut short, the CPU time is known to a hundredth of a second.
            cost = max(used, 0.01) / scanned
        elif 0 < measured < 1 and used >= _WINDOW_CPU_SECONDS:
            # Before 6.6 no counter has the scanned pages: as many as fit between the sleeps.
            cost = (self.sleep_millisecs / 1000 + _LAG_SECONDS) * measured / (1 - measured) / self.pages
        return min(max(cost, 5e-8), 5e-5)

    def _adjusted(self) -> ScanRate:
        share = min(max(self.share, 1e-4), 0.98)
        cost = self.cost / self.trim
        idle = (1 - share) / share
        sleep = _SLOW_SLEEP_SECONDS if share <= _SLOW_SHARE else _QUICK_SLEEP_SECONDS
        batch = min((sleep + _LAG_SECONDS) / idle, _BATCH_SECONDS)
        pages = int(min(max(batch / cost, _LEAST_PAGES), MOST_PAGES))
        # The sleep makes up for what the limits of a batch took away or added.
        sleep = min(max(0.001, pages * cost * idle - _LAG_SECONDS), 10.0)
        return replace(self, pages=pages, sleep_millisecs=max(1, round(1000 * sleep)))

    def text(self) -> str:
        """The knobs and their measured effect, in words."""
        if not self.share:
            return "0 pages: ksmd rests until there is something to merge"
        found = "" if self.measured is None else f"; measured {rough_percent(self.measured)}"
        if self.budget.rest_seconds:
            found += f"; {self.budget.text()}"
        return (
            f"{rough_count(self.pages)} pages each {self.sleep_millisecs} ms, for {rough_percent(self.share)} of a CPU "
            f"at {self.cost * 1e6:.2g} us a page{found}"
        )


@dataclass(frozen=True, slots=True)
class Pressure:
    """Shares of the time in which some task waited (/proc/pressure), smoothed over some seconds.

    :ivar max_cpu, max_memory: the limits
    :ivar cpu_high, memory_high: above its limit, or was and has not fallen far below it
    """

    max_cpu: float
    max_memory: float
    cpu: float = 0.0
    memory: float = 0.0
    cpu_high: bool = False
    memory_high: bool = False

    def step(self, before: Sample, sample: Sample) -> Pressure:
        """The pressure after another sample."""
        passed = max(sample.time_seconds - before.time_seconds, 1e-3)
        weight = min(1.0, passed / _SMOOTHING_SECONDS)
        names = ("cpu_pressure_some_seconds", "pressure_some_seconds", "ksmd_wait_seconds")
        cpu, memory, own = (min(1.0, (counter_delta(before, sample, name) or 0.0) / passed) for name in names)
        # While ksmd itself waits for a CPU, it takes none from others.
        cpu = max(0.0, cpu - own)
        cpu, memory = self.cpu + weight * (cpu - self.cpu), self.memory + weight * (memory - self.memory)
        return replace(
            self,
            cpu=cpu,
            memory=memory,
            cpu_high=_above(cpu, self.max_cpu, self.cpu_high),
            memory_high=_above(memory, self.max_memory, self.memory_high),
        )

    @property
    def high(self) -> bool:
        """Whether either is."""
        return self.cpu_high or self.memory_high

    def text(self) -> str:
        """Which pressure is high, in words."""
        name, share = ("CPU", self.cpu) if self.cpu_high else ("memory", self.memory)
        return f"{name} pressure is {rough_percent(share)}"


def _rest(exceeded: float, share: float) -> float:
    return min(exceeded / max(share, 1e-4), _LONGEST_REST_SECONDS)


def _differs(value: int, before: int) -> bool:
    return abs(value - before) > _WORTH_WRITING * before


def _above(share: float, limit: float, before: bool) -> bool:
    return share > limit * (_RELAXED if before else 1.0)
