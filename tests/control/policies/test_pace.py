# SPDX-License-Identifier: GPL-2.0-or-later
"""From a share of a CPU to pages_to_scan and sleep_millisecs, on a ksmd whose pages cost what the test says."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.control.policies.pace import MOST_PAGES, Pace
from ksmd_ctl.host.sample import Reading, Sample


def follow(share: float, costs: list[float], kind: str, *, counted: bool = True, lag: float = 0.003) -> list[float]:
    """The share that ksmd takes in each second of ten at each cost."""
    pace, cpu, scanned, found = Pace(), 100.0, 0.0, []
    for second in range(10 * len(costs)):
        readings: dict[str, Reading] = {"ksmd_cpu_seconds": int(cpu * 100) / 100}
        if counted:
            readings["pages_scanned"] = int(scanned)
        pace = pace.step(Sample(float(second), readings), share, kind)
        assert 1 <= pace.pages <= MOST_PAGES
        assert pace.sleep_millisecs >= 1
        batch = pace.pages * costs[second // 10]
        period = batch + pace.sleep_millisecs / 1000 + lag
        cpu += batch / period
        scanned += pace.pages / period
        found.append(batch / period)
    return found


@settings(max_examples=50)
@given(st.floats(0.1, 0.9), st.floats(1e-6, 1.2e-5), st.booleans())
def test_it_finds_its_share_within_seconds(share: float, cost: float, counted: bool) -> None:
    found = follow(share, [cost], "look", counted=counted)
    # More than the longest batch and the shortest sleep give is not to be had.
    longest = MOST_PAGES * cost
    share = min(share, longest / (longest + 0.001 + 0.003))
    assert abs(sum(found[5:]) / 5 - share) < 0.15 * share + 0.02


def test_it_finds_it_again_when_pages_cost_something_else() -> None:
    found = follow(0.5, [1e-6, 8e-6, 2e-6], "look")
    for at in (8, 18, 28):
        assert abs(found[at] - 0.5) < 0.1
    assert max(found[11:]) < 0.7


def test_in_the_background_it_is_small_and_steady() -> None:
    found = follow(0.005, [1e-6] * 20, "background")
    assert abs(sum(found[100:]) / 100 - 0.005) < 0.001


@settings(max_examples=20)
@given(st.floats(0.0005, 0.01), st.floats(1e-6, 4e-5), st.floats(1, 10), st.integers(3, 40))
def test_in_the_background_the_knobs_stand_still_while_cheap_and_dear_pages_take_turns(
    share: float, cost: float, ratio: float, period: int
) -> None:
    """Merged pages and unique ones, as ksmd goes round and round among them."""
    pace, cpu, scanned, written, used = Pace(), 100.0, 0.0, 0, 0.0
    hours = 6
    for second in range(hours * 3600):
        before = pace.pages, pace.sleep_millisecs
        readings: dict[str, Reading] = {"ksmd_cpu_seconds": int(cpu * 100) / 100, "pages_scanned": int(scanned)}
        pace = pace.step(Sample(float(second), readings), share, "background")
        # By then it has learned what a page costs.
        late = second > hours * 1800
        written += late and before != (pace.pages, pace.sleep_millisecs)
        batch = pace.pages * cost / (ratio if second // period % 2 else 1)
        length = batch + pace.sleep_millisecs / 1000 + 0.004
        cpu += batch / length
        scanned += pace.pages / length
        used += batch / length if late else 0.0
    assert written <= hours / 2
    assert abs(used / (hours * 1800) - share) < 0.3 * share


def test_a_batch_is_short() -> None:
    pace = Pace().step(Sample(0.0, {"ksmd_cpu_seconds": 0.0}), 0.95, "look")
    assert pace.pages * pace.cost <= 0.0401


def test_where_ksmds_time_is_unknown_the_first_guess_stands() -> None:
    pace = Pace()
    for second in range(100):
        before = pace
        pace = pace.step(Sample(float(second), {}), 0.5, "look")
    assert pace.pages == before.pages
    assert "measured" not in pace.text()
