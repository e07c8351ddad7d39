# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.daemon.lateness import BOUNDS_SECONDS, Lateness


@given(st.lists(st.one_of(st.sampled_from(BOUNDS_SECONDS), st.floats(0, 10))))
def test_how_many_came_within_each_bound(late: list[float]) -> None:
    lateness = Lateness()
    for seconds in late:
        lateness.add(seconds)
    assert lateness.document() == {
        "ticks": len(late),
        "seconds": pytest.approx(sum(late)),
        "within": {str(bound): sum(seconds <= bound for seconds in late) for bound in BOUNDS_SECONDS},
    }
