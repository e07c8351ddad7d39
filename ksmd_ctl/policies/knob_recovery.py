# SPDX-License-Identifier: GPL-2.0-or-later
"""Recovery of missed savings by writing knobs for a few full scans.

- `SmartScan` says when to switch smart_scan off, and what that brought. `adaptive` uses it, too.
- `SwapIn` scans faster after swap has copied merged pages (findings F16).
- use_zero_pages is held at 1, so that ksmd splits all huge pages with zeroes in one scan (findings F36).
- `KnobRecovery` adds these to policies that know nothing of them: `fixed`, `ksmtuned`, `kernel`. What the policy, or
  ``[knobs]``, wants is held otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

from ksmd_ctl.figures import rough_count, rough_seconds
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import counter_delta, tracked_pages
from ksmd_ctl.policies.policy import Intervention, Policy, PolicyDecision, Reason

#: The rest of the scan that runs, and two full scans: the first takes the checksums, the second merges.
FULL_SCANS: Final = 3
# So many newcomers are not worth a pulse: a share of all, and pages.
_FEW_SHARE: Final = 0.001
_FEW_NEWCOMERS: Final = 64
_SETTLING_SCANS: Final = 3
_MOST_SETTLING_SCANS: Final = 384
_FIRST_WAIT_SECONDS: Final = 900.0
_LONGEST_WAIT_SECONDS: Final = 86400.0
# A pulse that brought less than this share of what might have been locked out brought next to nothing.
_SUCCESS: Final = 0.02
# Fewer copies than these are not worth it; and pages_to_scan at most.
_FEW_COPIES: Final = 256
_MOST_PAGES: Final = 20000


@dataclass(frozen=True, slots=True)
class SmartScan:
    """Pulses of smart_scan off, and what they brought.

    With smart_scan on, ksmd compares a page that did not merge in its first three scans and then in every second to
    ninth. Two equal pages merge only in a scan that compares both: of pairs that were registered 13 scans or more
    apart, every third never merges (findings F2), and pairs of processes share a fifth less than they could (F13). No
    counter shows it. With smart_scan off every scan compares every page.

    New records of ksmd since the last pulse are pages that may be locked out. A pulse waits for the three scans in
    which smart_scan compares them anyway, so that the gain of the pulse is its own. Pages may also become equal by
    being written, which no counter shows: so there is a pulse now and then as well. A pulse that brings next to nothing
    doubles the wait for the next one of its sort.

    :ivar known: pages that ksmd kept records of at the last look at all, or the least since
    :ivar grown_at: full_scans when newcomers were first seen
    :ivar settling_scans: how long newcomers are waited for
    :ivar wait_seconds: from one pulse now and then to the next
    :ivar since: full_scans when the pulse began, None while there is none
    :ivar cause: why it began, in words
    :ivar waiting: newcomers since the last look
    :ivar tried, brought: newcomers for which there were pulses, and what these brought
    :ivar total: what there was so far
    """

    known: float | None = None
    grown_at: float | None = None
    settling_scans: int = _SETTLING_SCANS
    wait_seconds: float = _FIRST_WAIT_SECONDS
    scanned_at: float | None = None
    since: float | None = None
    sharing: float = 0.0
    newcomers: float = 0.0
    cause: str = ""
    last: str = ""
    waiting: float = 0.0
    tried: float = 0.0
    brought: float = 0.0
    total: Intervention = field(default_factory=Intervention)

    @property
    def off(self) -> bool:
        """Whether smart_scan shall be off now."""
        return self.since is not None

    @property
    def locked_out(self) -> int | None:
        """Newcomers that smart_scan has locked out, estimated from earlier pulses; None before the first."""
        return round(self.waiting * min(1.0, self.brought / self.tried)) if self.tried else None

    def step(self, sample: Sample) -> SmartScan:
        """Take a sample in: begin with a pulse, go on with it, or end it."""
        scans, tracked = sample.number("full_scans"), tracked_pages(sample)
        sharing = sample.number("pages_sharing")
        if scans is None or tracked is None or sharing is None:
            return self
        if self.since is not None:
            if scans < self.since:
                return replace(self, since=None, known=None, grown_at=None)
            return self._ended(sample, tracked, sharing) if scans - self.since >= FULL_SCANS else self
        known = tracked if self.known is None else min(self.known, tracked)
        now = sample.time_seconds
        after = replace(self, known=known, scanned_at=now if self.scanned_at is None else self.scanned_at)
        newcomers = tracked - known
        after = replace(after, waiting=newcomers)
        if newcomers < max(_FEW_NEWCOMERS, _FEW_SHARE * tracked):
            after = replace(after, grown_at=None)
        elif after.grown_at is None or scans < after.grown_at:
            after = replace(after, grown_at=scans)
        elif scans - after.grown_at >= self.settling_scans:
            cause = f"{rough_count(newcomers)} pages have come since smart_scan was off last"
            return replace(after, since=scans, sharing=sharing, newcomers=newcomers, cause=cause)
        assert after.scanned_at is not None
        if tracked and now - after.scanned_at >= self.wait_seconds:
            on = rough_seconds(now - after.scanned_at)
            cause = f"smart_scan was on for {on}, and pages may have become equal meanwhile"
            return replace(after, since=scans, sharing=sharing, newcomers=0.0, cause=cause)
        return after

    def scanned(self, sample: Sample) -> SmartScan:
        """Somebody else has had ksmd look at everything with smart_scan off."""
        known = tracked_pages(sample)
        return replace(self, since=None, known=known, grown_at=None, scanned_at=sample.time_seconds, waiting=0.0)

    def _ended(self, sample: Sample, tracked: float, sharing: float) -> SmartScan:
        gained = max(0.0, sharing - self.sharing)
        good = gained >= _SUCCESS * (self.newcomers or tracked)
        settling, wait = self.settling_scans, self.wait_seconds
        if self.newcomers:
            settling = _SETTLING_SCANS if good else min(2 * settling, _MOST_SETTLING_SCANS)
        else:
            wait = _FIRST_WAIT_SECONDS if good else min(2 * wait, _LONGEST_WAIT_SECONDS)
        last = f"the last pulse brought {rough_count(gained)} pages"
        if not good:
            wait_text = f"{settling} full scans" if self.newcomers else rough_seconds(wait)
            last += f", next to nothing: the next such one waits {wait_text}"
        return replace(
            self.scanned(sample),
            settling_scans=settling,
            wait_seconds=wait,
            last=last,
            tried=self.tried + self.newcomers,
            brought=self.brought + (gained if self.newcomers else 0.0),
            total=self.total.and_one(round(gained)),
        )

    def text(self) -> str:
        """How it stands, in words."""
        if self.off:
            return f"off for {FULL_SCANS} full scans: {self.cause}"
        return "on" + (f"; {self.last}" if self.last else "")


@dataclass(frozen=True, slots=True)
class SwapCopies:
    """Pages that swap has copied and that ksmd has not passed twice since (findings F16, ksm_might_need_to_copy).

    :ivar before: the latest sample in which both counters could be read
    :ivar waiting: by full_scans when they were copied, how many were
    """

    before: Sample | None = None
    waiting: Mapping[float, float] = field(default_factory=dict)

    def step(self, sample: Sample) -> SwapCopies:
        """Take a sample in."""
        scans = sample.number("full_scans")
        if scans is None or sample.number("ksm_swpin_copy") is None:
            return self
        copied = counter_delta(self.before, sample, "ksm_swpin_copy")
        if copied == 0 and not self.waiting:
            return self
        found: defaultdict[float, float] = defaultdict(float)
        for when, pages in self.waiting.items():
            if scans < when + FULL_SCANS:
                # run = 2 begins to count scans anew.
                found[min(when, scans)] += pages
        if copied:
            found[scans] += copied
        return SwapCopies(sample, found)

    @property
    def pages(self) -> int | None:
        """How many there are; None where this kernel doesn't count them."""
        return None if self.before is None else round(sum(self.waiting.values()))


