# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether tasks wait for a CPU or for memory, smoothed, and without flapping (/proc/pressure)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ksmd_ctl.control.policies.change import grown
from ksmd_ctl.control.policies.figures import percent
from ksmd_ctl.host.sample import Sample

__all__ = ["Pressure"]

_SMOOTHING_SECONDS: Final = 10.0
# It is over once it is below this share of its limit.
_RELAXED: Final = 0.6


@dataclass(frozen=True, slots=True)
class Pressure:
    """Shares of the time in which some task waited.

    :ivar most_cpu, most_memory: the limits
    :ivar cpu_high, memory_high: it is over its limit, or was and is not much below it yet
    """

    most_cpu: float
    most_memory: float
    cpu: float = 0.0
    memory: float = 0.0
    cpu_high: bool = False
    memory_high: bool = False

    def step(self, before: Sample, sample: Sample) -> Pressure:
        """Take a sample in."""
        passed = max(sample.time_seconds - before.time_seconds, 1e-3)
        weight = min(1.0, passed / _SMOOTHING_SECONDS)
        waited = (grown(before, sample, name) for name in ("cpu_pressure_some_seconds", "pressure_some_seconds"))
        cpu, memory = (min(1.0, (seconds or 0.0) / passed) for seconds in waited)
        after = replace(
            self, cpu=self.cpu + weight * (cpu - self.cpu), memory=self.memory + weight * (memory - self.memory)
        )
        return replace(
            after,
            cpu_high=_over(after.cpu, self.most_cpu, self.cpu_high),
            memory_high=_over(after.memory, self.most_memory, self.memory_high),
        )

    @property
    def high(self) -> bool:
        """Whether either is."""
        return self.cpu_high or self.memory_high

    def text(self) -> str:
        """What is waited for, and for how much of the time."""
        return f"CPU pressure is {percent(self.cpu)}" if self.cpu_high else f"memory pressure is {percent(self.memory)}"


def _over(share: float, most: float, before: bool) -> bool:
    return share > most * (_RELAXED if before else 1.0)
