# SPDX-License-Identifier: GPL-2.0-or-later
"""Pulses of smart_scan, and scanning faster after swap, on top of a policy that knows nothing of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.adaptive import Adaptive, Limits
from ksmd_ctl.policies.knob_recovery import KnobRecovery, SmartScan, SwapCopies, SwapIn
from ksmd_ctl.policies.policy import Policy
from ksmd_ctl.policies.policy_runner import Resting
from tests.policies.simulation import Simulation

#: Skipped pages are for nothing, so a full scan that skips them all is one batch: as long as a tick.
FIXED = {Knob.RUN: 1, Knob.PAGES_TO_SCAN: 100, Knob.SLEEP_MILLISECS: 200}


def fixed(*, smart: bool = True, swapin: bool = False) -> KnobRecovery:
    return KnobRecovery(Resting("fixed"), dict(FIXED), SmartScan() if smart else None, SwapIn() if swapin else None)


def running(policy: Policy, tick_seconds: float = 0.2) -> Simulation:
    simulation = Simulation(policy, tick_seconds=tick_seconds)
    for knob, value in FIXED.items():
        simulation.host.set(knob, value)
    return simulation


def locked_pairs(simulation: Simulation, pairs: int = 1000) -> float:
    """Pages with a twin each that came 13 full scans later; full_scans then."""
    labels = [f"pair {number}" for number in range(pairs)]
    simulation.process("first", labels)
    simulation.tick()
    simulation.machine.scan(13)
    simulation.process("second", labels)
    return simulation.number("full_scans")


def test_locked_pairs_stay_apart_without_healing() -> None:
    simulation = running(fixed(smart=False))
    began = locked_pairs(simulation)
    while simulation.number("full_scans") < began + 60:
        simulation.tick()
    assert simulation.number("pages_sharing") == 0


def test_locked_pairs_are_recovered_within_ten_full_scans_and_smart_scan_is_on_again() -> None:
    simulation = running(fixed())
    began = locked_pairs(simulation)
    while simulation.number("full_scans") < began + 10:
        simulation.tick()
    assert simulation.number("pages_sharing") == 1000
    simulation.run(2)
    assert simulation.host.read(Knob.SMART_SCAN) == 1
    pulse = simulation.decision.recovered["smart_scan"]
    assert pulse.pages >= 1000
    assert simulation.host.read(Knob.PAGES_TO_SCAN) == 100


def test_how_many_newcomers_are_apart_is_known_once_a_pulse_has_shown_it() -> None:
    simulation = running(fixed())
    began = locked_pairs(simulation)
    simulation.tick()
    assert "smart_scan" not in simulation.decision.unrealised
    while simulation.number("full_scans") < began + 12:
        simulation.tick()
    assert simulation.decision.unrealised == {"smart_scan": 0}
    simulation.process("third", [f"own {number}" for number in range(500)])
    counts = set()
    while simulation.number("full_scans") < began + 15:
        simulation.tick()
        counts.add(simulation.decision.unrealised["smart_scan"])
    # Of the 2000 newcomers before, 1000 merged into the others.
    assert max(counts) == 250


def test_adaptive_recovers_them_as_well() -> None:
    simulation = Simulation(Adaptive())
    began = locked_pairs(simulation)
    while simulation.number("pages_sharing") < 1000:
        simulation.tick()
    assert simulation.number("full_scans") <= began + 10
    simulation.run(60)
    assert simulation.host.read(Knob.SMART_SCAN) == 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_hour_in_which_nothing_is_locked_costs_less_than_five_percent_more(adaptive: bool) -> None:
    used, pulses = [], 0
    for healing in (False, True):
        policy: Policy = Adaptive(Limits(idle_cpu=0.0005, smart_scan=healing)) if adaptive else fixed(smart=healing)
        simulation = running(policy, 2.0)
        simulation.host.set(Knob.PAGES_TO_SCAN, 10)
        simulation.process("a", [f"{'own' if number % 2 else 'common'} {number}" for number in range(300)])
        simulation.process("b", [f"common {number}" for number in range(300)])
        simulation.run(60)
        before = simulation.number("ksmd_cpu_seconds")
        simulation.run(3600)
        used.append(simulation.number("ksmd_cpu_seconds") - before)
        pulses = simulation.decision.recovered["smart_scan"].pulses if healing else 0
    assert pulses >= 1
    # `adaptive` rests in between: pulses are nearly all that is left, and take less than idle_cpu.
    assert used[1] < (3600 * 0.0005 if adaptive else 1.05 * used[0])


def test_pulses_that_bring_nothing_get_rare() -> None:
    simulation = running(fixed(), 0.5)
    simulation.process("a", [f"own {number}" for number in range(300)])
    pulses = []
    for _ in range(3):
        before = simulation.decision.recovered["smart_scan"].pulses if simulation.decision.recovered else 0
        # Newcomers again and again that merge with nothing.
        for _ in range(12):
            pid, _ = simulation.process("b", [f"{simulation.now} {number}" for number in range(100)])
            simulation.run(8)
            simulation.machine.exit(pid)
            simulation.run(2)
        pulses.append(simulation.decision.recovered["smart_scan"].pulses - before)
    assert pulses[0] > pulses[-1]


def test_where_smart_scan_is_declared_off_nothing_is_done() -> None:
    own = {**FIXED, Knob.SMART_SCAN: 0}
    simulation = running(KnobRecovery(Resting("fixed"), own, SmartScan()))
    simulation.host.set(Knob.SMART_SCAN, 0)
    simulation.process("a", ["x"] * 500)
    simulation.run(20)
    assert simulation.host.read(Knob.SMART_SCAN) == 0
    assert simulation.decision.recovered["smart_scan"].pulses == 0


def swap_samples(policy: Policy, own: dict[str, int | str]) -> list[int | str | None]:
    """pages_to_scan as advised while swap copies pages at the second of eight samples, each a full scan later."""
    said = []
    for number in range(8):
        readings = {"full_scans": number, "pages_sharing": 100 * number, "ksm_swpin_copy": 5000 * (number > 0), **own}
        policy, decision = policy.step(Sample(float(number), readings))
        said.append(decision.knobs.get(Knob.PAGES_TO_SCAN))
        own = {**own, "pages_to_scan": said[-1] or own["pages_to_scan"]}
    return said


def test_after_swap_has_copied_pages_it_scans_faster_for_two_full_scans() -> None:
    own: dict[str, int | str] = {"pages_to_scan": 100, "advisor_mode": "none"}
    assert swap_samples(fixed(smart=False, swapin=True), own) == [None, 400, 400, 400, None, None, None, None]
    # Where nobody else wants a value, it is put back, and then it is nobody's again.
    unnamed = KnobRecovery(Resting("fixed"), {Knob.RUN: 1}, None, SwapIn())
    assert swap_samples(unnamed, own) == [None, 400, 400, 400, 100, None, None, None]


def test_an_advisor_that_is_switched_on_while_it_scans_faster_sets_the_speed_from_then_on() -> None:
    policy: Policy = KnobRecovery(Resting("fixed"), {Knob.RUN: 1}, None, SwapIn())
    said = []
    for number, mode in enumerate(("none", "none", "scan-time", "scan-time", "none")):
        readings = {"full_scans": number, "pages_sharing": 100 * number, "ksm_swpin_copy": 5000 * (number > 0)}
        sample = Sample(float(number), {**readings, "advisor_mode": mode, "pages_to_scan": 100})
        policy, decision = policy.step(sample)
        said.append(decision.knobs.get(Knob.PAGES_TO_SCAN))
    assert said == [None, 400, None, None, None]


def test_the_kernels_advisor_is_left_alone() -> None:
    own: dict[str, int | str] = {"pages_to_scan": 100, "advisor_mode": "scan-time"}
    assert swap_samples(fixed(smart=False, swapin=True), own) == [None] * 8


# -- copies ------------------------------------------------------------------------------------------------


def copies(*steps: tuple[int, int]) -> list[int | None]:
    """What is said after each sample: full_scans, and ksm_swpin_copy."""
    found, said = SwapCopies(), []
    for number, (scans, copied) in enumerate(steps):
        found = found.step(Sample(float(number), {"full_scans": scans, "ksm_swpin_copy": copied}))
        said.append(found.pages)
    return said


def test_copies_count_until_ksmd_has_passed_them_twice() -> None:
    # The first sample only shows where the counter is.
    steps = [(0, 70), (1, 5070), (2, 5070), (3, 5170), (4, 5170), (5, 5170), (6, 5170)]
    assert copies(*steps) == [0, 5000, 5000, 5100, 100, 100, 0]


def test_where_ksmd_is_stopped_they_stay() -> None:
    assert copies((4, 0), (4, 300), *[(4, 300)] * 50)[-1] == 300


def test_scans_that_begin_anew() -> None:
    assert copies((90, 0), (91, 300), (0, 300), (1, 300), (2, 300), (3, 300)) == [0, 300, 300, 300, 300, 0]


def test_a_kernel_that_does_not_count_them() -> None:
    assert SwapCopies().step(Sample(1.0, {"full_scans": 3})).pages is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000)), min_size=1, max_size=40))
def test_never_more_than_were_copied_in_the_last_three_scans(steps: list[tuple[int, int]]) -> None:
    found, scans, copied, seen = SwapCopies(), 10, 0, []
    for number, (passed, more) in enumerate(steps):
        scans, copied = scans + passed, copied + (more if number else 0)
        found = found.step(Sample(float(number), {"full_scans": scans, "ksm_swpin_copy": copied}))
        seen.append((scans, more if number else 0))
        assert found.pages == sum(pages for when, pages in seen if scans < when + 3)
        assert len(found.waiting) <= 3
