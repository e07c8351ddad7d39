# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "adaptive"``: ksmd is fast where pages still merge, and rests where none do.

At each sample the policy updates its backlog of pages that may merge (`ksmd_ctl.policies.backlog`), moves to
the next phase, and turns the share of a CPU for that phase into knobs (`ksmd_ctl.policies.scan_rate`):

| phase | what ksmd does | share of a CPU |
|---|---|---|
| IDLE | nothing: pages_to_scan is 0 | none |
| QUICK_SCAN | scans fast with smart_scan on: is the backlog really there? | `max_cpu` |
| FULL_SCAN | scans fast with smart_scan off, so that new pages meet old ones (findings F2, F13) | `max_cpu` |

ksmd is an idle task (SCHED_IDLE), so that whoever wakes up runs at once. Where others leave it nothing, it is an
ordinary one until the burst ends.

A quick scan and the full scans after it are a burst (`ksmd_ctl.policies.burst`). It takes a quarter of
`max_cpu` where tasks wait for a CPU, or for memory while merging does not relieve that, and where it only looks
whether there is anything to merge (`ksmd_ctl.policies.backlog.Looks`).

ksmd rests between two scans of all pages, not in the middle of one: new processes come last in its list
(mm/ksm.c, ``__ksm_enter``), so the first scan meets them, and the second can merge them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, Final

from ksmd_ctl.figures import rough_count, rough_seconds
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.backlog import FEW_GAINED, Backlog, Backoff, Kind, Looks
from ksmd_ctl.policies.burst import Burst, PendingGain, ScanCosts, scan_progress
from ksmd_ctl.policies.counters import anonymous_pages, gained_pages, tracked_pages
from ksmd_ctl.policies.knob_recovery import SmartScan, zero_pages_are_counted
from ksmd_ctl.policies.policy import Intervention, Policy, PolicyDecision, Reason
from ksmd_ctl.policies.scan_rate import Pressure, ScanMode, ScanRate

# Full scans of a burst at most, where pages change again and again.
_MOST_FULL_SCANS: Final = 4
# In a burst samples come at the first interval, and where a scan is about to end at the second.
_INTERVAL_SECONDS: Final = 0.2
_SHORTEST_INTERVAL_SECONDS: Final = 0.05
# Before the end of a scan ksmd sleeps so long after each batch, and so after the last one: a sample comes meanwhile.
_ENDING_SECONDS: Final = 0.15
_ENDING_SLEEP_MILLISECS: Final = 100
# Before this progress a scan is never about to end, whatever its costs were expected to be.
_LATE: Final = 0.5
# The share of max_cpu under pressure, and for a look.
_GENTLE: Final = 0.25
# After this CPU time the gain of a burst can be judged.
_TELLING_CPU_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """Shares of one CPU; pages a second of ksmd's time; a share of the time in which some task waits.

    :ivar smart_scan: whether smart_scan may be switched off for some scans
    :ivar swapin: whether copies by swap are candidates
    :ivar zero_pages: whether use_zero_pages is held at 1
    :ivar scheduling: whether ksmd's scheduling class is chosen
    """

    max_cpu: float = 0.8
    idle_cpu: float = 0.005
    worth: int = 1000
    max_cpu_pressure: float = 0.8
    max_memory_pressure: float = 0.2
    smart_scan: bool = True
    swapin: bool = True
    zero_pages: bool = True
    scheduling: bool = True


