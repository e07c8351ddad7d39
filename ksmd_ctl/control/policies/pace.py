# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages_to_scan and sleep_millisecs make ksmd take a given share of a CPU.

ksmd scans a batch and sleeps (mm/ksm.c, ``ksm_scan_thread``); so its share is the batch's time out of batch and sleep.
What a page costs is measured, and differs by a factor of twenty between merged pages and unique ones (findings F5),
so the share is looked at again and again. A batch is kept short, for the writers of ``run`` wait until it is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.control.policies.allowance import Allowance
from ksmd_ctl.control.policies.change import grown
from ksmd_ctl.control.policies.figures import count, percent
from ksmd_ctl.host.sample import Sample

__all__ = ["BACKGROUND", "LOOK", "MOST_PAGES", "PEEK", "PULSE", "Pace"]

#: What is scanned: with smart_scan at rest, off for a pulse, on in a burst, off in a burst.
BACKGROUND, PULSE, PEEK, LOOK = "background", "pulse", "peek", "look"

#: pages_to_scan at most: 40 ms at the 5 us that a unique page takes in a large tree.
MOST_PAGES: Final = 8000
_LEAST_PAGES: Final = 16
_BATCH_SECONDS: Final = 0.04
_QUICK_SLEEP_SECONDS: Final = 0.01
# Where ksmd rests, waking it ten times a second is enough.
_SLOW_SLEEP_SECONDS: Final = 0.1
_SLOW_SHARE: Final = 0.1
# /proc/PID/stat counts in hundredths of a second: less than this much of ksmd's time can't be told from noise.
_WINDOW_CPU_SECONDS: Final = 0.1
# A window ends all the same after so long, or where so much was to be expected.
_WINDOW_SECONDS: Final = 15.0
_LEAST_WINDOW_CPU_SECONDS: Final = 0.05
_SHORTEST_SECONDS: Final = 0.5
# Where ksmd is slow, what a page costs is averaged over so many windows, or so much of its time if that is less.
_SETTLED_WINDOWS: Final = 20
_SETTLED_CPU_SECONDS: Final = 4.0
# A smaller change is not worth a write.
_WORTH_WRITING: Final = 0.15
# What a sleep takes longer than it says: it ends at a tick of the kernel's clock, and ksmd has to be woken.
_LAG_SECONDS: Final = 0.004
#: What a page costs before that was measured, by what is scanned (findings F5, F18).
_FIRST_COSTS: Final = {BACKGROUND: 2e-6, PULSE: 3e-6, PEEK: 2e-6, LOOK: 3e-6}
_SLOW_KINDS: Final = frozenset({BACKGROUND, PULSE})


