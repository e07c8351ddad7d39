# SPDX-License-Identifier: GPL-2.0-or-later
"""CPU time is kept to a share of the time that passes."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.pace import Pace


@dataclass
class Clock:
    cpu: float = 100.0
    now: float = 7.0
    slept: int = 0

    def work(self, seconds: float) -> None:
        self.cpu += seconds
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        self.now += seconds


@given(st.floats(0.001, 1.0), st.lists(st.floats(0.0001, 0.5), max_size=50))
def test_never_more_than_the_share(share: float, work: list[float]) -> None:
    clock = Clock()
    pace = Pace(share, cpu=lambda: clock.cpu, clock=lambda: clock.now, sleep=clock.sleep)
    for seconds in work:
        clock.work(seconds)
        pace.keep()
        assert pace.cpu_seconds <= share * (pace.seconds + 0.02) + 1e-9
    pace.keep(exactly=True)
    assert pace.cpu_seconds <= share * pace.seconds + 1e-9
    assert pace.cpu_seconds <= sum(work) + 1e-6


def test_it_does_not_sleep_for_every_little_thing() -> None:
    clock = Clock()
    pace = Pace(0.5, cpu=lambda: clock.cpu, clock=lambda: clock.now, sleep=clock.sleep)
    for _ in range(1000):
        clock.work(0.001)
        pace.keep()
    assert 10 < clock.slept < 60


def test_waiting() -> None:
    clock = Clock()
    pace = Pace(1.0, cpu=lambda: clock.cpu, clock=lambda: clock.now, sleep=clock.sleep)
    pace.wait_until(5.0)
    assert pace.seconds == 5.0
    pace.wait_until(3.0)
    assert pace.seconds == 5.0