class Phase(Enum):
    """What ksmd does; the module's table has the meaning."""

    IDLE = "background"
    QUICK_SCAN = "quick scan"
    FULL_SCAN = "full scan"


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The policy, its phase, and what it has learned.

    :ivar burst: in the phases QUICK_SCAN and FULL_SCAN
    :ivar ending: the scan that runs is about to end, and ksmd sleeps for long after it
    :ivar at_start: ksmd rests before the first page of a scan
    :ivar last: the outcome of the last burst, in words
    :ivar bursts, swapped: what all of them gained, and those for copies by swap
    """

    fresh: ClassVar = True
    limits: Limits = field(default_factory=Limits)
    phase: Phase = Phase.IDLE
    before: Sample | None = None
    backlog: Backlog = field(default_factory=Backlog)
    backoff: Backoff = field(default_factory=Backoff)
    looks: Looks = field(default_factory=Looks)
    costs: ScanCosts = field(default_factory=ScanCosts)
    rate: ScanRate = field(default_factory=ScanRate)
    smart: SmartScan = field(default_factory=SmartScan)
    pressure: Pressure | None = None
    burst: Burst | None = None
    pending: PendingGain | None = None
    ending: bool = False
    at_start: bool = False
    tick_seconds: float = 1.0
    last: str = "nothing has been scanned yet"
    bursts: Intervention = field(default_factory=Intervention)
    swapped: Intervention = field(default_factory=Intervention)

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Move to the next phase, and set the knobs for it."""
        scans = sample.number("full_scans")
        before = None if self.before is None else self.before.number("full_scans")
        after = self._observed(sample)
        if scans is None:
            after = after if after.burst is None else after._ended(sample, after.burst, "full scans can't be counted")
        elif before is None or scans < before:
            cause = "everything was un-merged" if self.bursts.pulses else "ksmd starts"
            after = after._begun(sample, cause, full=True, blind=True)
        elif after.burst is None:
            after = after._from_idle(sample)
        else:
            after = after._from_burst(sample, after.burst)
        after = replace(after, ending=after._about_to_rest(sample))
        after = replace(after, rate=after.rate.step(sample, after._share(sample), after._mode))
        return after, after._decision(sample)

    # -- taking a sample in ----------------------------------------------------------------------------------

    def _observed(self, sample: Sample) -> Adaptive:
        before = self.before
        backlog = replace(self.backlog, count_swap=self.limits.swapin).step(sample)
        if before is None:
            return replace(self, before=sample, backlog=backlog)
        pressure = self.pressure or Pressure(self.limits.max_cpu_pressure, self.limits.max_memory_pressure)
        passed = sample.time_seconds - before.time_seconds
        after = replace(
            self,
            before=sample,
            backlog=backlog,
            pressure=pressure.step(before, sample),
            # The shortest for a while: a sample may come late, and seldom early.
            tick_seconds=min(max(passed, 0.05), 1.25 * self.tick_seconds),
        )
        due = self.pending is not None and sample.time_seconds >= self.pending.at
        return after._judged(sample) if due else after

    def _judged(self, sample: Sample) -> Adaptive:
        pending = self.pending
        if pending is None:
            return self
        backlog = self.backlog.learned(Kind.WRITTEN, pending.written, pending.gained(sample))
        return replace(self, pending=None, backlog=backlog)

    # -- from phase to phase ---------------------------------------------------------------------------------

    def _from_idle(self, sample: Sample) -> Adaptive:
        cost = self.costs.burst(self.backlog, sample)
        backoff = self.backoff.step(sample.time_seconds, self.backlog, cost, self.limits.worth)
        smart = self.smart.step(sample)
        looks = self.looks.step(sample, self.backlog)
        after = replace(self, backoff=backoff, smart=smart, looks=looks)
        if smart.off:
            return after._begun(sample, smart.cause, full=True, look=True)
        if backoff.over(sample.time_seconds):
            takes = f"for about {rough_seconds(cost)} of ksmd's time"
            return after._begun(
                sample, f"{self.backlog.text()}: about {rough_count(self.backlog.gain)} may merge, {takes}"
            )
        if backoff.pending_since is None and looks.due(sample):
            return after._begun(sample, looks.text(sample, self.backlog), look=True)
        return after

    def _from_burst(self, sample: Sample, burst: Burst) -> Adaptive:
        before, burst = burst, burst.step(sample, self.rate.share)
        ended, after = before.scan_ended(sample), replace(self, burst=burst)
        if ended:
            after = replace(after, costs=self.costs.measured(before.mode, before.scan, sample))
        if burst.idle(sample):
            return after._ended(sample, replace(burst, look=True), "no process has memory that ksmd may scan")
        if self.phase is Phase.QUICK_SCAN:
            return after._from_quick_scan(sample, before, burst, ended=ended)
        if not (ended and burst.full_scans_done(sample)):
            return after
        after = after._changed_pages_judged(sample, burst)
        changed = sample.number("pages_volatile") or 0.0
        few = (burst.scans(sample) or 0) >= _MOST_FULL_SCANS
        if few or changed * after.backlog.hit_rates[Kind.CHANGED] < self._full_scan_worth(sample):
            return after._ended(sample, burst, "it has scanned every page")
        again = replace(burst, full_scans=burst.full_scans + 1, again=sample, changed=changed)
        return replace(after, burst=again)

    def _from_quick_scan(self, sample: Sample, before: Burst, burst: Burst, *, ended: bool) -> Adaptive:
        """:param before: the burst before this sample, so that its scan is the one that has ended"""
        if not ended:
            early = self._about_to_end(sample, burst) and burst.kind is not Kind.SWAPPED
            found = burst.found(sample) * self.backlog.hit_rates[Kind.FOUND]
            # What is new comes last, and smart_scan does not skip it: the rest of this scan counts as a full one.
            return self._full(sample, burst, 2) if early and found >= self._full_scan_worth(sample) else self
        whole = self.at_start or (burst.scans(sample) or 0) >= 2
        changed = before.changed_pages(sample) if whole else 0.0
        found = burst.found(sample)
        rates, gained = self.backlog.hit_rates, max(0.0, burst.gained(sample))
        expected = found * rates[Kind.FOUND] + changed * rates[Kind.CHANGED] - gained
        if max(expected, gained) >= self._full_scan_worth(sample):
            # Without the sleep before it, the next scan has begun with smart_scan on.
            scans = 1 if self.ending else 2
            burst = replace(burst, again=sample, changed=changed) if changed > found else burst
            return self._full(sample, burst, scans)
        if whole:
            used = rough_seconds(burst.used(sample) or 0.0)
            text = f"it found {rough_count(found)} new pages in {used}, of which too few may merge"
            return self._ended(sample, burst, text)
        return self

    def _full(self, sample: Sample, burst: Burst, scans: int) -> Adaptive:
        return replace(self, phase=Phase.FULL_SCAN, burst=replace(burst, full_since=sample, full_scans=scans))

    def _changed_pages_judged(self, sample: Sample, burst: Burst) -> Adaptive:
        # New pages are volatile after their first scan, too, and have their own hit rates.
        if burst.again is None or burst.changed <= burst.found(sample):
            return self
        gained = max(0.0, gained_pages(burst.again, sample))
        return replace(self, backlog=self.backlog.learned(Kind.CHANGED, burst.changed, gained))

    def _scan_cost(self, mode: ScanMode, sample: Sample) -> float:
        return self.costs.scan(mode, tracked_pages(sample) or 0)

    def _full_scan_worth(self, sample: Sample) -> float:
        """Pages that a full scan has to save."""
        return max(FEW_GAINED, self.limits.worth * self._scan_cost(ScanMode.FULL, sample))

    # -- where a scan ends -----------------------------------------------------------------------------------

    def _rest_of_scan(self, sample: Sample, burst: Burst) -> float:
        """Seconds until the scan that runs seems to end."""
        measured = self.rate.measured if self.rate.mode is burst.mode else None
        usual = self._scan_cost(burst.mode, sample) / max(measured or self.limits.max_cpu, 0.01)
        return burst.remaining(sample, usual)[0]

    def _about_to_end(self, sample: Sample, burst: Burst) -> bool:
        """Whether the scan that runs seems to end before the next sample but one."""
        return self._rest_of_scan(sample, burst) < max(1.5 * self.tick_seconds, _ENDING_SECONDS)

    def _about_to_rest(self, sample: Sample) -> bool:
        """Whether the scan that runs is about to end, and may be the last one."""
        burst = self.burst
        if burst is None:
            return False
        last = burst.full_since is None or burst.full_scans_left(sample) <= 1
        progress = scan_progress(burst.scan, sample)
        late = progress is None or progress > _LATE
        return last and late and self._rest_of_scan(sample, burst) < _ENDING_SECONDS

    # -- entering a phase ------------------------------------------------------------------------------------

    def _begun(
        self, sample: Sample, cause: str, *, full: bool = False, blind: bool = False, look: bool = False
    ) -> Adaptive:
        after = self._judged(sample)
        candidates = after.backlog.pages
        if blind:
            # All pages may be new.
            candidates = {**candidates, Kind.NEW: anonymous_pages(sample) or 0.0}
        burst = Burst(
            sample,
            sample,
            sample,
            candidates,
            after.backlog.main.kind,
            cause,
            full_since=sample if full else None,
            blind=blind,
            look=look,
            unnoticed=after.backlog.unnoticed,
        )
        phase = Phase.FULL_SCAN if full else Phase.QUICK_SCAN
        return replace(after, phase=phase, burst=burst, backoff=self.backoff.begun())

    def _ended(self, sample: Sample, burst: Burst, why: str) -> Adaptive:
        outcome = burst.outcome(sample)
        gained, used, kind = outcome.gained, outcome.used, burst.kind
        paid = used is not None and gained >= self.limits.worth * used
        backlog = self.backlog.scanned(anonymous_pages(burst.older), tracked_pages(sample))
        # What came later was not scanned twice, and says nothing about the hit rate.
        candidates = max(burst.backlog[kind], self.backlog.pages[kind] - backlog.pages[kind])
        backoff, pending = self.backoff, self.pending
        if not burst.look:
            backoff = backoff.ended(sample.time_seconds, kind, used, paid=paid)
            if kind is Kind.WRITTEN:
                pending = burst.pending_gain(sample, candidates)
            else:
                backlog = backlog.learned(kind, candidates, gained)
        if burst.full_since is not None and kind is not Kind.FOUND:
            backlog = backlog.learned(Kind.FOUND, burst.found(sample), gained)
        smart = self.smart.step(sample) if self.smart.off else self.smart
        cost = self._scan_cost(ScanMode.QUICK, sample)
        return replace(
            self,
            phase=Phase.IDLE,
            burst=None,
            at_start=self.ending,
            backoff=backoff,
            looks=self.looks.ended(sample, cost, self.limits.idle_cpu, paid=paid, look=burst.look),
            backlog=backlog,
            pending=pending,
            smart=smart if burst.full_since is None else smart.scanned(sample),
            last=f"{outcome.text()}; it ended because {why}",
            bursts=self.bursts.and_one(outcome.pages),
            swapped=self.swapped.and_one(outcome.pages) if kind is Kind.SWAPPED else self.swapped,
        )

    # -- the scan rate, and the reasons ----------------------------------------------------------------------

    def _share(self, sample: Sample) -> float:
        """ksmd's share of a CPU."""
        limits = self.limits
        if self.burst is None:
            # Where nobody counts the scans, no burst would end. Where no process has memory to scan, ksmd sleeps.
            rests = sample.number("full_scans") is not None and tracked_pages(sample)
            return 0.0 if rests else limits.idle_cpu
        return max(limits.idle_cpu, _GENTLE * limits.max_cpu) if self._gentle(sample) else limits.max_cpu

    def _gentle(self, sample: Sample) -> bool:
        """Whether a burst leaves the CPU to tasks that wait, or only looks."""
        burst, pressure = self.burst, self.pressure
        if burst is None:
            return False
        if burst.look and (self.phase is Phase.QUICK_SCAN or self.smart.off):
            return True
        if pressure is None or not pressure.high:
            return False
        used = burst.used(sample)
        # Until the gain of this burst can be judged, the expected gain counts: it would not have begun otherwise.
        early = not used or used < _TELLING_CPU_SECONDS
        relieves = early or burst.gained(sample) >= self.limits.worth * (used or 0.0)
        return pressure.cpu_high or not relieves

    @property
    def _mode(self) -> ScanMode:
        return ScanMode.FULL if self.phase is Phase.FULL_SCAN else ScanMode.QUICK

    def _shown_phase(self, sample: Sample) -> str:
        """The phase as reports show it; a quick scan and a full scan are one there."""
        if self.burst is None:
            return self.phase.value if tracked_pages(sample) else "ready"
        return "gentle" if self._gentle(sample) else "quick"

    def _why(self, sample: Sample) -> str:
        burst, pressure, shown = self.burst, self.pressure, self._shown_phase(sample)
        if burst is None:
            if not tracked_pages(sample):
                return f"{shown}: {self.last}; no process has memory that ksmd may scan"
            cost = self.costs.burst(self.backlog, sample)
            waits = self.backoff.text(sample.time_seconds, self.backlog, cost, self.limits.worth)
            return f"{shown}: {self.last}; {waits}"
        text = f"{shown}: {burst.text(sample)}"
        if pressure is None or not pressure.high:
            return text
        if self._gentle(sample):
            return f"{text}; slowed down, as {pressure.text()}"
        return f"{text}; {pressure.text()}, and merging relieves that"

    def _decision(self, sample: Sample) -> PolicyDecision:
        # At rest ksmd would wake up each time.
        slow = self.ending or not self.rate.pages
        reasons = [Reason("phase", lambda: self._why(sample)), Reason("speed", self.rate.text)]
        knobs: dict[Knob, KnobValue] = {
            Knob.RUN: 1,
            Knob.SLEEP_MILLISECS: max(self.rate.sleep_millisecs, _ENDING_SLEEP_MILLISECS if slow else 1),
            Knob.PAGES_TO_SCAN: self.rate.pages,
        }
        if isinstance(sample.readings.get(Knob.ADVISOR_MODE), str):
            knobs[Knob.ADVISOR_MODE] = "none"
        recovered = {"swapin": self.swapped} if self.limits.swapin else {}
        unrealised: dict[str, int] = {}
        if isinstance(sample.readings.get(Knob.SMART_SCAN), int):
            off = self.limits.smart_scan and self.phase is Phase.FULL_SCAN
            knobs[Knob.SMART_SCAN] = 0 if off else 1
            text = (
                "smart_scan off, to scan every page"
                if off
                else "smart_scan on, to see first whether it finds new pages"
            )
            reasons.append(Reason("smart_scan", self.smart.text if self.burst is None or self.smart.off else text))
            if self.limits.smart_scan:
                recovered["smart_scan"] = self.smart.total
                if self.smart.locked_out is not None:
                    unrealised["smart_scan"] = self.smart.locked_out
        if self.limits.zero_pages and zero_pages_are_counted(sample):
            knobs[Knob.USE_ZERO_PAGES] = 1
        if self.limits.scheduling and isinstance(sample.readings.get(Knob.KSMD_SCHEDULING), str):
            starved = self.burst is not None and self.burst.starved
            knobs[Knob.KSMD_SCHEDULING] = "other" if starved else "idle"
            if starved:
                reasons.append(Reason("scheduling", "ksmd is no idle task now, as others left it too little of a CPU"))
        if sample.number("ksmd_cpu_seconds") is None:
            reasons.append(Reason("ksmd", "its CPU time can't be read here, so what a page costs is a guess"))
        return PolicyDecision(
            knobs, tuple(reasons), self._shown_phase(sample), self._interval(sample), recovered, unrealised
        )

    def _interval(self, sample: Sample) -> float | None:
        """When the next sample has to come at the latest; None where the configured interval is enough."""
        burst = self.burst
        if burst is None:
            return None if self.backoff.pending_since is None else _INTERVAL_SECONDS
        if self.ending:
            return _SHORTEST_INTERVAL_SECONDS
        # The next sample comes before the scan is about to end.
        rest = self._rest_of_scan(sample, burst) - _ENDING_SECONDS
        return min(max(_SHORTEST_INTERVAL_SECONDS, rest), _INTERVAL_SECONDS)
