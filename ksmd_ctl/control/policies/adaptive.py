# SPDX-License-Identifier: GPL-2.0-or-later
"""``policy = "adaptive"``: ksmd works where pages still get merged, and rests where none do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.control.policies.advice import Advice, Reason, Steering
from ksmd_ctl.control.policies.figures import count, percent
from ksmd_ctl.host import Sample
from ksmd_ctl.knobs import Knob, KnobValue

__all__ = ["Adaptive", "Limits"]

_SLEEP_MILLISECS: Final = 10
_FIRST_PAGES: Final = 1000
_LEAST_PAGES: Final = 16
_MOST_PAGES: Final = 20000


@dataclass(frozen=True, slots=True)
class Limits:
    """Shares of one CPU; pages a second of ksmd's CPU time; a share of the time in which some task waits."""

    max_cpu: float = 0.8
    idle_cpu: float = 0.01
    worth: int = 5000
    max_pressure: float = 0.3


@dataclass(frozen=True, slots=True)
class Adaptive:
    """The policy and what it has learned."""

    limits: Limits = field(default_factory=Limits)
    before: Sample | None = None
    pages: int = _FIRST_PAGES

    @property
    def fresh(self) -> bool:
        return True

    def step(self, sample: Sample) -> tuple[Steering, Advice]:
        """Keep ksmd's share at its limit."""
        after = replace(self, before=sample, pages=self._paced(sample))
        knobs: dict[Knob, KnobValue] = {
            Knob.RUN: 1,
            Knob.ADVISOR_MODE: "none",
            Knob.SLEEP_MILLISECS: _SLEEP_MILLISECS,
            Knob.PAGES_TO_SCAN: after.pages,
        }
        if isinstance(sample.readings.get(Knob.SMART_SCAN), int):
            knobs[Knob.SMART_SCAN] = 1
        text = f"{count(after.pages)} pages a batch, for {percent(self.limits.max_cpu)} of a CPU"
        return after, Advice(knobs, (Reason("pages_to_scan", text),), "quick")

    def _paced(self, sample: Sample) -> int:
        if self.before is None:
            return self.pages
        used, seconds = sample.number("ksmd_cpu_seconds"), sample.time_seconds - self.before.time_seconds
        first = self.before.number("ksmd_cpu_seconds")
        if used is None or first is None or seconds <= 0:
            return self.pages
        share = max(0.01, (used - first) / seconds)
        pages = int(min(max(_LEAST_PAGES, self.pages * self.limits.max_cpu / share), _MOST_PAGES))
        return pages if abs(pages - self.pages) > 0.2 * self.pages else self.pages