@dataclass(frozen=True, slots=True)
class SwapIn:
    """Scanning faster after swap has copied merged pages.

    :ivar copies: pages that ksmd has not passed twice since swap copied them
    :ivar since: full_scans when it began to scan faster, None while it doesn't
    :ivar usual: pages_to_scan as it was then
    """

    faster: int = 4
    copies: SwapCopies = field(default_factory=SwapCopies)
    since: float | None = None
    sharing: float = 0.0
    usual: int = 0
    total: Intervention = field(default_factory=Intervention)

    def step(self, sample: Sample, usual: KnobValue | None) -> SwapIn:
        """Take a sample in.

        :param usual: pages_to_scan without this, None where it can't be steered
        """
        after = replace(self, copies=self.copies.step(sample))
        copies = after.copies.pages or 0
        scans, sharing = sample.number("full_scans"), sample.number("pages_sharing")
        if scans is None or sharing is None:
            return after
        if self.since is None:
            if copies < _FEW_COPIES or not isinstance(usual, int) or not usual:
                return after
            return replace(after, since=scans, sharing=sharing, usual=usual)
        if self.since <= scans < self.since + FULL_SCANS:
            return after
        gained = round(max(0.0, sharing - self.sharing))
        return replace(after, since=None, total=self.total.and_one(gained))

    @property
    def pages(self) -> int:
        """pages_to_scan while it scans faster."""
        return max(self.usual, min(self.faster * self.usual, _MOST_PAGES))


