# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "adaptive"``: ksmd works where pages still get merged, and rests where none do.

It rests (*background*) at `idle_cpu`, until there are pages that may merge and that it has not looked at twice
(`ksmd_ctl.control.policies.debts`), and looking at them is expected to save `worth` pages for each second that ksmd
takes for it. Then it is *quick*, at `max_cpu`, for a burst of a few full scans:

- It *peeks*: the rest of the scan that runs, in which new pages have no part, and one more. smart_scan is on, so that
  costs little; new pages merge with merged ones and with one another all the same, for smart_scan skips no new page.
  Where ksmd found few of the pages for which it was done, that was all.
- It *looks*: one full scan with smart_scan off, so that new pages meet old ones that smart_scan would have skipped, and
  what it would have locked out for ever is found (findings F2 and F13). Merged pages that were written are old to
  smart_scan: for those it looks at once, and three times.

What comes while it peeks and looks is the next burst's, so it waits until what comes has settled, though not for long;
and samples come more often meanwhile, to see where a full scan ends.

So on a large host little that is new waits until more has come; and what never merges is looked at less and less, for
the yield of what was looked at is learned. Where no process has memory that ksmd may scan it is *ready*: quick, at no
cost.

Where tasks wait for a CPU, or for memory while merging does not relieve that, a burst is *gentle*: a quarter of
`max_cpu`. A huge page that is split while merging counts as `HUGE_PAGE_WORTH` pages lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.control.policies.advice import Advice, Pulse, Reason, Steering
from ksmd_ctl.control.policies.change import grown, tracked_pages
from ksmd_ctl.control.policies.debts import KINDS, PRIORS, Debts, anonymous_pages
from ksmd_ctl.control.policies.figures import count, seconds
from ksmd_ctl.control.policies.pace import Pace
from ksmd_ctl.control.policies.pressure import Pressure
from ksmd_ctl.control.policies.pulse import LOOKS, SmartScan
from ksmd_ctl.host import Sample
from ksmd_ctl.knobs import Knob, KnobValue

__all__ = ["HUGE_PAGE_WORTH", "Adaptive", "Limits"]

#: What is lost with a huge page, in pages: a sixteenth of its 512. Its memory is not lost, but the reach of a TLB entry
#: is; who merges less than that of it has gained nothing.
HUGE_PAGE_WORTH: Final = 32
# Less than this that is new, or to be gained, is no reason to write knobs.
_FEW_PAGES: Final = 512
_FEW_GAINED: Final = 100
# Full scans of a peek, one of them half done when it begins, and of a look.
_PEEKS: Final = 2
_PEEKS_EXPECTED: Final = 1.5
# What a page of all that ksmd knows costs in a full scan, in seconds, before that was measured.
_FIRST_COSTS: Final = {"peek": 1.5e-6, "look": 3e-6}
# More full scans within one sample than these can't be made use of.
_SCANS_A_TICK: Final = {"peek": 3.0, "look": 2.5}
# While it matters where a full scan ends, samples come so often.
_HURRY_SECONDS: Final = 0.2
# What is new has settled once it has not grown for so long; but it does not wait for longer than that.
_SETTLED_SECONDS: Final = 1.0
_IMPATIENT_SECONDS: Final = 4.0
# Growth by less than this share of what is owed is none.
_GROWTH: Final = 0.05
# A full scan that takes so many samples is met at its beginning well enough; one that takes less than those can't be
# met at its end.
_LONG_SCAN_TICKS: Final = 5.0
_SHORT_SCAN_TICKS: Final = 2.0
_GENTLE: Final = 0.25
# So long without any sign of life, ksmd has nothing to do.
_NOTHING_SECONDS: Final = 3.0
# Bursts that did not pay take this share of a CPU at most: the next one waits for so long.
_WASTE: Final = 0.05
_REST_SECONDS: Final = (1.0, 60.0)
# One burst that brought nothing says little; a yield below this share of what is believed at first says more.
_FAILING: Final = 0.25
# After so long it shows whether pages that had been written stay merged.
_LASTING_SECONDS: Final = 60.0
_ACTIVITY: Final = ("full_scans", "pages_scanned", "ksmd_cpu_seconds")
_SEEN: Final = KINDS.index("seen")
_WRITTEN: Final = KINDS.index("written")