@dataclass(frozen=True, slots=True)
class Pace:
    """The knobs, and what has been learned about their effect.

    :ivar target: the share that these are for
    :ivar kind: what is scanned: costs hang on that, and are remembered for each
    :ivar costs: seconds of ksmd's time a page of pages_to_scan
    :ivar windows: how often that was measured, by kind
    :ivar trim: what was found to be wrong with that, as a factor of pages
    :ivar measured: the share found in the last window, None before one is over
    :ivar since: the sample at which the window began
    :ivar allowance: whether ksmd keeps to the share, however it is paced
    """

    pages: int = _LEAST_PAGES
    sleep_millisecs: int = 100
    target: float = 0.0
    kind: str = BACKGROUND
    costs: Mapping[str, float] = field(default_factory=lambda: _FIRST_COSTS)
    windows: Mapping[str, int] = field(default_factory=dict)
    trim: float = 1.0
    measured: float | None = None
    since: Sample | None = None
    allowance: Allowance = field(default_factory=Allowance)

    @property
    def cost(self) -> float:
        """Seconds of ksmd's time a page of pages_to_scan, for what is scanned now."""
        return self.costs[self.kind]

    def step(self, sample: Sample, target: float, kind: str) -> Pace:
        """Take a sample in, and go for a share of a CPU."""
        after = self._measured(sample)
        if after.since is None or kind != after.kind or abs(target - after.target) > 0.25 * after.target:
            # Something else: what was wrong with the last one may not be wrong with this.
            again = self.allowance.again(sample)
            after = replace(after, target=target, kind=kind, trim=1.0, measured=None, since=sample, allowance=again)
            return after._for()
        rested, allowance = self.allowance.rest_seconds, self.allowance.step(sample, target)
        after = replace(after, allowance=allowance)
        if allowance.rest_seconds:
            return replace(after, sleep_millisecs=round(1000 * allowance.rest_seconds), since=sample)
        if rested:
            return replace(after, trim=1.0, measured=None, since=sample)._for()
        if after.since is sample:
            new = replace(after, target=target)._for()
            if _differs(new.pages, self.pages) or _differs(new.sleep_millisecs, self.sleep_millisecs):
                return new
        return after

    def _measured(self, sample: Sample) -> Pace:
        if self.since is None:
            return self
        seconds = sample.time_seconds - self.since.time_seconds
        used = grown(self.since, sample, "ksmd_cpu_seconds")
        if used is None or seconds <= 0:
            # Where ksmd's time can't be had, or began again, the first guess stands.
            return replace(self, since=sample, measured=None)
        longest = max(_WINDOW_SECONDS, _LEAST_WINDOW_CPU_SECONDS / max(self.target, 1e-4))
        if seconds < _SHORTEST_SECONDS or (used < _WINDOW_CPU_SECONDS and seconds < longest):
            return self
        share = used / seconds
        scanned = grown(self.since, sample, "pages_scanned")
        cost = self.cost
        if scanned:
            # In a window that was cut short by the clock, the time is known to a hundredth of a second.
            cost = max(used, 0.01) / scanned
        elif 0 < share < 1 and used >= _WINDOW_CPU_SECONDS:
            # Before 6.6 nobody says how many pages that were: as many as fit between the sleeps.
            cost = (self.sleep_millisecs / 1000 + _LAG_SECONDS) * share / (1 - share) / self.pages
        cost = min(max(cost, 5e-8), 5e-5)
        batch = self.pages * cost
        wrong = batch / (batch + self.sleep_millisecs / 1000 + _LAG_SECONDS) / share if share > 0 else 1.0
        windows, weight = self.windows.get(self.kind, 0) + 1, 1.0
        if self.kind in _SLOW_KINDS:
            # Averaged, or a slow scan would look dear among unique pages and cheap among merged ones, and the knobs
            # would follow it up and down for ever.
            weight = min(1.0, max(1 / min(windows, _SETTLED_WINDOWS), used / _SETTLED_CPU_SECONDS))
        cost = self.cost + (cost - self.cost) * weight
        trim = min(max(self.trim + (wrong - self.trim) * min(weight, 0.5), 0.25), 3.0)
        return replace(
            self,
            costs={**self.costs, self.kind: cost},
            windows={**self.windows, self.kind: windows},
            trim=trim,
            measured=share,
            since=sample,
        )

    def _for(self) -> Pace:
        share = min(max(self.target, 1e-4), 0.98)
        cost = self.cost / self.trim
        idle = (1 - share) / share
        sleep = _SLOW_SLEEP_SECONDS if share <= _SLOW_SHARE else _QUICK_SLEEP_SECONDS
        batch = min((sleep + _LAG_SECONDS) / idle, _BATCH_SECONDS)
        pages = int(min(max(batch / cost, _LEAST_PAGES), MOST_PAGES))
        # What the limits of a batch took away or added, the sleep makes good.
        sleep = min(max(0.001, pages * cost * idle - _LAG_SECONDS), 10.0)
        return replace(self, pages=pages, sleep_millisecs=max(1, round(1000 * sleep)))

    def text(self) -> str:
        """The knobs and what came of them."""
        found = "" if self.measured is None else f"; measured {percent(self.measured)}"
        if self.allowance.rest_seconds:
            found += f"; {self.allowance.text()}"
        return (
            f"{count(self.pages)} pages each {self.sleep_millisecs} ms, for {percent(self.target)} of a CPU at "
            f"{self.cost * 1e6:.2g} us a page{found}"
        )


def _differs(value: int, before: int) -> bool:
    return abs(value - before) > _WORTH_WRITING * before
