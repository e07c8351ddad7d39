# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "kubevirt"``: the rules of KubeVirt's virt-handler, for those who move over.

Each interval, by default three minutes: memory is short when no more than a share of it is available. Then ksmd is
started, or scans more pages a batch; while memory is not short it scans fewer, and stops once that would be less than
the least. How long ksmd sleeps is set at the same time, from how much memory is in use.

Source: pkg/virt-handler/ksm/ksm.go of KubeVirt 1.9 (calculateNewRunSleepAndPages). Two things differ: virt-handler
takes its state from the knobs each time, so that whoever else writes them is part of the rule, and here it is kept; and
virt-handler leaves the kernel's advisor on, which then refuses pages_to_scan, and here it is switched off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.policy import Policy, PolicyDecision, Reason

# The memory in use that sleep_ms_baseline is meant for.
_REFERENCE_BYTES: Final = 16 << 30


@dataclass(frozen=True, slots=True)
class Kubevirt:
    """virt-handler's quantities, under the names of its annotations, and how far it is.

    :ivar free_percent: a share, as in the annotation
    :ivar pages: pages_to_scan now; None before the first decision
    :ivar running: whether ksmd runs
    :ivar until: it decides anew then
    """

    fresh: ClassVar = False
    interval: float
    pages_boost: int
    pages_decay: int
    pages_min: int
    pages_max: int
    pages_init: int
    sleep_ms_baseline: int
    free_percent: float
    pages: int | None = None
    running: bool = False
    until: float = 0.0
    decision: PolicyDecision | None = None

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Decide once an interval."""
        if self.decision is not None and sample.time_seconds < self.until:
            return self, self.decision
        if self.pages is not None:
            return self._decided(sample)
        # As virt-handler, it goes on from what it finds.
        found = sample.knob(Knob.PAGES_TO_SCAN)
        pages = found if isinstance(found, int) else self.pages_init
        return replace(self, pages=pages, running=sample.knob(Knob.RUN) == 1)._decided(sample)

    def _decided(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        pages, running = self.pages or 0, self.running
        total, free = sample.number("mem_total_bytes"), sample.number("mem_available_bytes")
        knobs: dict[Knob, KnobValue] = {}
        if not total or free is None:
            text = "memory size can't be read: left as it is until it can"
            knobs |= self.decision.knobs if self.decision else {Knob.RUN: int(running)}
            decision = PolicyDecision(knobs, (Reason("memory", text),), self._phase(running))
            return replace(self, decision=decision, until=sample.time_seconds + self.interval), decision
        threshold = total * self.free_percent
        said = f"{bytes_text(free)} of {bytes_text(total)} are available, the threshold is {bytes_text(threshold)}"
        if free > threshold:
            said = f"memory is not short: {said}"
            if running:
                pages += self.pages_decay
                running = pages >= self.pages_min
                pages = max(pages, self.pages_min)
                change = f"shrinks by {-self.pages_decay} to {pages}" if running else "would shrink below its least"
                said += f": pages_to_scan {change}"
        elif running:
            pages = min(pages + self.pages_boost, self.pages_max)
            said = f"memory is short: {said}: pages_to_scan grows by {self.pages_boost} to {pages}"
        else:
            pages, running = self.pages_init, True
            said = f"memory is short: {said}: ksmd is started with {pages} pages a batch"
        knobs[Knob.RUN] = int(running)
        if running:
            used = max(total - free, 1)
            # In whole milliseconds, as there.
            sleep = max(int(self.sleep_ms_baseline * _REFERENCE_BYTES / used), self.sleep_ms_baseline // 10)
            sleep = min(sleep, KNOBS[Knob.SLEEP_MILLISECS].maximum or sleep)
            knobs |= {Knob.ADVISOR_MODE: "none", Knob.SLEEP_MILLISECS: sleep, Knob.PAGES_TO_SCAN: pages}
        else:
            said += ": run = 0"
        decision = PolicyDecision(knobs, (Reason("memory", said),), self._phase(running))
        until = sample.time_seconds + self.interval
        return replace(self, pages=pages, running=running, decision=decision, until=until), decision

    @staticmethod
    def _phase(running: bool) -> str:
        return "merging" if running else "stopped"
