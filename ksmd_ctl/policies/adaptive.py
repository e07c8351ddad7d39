# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "adaptive"``: ksmd is fast where pages still merge, and slow where none do.

At each sample the policy updates its backlog of pages that may merge (`ksmd_ctl.policies.backlog`), moves to
the next phase (`next_phase`), and turns the share of a CPU for that phase into knobs
(`ksmd_ctl.policies.scan_rate`):

| phase | what ksmd does | share of a CPU |
|---|---|---|
| READY | nothing: no process has memory that it may scan | `max_cpu` |
| IDLE | scans slowly, smart_scan on | `idle_cpu` |
| QUICK_SCAN | scans fast with smart_scan on: is the backlog really there? | `max_cpu` |
| FULL_SCAN | scans fast with smart_scan off, so that new pages meet old ones (findings F2, F13) | `max_cpu` |

A quick scan and the full scans after it are a burst (`ksmd_ctl.policies.burst`). It takes a quarter of
`max_cpu` where tasks wait for a CPU, or for memory while merging does not relieve that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, Final

from ksmd_ctl.figures import rough_count, rough_seconds
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.backlog import FEW_GAINED, FEW_PAGES, Backlog, Backoff, Kind
from ksmd_ctl.policies.burst import Burst, PendingGain, ScanCosts
from ksmd_ctl.policies.counters import anonymous_pages, counter_delta, gained_pages, saved_pages, tracked_pages
from ksmd_ctl.policies.knob_recovery import FULL_SCANS, SmartScan
from ksmd_ctl.policies.policy import Intervention, Policy, PolicyDecision, Reason
from ksmd_ctl.policies.scan_rate import Pressure, ScanMode, ScanRate

# Scans of all pages in a quick scan; the first is half done when it begins. New processes come behind ksmd's cursor,
# so the second one meets them.
_QUICK_SCANS: Final = 2
# Full scans of a burst at most, where pages change again and again.
_MOST_FULL_SCANS: Final = 4
# More scans than these between two samples can't be told apart.
_SCANS_PER_TICK: Final = {ScanMode.QUICK: 3.0, ScanMode.FULL: 2.5}
# In a burst samples come at this interval, or so often while a scan lasts: it matters where a scan ends.
_INTERVAL_SECONDS: Final = 0.2
_SHORTEST_INTERVAL_SECONDS: Final = 0.05
_SAMPLES_PER_SCAN: Final = 8.0
# The end of a quick scan that takes fewer ticks can't be foreseen; one that takes more ends near a sample anyway.
_SHORT_SCAN_TICKS: Final = 2.0
_LONG_SCAN_TICKS: Final = 20.0
# The share of max_cpu under pressure.
_GENTLE: Final = 0.25
# After this time without any activity, ksmd has nothing to scan.
_INACTIVE_SECONDS: Final = 3.0
_ACTIVITY: Final = ("full_scans", "pages_scanned", "ksmd_cpu_seconds")
# After this CPU time the gain of a burst can be judged.
_TELLING_CPU_SECONDS: Final = 0.5

_BLIND_CAUSE: Final = "everything was un-merged"


@dataclass(frozen=True, slots=True)
class Limits:
    """Shares of one CPU; pages a second of ksmd's time; a share of the time in which some task waits.

    :ivar smart_scan: whether smart_scan may be switched off for some scans
    :ivar swapin: whether copies by swap are candidates
    """

    max_cpu: float = 0.8
    idle_cpu: float = 0.005
    worth: int = 1000
    max_cpu_pressure: float = 0.8
    max_memory_pressure: float = 0.2
    smart_scan: bool = True
    swapin: bool = True


