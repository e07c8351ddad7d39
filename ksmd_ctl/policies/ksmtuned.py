# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "ksmtuned"``: the formula of ksmtuned (oVirt, Debian's package of that name), for those who move over.

Memory is short when less than a threshold of it is free: a share of all, or a constant if that is more. Then ksmd
merges, each interval by more pages a batch; while memory is not short, by fewer; and where all that is committed fits
with the threshold to spare, it stops.

Two of the script's faults are mended:

- It counts as committed only the memory of processes whose command line begins with ``qemu-system`` and holds
  ``-enable-kvm``. Here it is all anonymous memory of the host, as far as it is or would be resident un-merged.
- Its constant threshold is meant as 2048 MiB and compared with KiB, so it is 2 MiB and never counts. Here it is bytes.

What is free is MemAvailable; the script adds MemFree, Buffers and Cached, in which shared memory stands as if it were
free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.policy import Policy, PolicyDecision, Reason

_LEAST_SLEEP_MILLISECS: Final = 10
# The host that sleep_millisecs is meant for.
_REFERENCE_BYTES: Final = 16 << 30


@dataclass(frozen=True, slots=True)
class Ksmtuned:
    """ksmtuned's quantities, and how far it is.

    :ivar npages: pages_to_scan now
    :ivar until: it decides anew then
    """

    fresh: ClassVar = False
    interval: float
    npages_boost: int
    npages_decay: int
    npages_min: int
    npages_max: int
    sleep_millisecs: int
    thres_coef: float
    thres_const_bytes: int
    page_size_bytes: int
    npages: int = 0
    until: float = 0.0
    decision: PolicyDecision | None = None

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Decide once an interval."""
        if self.decision is not None and sample.time_seconds < self.until:
            return self, self.decision
        npages, decision = self._decide(sample)
        return replace(self, npages=npages, decision=decision, until=sample.time_seconds + self.interval), decision

    def _decide(self, sample: Sample) -> tuple[int, PolicyDecision]:
        total, free = sample.number("mem_total_bytes"), sample.number("mem_available_bytes")
        if not total or free is None:
            text = "memory size can't be read: using npages_min until it can"
            return self.npages_min, self._merge(self.npages_min, _LEAST_SLEEP_MILLISECS, Reason("memory", text))
        threshold = max(total * self.thres_coef, self.thres_const_bytes)
        anonymous = sample.number("nr_anon_pages")
        # What is merged counts once a mapping, as it does in the sizes of processes.
        saved = sample.number("pages_sharing") or 0
        committed = None if anonymous is None else (anonymous + saved) * self.page_size_bytes
        sleep = max(_LEAST_SLEEP_MILLISECS, int(self.sleep_millisecs * _REFERENCE_BYTES / total))
        said = f"{bytes_text(free)} of {bytes_text(total)} are free, the threshold is {bytes_text(threshold)}"
        if committed is not None and committed + threshold < total and free > threshold:
            text = f"memory is not short: {said}, and {bytes_text(committed)} committed would fit un-merged: run = 0"
            return self.npages, PolicyDecision(self._knobs(0, None, sleep), (Reason("memory", text),), "stopped")
        if free < threshold:
            npages = self._clamped(self.npages + self.npages_boost)
            text = f"memory is short: {said}: pages_to_scan grows by {self.npages_boost} to {npages}"
        else:
            npages = self._clamped(self.npages - self.npages_decay)
            fits = "" if committed is None else f", but {bytes_text(committed)} committed would not fit un-merged"
            text = f"memory is not short: {said}{fits}: pages_to_scan shrinks by {self.npages_decay} to {npages}"
        return npages, self._merge(npages, sleep, Reason("memory", text))

    def _merge(self, npages: int, sleep: int, reason: Reason) -> PolicyDecision:
        return PolicyDecision(self._knobs(1, npages, sleep), (reason,), "merging")

    def _knobs(self, run: int, npages: int | None, sleep: int) -> dict[Knob, KnobValue]:
        knobs: dict[Knob, KnobValue] = {Knob.RUN: run}
        if run:
            knobs |= {Knob.ADVISOR_MODE: "none", Knob.SLEEP_MILLISECS: sleep}
            if npages is not None:
                knobs[Knob.PAGES_TO_SCAN] = npages
        return knobs

    def _clamped(self, npages: int) -> int:
        return min(max(npages, self.npages_min), self.npages_max)
