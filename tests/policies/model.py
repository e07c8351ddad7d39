# SPDX-License-Identifier: GPL-2.0-or-later
"""A host with KSM in a few formulas, for simulated weeks: the engine, page by page, would take too long.

Pages come and go in lots. ksmd meets a lot first at the end of the full scan in which it came, and merges it in the one
after that, where there is anything to merge it with. A full scan costs what its pages cost; a batch and a sleep take
turns. Only what the policies look at is there. It is no substitute for the engine, which their rules are tried on as
well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ksmd_ctl.errors import Absent
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.policies.policy import Policy, PolicyDecision

__all__ = ["Lot", "Model"]


@dataclass(slots=True)
class Lot:
    """Pages that came together.

    :ivar share: how many of them merge when they are compared
    :ivar scans: full scans that met them, two are enough
    :ivar aged: they are on record with other contents, for so long that smart_scan skips them
    :ivar huge: huge pages, in each of which one page merges and the others are zeroes, which the split frees
    """

    pages: int
    share: float = 0.0
    mergeable: bool = True
    scans: int = 0
    aged: bool = False
    huge: bool = False

    @property
    def split(self) -> int:
        return self.pages // 512 if self.huge and self.mergeable and self.scans >= 2 else 0

    @property
    def freed(self) -> int:
        return self.split * 511

    @property
    def there(self) -> int:
        """Pages that are not freed."""
        return self.pages - self.freed

    @property
    def merged(self) -> float:
        return self.there * self.share if self.mergeable and self.scans >= 2 else 0.0


@dataclass(slots=True)
class Model:
    """One host and one policy.

    :ivar unique_cost, merged_cost: seconds of ksmd's time a page
    :ivar unskipped_share: of what is old, what smart_scan scans at all the same
    :ivar lag: what a sleep takes longer than it says
    :ivar walk: seconds that ksmd takes at once in each full scan, for address space in which nothing is
    :ivar asleep: seconds that ksmd sleeps on, after a full scan has ended
    :ivar left_over: what others leave of a CPU to a ksmd that is an idle task
    :ivar lacks: readings that this kernel hasn't
    :ivar unskipped: full scans with smart_scan off from their beginning
    :ivar skips: whether smart_scan was on in the full scan that runs
    """

    policy: Policy
    tick_seconds: float = 1.0
    unique_cost: float = 5e-6
    merged_cost: float = 4e-7
    unskipped_share: float = 0.3
    lag: float = 0.004
    walk: float = 0.0
    walked: float = 0.0
    left_over: float = 1.0
    lacks: frozenset[str] = frozenset()
    pressure: float = 0.0
    now: float = 100.0
    lots: list[Lot] = field(default_factory=list)
    knobs: dict[Knob, KnobValue] = field(
        default_factory=lambda: {
            Knob.RUN: 0,
            Knob.PAGES_TO_SCAN: 100,
            Knob.SLEEP_MILLISECS: 20,
            Knob.SMART_SCAN: 1,
            Knob.ADVISOR_MODE: "none",
            Knob.KSMD_SCHEDULING: "other",
        }
    )
    base_pages: int = 100_000
    full_scans: int = 0
    unskipped: int = 0
    skips: bool = False
    done: float = 0.0
    scanned: float = 0.0
    cpu: float = 0.0
    waited: float = 0.0
    asleep: float = 0.0
    cow: float = 0.0
    decision: PolicyDecision = field(default_factory=PolicyDecision)
    writes: list[tuple[float, Knob, KnobValue]] = field(default_factory=list)
    phases: list[tuple[float, str]] = field(default_factory=list)
    used: list[tuple[float, float]] = field(default_factory=list)

    @property
    def tracked(self) -> float:
        known = sum(lot.there for lot in self.lots if lot.mergeable and (lot.scans or lot.aged))
        new = sum(lot.pages for lot in self.lots if lot.mergeable and not lot.scans and not lot.aged)
        if not new:
            return known
        # What is new comes last. (Where it comes on a kernel hangs on where ksmd's cursor was.)
        cost = new * self.unique_cost
        return known + new * max(0.0, 1 - (1 - self.done) * self._cost() / cost)

    @property
    def merged(self) -> float:
        return sum(lot.merged for lot in self.lots)

    def sample(self) -> Sample:
        """What the host shows now."""
        merged = self.merged
        volatile = sum(lot.pages for lot in self.lots if lot.mergeable and lot.scans == 1)
        readings: dict[str, Reading] = {
            "pages_shared": int(merged / 10),
            "pages_sharing": int(merged * 0.9),
            "pages_unshared": int(self.tracked - merged - volatile),
            "pages_volatile": volatile,
            "full_scans": self.full_scans,
            # Of all that ksmd passes, smart_scan's leaps among it.
            "pages_scanned": int(self.scanned),
            "pages_skipped": 0,
            "nr_anon_pages": int(self.base_pages + sum(lot.there for lot in self.lots) - merged * 0.9),
            # In hundredths, as the kernel shows it.
            "ksmd_cpu_seconds": int(self.cpu * 100) / 100,
            "cow_ksm": int(self.cow),
            "ksm_swpin_copy": 0,
            "thp_split_page": sum(lot.split for lot in self.lots),
            "mem_total_bytes": 64 << 30,
            "mem_available_bytes": 8 << 30,
            "cpu_pressure_some_seconds": self.waited,
            "pressure_some_seconds": 0.0,
            **{knob.value: value for knob, value in self.knobs.items()},
        }
        for name in self.lacks:
            readings[name] = Absent("reading", "not here")
        return Sample(self.now, readings)

    def tick(self) -> PolicyDecision:
        """Sample, decide, write, and let time pass."""
        self.policy, self.decision = self.policy.step(self.sample())
        self._write(self.decision.knobs)
        if not self.phases or self.phases[-1][1] != self.decision.phase:
            self.phases.append((self.now, self.decision.phase))
        before = self.cpu
        seconds = min(self.tick_seconds, self.decision.within_seconds or self.tick_seconds)
        self._scan(seconds)
        self.used.append((self.now, self.cpu - before))
        self.waited += self.pressure * seconds
        self.now += seconds
        return self.decision

    def run(self, seconds: float) -> None:
        """Tick for so long."""
        until = self.now + seconds - 1e-6
        while self.now < until:
            self.tick()

    def greatest_share(self, seconds: float) -> float:
        """ksmd's greatest share of a CPU over so long."""
        greatest, total, first = 0.0, 0.0, 0
        for time, used in self.used:
            total += used
            while time - self.used[first][0] >= seconds:
                total -= self.used[first][1]
                first += 1
            greatest = max(greatest, total / seconds)
        return greatest

    def unmerge(self) -> None:
        """What run = 2 and run = 1 after it do."""
        self.full_scans, self.done = 0, 0.0
        for lot in self.lots:
            lot.scans = 0

    def _write(self, knobs: Mapping[Knob, KnobValue]) -> None:
        for knob, value in knobs.items():
            if knob in self.knobs and self.knobs[knob] != value:
                # A change of sleep_millisecs wakes ksmd.
                self.asleep = 0.0 if knob is Knob.SLEEP_MILLISECS else self.asleep
                self.knobs[knob] = value
                self.writes.append((self.now, knob, value))

    def _cost(self) -> float:
        """Of a full scan."""
        unique, merged = 0.0, 0.0
        for lot in self.lots:
            if lot.mergeable:
                merged += lot.merged
                skips = self.knobs[Knob.SMART_SCAN] and lot.scans > 2
                unique += (lot.there - lot.merged) * (self.unskipped_share if skips else 1.0)
        return unique * self.unique_cost + merged * self.merged_cost

    def _scan(self, seconds: float) -> None:
        pages, sleep = self.knobs[Knob.PAGES_TO_SCAN], self.knobs[Knob.SLEEP_MILLISECS]
        assert isinstance(pages, int)
        assert isinstance(sleep, int)
        registered = sum(lot.there for lot in self.lots if lot.mergeable)
        if self.knobs[Knob.RUN] != 1 or not registered or not pages:
            return
        if self.knobs[Knob.KSMD_SCHEDULING] == "idle":
            seconds *= self.left_over
        for _ in range(1000):
            sleeps = min(self.asleep, seconds)
            self.asleep -= sleeps
            seconds -= sleeps
            if seconds <= 1e-9:
                return
            if self.walked < self.walk:
                walks = min(self.walk - self.walked, seconds)
                self.walked += walks
                self.cpu += walks
                seconds -= walks
                if seconds <= 1e-9:
                    return
            cost = self._cost()
            batch = min(pages / registered, 1.0) * cost
            share = batch / (batch + sleep / 1000 + self.lag)
            # Up to the end of the full scan, or of the time.
            takes = (1 - self.done) * cost / share
            passes = min(takes, seconds)
            part = passes * share / cost
            self.cpu += passes * share
            self.scanned += part * registered
            self.done += part
            self.skips |= bool(self.knobs[Knob.SMART_SCAN])
            seconds -= passes
            if self.done >= 1 - 1e-9:
                self.done = self.walked = 0.0
                self.full_scans += 1
                self.asleep = sleep / 1000
                self.unskipped += not self.skips
                for lot in self.lots:
                    lot.scans += lot.mergeable and not (lot.aged and self.skips)
                self.skips = False
            if seconds <= 1e-9:
                return
