# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "adaptive"``: ksmd works where pages still get merged, and rests where none do.

It rests (*background*) at `idle_cpu`, until there are pages that may merge and that it has not looked at twice
(`ksmd_ctl.control.policies.debts`), and looking at them is expected to save `worth` pages for each second that ksmd
takes for it. Then it is *quick*, at `max_cpu`, for a burst of a few full scans:

- It *peeks*: the rest of the scan that runs, and one more where that has not found enough: new processes are put behind
  ksmd's cursor and met a round later. smart_scan is on, so that costs little; new pages merge with merged ones and with
  one another all the same, for smart_scan skips no new page. Where ksmd found few of the pages for which it was done,
  that was all.
- It *looks*: one full scan with smart_scan off from its very beginning, so that new pages meet old ones that smart_scan
  would have skipped, and what it would have locked out for ever is found (findings F2 and F13). Where much of what it
  met was new or had changed, it looks once more. Merged pages that were written are as old to smart_scan as when they
  merged, young mostly: it looks only where too few of them merge in the peek, and then three times.

What comes while it peeks and looks is the next burst's, so it waits until what comes has settled, though not for long;
and samples come more often meanwhile, to see where a full scan ends.

So on a large host little that is new waits until more has come; and what never merges is looked at less and less, for
the yield of what was looked at is learned. Where no process has memory that ksmd may scan it is *ready*: quick, at no
cost.

Where tasks wait for a CPU, or for memory while merging does not relieve that, a burst is *gentle*: a quarter of
`max_cpu`. A huge page that is split while merging counts as pages lost (`ksmd_ctl.control.policies.burst`), and pages
of zeroes that this frees as pages gained: the kernel gives them back, and no counter of KSM shows it (findings F32).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.control.policies.advice import Advice, Pulse, Reason, Steering
from ksmd_ctl.control.policies.burst import PEEKS, Burst, Verdict
from ksmd_ctl.control.policies.change import grown, tracked_pages
from ksmd_ctl.control.policies.costs import Costs
from ksmd_ctl.control.policies.debts import KINDS, Debts, anonymous_pages, gained_pages, merged_pages
from ksmd_ctl.control.policies.figures import count, seconds
from ksmd_ctl.control.policies.pace import BACKGROUND, LOOK, PEEK, PULSE, Pace
from ksmd_ctl.control.policies.patience import FEW_GAINED, FEW_PAGES, Patience
from ksmd_ctl.control.policies.pressure import Pressure
from ksmd_ctl.control.policies.pulse import LOOKS, SmartScan
from ksmd_ctl.control.policies.scan_end import left
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import Knob, KnobValue

__all__ = ["Adaptive", "Limits"]

# More full scans within one sample than these can't be made use of.
_SCANS_A_TICK: Final = {PEEK: 3.0, LOOK: 2.5}
# While it matters where a full scan ends, samples come so often, or more often: so many times while it lasts.
_HURRY_SECONDS: Final = 0.2
_SHORTEST_HURRY_SECONDS: Final = 0.05
_SAMPLES_A_SCAN: Final = 8.0
# A peek that takes so many samples is met at its end well enough; one that takes less than those can't be foreseen.
_LONG_SCAN_TICKS: Final = 20.0
_SHORT_SCAN_TICKS: Final = 2.0
_GENTLE: Final = 0.25
# So long without any sign of life, ksmd has nothing to do.
_NOTHING_SECONDS: Final = 3.0
# It doesn't look more often than that.
_MOST_LOOKS: Final = 4
# So much of ksmd's time shows what a burst brings.
_TELLING_CPU_SECONDS: Final = 0.5
_ACTIVITY: Final = ("full_scans", "pages_scanned", "ksmd_cpu_seconds")
_SEEN: Final = KINDS.index("seen")
_WRITTEN: Final = KINDS.index("written")
_SWAPPED: Final = KINDS.index("swapped")
_CHANGED: Final = KINDS.index("changed")

READY, QUICK, GENTLE = "ready", "quick", "gentle"