class Phase(Enum):
    """What ksmd does; the module's table has the meaning."""

    READY = "ready"
    IDLE = "background"
    QUICK_SCAN = "quick scan"
    FULL_SCAN = "full scan"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the samples say about the next phase. Only what matters in the phase before is set.

    :ivar uncountable: this kernel has no full_scans to read
    :ivar blind: what ksmd has scanned is unknown: the policy starts, or everything was un-merged
    :ivar nothing_mergeable: no process has memory that ksmd may scan
    :ivar backlog_due: the backlog is worth a burst, and has settled; or a scan in the background merged that much
    :ivar quick_scan_done: the quick scan has ended or is about to
    :ivar found_enough: what the quick scan, or before it the background, found is worth a full scan
    :ivar full_scans_done: the full scans of the burst have ended
    :ivar changed_enough: pages that changed meanwhile are worth one more
    """

    uncountable: bool = False
    blind: bool = False
    nothing_mergeable: bool = False
    backlog_due: bool = False
    quick_scan_done: bool = False
    found_enough: bool = False
    full_scans_done: bool = False
    changed_enough: bool = False


def next_phase(phase: Phase, evidence: Evidence) -> Phase:
    """The phase after a sample."""
    if phase is Phase.IDLE:
        if evidence.blind or (evidence.backlog_due and evidence.found_enough):
            return Phase.FULL_SCAN
        return Phase.QUICK_SCAN if evidence.backlog_due else Phase.IDLE
    if evidence.uncountable:
        return Phase.IDLE
    if evidence.blind:
        return Phase.FULL_SCAN
    if evidence.nothing_mergeable:
        return Phase.READY
    if phase is Phase.READY:
        return Phase.IDLE
    if phase is Phase.QUICK_SCAN:
        if evidence.found_enough:
            return Phase.FULL_SCAN
        return Phase.IDLE if evidence.quick_scan_done else Phase.QUICK_SCAN
    return Phase.IDLE if evidence.full_scans_done and not evidence.changed_enough else Phase.FULL_SCAN


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The policy, its phase, and what it has learned.

    :ivar burst: in the phases QUICK_SCAN and FULL_SCAN
    :ivar quiet_since: the sample at which the last burst ended or a scan in the background began; None at the start
    :ivar active_at: when ksmd last did anything
    :ivar last: the outcome of the last burst, in words
    :ivar bursts, swapped: what all of them gained, and those for copies by swap
    """

    fresh: ClassVar = True
    limits: Limits = field(default_factory=Limits)
    phase: Phase = Phase.IDLE
    before: Sample | None = None
    backlog: Backlog = field(default_factory=Backlog)
    backoff: Backoff = field(default_factory=Backoff)
    costs: ScanCosts = field(default_factory=ScanCosts)
    rate: ScanRate = field(default_factory=ScanRate)
    smart: SmartScan = field(default_factory=SmartScan)
    pressure: Pressure | None = None
    burst: Burst | None = None
    pending: PendingGain | None = None
    quiet_since: Sample | None = None
    active_at: float = 0.0
    tick_seconds: float = 1.0
    last: str = "nothing has been scanned yet"
    bursts: Intervention = field(default_factory=Intervention)
    swapped: Intervention = field(default_factory=Intervention)

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Move to the next phase, and set the knobs for it."""
        after = self._observed(sample)
        if after.phase is Phase.READY:
            after = after._from_ready(sample)
        elif after.burst is None:
            after = after._from_idle(sample)
        else:
            after = after._from_burst(sample, after.burst)
        after = replace(after, rate=after.rate.step(sample, after._share(sample), after._mode))
        return after, after._decision(sample)

    # -- taking a sample in ----------------------------------------------------------------------------------

    def _observed(self, sample: Sample) -> Adaptive:
        before = self.before
        backlog = replace(self.backlog, count_swap=self.limits.swapin).step(sample)
        if before is None:
            return replace(self, before=sample, backlog=backlog, active_at=sample.time_seconds)
        pressure = self.pressure or Pressure(self.limits.max_cpu_pressure, self.limits.max_memory_pressure)
        active = any(sample.number(name) != before.number(name) for name in _ACTIVITY)
        passed = sample.time_seconds - before.time_seconds
        after = replace(
            self,
            before=sample,
            backlog=backlog,
            pressure=pressure.step(before, sample),
            active_at=sample.time_seconds if active else self.active_at,
            # The shortest for a while: a sample may come late, and seldom early.
            tick_seconds=min(max(passed, 0.05), 1.25 * self.tick_seconds),
            smart=self.smart.step(sample) if self.limits.smart_scan and self.phase is Phase.IDLE else self.smart,
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
        quiet, scans = self.quiet_since, sample.number("full_scans")
        if quiet is None or (scans or 0) < (quiet.number("full_scans") or 0):
            cause, blind, after = _BLIND_CAUSE if self.bursts.pulses else "ksmd starts", True, self
        else:
            cost = self.costs.burst(self.backlog, sample)
            backoff = self.backoff.step(sample.time_seconds, self.backlog, cost, self.limits.worth)
            after = replace(self, backoff=backoff)
            cause, blind = after._cause(sample, quiet, cost), False
        if not cause:
            return replace(after, quiet_since=sample) if _scan_ended(quiet or sample, sample) else after
        after = after._judged(sample)
        burst = after._new_burst(sample, cause, blind=blind)
        # Pages that were never merged are written as well, and smart_scan would skip these.
        found = not self.limits.smart_scan or burst.kind is Kind.WRITTEN or after._found_enough(sample, burst)
        phase = next_phase(Phase.IDLE, Evidence(blind=blind, backlog_due=True, found_enough=found))
        if phase is Phase.FULL_SCAN:
            unknown = blind or not self.limits.smart_scan
            burst = replace(burst, full_since=sample, full_scans=FULL_SCANS if unknown else 2)
        return after._begun(sample, phase, burst)

    def _cause(self, sample: Sample, quiet: Sample, cost: float) -> str:
        """Why a burst begins, in words; empty where none does."""
        if self.backoff.over(sample.time_seconds):
            text = self.backlog.text()
            takes = f"for about {rough_seconds(cost)} of ksmd's time"
            return f"{text}: about {rough_count(self.backlog.gain)} may merge, {takes}"
        gained, used = saved_pages(sample) - saved_pages(quiet), counter_delta(quiet, sample, "ksmd_cpu_seconds")
        if _scan_ended(quiet, sample) and used and gained >= max(FEW_PAGES, self.limits.worth * used):
            return f"the last full scan in the background merged {rough_count(gained)} pages in {rough_seconds(used)}"
        return ""

    def _from_ready(self, sample: Sample) -> Adaptive:
        quiet = self.quiet_since or sample
        scans, before = sample.number("full_scans"), quiet.number("full_scans")
        evidence = Evidence(
            uncountable=scans is None or before is None,
            blind=scans is not None and before is not None and scans < before,
            nothing_mergeable=self._nothing_mergeable(sample),
        )
        phase = next_phase(Phase.READY, evidence)
        if phase is Phase.READY:
            return self._ready(sample)
        if phase is Phase.FULL_SCAN:
            return self._blind(sample)
        last = "full scans can't be counted" if evidence.uncountable else "a process has memory that ksmd may scan"
        return replace(self, phase=phase, quiet_since=sample, backoff=self.backoff.begun(), last=last)

    def _from_burst(self, sample: Sample, burst: Burst) -> Adaptive:
        ended = burst.scan_ended(sample)
        after = replace(self, burst=burst.step(sample))
        if ended:
            after = replace(after, costs=self.costs.measured(burst.mode, burst.scan, sample))
        if self.phase is Phase.FULL_SCAN and ended and burst.again is not None and burst.full_scans_done(sample):
            changed = burst.again.number("pages_volatile") or 0.0
            gained = max(0.0, gained_pages(burst.again, sample))
            after = replace(after, backlog=self.backlog.learned(Kind.CHANGED, changed, gained))
        assert after.burst is not None
        burst = after.burst
        evidence = after._evidence(sample, burst, ended=ended)
        phase = next_phase(self.phase, evidence)
        if phase is Phase.READY:
            return after._ready(sample)
        if phase is Phase.IDLE:
            return after._ended(sample, burst, after._why_ended(sample, burst, evidence))
        if evidence.blind:
            return after._blind(sample)
        if phase is not self.phase:
            scans = after._full_scans(sample, ended=ended)
            return replace(after, phase=phase, burst=replace(burst, full_since=sample, full_scans=scans))
        if evidence.full_scans_done:
            return replace(after, burst=replace(burst, full_scans=burst.full_scans + 1, again=sample))
        return after

    def _evidence(self, sample: Sample, burst: Burst, *, ended: bool) -> Evidence:
        scans = burst.scans(sample)
        if scans is None or scans < 0:
            return Evidence(uncountable=scans is None, blind=scans is not None)
        if self._nothing_mergeable(sample):
            return Evidence(nothing_mergeable=True)
        if self.phase is Phase.FULL_SCAN:
            done = ended and burst.full_scans_done(sample)
            return Evidence(full_scans_done=done, changed_enough=done and self._changed_enough(sample, burst, scans))
        if not ended and not scans:
            return Evidence(found_enough=self._found_enough(sample, burst))
        done = scans >= _QUICK_SCANS if ended else self._about_to_end(sample, burst, _SHORT_SCAN_TICKS)
        return Evidence(quick_scan_done=done, found_enough=done and self._quick_scan_pays(sample, burst))

    def _nothing_mergeable(self, sample: Sample) -> bool:
        return sample.time_seconds - self.active_at >= _INACTIVE_SECONDS and not tracked_pages(sample)

    def _found_enough(self, sample: Sample, burst: Burst) -> bool:
        """Whether the first scan is about to end, and what was found is worth a full scan already."""
        if burst.kind is Kind.SWAPPED or not self._about_to_end(sample, burst):
            return False
        return self.backlog.pages[Kind.FOUND] * self.backlog.hit_rates[Kind.FOUND] >= self._full_scan_worth(sample)

    def _about_to_end(self, sample: Sample, burst: Burst, least_ticks: float = 0.0) -> bool:
        """Whether the quick scan seems to end before the next sample but one.

        The full scan has to begin with smart_scan off, because it meets old pages first.

        :param least_ticks: a scan has to take more ticks than that, or its end can't be foreseen
        """
        measured = self.rate.measured if self.rate.mode is ScanMode.QUICK else None
        usual = self._scan_cost(ScanMode.QUICK, sample) / max(measured or self.limits.max_cpu, 0.01)
        rest, takes = burst.remaining(sample, usual)
        return takes > least_ticks * self.tick_seconds and rest < 1.5 * self.tick_seconds

    def _quick_scan_pays(self, sample: Sample, burst: Burst) -> bool:
        """Whether a full scan is worth it after a quick scan."""
        gained, rates = max(0.0, burst.gained(sample)), self.backlog.hit_rates
        worth = self._full_scan_worth(sample)
        return max(burst.found(sample) * rates[Kind.FOUND] - gained, gained) >= worth

    def _changed_enough(self, sample: Sample, burst: Burst, scans: float) -> bool:
        expected = (sample.number("pages_volatile") or 0.0) * self.backlog.hit_rates[Kind.CHANGED]
        few = scans >= _MOST_FULL_SCANS
        return not few and expected >= self._full_scan_worth(sample)

    def _full_scans(self, sample: Sample, *, ended: bool) -> int:
        """Full scans that have to end after a quick scan, so that one has smart_scan off from its beginning."""
        # Where the quick scan has ended, smart_scan was on in the next one for the time of a sample.
        long = _LONG_SCAN_TICKS * self.tick_seconds * self.rate.share
        return 1 if ended and self._scan_cost(ScanMode.QUICK, sample) > long else 2

    def _scan_cost(self, mode: ScanMode, sample: Sample) -> float:
        return self.costs.scan(mode, tracked_pages(sample) or 0)

    def _full_scan_worth(self, sample: Sample) -> float:
        """Pages that a full scan has to save."""
        return max(FEW_GAINED, self.limits.worth * self._scan_cost(ScanMode.FULL, sample))

    # -- entering a phase ------------------------------------------------------------------------------------

    def _new_burst(self, sample: Sample, cause: str, *, blind: bool) -> Burst:
        candidates = self.backlog.pages
        if blind:
            # All pages may be new.
            candidates = {**candidates, Kind.NEW: anonymous_pages(sample) or 0.0}
        scan = sample
        if not blind and self.quiet_since and self.quiet_since.number("full_scans") == sample.number("full_scans"):
            # The scan that runs began in the background.
            scan = self.quiet_since
        unnoticed = self.backlog.unnoticed
        kind = self.backlog.main.kind
        return Burst(sample, scan, scan, candidates, kind, cause, blind=blind, unnoticed=unnoticed)

    def _begun(self, sample: Sample, phase: Phase, burst: Burst) -> Adaptive:
        return replace(
            self,
            phase=phase,
            burst=burst,
            quiet_since=sample,
            active_at=sample.time_seconds,
            backoff=self.backoff.begun(),
        )

    def _blind(self, sample: Sample) -> Adaptive:
        after = self._judged(sample)
        burst = after._new_burst(sample, _BLIND_CAUSE, blind=True)
        return after._begun(sample, Phase.FULL_SCAN, replace(burst, full_since=sample))

    def _ready(self, sample: Sample) -> Adaptive:
        # What comes finds ksmd at work.
        after = replace(self, backlog=self.backlog.scanned(anonymous_pages(sample), tracked_pages(sample)))
        backoff = self.backoff.begun()
        return replace(after._judged(sample), phase=Phase.READY, burst=None, quiet_since=sample, backoff=backoff)

    def _ended(self, sample: Sample, burst: Burst, why: str) -> Adaptive:
        outcome = burst.outcome(sample)
        gained, used = outcome.gained, outcome.used
        paid = used is not None and gained >= self.limits.worth * used
        kind, now = burst.kind, self.backlog.pages
        candidates = max(burst.backlog[kind], now[kind])
        backlog, pending = self.backlog, self.pending
        if kind is Kind.WRITTEN:
            pending = burst.pending_gain(sample, candidates)
        else:
            backlog = backlog.learned(kind, candidates, gained)
        if burst.full_since is not None and kind is not Kind.FOUND:
            backlog = backlog.learned(Kind.FOUND, burst.found(sample), gained)
        # A full scan that began a little late has missed some pages: a pulse in the background finds these.
        missed = burst.full_since is None or burst.full_scans == 1
        return replace(
            self,
            phase=Phase.IDLE,
            burst=None,
            quiet_since=sample,
            backoff=self.backoff.ended(sample.time_seconds, kind, used, paid=paid),
            backlog=backlog.scanned(anonymous_pages(burst.older), tracked_pages(sample)),
            pending=pending,
            smart=self.smart if missed else self.smart.scanned(sample),
            last=f"{outcome.text()}; it ended because {why}",
            bursts=self.bursts.and_one(outcome.pages),
            swapped=self.swapped.and_one(outcome.pages) if kind is Kind.SWAPPED else self.swapped,
        )

    def _why_ended(self, sample: Sample, burst: Burst, evidence: Evidence) -> str:
        if evidence.uncountable:
            return "full scans can't be counted"
        if self.phase is Phase.FULL_SCAN:
            return "it has scanned every page"
        used = rough_seconds(burst.used(sample) or 0.0)
        return f"it found {rough_count(burst.found(sample))} new pages in {used}, of which too few may merge"

    # -- the scan rate, and the reasons ----------------------------------------------------------------------

    def _share(self, sample: Sample) -> float:
        """ksmd's share of a CPU."""
        limits, burst = self.limits, self.burst
        if burst is None:
            return limits.idle_cpu if self.phase is Phase.IDLE else limits.max_cpu
        most = max(limits.idle_cpu, _GENTLE * limits.max_cpu) if self._gentle(sample) else limits.max_cpu
        if burst.blind and not burst.scans(sample):
            return min(limits.max_cpu, most)
        # No more scans between two samples than can be told apart.
        expected = max(pages * self.backlog.hit_rates[kind] for kind, pages in burst.backlog.items())
        known = max((tracked_pages(sample) or 0) + expected, 4 * FEW_PAGES)
        useful = _SCANS_PER_TICK[burst.mode] * self.costs.scan(burst.mode, known) / self.tick_seconds
        return min(limits.max_cpu, max(limits.idle_cpu, useful), most)

    def _gentle(self, sample: Sample) -> bool:
        """Whether a burst leaves the CPU to tasks that wait."""
        burst, pressure = self.burst, self.pressure
        if burst is None or pressure is None or not pressure.high:
            return False
        used = burst.used(sample)
        # Until the gain of this burst can be judged, the expected gain counts: it would not have begun otherwise.
        early = not used or used < _TELLING_CPU_SECONDS
        relieves = early or burst.gained(sample) >= self.limits.worth * (used or 0.0)
        return pressure.cpu_high or not relieves

    @property
    def _mode(self) -> ScanMode:
        if self.phase is Phase.IDLE:
            return ScanMode.BACKGROUND_FULL if self.smart.off else ScanMode.BACKGROUND
        return ScanMode.QUICK if self.phase is Phase.QUICK_SCAN else ScanMode.FULL

    def _shown_phase(self, sample: Sample) -> str:
        """The phase as reports show it; a quick scan and a full scan are one there."""
        if self.burst is None:
            return self.phase.value
        return "gentle" if self._gentle(sample) else "quick"

    def _why(self, sample: Sample) -> str:
        burst, pressure, shown = self.burst, self.pressure, self._shown_phase(sample)
        if self.phase is Phase.READY:
            return f"{shown}: no process has memory that ksmd may scan, so being quick costs nothing"
        if burst is None:
            waits = "no process has memory that ksmd may scan"
            if tracked_pages(sample):
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
        reasons = [Reason("phase", lambda: self._why(sample)), Reason("speed", self.rate.text)]
        knobs: dict[Knob, KnobValue] = {
            Knob.RUN: 1,
            Knob.SLEEP_MILLISECS: self.rate.sleep_millisecs,
            Knob.PAGES_TO_SCAN: self.rate.pages,
        }
        if isinstance(sample.readings.get(Knob.ADVISOR_MODE), str):
            knobs[Knob.ADVISOR_MODE] = "none"
        recovered = {"swapin": self.swapped} if self.limits.swapin else {}
        unrealised: dict[str, int] = {}
        if isinstance(sample.readings.get(Knob.SMART_SCAN), int):
            off = self.limits.smart_scan and self._mode in (ScanMode.BACKGROUND_FULL, ScanMode.FULL)
            knobs[Knob.SMART_SCAN] = 0 if off else 1
            text = (
                "smart_scan off, to scan every page"
                if off
                else "smart_scan on, to see first whether it finds new pages"
            )
            reasons.append(Reason("smart_scan", self.smart.text if self.phase is Phase.IDLE else text))
            if self.limits.smart_scan:
                recovered["smart_scan"] = self.smart.total
                if self.smart.locked_out is not None:
                    unrealised["smart_scan"] = self.smart.locked_out
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
        if burst.blind or not self.limits.smart_scan:
            return _INTERVAL_SECONDS
        takes = self._scan_cost(burst.mode, sample) / max(self.rate.share, 0.01)
        return min(max(_SHORTEST_INTERVAL_SECONDS, takes / _SAMPLES_PER_SCAN), _INTERVAL_SECONDS)


def _scan_ended(before: Sample, sample: Sample) -> bool:
    """Whether a scan of all pages has ended between two samples."""
    scans = sample.number("full_scans")
    return scans is not None and scans != before.number("full_scans")
