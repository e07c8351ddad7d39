# SPDX-License-Identifier: GPL-2.0-or-later
"""Healing by knobs for policies that know nothing of it: `fixed`, `ksmtuned`, `kernel`.

What the policy, or ``[knobs]``, wants is held, but for a while: smart_scan off for a few full scans
(`ksmd_ctl.policies.smart_scan`), and `SwapIn.faster` times as many pages a batch for two full scans after swap
has copied merged pages (findings F16). `adaptive` does both by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import counter_delta
from ksmd_ctl.policies.figures import count
from ksmd_ctl.policies.policy import Intervention, Policy, PolicyDecision, Reason
from ksmd_ctl.policies.smart_scan import SmartScan

__all__ = ["Healing", "SwapIn"]

_FEW_PAGES: Final = 256
_MOST_PAGES: Final = 20000
#: The rest of the scan that runs, and two full ones: the copies are new pages.
SCANS: Final = 3


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
            if scans < when + SCANS:
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
            if copies < _FEW_PAGES or not isinstance(usual, int) or not usual:
                return after
            return replace(after, since=scans, sharing=sharing, usual=usual)
        if self.since <= scans < self.since + SCANS:
            return after
        gained = round(max(0.0, sharing - self.sharing))
        return replace(after, since=None, total=self.total.and_one(gained))

    @property
    def pages(self) -> int:
        """pages_to_scan while it scans faster."""
        return max(self.usual, min(self.faster * self.usual, _MOST_PAGES))


@dataclass(frozen=True, slots=True)
class Healing:
    """Another policy, with healing on top.

    :ivar own: what ``[knobs]`` wants
    :ivar smart, swapin: None where that is not switched on
    """

    inner: Policy
    own: Mapping[Knob, KnobValue]
    smart: SmartScan | None = None
    swapin: SwapIn | None = None

    @property
    def fresh(self) -> bool:
        return self.inner.fresh

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Let the policy decide, then heal."""
        inner, decision = self.inner.step(sample)
        knobs, healed, reasons = dict(decision.knobs), dict(decision.healed), list(decision.reasons)
        unrealised = dict(decision.unrealised)
        smart, swapin = self.smart, self.swapin
        wanted = {**self.own, **knobs}
        if smart is not None and isinstance(sample.readings.get(Knob.SMART_SCAN), int):
            if wanted.get(Knob.SMART_SCAN, 1) == 1:
                smart = smart.step(sample)
                knobs[Knob.SMART_SCAN] = 0 if smart.off else 1
                reasons.append(Reason("smart_scan", smart.text))
            healed["smart_scan"] = smart.total
            if smart.locked_out is not None:
                unrealised["smart_scan"] = smart.locked_out
        if swapin is not None:
            advised = "scan-time" in (wanted.get(Knob.ADVISOR_MODE), sample.knob(Knob.ADVISOR_MODE))
            usual = wanted.get(Knob.PAGES_TO_SCAN, swapin.usual or sample.knob(Knob.PAGES_TO_SCAN))
            swapin = swapin.step(sample, None if advised else usual)
            healed["swapin"] = swapin.total
            if advised:
                # The kernel's advisor sets it.
                pass
            elif swapin.since is not None:
                knobs[Knob.PAGES_TO_SCAN] = swapin.pages
                text = f"{count(swapin.copies.pages or 0)} merged pages were copied by swap"
                reasons.append(Reason("swapin", f"{text}: {count(swapin.pages)} pages a batch for {SCANS} full scans"))
            elif Knob.PAGES_TO_SCAN not in wanted and sample.knob(Knob.PAGES_TO_SCAN) == swapin.pages != swapin.usual:
                # It was not wanted by anybody else, so somebody has to put it back.
                knobs[Knob.PAGES_TO_SCAN] = swapin.usual
        after = replace(self, inner=inner, smart=smart, swapin=swapin)
        return after, replace(decision, knobs=knobs, reasons=tuple(reasons), healed=healed, unrealised=unrealised)