def zero_pages_are_counted(sample: Sample) -> bool:
    """Whether ksmd can use the zero page here and the kernel counts what that saves (since 6.6)."""
    return isinstance(sample.readings.get(Knob.USE_ZERO_PAGES), int) and sample.number("ksm_zero_pages") is not None


@dataclass(frozen=True, slots=True)
class KnobRecovery:
    """Another policy, with recovery on top.

    :ivar own: what ``[knobs]`` wants
    :ivar smart, swapin: None where that is not switched on
    :ivar zero_pages: whether use_zero_pages is held at 1
    """

    fresh: ClassVar = False
    inner: Policy
    own: Mapping[Knob, KnobValue]
    smart: SmartScan | None = None
    swapin: SwapIn | None = None
    zero_pages: bool = False

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Let the policy decide, then add what recovers."""
        inner, decision = self.inner.step(sample)
        knobs, recovered, reasons = dict(decision.knobs), dict(decision.recovered), list(decision.reasons)
        unrealised = dict(decision.unrealised)
        smart, swapin = self.smart, self.swapin
        wanted = {**self.own, **knobs}
        if smart is not None and isinstance(sample.readings.get(Knob.SMART_SCAN), int):
            if wanted.get(Knob.SMART_SCAN, 1) == 1:
                smart = smart.step(sample)
                knobs[Knob.SMART_SCAN] = 0 if smart.off else 1
                reasons.append(Reason("smart_scan", smart.text))
            recovered["smart_scan"] = smart.total
            if smart.locked_out is not None:
                unrealised["smart_scan"] = smart.locked_out
        if swapin is not None:
            advised = "scan-time" in (wanted.get(Knob.ADVISOR_MODE), sample.knob(Knob.ADVISOR_MODE))
            usual = wanted.get(Knob.PAGES_TO_SCAN, swapin.usual or sample.knob(Knob.PAGES_TO_SCAN))
            swapin = swapin.step(sample, None if advised else usual)
            recovered["swapin"] = swapin.total
            if advised:
                # The kernel's advisor sets it.
                pass
            elif swapin.since is not None:
                knobs[Knob.PAGES_TO_SCAN] = swapin.pages
                text = f"{rough_count(swapin.copies.pages or 0)} merged pages were copied by swap"
                rate = f"{rough_count(swapin.pages)} pages a batch for {FULL_SCANS} full scans"
                reasons.append(Reason("swapin", f"{text}: {rate}"))
            elif Knob.PAGES_TO_SCAN not in wanted and sample.knob(Knob.PAGES_TO_SCAN) == swapin.pages != swapin.usual:
                # It was not wanted by anybody else, so somebody has to put it back.
                knobs[Knob.PAGES_TO_SCAN] = swapin.usual
        if self.zero_pages and zero_pages_are_counted(sample):
            knobs[Knob.USE_ZERO_PAGES] = 1
        after = replace(self, inner=inner, smart=smart, swapin=swapin)
        return after, replace(decision, knobs=knobs, reasons=tuple(reasons), recovered=recovered, unrealised=unrealised)
