# SPDX-License-Identifier: GPL-2.0-or-later
"""virt-handler's rules: what it would write on a host, decision by decision."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.policy import Policy, PolicyDecision
from ksmd_ctl.policies.policy_runner import make_policy
from tests.policies.simulation import Simulation

GIB = 1 << 30
INTERVAL = 180.0
KUBEVIRT = make_policy(Config(policy=PolicyName.KUBEVIRT), 4096)


def sample(number: float, free: float, total: float = 64, run: int = 0, pages: int = 100) -> Sample:
    memory = {"mem_total_bytes": int(total * GIB), "mem_available_bytes": int(free * GIB)}
    return Sample(number * INTERVAL, {"run": run, "pages_to_scan": pages, **memory})


def follow(samples: list[Sample], policy: Policy = KUBEVIRT) -> list[PolicyDecision]:
    said = []
    for one in samples:
        policy, decision = policy.step(one)
        said.append(decision)
    return said


def pages(decisions: list[PolicyDecision]) -> list[object]:
    return [decision.knobs.get(Knob.PAGES_TO_SCAN) for decision in decisions]


def test_while_memory_is_short_it_scans_more_and_more_up_to_the_most() -> None:
    said = follow([sample(number, 8) for number in range(7)])
    assert pages(said) == [100, 400, 700, 1000, 1250, 1250, 1250]
    assert {decision.knobs[Knob.RUN] for decision in said} == {1}
    # 100 ms while 16 GiB are in use: a third of it, rounded down, for 56 GiB.
    assert said[0].knobs[Knob.SLEEP_MILLISECS] == 28
    assert said[0].reasons[0].text == (
        "memory is short: 8.0 GiB of 64.0 GiB are available, the threshold is 12.8 GiB: "
        "ksmd is started with 100 pages a batch"
    )


def test_it_scans_less_when_memory_is_not_short_and_stops_below_the_least() -> None:
    said = follow([sample(0, 8), sample(1, 8), *(sample(number, 32) for number in range(2, 12))])
    assert pages(said) == [100, 400, 350, 300, 250, 200, 150, 100, None, None, None, None]
    assert [decision.knobs for decision in said[8:]] == [{Knob.RUN: 0}] * 4
    assert (said[7].phase, said[8].phase) == ("merging", "stopped")
    # Started again, it begins anew.
    assert pages(follow([sample(0, 8), *(sample(number, 32) for number in range(1, 4)), sample(4, 8)]))[-1] == 100


def test_it_goes_on_from_what_it_finds_and_keeps_its_own_count_then() -> None:
    assert pages(follow([sample(0, 8, run=1, pages=1000), sample(1, 8, pages=7)])) == [1250, 1250]
    assert pages(follow([sample(0, 32, run=1, pages=1000), sample(1, 32, pages=7)])) == [950, 900]
    assert follow([sample(0, 32, run=0, pages=1000)])[0].knobs == {Knob.RUN: 0}


def test_it_decides_every_three_minutes() -> None:
    said = follow([sample(number / 18, 8) for number in range(40)])
    assert pages(said) == [100] * 18 + [400] * 18 + [700] * 4


def test_memory_just_at_the_threshold_is_short() -> None:
    assert follow([sample(0, 12, 60)])[0].knobs[Knob.RUN] == 1
    assert follow([sample(0, 12.01, 60)])[0].knobs[Knob.RUN] == 0


@pytest.mark.parametrize(("total", "free", "millisecs"), [(16, 0.1, 100), (32, 0.25, 50), (64, 0, 25), (1024, 0, 10)])
def test_the_more_memory_is_in_use_the_less_ksmd_sleeps(total: float, free: float, millisecs: int) -> None:
    assert follow([sample(0, free, total)])[0].knobs[Knob.SLEEP_MILLISECS] == millisecs


def test_without_figures_of_memory_all_stays_as_it_is() -> None:
    assert pages(follow([sample(0, 8), Sample(INTERVAL, {}), sample(2, 8)])) == [100, 100, 400]
    assert [decision.knobs for decision in follow([Sample(0, {}), Sample(INTERVAL, {"run": 1})])] == [{Knob.RUN: 0}] * 2


def test_all_seven_annotations_are_settings() -> None:
    config = Config(
        policy=PolicyName.KUBEVIRT,
        kubevirt_pages_boost=500,
        kubevirt_pages_decay=-300,
        kubevirt_pages_min=200,
        kubevirt_pages_max=900,
        kubevirt_pages_init=300,
        kubevirt_sleep_ms_baseline=200,
        kubevirt_free_percent=1.0,
    )
    said = follow([sample(number, 48) for number in range(3)], make_policy(config, 4096))
    assert pages(said) == [300, 800, 900]
    assert said[0].knobs[Knob.SLEEP_MILLISECS] == 200
    eased = follow([sample(0, 8, run=1, pages=700), sample(1, 65), sample(2, 65)], make_policy(config, 4096))
    assert pages(eased) == [900, 600, 300]


@given(st.lists(st.tuples(st.floats(0, 64), st.integers(0, 2), st.integers(0, 5000)), min_size=1, max_size=20))
def test_whatever_it_sees_its_values_are_within_its_limits(seen: list[tuple[float, int, int]]) -> None:
    samples = [sample(number, free, 64, run, found) for number, (free, run, found) in enumerate(seen)]
    for decision in follow(samples)[1:]:
        if decision.knobs[Knob.RUN]:
            assert 64 <= int(decision.knobs[Knob.PAGES_TO_SCAN]) <= max(1250, seen[0][2])
            assert int(decision.knobs[Knob.SLEEP_MILLISECS]) >= 10
        else:
            assert decision.knobs == {Knob.RUN: 0}


def test_on_the_simulated_host_it_merges_once_memory_is_short() -> None:
    # On a host that is nearly empty its rule has ksmd sleep for hours.
    config = Config(policy=PolicyName.KUBEVIRT, kubevirt_free_percent=1.0, kubevirt_sleep_ms_baseline=1)
    simulation = Simulation(make_policy(config, 4096), tick_seconds=10.0)
    for name in ("a", "b"):
        simulation.process(name, [f"page {index}" for index in range(500)])
    while simulation.now < 4 * INTERVAL:
        simulation.tick()
    assert simulation.number("pages_sharing") == 500
    assert [value for _, knob, value in simulation.written if knob is Knob.PAGES_TO_SCAN][:2] == [400, 700]
