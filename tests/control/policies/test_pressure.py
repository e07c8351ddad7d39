# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a CPU and for memory, each smoothed and by itself."""

from __future__ import annotations

from ksmd_ctl.control.policies.pressure import Pressure
from ksmd_ctl.host.sample import Sample


def waiting(pressure: Pressure, cpu: float, memory: float, seconds: int = 60) -> Pressure:
    """So long with such shares of the time in which some task waits."""
    for second in range(seconds):
        before, after = (
            Sample(now, {"cpu_pressure_some_seconds": cpu * now, "pressure_some_seconds": memory * now})
            for now in (float(second), second + 1.0)
        )
        pressure = pressure.step(before, after)
    return pressure


def test_each_has_its_limit_and_is_told_of() -> None:
    calm = Pressure(0.8, 0.2)
    for cpu, memory, words in (
        (0.95, 0.0, "CPU pressure is 95 %"),
        (0.1, 0.5, "memory pressure is 50 %"),
        (0.95, 0.5, "CPU pressure"),
    ):
        found = waiting(calm, cpu, memory)
        assert (found.cpu_high, found.memory_high) == (cpu > 0.8, memory > 0.2)
        assert words in found.text()
    assert not waiting(calm, 0.7, 0.15).high


def test_a_moment_is_none_and_it_is_over_well_below_the_limit() -> None:
    calm = Pressure(0.8, 0.2)
    assert not waiting(calm, 1.0, 1.0, 2).high
    high = waiting(calm, 0.95, 0.0)
    assert waiting(high, 0.6, 0.0).cpu_high
    assert not waiting(high, 0.3, 0.0).cpu_high


def test_waiting_for_memory_does_not_hide_that_tasks_wait_for_a_cpu() -> None:
    assert waiting(Pressure(0.8, 0.2), 0.9, 1.0).cpu_high
