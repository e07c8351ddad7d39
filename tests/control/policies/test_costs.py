# SPDX-License-Identifier: GPL-2.0-or-later
"""What full scans cost."""

from __future__ import annotations

import pytest

from ksmd_ctl.control.policies.costs import Costs
from ksmd_ctl.control.policies.debts import PRIORS, Debts
from ksmd_ctl.host.sample import Sample


def sample(time: float, **readings: float) -> Sample:
    base = {"full_scans": 10, "pages_sharing": 1000, "pages_shared": 100, "pages_unshared": 5000, "pages_volatile": 0}
    return Sample(time, {**base, "ksmd_cpu_seconds": 1.0, **readings})


def test_costs_are_learned_by_mode() -> None:
    costs = Costs()
    before, after = sample(0.0), sample(1.0, full_scans=12, ksmd_cpu_seconds=1.122)
    measured = costs.scanned("peek", before, after)
    assert measured.page["peek"] == pytest.approx((1.5e-6 + 1e-5) / 2)
    assert measured.page["look"] == costs.page["look"]
    assert measured.scan("look", after) == pytest.approx(6100 * 3e-6)


@pytest.mark.parametrize("readings", [{"ksmd_cpu_seconds": 1.04}, {"full_scans": 10}, {"ksmd_cpu_seconds": 0.5}])
def test_costs_stay_where_nothing_can_be_told(readings: dict[str, float]) -> None:
    after = sample(1.0, **{"full_scans": 12, "ksmd_cpu_seconds": 3.0, **readings})
    assert Costs().scanned("peek", sample(0.0), after) == Costs()


def test_a_burst_for_what_seldom_merges_is_expected_to_end_with_the_peek() -> None:
    now = sample(0.0)
    usual = Costs().burst(Debts(before=now, written=1000.0), now)
    assert usual == pytest.approx(6100 * (1.5 * 1.5e-6 + 3e-6))
    seldom = Debts(before=now, written=1000.0, yields=(*PRIORS[:2], 0.05, *PRIORS[3:]))
    assert Costs().burst(seldom, now) == pytest.approx(6100 * (1.5 * 1.5e-6 + 0.2 * 3e-6))
