# SPDX-License-Identifier: GPL-2.0-or-later
"""ksmd's time against its share."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.control.policies.allowance import Allowance
from ksmd_ctl.host.sample import Sample


class Ksmd:
    """ksmd's time, looked at each second."""

    def __init__(self, share: float) -> None:
        self.share, self.now, self.cpu = share, 0.0, 100.0
        self.allowance = Allowance()
        self.take(0.0)

    def take(self, *seconds: float) -> None:
        """So much in each of the next seconds."""
        for used in seconds:
            self.now += 1.0
            self.cpu += used
            self.allowance = self.allowance.step(Sample(self.now, {"ksmd_cpu_seconds": self.cpu}), self.share)


def test_it_rests_until_it_has_made_good() -> None:
    ksmd = Ksmd(0.1)
    ksmd.take(0.1, 0.2, 0.3)
    assert not ksmd.allowance.rest_seconds
    # 1.5 s at once: a rest begins while it is still at it, and grows with what it takes.
    ksmd.take(1.0)
    first = ksmd.allowance.rest_seconds
    assert first == pytest.approx(10 * (0.1 + 0.2 + 0.9))
    ksmd.take(0.9)
    second = ksmd.allowance.rest_seconds
    assert second == pytest.approx(10 * (0.1 + 0.2 + 0.9 + 0.8))
    assert "it rests for 20 s" in ksmd.allowance.text()
    # Then it stays as it is: to write it would wake ksmd.
    ksmd.take(*[0.0] * 19)
    assert ksmd.allowance.rest_seconds == second
    ksmd.take(0.0, 0.0)
    assert ksmd.allowance.rest_seconds == 0.0
    # The next time it is known from the beginning how much it takes.
    ksmd.take(0.8)
    assert ksmd.allowance.rest_seconds == second


@given(st.lists(st.floats(0, 0.1), max_size=60))
def test_who_takes_no_more_than_its_share_never_rests(used: list[float]) -> None:
    ksmd = Ksmd(0.1)
    ksmd.take(*used)
    assert not ksmd.allowance.rest_seconds


@settings(max_examples=20)
@given(st.floats(0.02, 0.8), st.floats(0.6, 30.0))
def test_in_the_long_run_it_keeps_to_its_share(share: float, walk: float) -> None:
    ksmd = Ksmd(share)
    began, left, sleeps = ksmd.cpu, walk, 0.0
    spent = 0
    while spent < 4:
        used = min(left, 1.0)
        left -= used
        ksmd.take(used)
        if left <= 0:
            sleeps += 1.0
            if sleeps > ksmd.allowance.rest_seconds:
                left, sleeps, spent = walk, 0.0, spent + 1
    # The first walk is not known before it has been.
    assert ksmd.cpu - began <= 1.5 * share * ksmd.now + 2 * walk


def test_where_ksmds_time_is_not_known_it_never_rests() -> None:
    allowance = Allowance()
    for second in range(50):
        allowance = allowance.step(Sample(float(second), {}), 0.1)
    assert not allowance.rest_seconds
