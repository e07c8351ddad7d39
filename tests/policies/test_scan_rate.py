# SPDX-License-Identifier: GPL-2.0-or-later
"""From a share of a CPU to knobs, on a ksmd whose pages cost what the test says; the CPU budget; pressure."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.policies.scan_rate import MOST_PAGES, CpuBudget, Pressure, ScanMode, ScanRate


def follow(
    share: float, costs: list[float], mode: ScanMode, *, counted: bool = True, lag: float = 0.003
) -> list[float]:
    """The share that ksmd takes in each second of ten at each cost."""
    rate, cpu, scanned, found = ScanRate(), 100.0, 0.0, []
    for second in range(10 * len(costs)):
        readings: dict[str, Reading] = {"ksmd_cpu_seconds": int(cpu * 100) / 100}
        if counted:
            readings["pages_scanned"] = int(scanned)
        rate = rate.step(Sample(float(second), readings), share, mode)
        assert 1 <= rate.pages <= MOST_PAGES
        assert rate.sleep_millisecs >= 1
        batch = rate.pages * costs[second // 10]
        period = batch + rate.sleep_millisecs / 1000 + lag
        cpu += batch / period
        scanned += rate.pages / period
        found.append(batch / period)
    return found


@settings(max_examples=50)
@given(st.floats(0.1, 0.9), st.floats(1e-6, 1.2e-5), st.booleans())
def test_it_finds_its_share_within_seconds(share: float, cost: float, counted: bool) -> None:
    found = follow(share, [cost], ScanMode.FULL, counted=counted)
    # More than the longest batch and the shortest sleep give is not to be had.
    longest = MOST_PAGES * cost
    share = min(share, longest / (longest + 0.001 + 0.003))
    assert abs(sum(found[5:]) / 5 - share) < 0.15 * share + 0.02


def test_it_finds_it_again_when_pages_cost_something_else() -> None:
    found = follow(0.5, [1e-6, 8e-6, 2e-6], ScanMode.FULL)
    for at in (8, 18, 28):
        assert abs(found[at] - 0.5) < 0.1
    assert max(found[11:]) < 0.7


def test_a_small_share_is_kept() -> None:
    found = follow(0.005, [1e-6] * 20, ScanMode.QUICK)
    assert abs(sum(found[100:]) / 100 - 0.005) < 0.001


def test_a_share_of_nothing_is_no_page() -> None:
    rate = ScanRate().step(Sample(0.0, {"ksmd_cpu_seconds": 0.0}), 0.5, ScanMode.QUICK)
    resting = rate.step(Sample(1.0, {"ksmd_cpu_seconds": 0.5}), 0.0, ScanMode.QUICK)
    # A write to sleep_millisecs would wake ksmd.
    assert (resting.pages, resting.sleep_millisecs) == (0, rate.sleep_millisecs)
    assert resting.text().startswith("0 pages")
    again = resting.step(Sample(900.0, {"ksmd_cpu_seconds": 0.5}), 0.5, ScanMode.QUICK)
    assert (again.pages, again.share) == (rate.pages, 0.5)


def test_a_batch_is_short() -> None:
    rate = ScanRate().step(Sample(0.0, {"ksmd_cpu_seconds": 0.0}), 0.95, ScanMode.FULL)
    assert rate.pages * rate.cost <= 0.0401


def test_where_ksmds_time_is_unknown_the_first_guess_stands() -> None:
    rate = ScanRate()
    for second in range(100):
        before = rate
        rate = rate.step(Sample(float(second), {}), 0.5, ScanMode.FULL)
    assert rate.pages == before.pages
    assert "measured" not in rate.text()


class Ksmd:
    """ksmd's time, sampled each second."""

    def __init__(self, share: float) -> None:
        self.share, self.now, self.cpu = share, 0.0, 100.0
        self.budget = CpuBudget()
        self.take(0.0)

    def take(self, *seconds: float) -> None:
        """So much in each of the next seconds."""
        for used in seconds:
            self.now += 1.0
            self.cpu += used
            self.budget = self.budget.step(Sample(self.now, {"ksmd_cpu_seconds": self.cpu}), self.share)


def test_it_rests_until_it_has_made_good() -> None:
    ksmd = Ksmd(0.1)
    ksmd.take(0.1, 0.2, 0.3)
    assert not ksmd.budget.rest_seconds
    # 1.5 s at once: a rest begins while it is still at it, and grows with what it takes.
    ksmd.take(1.0)
    first = ksmd.budget.rest_seconds
    assert first == pytest.approx(10 * (0.1 + 0.2 + 0.9))
    ksmd.take(0.9)
    second = ksmd.budget.rest_seconds
    assert second == pytest.approx(10 * (0.1 + 0.2 + 0.9 + 0.8))
    assert "ksmd sleeps for 20 s" in ksmd.budget.text()
    # Then it stays as it is: to write it would wake ksmd.
    ksmd.take(*[0.0] * 19)
    assert ksmd.budget.rest_seconds == second
    ksmd.take(0.0, 0.0)
    assert ksmd.budget.rest_seconds == 0.0
    # The next time it is known from the beginning how much it takes.
    ksmd.take(0.8)
    assert ksmd.budget.rest_seconds == second


@given(st.lists(st.floats(0, 0.1), max_size=60))
def test_who_takes_no_more_than_its_share_never_rests(used: list[float]) -> None:
    ksmd = Ksmd(0.1)
    ksmd.take(*used)
    assert not ksmd.budget.rest_seconds


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
            if sleeps > ksmd.budget.rest_seconds:
                left, sleeps, spent = walk, 0.0, spent + 1
    # The first walk is not known before it has been.
    assert ksmd.cpu - began <= 1.5 * share * ksmd.now + 2 * walk


def test_where_ksmds_time_is_not_known_it_never_rests() -> None:
    budget = CpuBudget()
    for second in range(50):
        budget = budget.step(Sample(float(second), {}), 0.1)
    assert not budget.rest_seconds


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


def test_while_ksmd_itself_waits_it_takes_no_cpu_from_others() -> None:
    def after(own: float) -> Pressure:
        readings = {"cpu_pressure_some_seconds": 60.0, "ksmd_wait_seconds": 60 * own}
        none = dict.fromkeys(readings, 0.0)
        return Pressure(0.8, 0.2).step(Sample(0.0, {**none}), Sample(60.0, {**readings}))

    assert not after(0.7).cpu_high
    assert after(0.7).cpu == pytest.approx(0.3)
    assert after(0.1).cpu_high
    # The sums of two files read one after the other may differ.
    assert after(1.0).cpu == 0


def test_waiting_for_memory_does_not_hide_that_tasks_wait_for_a_cpu() -> None:
    assert waiting(Pressure(0.8, 0.2), 0.9, 1.0).cpu_high
