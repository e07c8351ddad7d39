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


def test_what_no_page_can_cost_is_a_walk_and_a_burst_pays_for_it() -> None:
    costs = Costs().scanned("peek", sample(0.0), sample(5.0, full_scans=12, ksmd_cpu_seconds=4.0))
    assert costs.walk == pytest.approx(1.5 - 6100 * 1.5e-6)
    assert costs.page == Costs().page
    now = sample(0.0)
    assert costs.scan("look", now) == pytest.approx(costs.walk + 6100 * 3e-6)
    assert costs.burst(Debts(before=now, written=1000.0), now) > 2 * costs.walk
    # Later pages cost what is left; and who walked has ended where a scan takes less.
    later = costs.scanned(
        "peek",
        sample(0.0, pages_unshared=100_000),
        sample(5.0, pages_unshared=100_000, full_scans=11, ksmd_cpu_seconds=2.7),
    )
    assert later.walk == costs.walk
    assert later.page["peek"] < 3e-6
    assert costs.scanned("peek", sample(0.0), sample(5.0, full_scans=12, ksmd_cpu_seconds=1.2)).walk == pytest.approx(
        0.1
    )