@dataclass(frozen=True, slots=True)
class Limits:
    """Shares of one CPU; pages a second of ksmd's time; a share of the time in which some task waits.

    :ivar smart_scan: whether smart_scan is switched off for a burst or a pulse
    :ivar swapin: whether copies by swap are a reason to scan
    """

    max_cpu: float = 0.8
    idle_cpu: float = 0.005
    worth: int = 1000
    max_cpu_pressure: float = 0.8
    max_memory_pressure: float = 0.2
    smart_scan: bool = True
    swapin: bool = True


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The policy and what it has learned.

    :ivar resting: the sample at which a full scan of the background began, None where nothing is known of ksmd's work
    :ivar moved_at: when ksmd last did anything
    :ivar last: what the last burst brought, in words
    :ivar bursts, swapped: what all of them brought, and those for copies by swap
    """

    limits: Limits = field(default_factory=Limits)
    before: Sample | None = None
    debts: Debts = field(default_factory=Debts)
    costs: Costs = field(default_factory=Costs)
    patience: Patience = field(default_factory=Patience)
    pace: Pace = field(default_factory=Pace)
    smart: SmartScan = field(default_factory=SmartScan)
    pressure: Pressure | None = None
    burst: Burst | None = None
    verdict: Verdict | None = None
    resting: Sample | None = None
    moved_at: float = 0.0
    tick_seconds: float = 1.0
    last: str = "nothing has been looked at yet"
    bursts: Pulse = field(default_factory=Pulse)
    swapped: Pulse = field(default_factory=Pulse)

    @property
    def fresh(self) -> bool:
        return True

    def step(self, sample: Sample) -> tuple[Steering, Advice]:
        """Decide whether ksmd is quick, and how quick that is."""
        after = self._seen(sample)
        after = after._rested(sample) if after.burst is None else after._judged(sample, after.burst)
        phase, share = after._share(sample)
        after = replace(after, pace=after.pace.step(sample, share, after._scanned()))
        return after, after._advice(sample, phase)

    def _seen(self, sample: Sample) -> Adaptive:
        before = self.before
        debts = replace(self.debts, mind_swap=self.limits.swapin).step(sample)
        if before is None:
            return replace(self, before=sample, debts=debts, moved_at=sample.time_seconds)
        passed = sample.time_seconds - before.time_seconds
        pressure = self.pressure or Pressure(self.limits.max_cpu_pressure, self.limits.max_memory_pressure)
        after = replace(
            self,
            before=sample,
            debts=debts,
            pressure=pressure.step(before, sample),
            # The shortest for a while: a sample may come late, and seldom early.
            tick_seconds=min(max(passed, 0.05), 1.25 * self.tick_seconds),
        )
        if any(sample.number(name) != before.number(name) for name in _ACTIVITY):
            after = replace(after, moved_at=sample.time_seconds)
        if self.limits.smart_scan and self.burst is None:
            after = replace(after, smart=self.smart.step(sample))
        if self.verdict is not None and sample.time_seconds >= self.verdict.at:
            after = after._settled(sample)
        return after

    def _settled(self, sample: Sample) -> Adaptive:
        verdict = self.verdict
        if verdict is None:
            return self
        return replace(
            self, verdict=None, debts=self.debts.learned(_WRITTEN, verdict.owed[_WRITTEN], verdict.gained(sample))
        )

    # -- where bursts begin and end ------------------------------------------------------------------------

    def _rested(self, sample: Sample) -> Adaptive:
        """Begin a burst, if there is a reason."""
        rested, scans = self.resting, sample.number("full_scans")
        if rested is None or (scans or 0) < (rested.number("full_scans") or 0):
            cause = "everything was un-merged" if self.bursts.pulses else "ksmd starts"
            return replace(self, resting=None)._start(sample, cause)
        now, debts = sample.time_seconds, self.debts
        cost = self.costs.burst(debts, sample)
        after = replace(self, patience=self.patience.step(now, debts, cost, self.limits.worth))
        if after.patience.over(now):
            expected = f"about {count(debts.gain)} may merge, for about {seconds(cost)} of ksmd's time"
            return after._start(sample, f"{debts.text()}: {expected}")
        if scans is None or scans == rested.number("full_scans"):
            return after
        gained = merged_pages(sample) - merged_pages(rested)
        used = grown(rested, sample, "ksmd_cpu_seconds")
        if gained >= FEW_PAGES and used and gained >= self.limits.worth * used:
            cause = f"the last full scan in the background merged {count(gained)} pages in {seconds(used)}"
            return after._start(sample, cause)
        return replace(after, resting=sample)

    def _start(self, sample: Sample, cause: str) -> Adaptive:
        after = self._settled(sample)
        owed, kind, blind = after.debts.pages, after.debts.main(), self.resting is None
        if blind:
            # What ksmd has looked at is not known: all may be new.
            owed = (anonymous_pages(sample) or 0.0, *owed[1:])
        # Where nobody knows what ksmd has done so far, peeking is no use.
        peeks = not blind and self.limits.smart_scan
        # The scan that runs began in the background, unless one has just ended.
        scan = self.resting
        if scan is None or scan.number("full_scans") != sample.number("full_scans"):
            scan = sample
        burst = Burst(sample, scan, scan, owed, kind, cause, None if peeks else sample, blind=blind)
        patience = after.patience.begun()
        after = replace(after, burst=burst, resting=sample, moved_at=sample.time_seconds, patience=patience)
        return after._look(sample, burst, 2) if peeks and after._found_enough(sample, burst) else after

    def _judged(self, sample: Sample, burst: Burst) -> Adaptive:
        """Go on with a burst, or end it."""
        burst = burst.met(sample)
        scans, scan, after = burst.scans(sample), burst.scan, replace(self, burst=burst)
        if scans is None:
            return self._end(sample, burst, "full scans can't be counted")
        if scans < 0:
            return replace(self, resting=None)._start(sample, "everything was un-merged")
        if self._idle(sample):
            # Nothing to scan costs nothing: the first that comes finds ksmd at work.
            debts = self.debts.looked(anonymous_pages(sample), tracked_pages(sample))
            return replace(replace(self, resting=None, debts=debts)._start(sample, ""), moved_at=self.moved_at)
        if not burst.cause:
            last, patience = "a process has memory that ksmd may scan", self.patience.begun()
            return replace(self, burst=None, resting=sample, patience=patience, last=last)
        if sample.number("full_scans") == scan.number("full_scans"):
            if burst.looking is not None:
                return after
            if scans == 0:
                return self._look(sample, burst, 2) if self._found_enough(sample, burst) else after
            return self._peeked(sample, burst, 2) if self._about_to_end(sample, burst, _SHORT_SCAN_TICKS) else after
        burst = replace(burst, scan=sample, older=scan)
        after = replace(self, burst=burst, costs=self.costs.scanned(burst.mode, scan, sample))
        if burst.looking is None:
            return after if scans < PEEKS else after._peeked(sample, burst, 0)
        return after._looked(sample, burst) if burst.looked(sample) else after

    def _idle(self, sample: Sample) -> bool:
        return sample.time_seconds - self.moved_at >= _NOTHING_SECONDS and not tracked_pages(sample)

    def _about_to_end(self, sample: Sample, burst: Burst, least_ticks: float = 0.0) -> bool:
        """Whether the full scan that runs seems to end before the next sample but one.

        The next one has to begin with smart_scan off: it meets old pages first.

        :param least_ticks: samples that a whole one has to take more than, or its end counts as not to be foreseen
        """
        measured = self.pace.measured if self.pace.kind == burst.mode else None
        usual = self.costs.scan(PEEK, sample) / max(measured or self.limits.max_cpu, 0.01)
        rest, takes = left(sample, burst, usual)
        return takes > least_ticks * self.tick_seconds and rest < 1.5 * self.tick_seconds

    def _found_enough(self, sample: Sample, burst: Burst) -> bool:
        """Whether the first scan is about to end, and what has been found is worth a look already."""
        if burst.kind in (_WRITTEN, _SWAPPED) or not self._about_to_end(sample, burst):
            return False
        return self.debts.pages[_SEEN] * self.debts.yields[_SEEN] >= self._worth(sample)

    def _worth(self, sample: Sample) -> float:
        """Pages that a look has to save."""
        return max(FEW_GAINED, self.limits.worth * self.costs.scan(LOOK, sample))

    def _look(self, sample: Sample, burst: Burst, looks: int) -> Adaptive:
        return replace(self, burst=replace(burst, looking=sample, looks=looks))

    def _looked(self, sample: Sample, burst: Burst) -> Adaptive:
        """It has looked at every page: that is all, or once more at what was new to it or had changed."""
        debts, again = self.debts, burst.again
        if again is not None:
            gained = max(0.0, gained_pages(again, sample))
            debts = debts.learned(_CHANGED, again.number("pages_volatile") or 0.0, gained)
        after = replace(self, debts=debts)
        expected = (sample.number("pages_volatile") or 0.0) * debts.yields[_CHANGED]
        if burst.kind == _WRITTEN or (burst.scans(sample) or 0) >= _MOST_LOOKS or expected < self._worth(sample):
            return after._end(sample, burst, "it has looked at every page")
        return replace(after, burst=replace(burst, looks=burst.looks + 1, again=sample))

    def _peeked(self, sample: Sample, burst: Burst, looks: int) -> Adaptive:
        """Look, if ksmd has found enough of what it was to find.

        :param looks: full scans that have to end until then, 0 where one has just ended
        """
        found, gained, worth = burst.found(sample), max(0.0, burst.gained(sample)), self._worth(sample)
        if burst.kind == _WRITTEN:
            if burst.owed[_WRITTEN] * self.debts.yields[_WRITTEN] - gained < worth:
                return self._end(sample, burst, "what was written has merged again, or too little of it is left")
            return self._look(sample, burst, LOOKS)
        expected = max(found * self.debts.yields[_SEEN] - gained, 0.0)
        if max(expected, gained) < worth:
            used = seconds(burst.used(sample) or 0.0)
            return self._end(sample, burst, f"it found {count(found)} new pages in {used}, of which too few may merge")
        if not looks:
            # smart_scan was on for the time of a sample: it has skipped so much of a peek, and that is to be looked at.
            long = _LONG_SCAN_TICKS * self.tick_seconds * self.pace.target
            looks = 1 if self.costs.scan(PEEK, sample) > long else 2
        return self._look(sample, burst, looks)

    def _end(self, sample: Sample, burst: Burst, why: str) -> Adaptive:
        outcome = burst.outcome(sample)
        gained, used = outcome.gained, outcome.used
        paid = used is not None and gained >= self.limits.worth * used
        owed = tuple(max(before, now) for before, now in zip(burst.owed, self.debts.pages, strict=True))
        debts, verdict = self.debts, self.verdict
        if burst.kind == _WRITTEN:
            verdict = burst.verdict(sample, owed)
        else:
            debts = debts.learned(burst.kind, owed[burst.kind], gained)
        if burst.looking is not None and burst.kind != _SEEN:
            debts = debts.learned(_SEEN, burst.found(sample), gained)
        return replace(
            self,
            burst=None,
            resting=sample,
            patience=self.patience.ended(sample.time_seconds, burst.kind, used, paid=paid),
            debts=debts.looked(anonymous_pages(burst.older), tracked_pages(sample)),
            verdict=verdict,
            # A look that began a little late has missed a few pages: a pulse in the background finds these.
            smart=self.smart if burst.looking is None or burst.looks == 1 else self.smart.looked(sample),
            last=f"{outcome.text()}; it ended because {why}",
            bursts=self.bursts.and_one(outcome.pages),
            swapped=self.swapped.and_one(outcome.pages) if burst.kind == _SWAPPED else self.swapped,
        )

    # -- how quick, and why --------------------------------------------------------------------------------

    def _share(self, sample: Sample) -> tuple[str, float]:
        """The phase, and ksmd's share of a CPU in it."""
        limits, burst, pressure = self.limits, self.burst, self.pressure
        if burst is None:
            return BACKGROUND, limits.idle_cpu
        if not burst.cause:
            return READY, limits.max_cpu
        # No more full scans a tick than can be looked at.
        expected = (pages * share for pages, share in zip(burst.owed, self.debts.yields, strict=True))
        known = max((tracked_pages(sample) or 0) + max(expected), 4 * FEW_PAGES)
        scan = known * self.costs.page[burst.mode] + self.costs.walk
        useful = _SCANS_A_TICK[burst.mode] * scan / self.tick_seconds
        share = min(limits.max_cpu, max(limits.idle_cpu, useful))
        if burst.blind and burst.scan is burst.start:
            share = limits.max_cpu
        if pressure is None or not pressure.high or (not pressure.cpu_high and self._relieves(sample, burst)):
            return QUICK, share
        return GENTLE, min(share, max(limits.idle_cpu, _GENTLE * limits.max_cpu))

    def _relieves(self, sample: Sample, burst: Burst) -> bool:
        used = burst.used(sample)
        # Until it shows what this burst brings, what is expected of it counts: it would not have begun.
        return not used or used < _TELLING_CPU_SECONDS or burst.gained(sample) >= self.limits.worth * used

    def _scanned(self) -> str:
        """What is scanned, which decides what a page costs."""
        if self.burst is not None:
            return self.burst.mode
        return PULSE if self.smart.off else BACKGROUND

    def _why(self, sample: Sample, phase: str) -> str:
        burst, pressure, debts = self.burst, self.pressure, self.debts
        if burst is None:
            waits = "no process has memory that ksmd may scan"
            if tracked_pages(sample):
                cost = self.costs.burst(debts, sample)
                waits = self.patience.text(sample.time_seconds, debts, cost, self.limits.worth)
            return f"{phase}: {self.last}; {waits}"
        if not burst.cause:
            return f"{phase}: no process has memory that ksmd may scan, so being quick costs nothing"
        text = f"{phase}: {burst.text(sample)}"
        if pressure is None or not pressure.high:
            return text
        if phase == GENTLE:
            return f"{text}; slowed down, as {pressure.text()}"
        return f"{text}; {pressure.text()}, and merging relieves that"

    def _advice(self, sample: Sample, phase: str) -> Advice:
        pace, burst, smart = self.pace, self.burst, self.smart
        reasons = [Reason("phase", lambda: self._why(sample, phase)), Reason("speed", pace.text)]
        knobs: dict[Knob, KnobValue] = {
            Knob.RUN: 1,
            Knob.SLEEP_MILLISECS: pace.sleep_millisecs,
            Knob.PAGES_TO_SCAN: pace.pages,
        }
        if isinstance(sample.readings.get(Knob.ADVISOR_MODE), str):
            knobs[Knob.ADVISOR_MODE] = "none"
        healed = {"swapin": self.swapped} if self.limits.swapin else {}
        unrealised: dict[str, int] = {}
        if isinstance(sample.readings.get(Knob.SMART_SCAN), int):
            off = self.limits.smart_scan and (smart.off if burst is None else burst.looking is not None)
            knobs[Knob.SMART_SCAN] = 0 if off else 1
            if burst is None:
                reasons.append(Reason("smart_scan", smart.text))
            else:
                text = "off, to look at every page" if off else "on, to see first whether it finds new pages"
                reasons.append(Reason("smart_scan", text))
            if self.limits.smart_scan:
                healed["smart_scan"] = smart.total
                if smart.apart is not None:
                    unrealised["smart_scan"] = smart.apart
        if sample.number("ksmd_cpu_seconds") is None:
            reasons.append(Reason("ksmd", "its CPU time can't be read here, so what a page costs is a guess"))
        return Advice(knobs, tuple(reasons), phase, self._hurry(sample, phase), healed, unrealised)

    def _hurry(self, sample: Sample, phase: str) -> float | None:
        """When the next sample is to come at the latest."""
        burst = self.burst
        if burst is None or phase not in (QUICK, GENTLE):
            return None if self.patience.owed_since is None else _HURRY_SECONDS
        if burst.blind or not self.limits.smart_scan:
            return _HURRY_SECONDS
        takes = self.costs.scan(burst.mode, sample) / max(self.pace.target, 0.01)
        return min(max(_SHORTEST_HURRY_SECONDS, takes / _SAMPLES_A_SCAN), _HURRY_SECONDS)
