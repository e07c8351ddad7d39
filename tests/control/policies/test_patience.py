# SPDX-License-Identifier: GPL-2.0-or-later
"""When a burst begins."""

from __future__ import annotations

from dataclasses import replace

from ksmd_ctl.control.policies.debts import KINDS, PRIORS, Debts
from ksmd_ctl.control.policies.patience import Patience
from ksmd_ctl.host.sample import Sample

WRITTEN = KINDS.index("written")


def owing(pages: float) -> Debts:
    """So many merged pages have been written, of which a quarter is believed to merge."""
    return Debts(before=Sample(0.0, {}), written=pages)


def test_what_has_settled_is_looked_at() -> None:
    patience = Patience().step(10.0, owing(8000), 1.0, 1000)
    assert patience.owed_since == 10.0
    assert not patience.over(10.9)
    assert patience.over(11.0)
    assert "waiting for more pages to appear" in patience.text(10.0, owing(8000), 1.0, 1000)
    assert patience.begun().owed_since is None


def test_what_grows_is_waited_for_but_not_for_long() -> None:
    patience, now = Patience(), 0.0
    while not patience.over(now):
        now += 0.5
        patience = patience.step(now, owing(8000 * (1 + now)), 1.0, 1000)
        assert now < 10
    assert patience.owed_since == 0.5
    assert now == 4.5
    slow = Patience().step(1.0, owing(8000), 1.0, 1000).step(2.0, owing(8300), 1.0, 1000)
    assert slow.over(2.0)


def test_what_is_not_worth_its_cost_waits() -> None:
    debts = owing(8000)
    assert Patience().step(1.0, debts, 2.0, 1000).owed_since is not None
    assert Patience().step(1.0, debts, 2.1, 1000).owed_since is None
    assert "not worth 2.1 s of ksmd's time" in Patience().text(1.0, debts, 2.1, 1000)
    assert Patience().step(1.0, owing(511), 0.0, 1000).owed_since is None
    begun = Patience().step(1.0, debts, 2.0, 1000)
    assert begun.step(2.0, owing(0), 2.0, 1000).owed_since is None


def test_pages_for_which_bursts_fail_time_and_again_rest() -> None:
    good = owing(80_000)
    bad = replace(good, yields=(*PRIORS[:WRITTEN], 0.05, *PRIORS[WRITTEN + 1 :]))
    rested = Patience().ended(100.0, WRITTEN, 1.0, paid=False)
    assert rested.rest_until == 120.0
    assert rested.step(119.0, good, 1.0, 1000).owed_since == 119.0
    assert rested.step(119.0, bad, 1.0, 1000).owed_since is None
    assert "bursts for such pages did not pay" in rested.text(119.0, bad, 1.0, 1000)
    assert rested.step(120.0, bad, 1.0, 1000).owed_since == 120.0
    assert replace(rested, rest_kind=0).step(119.0, bad, 1.0, 1000).owed_since == 119.0


def test_a_rest_is_as_long_as_the_burst_was_dear() -> None:
    def rest(used: float | None, *, paid: bool = False) -> float:
        return Patience().ended(100.0, WRITTEN, used, paid=paid).rest_until - 100.0

    assert [rest(0.01), rest(1.0), rest(10.0), rest(None)] == [1.0, 20.0, 60.0, 1.0]
    assert rest(10.0, paid=True) == 0.0
