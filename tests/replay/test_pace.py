# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast ksmd was, from what a recording has of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.sample import Sample
from ksmd_ctl.replay.pace import Pace, Speed, measure


def sample(seconds: float, scanned: float, cpu: float, scans: float = 0, **knobs: int | str) -> Sample:
    readings = {"run": 1, "pages_to_scan": 100, "sleep_millisecs": 20, "advisor_mode": "none", "pages_scanned": scanned}
    return Sample(seconds, {**readings, "ksmd_cpu_seconds": cpu, "full_scans": scans, **knobs})


@given(st.floats(500, 20_000), st.floats(0, 5e6), st.integers(50, 5000))
def test_cost_and_delay_are_found_again(cost: float, delay: float, batch: int) -> None:
    """One full scan is never done: batches are of one size."""
    each = 20e6 + delay + batch * cost
    samples = [
        sample(second, second * 1e9 / each * batch, second * 1e9 / each * batch * cost / 1e9, pages_to_scan=batch)
        for second in range(12)
    ]
    speed = measure(samples).at(3.0)
    assert speed.cost_ns == pytest.approx(cost)
    assert speed.delay_ns == pytest.approx(delay, abs=1.0)


def test_a_batch_ends_with_its_full_scan() -> None:
    """250 pages in three batches, each 21 ms long: 100, 100 and 50 pages."""
    samples = [sample(second, second / 0.063 * 250, second * 0.01, second / 0.063) for second in range(8)]
    cpu = 0.01 * 0.021
    assert measure(samples).at(1.0).delay_ns == pytest.approx((0.021 - 0.020 - cpu) * 1e9, rel=1e-6)


def test_what_changes_with_a_knob_is_measured_anew() -> None:
    slow = [sample(second, second * 1000, second * 0.01) for second in range(7)]
    quick = [sample(7 + second, 7000 + second * 10_000, 0.07 + second * 0.02, sleep_millisecs=2) for second in range(8)]
    pace = measure([*slow, *quick])
    assert pace.at(0.0).cost_ns == pytest.approx(10_000)
    assert pace.at(20.0).cost_ns == pytest.approx(2_000)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [sample(0, 0, 0)],
        [sample(second, 0, 0) for second in range(20)],
        [sample(second, 5000 - second, 0) for second in range(20)],
        [sample(second, second * 5000, second, run=0) for second in range(20)],
        [Sample(second, {"run": 1}) for second in range(20)],
    ],
)
def test_where_nothing_can_be_measured_the_usual_pace_holds(samples: list[Sample]) -> None:
    assert measure(samples) == Pace((), ())
    assert measure(samples).at(5.0).cost_ns > 0


def test_before_anything_was_measured_the_usual_pace_holds() -> None:
    pace = Pace([10.0], [Speed(1.0, 2.0)], Speed(3.0, 4.0))
    assert (pace.at(9.9), pace.at(10.0), pace.at(99.0)) == (Speed(3.0, 4.0), Speed(1.0, 2.0), Speed(1.0, 2.0))