READY, QUICK, GENTLE, BACKGROUND = "ready", "quick", "gentle", "background"
PEEK, LOOK, PULSE = "peek", "look", "pulse"


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
class Burst:
    """One burst.

    :ivar start: the sample at which it began
    :ivar scan: the sample at which the full scan began that is judged next
    :ivar older: the one before: what came later was not looked at twice
    :ivar owed, kind: what it is for
    :ivar looking: the sample at which it began to look, None while it peeks
    :ivar looks: full scans to look, the one that runs among them
    :ivar blind: nobody knows how much there is to scan
    """

    start: Sample
    scan: Sample
    older: Sample
    owed: tuple[float, ...]
    kind: int
    cause: str
    looking: Sample | None = None
    looks: int = LOOKS
    blind: bool = False

    @property
    def mode(self) -> str:
        return PEEK if self.looking is None else LOOK


@dataclass(frozen=True, slots=True)
class Verdict:
    """Merged pages that had been written are judged later: a program may write them again at once."""

    at: float
    sharing: float
    owed: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The policy and what it has learned.

    :ivar rest_until, rest_kind: no burst before that time for pages of that kind: the last one did not pay
    :ivar owed_since: since when there is something that is worth a burst
    :ivar grown_at, grown_to: when that grew last, and to how many pages
    :ivar costs: seconds of ksmd's time for a page that it knows in a full scan, peeking and looking
    :ivar moved_at: when ksmd last did anything
    :ivar resting: the sample at which a full scan of the background began, None where nothing is known of ksmd's work
    """

    limits: Limits = field(default_factory=Limits)
    before: Sample | None = None
    debts: Debts = field(default_factory=Debts)
    pace: Pace = field(default_factory=Pace)
    smart: SmartScan = field(default_factory=SmartScan)
    burst: Burst | None = None
    resting: Sample | None = None
    rest_until: float = 0.0
    rest_kind: int = 0
    owed_since: float | None = None
    grown_at: float = 0.0
    grown_to: float = 0.0
    costs: Mapping[str, float] = field(default_factory=lambda: _FIRST_COSTS)
    pressure: Pressure | None = None
    moved_at: float = 0.0
    tick_seconds: float = 1.0
    verdict: Verdict | None = None
    last: str = "nothing has been looked at yet"
    bursts: Pulse = field(default_factory=Pulse)
    swapped: Pulse = field(default_factory=Pulse)

    @property
    def fresh(self) -> bool:
        return True

    # -- one sample ----------------------------------------------------------------------------------------

    def step(self, sample: Sample) -> tuple[Steering, Advice]:
        """Decide whether ksmd is quick, and how quick that is."""
        after = self._seen(sample)
        after = after._begun(sample) if after.burst is None else after._judged(sample, after.burst)
        phase, share, why = after._share(sample)
        after = replace(after, pace=after.pace.step(sample, share, after._scanned()))
        return after, after._advice(sample, phase, why)

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
            after = after._lasting(sample)
        return after

    def _lasting(self, sample: Sample) -> Adaptive:
        verdict = self.verdict
        if verdict is None:
            return self
        gained = (sample.number("pages_sharing") or 0.0) - verdict.sharing
        return replace(self, verdict=None, debts=self.debts.learned(verdict.owed, _WRITTEN, gained))

    # -- a burst -------------------------------------------------------------------------------------------

    def _begun(self, sample: Sample) -> Adaptive:
        """Begin a burst, if there is a reason."""
        after = self._background(sample)
        scans = sample.number("full_scans")
        if after.resting is None:
            cause = "ksmd begins" if self.bursts.pulses == 0 else "everything was un-merged"
            return after._start(sample, cause)
        now, cost = sample.time_seconds, after._cost(sample)
        gain, owed = after.debts.gain, max(after.debts.pages)
        if not after._worth(cost) or after._rests(now):
            after = replace(after, owed_since=None, grown_to=0.0)
        elif after.owed_since is None or owed > after.grown_to * (1 + _GROWTH):
            since = now if after.owed_since is None else after.owed_since
            after = replace(after, owed_since=since, grown_at=now, grown_to=owed)
        if after.owed_since is not None and (
            now - after.grown_at >= _SETTLED_SECONDS or now - after.owed_since >= _IMPATIENT_SECONDS
        ):
            return after._start(
                sample,
                f"{after.debts.text()}: about {count(gain)} may merge, for about {seconds(cost)} of ksmd's time",
            )
        rested = after.resting
        assert rested is not None
        if scans is None or scans == rested.number("full_scans"):
            return after
        gained, used = grown(rested, sample, "pages_sharing"), grown(rested, sample, "ksmd_cpu_seconds")
        if gained and gained >= _FEW_PAGES and used and gained >= self.limits.worth * used:
            return after._start(
                sample, f"the last full scan in the background merged {count(gained)} pages in {seconds(used)}"
            )
        return replace(after, resting=sample)

    def _worth(self, cost: float) -> bool:
        """Whether what is owed is expected to bring what looking at it costs."""
        debts = self.debts
        return max(debts.pages) >= _FEW_PAGES and debts.gain >= max(_FEW_GAINED, self.limits.worth * cost)

    def _rests(self, now: float) -> bool:
        """Whether that waits all the same: bursts for such pages have not paid, time and again."""
        kind = self.debts.main()
        failing = self.debts.yields[kind] < PRIORS[kind] * _FAILING
        return failing and now < self.rest_until and kind == self.rest_kind

    def _background(self, sample: Sample) -> Adaptive:
        rested, scans = self.resting, sample.number("full_scans")
        if rested is not None and (scans or 0) < (rested.number("full_scans") or 0):
            return replace(self, resting=None)
        return self

    def _start(self, sample: Sample, cause: str) -> Adaptive:
        after = self._lasting(sample)
        owed, kind = after.debts.pages, after.debts.main()
        if self.resting is None:
            # What ksmd has looked at is not known: all may be new.
            owed = (anonymous_pages(sample) or 0.0, *owed[1:])
        # Where nobody knows what ksmd has done so far, and for pages that are old to smart_scan, peeking is no use.
        peeks = self.resting is not None and kind != _WRITTEN and self.limits.smart_scan
        burst = Burst(sample, sample, sample, owed, kind, cause, None if peeks else sample, blind=self.resting is None)
        return replace(after, burst=burst, resting=sample, moved_at=sample.time_seconds, owed_since=None)

    def _cost(self, sample: Sample) -> float:
        """Seconds of ksmd's time that a burst takes."""
        debts = self.debts.pages
        pages = (tracked_pages(sample) or 0) + max(0.0, debts[0] * self.debts.yields[0] - debts[1])
        # A look follows only where the peek found what it was done for.
        found = min(1.0, self.debts.yields[self.debts.main()] / PRIORS[self.debts.main()])
        return pages * (_PEEKS_EXPECTED * self.costs[PEEK] + found * self.costs[LOOK])

    def _judged(self, sample: Sample, burst: Burst) -> Adaptive:
        """Go on with a burst, or end it."""
        scans, began = sample.number("full_scans"), burst.start.number("full_scans")
        if scans is None or began is None:
            return self._end(sample, burst, "full scans can't be counted")
        if scans < began:
            return replace(self, resting=None)._start(sample, "everything was un-merged")
        if self._idle(sample):
            # Nothing to scan costs nothing: the first that comes finds ksmd at work.
            debts = self.debts.looked(anonymous_pages(sample), tracked_pages(sample))
            return replace(replace(self, resting=None, debts=debts)._start(sample, ""), moved_at=self.moved_at)
        if not burst.cause:
            last = "a process has memory that ksmd may scan"
            return replace(self, burst=None, resting=sample, owed_since=None, last=last)
        scan = burst.scan
        if scans == scan.number("full_scans"):
            soon = burst.looking is None and scans - began == _PEEKS - 1 and self._about_to_end(sample, scan)
            return self._peeked(sample, burst, 2) if soon else self
        after = replace(self, burst=replace(burst, scan=sample, older=scan))
        used = grown(scan, sample, "ksmd_cpu_seconds")
        after = after._measured_scan(sample, scan, burst.mode, used)
        if burst.looking is None:
            return after if scans - began < _PEEKS else after._peeked(sample, after.burst or burst, 0)
        if scans - (burst.looking.number("full_scans") or 0) < burst.looks:
            return after
        return after._end(sample, after.burst or burst, "it has looked at every page")

    def _idle(self, sample: Sample) -> bool:
        return sample.time_seconds - self.moved_at >= _NOTHING_SECONDS and not tracked_pages(sample)

    def _about_to_end(self, sample: Sample, scan: Sample) -> bool:
        """Whether the full scan that began at a sample seems to end before the next but one.

        The next one has to begin with smart_scan off: it meets old pages first.
        """
        share = self.pace.measured or self.pace.target
        takes = (tracked_pages(sample) or 0) * self.costs[PEEK] / max(share, 0.01)
        left = takes - (sample.time_seconds - scan.time_seconds)
        return takes > _SHORT_SCAN_TICKS * self.tick_seconds and left < 1.5 * self.tick_seconds

    def _peeked(self, sample: Sample, burst: Burst, looks: int) -> Adaptive:
        """Look, if ksmd has found enough of what it was to find.

        :param looks: full scans that have to end until then, 0 where one has just ended
        """
        known = tracked_pages(sample) or 0
        found = self._found(sample, burst)
        gained = grown(burst.start, sample, "pages_sharing") or 0.0
        used = grown(burst.start, sample, "ksmd_cpu_seconds") or 0.0
        expected = max(found * self.debts.yields[_SEEN] - gained, 0.0)
        worth = max(_FEW_GAINED, self.limits.worth * known * self.costs[LOOK])
        if max(expected, gained) < worth:
            return self._end(
                sample,
                burst,
                f"it found {count(found)} new pages in {seconds(used)}, of which too few may merge",
            )
        if not looks:
            looks = 1 if known * self.costs[LOOK] > _LONG_SCAN_TICKS * self.tick_seconds * self.pace.target else 2
        return replace(self, burst=replace(burst, looking=sample, looks=looks))

    @staticmethod
    def _found(sample: Sample, burst: Burst) -> float:
        """Pages that ksmd has newly found since a burst began."""
        return max(0.0, (tracked_pages(sample) or 0) - (tracked_pages(burst.start) or 0))

    def _measured_scan(self, sample: Sample, scan: Sample, mode: str, used: float | None) -> Adaptive:
        tracked, scans = tracked_pages(sample), grown(scan, sample, "full_scans")
        if not tracked or not scans or used is None or used < 0.05:
            return self
        cost = min(max(used / scans / tracked, 1e-7), 5e-5)
        return replace(self, costs={**self.costs, mode: (self.costs[mode] + cost) / 2})

    def _end(self, sample: Sample, burst: Burst, why: str) -> Adaptive:
        merged = (sample.number("pages_sharing") or 0.0) - (burst.start.number("pages_sharing") or 0.0)
        split = grown(burst.start, sample, "thp_split_page") or 0.0
        gained = merged - split * HUGE_PAGE_WORTH
        used = grown(burst.start, sample, "ksmd_cpu_seconds")
        owed = tuple(max(before, now) for before, now in zip(burst.owed, self.debts.pages, strict=True))
        debts, verdict = self.debts, self.verdict
        if burst.kind == _WRITTEN:
            sharing = burst.start.number("pages_sharing") or 0.0
            verdict = Verdict(sample.time_seconds + _LASTING_SECONDS, sharing, owed)
        else:
            debts = debts.learned(owed, burst.kind, gained)
        if burst.looking is not None and burst.kind != _SEEN:
            debts = debts.learned((0.0, self._found(sample, burst), 0.0, 0.0), _SEEN, gained)
        debts = debts.looked(anonymous_pages(burst.older), tracked_pages(sample))
        took = sample.time_seconds - burst.start.time_seconds
        paid = used is not None and gained >= self.limits.worth * used
        last = f"the last burst merged {count(max(0.0, merged))} pages in {seconds(took)}"
        last += "" if used is None else f", {seconds(used)} of ksmd's time"
        if split:
            last += f", and split {count(split)} huge pages, each of which counts as {HUGE_PAGE_WORTH} lost"
        swapped = self.swapped
        if KINDS[burst.kind] == "swapped":
            swapped = Pulse(swapped.pulses + 1, swapped.pages + round(max(0.0, merged)))
        return replace(
            self,
            burst=None,
            resting=sample,
            rest_until=sample.time_seconds + (0.0 if paid else self._rest(used)),
            rest_kind=burst.kind,
            debts=debts,
            verdict=verdict,
            # A look that began a little late has missed a few pages: a pulse in the background finds these.
            smart=self.smart if burst.looking is None or burst.looks == 1 else self.smart.looked(sample),
            last=f"{last}; it ended because {why}",
            bursts=Pulse(self.bursts.pulses + 1, self.bursts.pages + round(max(0.0, merged))),
            swapped=swapped,
        )

    @staticmethod
    def _rest(used: float | None) -> float:
        least, most = _REST_SECONDS
        return least if used is None else min(max(used / _WASTE, least), most)

    # -- how quick -----------------------------------------------------------------------------------------

    def _share(self, sample: Sample) -> tuple[str, float, str]:
        """The phase, ksmd's share of a CPU in it, and why."""
        limits, burst = self.limits, self.burst
        if burst is None:
            return BACKGROUND, limits.idle_cpu, f"{self.last}; {self._waits(sample)}"
        # No more full scans a tick than can be looked at.
        expected = (pages * share for pages, share in zip(burst.owed, self.debts.yields, strict=True))
        known = (tracked_pages(sample) or 0) + max(expected)
        useful = _SCANS_A_TICK[burst.mode] * max(known, 4 * _FEW_PAGES) * self.costs[burst.mode] / self.tick_seconds
        if not burst.cause:
            return READY, limits.max_cpu, "no process has memory that ksmd may scan, so being quick costs nothing"
        share = min(limits.max_cpu, max(limits.idle_cpu, useful))
        if burst.blind and burst.scan is burst.start:
            share = limits.max_cpu
        scans = (sample.number("full_scans") or 0) - (burst.start.number("full_scans") or 0)
        done = f"; it {'peeks' if burst.looking is None else 'looks'}"
        if scans:
            done += f", and {scans:.0f} full scans of it are over"
        why, pressure = burst.cause + done, self.pressure
        if pressure is None or not pressure.high:
            return QUICK, share, why
        if not pressure.by_cpu and self._relieves(sample, burst):
            return QUICK, share, f"{why}; {pressure.text()}, and merging relieves that"
        share = min(share, max(limits.idle_cpu, _GENTLE * limits.max_cpu))
        return GENTLE, share, f"{why}; but {pressure.text()}"

    def _scanned(self) -> str:
        """What is scanned, which decides what a page costs."""
        if self.burst is not None:
            return self.burst.mode
        return PULSE if self.smart.off else BACKGROUND

    def _relieves(self, sample: Sample, burst: Burst) -> bool:
        used, gained = grown(burst.start, sample, "ksmd_cpu_seconds"), grown(burst.start, sample, "pages_sharing")
        # Until it shows what this burst brings, what is expected of it counts: it would not have begun.
        return not used or used < 0.5 or (gained or 0.0) >= self.limits.worth * used

    def _waits(self, sample: Sample) -> str:
        if not tracked_pages(sample):
            return "no process has memory that ksmd may scan"
        debts = self.debts
        if max(debts.pages) < _FEW_PAGES:
            return f"since then {debts.text()}"
        text = f"since then {debts.text()}: about {count(debts.gain)} may merge"
        if self._worth(self._cost(sample)):
            why = (
                "bursts for such have not paid lately" if self._rests(sample.time_seconds) else "it may not be all yet"
            )
            return f"{text}; that waits, for {why}"
        return f"{text}, not worth {seconds(self._cost(sample))} of ksmd's time"

    def _advice(self, sample: Sample, phase: str, why: str) -> Advice:
        pace = self.pace
        reasons = [Reason("phase", f"{phase}: {why}"), Reason("speed", pace.text())]
        knobs: dict[Knob, KnobValue] = {
            Knob.RUN: 1,
            Knob.SLEEP_MILLISECS: pace.sleep_millisecs,
            Knob.PAGES_TO_SCAN: pace.pages,
        }
        if isinstance(sample.readings.get(Knob.ADVISOR_MODE), str):
            knobs[Knob.ADVISOR_MODE] = "none"
        healed = {"swapin": self.swapped} if self.limits.swapin else {}
        unrealised = {"swapin": round(self.debts.swapped)} if self.limits.swapin else {}
        if isinstance(sample.readings.get(Knob.SMART_SCAN), int):
            off = self.limits.smart_scan and (self.smart.off if self.burst is None else self.burst.looking is not None)
            knobs[Knob.SMART_SCAN] = 0 if off else 1
            text = self.smart.text()
            if self.burst is not None:
                text = "off, to look at every page" if off else "on, to see first whether it finds new pages"
            reasons.append(Reason("smart_scan", text))
            if self.limits.smart_scan:
                healed["smart_scan"] = self.smart.total
                if self.smart.apart is not None:
                    unrealised["smart_scan"] = self.smart.apart
        if sample.number("ksmd_cpu_seconds") is None:
            reasons.append(Reason("ksmd", "its CPU time can't be read here, so what a page costs is a guess"))
        hurry = _HURRY_SECONDS if phase in (QUICK, GENTLE) or self.owed_since is not None else None
        return Advice(knobs, tuple(reasons), phase, hurry, healed, unrealised)
