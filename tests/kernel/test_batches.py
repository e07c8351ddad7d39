# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.batches import BatchSizer

SECONDS = st.floats(0, 1000, allow_nan=False)


@given(
    st.floats(1e-6, 10),
    st.lists(st.tuples(st.integers(0, 10000), SECONDS), max_size=30),
    st.integers(1, 50),
    st.integers(0, 50),
    st.integers(0, 5000),
)
def test_a_size_is_always_within_its_bounds(
    latency: float, measured: list[tuple[int, float]], minimum: int, more: int, most: int
) -> None:
    sizer = BatchSizer(latency, first=minimum + more, minimum=minimum, maximum=minimum + more + most)
    for pages, seconds in measured:
        before = sizer.size
        sizer.measured(pages, seconds)
        assert minimum <= sizer.size <= minimum + more + most
        assert sizer.size <= 2 * max(before, pages)


@given(st.floats(1e-4, 1), st.floats(1e-9, 1e-3), st.integers(1, 8192))
def test_where_pages_cost_alike_calls_come_to_fit_and_stay_so(latency: float, cost: float, first: int) -> None:
    sizer = BatchSizer(latency, first=first)
    for _ in range(20):
        sizer.measured(sizer.size, sizer.size * cost)
    for _ in range(10):
        # One page is the least that can be asked for, however long it takes.
        assert sizer.size == 1 or sizer.size * cost <= latency
        assert sizer.size == 8192 or sizer.size * cost * 2 + cost * 2 >= latency * 0.7 or sizer.size == 1
        sizer.measured(sizer.size, sizer.size * cost)


def test_a_slow_call_takes_effect_at_once_and_a_quick_one_by_and_by() -> None:
    sizer = BatchSizer(0.01, first=64)
    sizer.measured(64, 0.0001)
    assert sizer.size == 128
    sizer.measured(128, 1.0)
    assert sizer.size == 1
    sizer.measured(0, 0.0)
    assert sizer.size == 1


@pytest.mark.parametrize("wrong", [{"latency_seconds": 0}, {"latency_seconds": 1, "first": 0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="minimum"):
        BatchSizer(**wrong)
