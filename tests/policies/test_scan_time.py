# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's advisor, and its algorithm done here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.policy import Policy
from ksmd_ctl.policies.scan_time import Advised, Aim, ScanTime, scan_time_step
from tests.policies.simulation import Simulation

AIM = Aim(target_scan_time=200, max_cpu=0.7, min_pages_to_scan=500, max_pages_to_scan=30000)

CRAWLING: dict[str, KnobValue] = {
    "advisor_mode": "scan-time",
    "pages_to_scan": 10,
    "pages_shared": 0,
    "pages_sharing": 0,
    "pages_unshared": 1 << 20,
    "pages_volatile": 0,
    "full_scans": 3,
}


def test_where_the_kernel_has_an_advisor_it_is_switched_on_with_its_limits() -> None:
    simulation = Simulation(Advised(Aim(100, 0.5, 600, 20000)), PROFILES["7.2"])
    simulation.process("a", [f"{number}" for number in range(1000)])
    simulation.run(5)
    found = {
        knob: simulation.host.read(knob)
        for knob in (Knob.ADVISOR_MODE, Knob.ADVISOR_MAX_CPU, Knob.ADVISOR_TARGET_SCAN_TIME, Knob.RUN)
    }
    assert list(found.values()) == ["scan-time", 50, 100, 1]
    assert Knob.PAGES_TO_SCAN not in simulation.decision.knobs
    assert simulation.decision.phase == "kernel"


def test_where_it_has_none_it_is_done_here() -> None:
    simulation = Simulation(Advised(AIM), PROFILES["6.1"])
    simulation.process("a", [f"{number}" for number in range(2000)])
    simulation.process("b", [f"{number}" for number in range(2000)])
    simulation.run(30)
    assert simulation.decision.phase == "here"
    assert "this kernel has no advisor" in simulation.decision.reasons[1].text
    assert simulation.number("pages_sharing") == 2000
    # At least 10 % of a CPU, as the kernel's.
    before = simulation.number("ksmd_cpu_seconds")
    simulation.run(60)
    assert simulation.number("ksmd_cpu_seconds") - before > 3


def test_a_crawl_is_taken_over_after_a_while_and_only_if_that_is_allowed() -> None:
    for heal in (True, False):
        policy: Policy = Advised(AIM, heal)
        phases = []
        for number in range(8):
            policy, decision = policy.step(Sample(10.0 * number, CRAWLING))
            phases.append(decision.phase)
            if number == 1:
                assert decision.reasons[1].subject == "crawl"
                assert "a full scan of 1,048,576 pages takes 35.0 min or more, and 200 s are wanted" in (
                    decision.reasons[1].text
                )
        assert phases == (["kernel"] * 3 + ["here"] * 5 if heal else ["kernel"] * 8)
        if heal:
            assert decision.knobs[Knob.ADVISOR_MODE] == "none"
            assert decision.knobs[Knob.PAGES_TO_SCAN] == 500
            assert decision.recovered["advisor"].pulses == 1
            assert "made ksmd very slow" in decision.reasons[1].text


def test_a_kernel_that_is_slow_because_it_may_be_is_at_no_crawl() -> None:
    policy: Policy = Advised(AIM)
    for number in range(20):
        policy, decision = policy.step(Sample(10.0 * number, {**CRAWLING, "pages_unshared": 50_000}))
    assert decision.phase == "kernel"


def test_the_first_evaluation_does_not_count_what_ksmd_used_before() -> None:
    policy: Policy = ScanTime(AIM)
    readings: dict[str, KnobValue] = {"full_scans": 0}
    policy, _ = policy.step(Sample(0, {**readings, "ksmd_cpu_seconds": 5000.0}))
    policy, decision = policy.step(Sample(100, {"full_scans": 1, "ksmd_cpu_seconds": 5020.0}))
    # 20 % of a CPU for half of the time that is wanted: half as fast, but at least 10 %.
    assert decision.knobs[Knob.PAGES_TO_SCAN] == 250
    assert "the last full scan took 100 s of 200 s wanted, and ksmd 20 % of a CPU" in decision.reasons[0].text


def test_after_an_unmerging_it_begins_anew_from_where_it_is() -> None:
    policy: Policy = ScanTime(AIM)
    for number in range(5):
        policy, decision = policy.step(
            Sample(100.0 * number, {"full_scans": number, "ksmd_cpu_seconds": 20.0 * number})
        )
    pages = decision.knobs[Knob.PAGES_TO_SCAN]
    policy, decision = policy.step(Sample(600.0, {"full_scans": 0, "ksmd_cpu_seconds": 120.0}))
    assert decision.knobs[Knob.PAGES_TO_SCAN] == pages


@given(
    st.integers(1, 30000),
    st.floats(0.001, 1e6),
    st.floats(0.001, 1e6),
    st.floats(0, 100),
    st.floats(0, 1),
)
def test_the_formula_stays_within_its_limits(
    pages: int, seconds: float, last: float, change: float, ratio: float
) -> None:
    result, after = scan_time_step(AIM, pages, seconds, last, change, ratio)
    assert 1 <= result <= 30000
    assert after >= 0
    # Not beyond max_cpu of what this speed takes, and not below 10 %.
    per_cpu = pages / max(ratio, 0.01)
    assert result <= max(1, per_cpu * 0.7) + 1
    assert result >= min(int(per_cpu * 0.1), 30000)
