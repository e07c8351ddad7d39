# SPDX-License-Identifier: GPL-2.0-or-later
"""`adaptive`: on the engine page by page, and on a model of a few formulas for long times and large hosts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.errors import Absent
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.policies.adaptive import Adaptive, Limits
from ksmd_ctl.policies.backlog import INITIAL_HIT_RATES, Kind
from ksmd_ctl.policies.policy import Policy
from ksmd_ctl.policies.scan_rate import MOST_PAGES
from tests.policies.model import Lot, Model
from tests.policies.simulation import Simulation, content

DAY = 86400.0


def half(pages: int, own: str, system: str = "debian") -> list[str]:
    """Contents of a process that has half of its pages in common with all of its system."""
    return [f"{system} {number}" for number in range(pages // 2)] + [f"{own} {number}" for number in range(pages // 2)]


def quick(model: Model, since: float = 0.0) -> int:
    """How often it was quick."""
    return sum(phase == "quick" and time >= since for time, phase in model.phases)


# -- on the engine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["4.10", "6.1", "7.2"])
def test_what_comes_is_merged_within_seconds_and_then_it_rests(profile: str) -> None:
    simulation = Simulation(Adaptive(), PROFILES[profile])
    simulation.run(5)
    assert simulation.decision.phase == "ready"
    for number in range(3):
        simulation.process(f"p{number}", half(1600, str(number)))
        simulation.run(8)
        assert simulation.number("pages_sharing") == 800 * number
    simulation.run(20)
    assert simulation.decision.phase == "background"
    used = simulation.number("ksmd_cpu_seconds")
    simulation.run(100)
    assert simulation.number("ksmd_cpu_seconds") - used < 100 * 0.005 * 1.3


def test_old_unique_pages_meet_new_ones_that_smart_scan_would_have_skipped() -> None:
    simulation = Simulation(Adaptive())
    simulation.process("a", [f"x {number}" for number in range(2000)])
    for knob, value in ((Knob.PAGES_TO_SCAN, 5000), (Knob.SMART_SCAN, 1), (Knob.RUN, 1)):
        simulation.host.set(knob, value)
    simulation.host.advance(10)
    assert simulation.number("full_scans") > 20
    simulation.run(60)
    simulation.process("b", [f"x {number}" for number in range(2000)])
    simulation.run(10)
    assert simulation.number("pages_sharing") == 2000
    simulation.run(10)
    assert simulation.host.read(Knob.SMART_SCAN) == 1


def test_one_that_comes_as_another_leaves_is_scanned() -> None:
    simulation = Simulation(Adaptive())
    first, _ = simulation.process("first", half(9000, "first"))
    simulation.process("second", [f"x {number}" for number in range(5000)])
    simulation.run(60)
    simulation.machine.exit(first)
    simulation.process("third", [f"x {number}" for number in range(5000)])
    simulation.run(15)
    assert simulation.number("pages_sharing") == 5000


def test_ksmd_is_an_idle_task_where_that_leaves_it_a_cpu() -> None:
    model = Model(Adaptive(), lots=[Lot(50_000, 0.5)])
    model.run(60)
    assert model.merged == 25_000
    assert [value for _, knob, value in model.writes if knob is Knob.KSMD_SCHEDULING] == ["idle"]


def test_on_a_busy_host_it_is_an_ordinary_task_in_each_burst() -> None:
    model = Model(Adaptive(), lots=[Lot(50_000, 0.5)], left_over=0.003)
    model.run(60)
    assert model.merged == 25_000
    classes = [value for _, knob, value in model.writes if knob is Knob.KSMD_SCHEDULING]
    assert classes[:3] == ["idle", "other", "idle"]
    assert classes[-1] == "idle"
    took = next(at for at, knob, value in model.writes if value == "other") - 100.0
    assert took < 3


@pytest.mark.parametrize("limits", [Limits(scheduling=False), Limits()])
def test_a_class_that_is_configured_or_cannot_be_seen_is_left_alone(limits: Limits) -> None:
    lacks = frozenset({Knob.KSMD_SCHEDULING.value}) if limits.scheduling else frozenset()
    model = Model(Adaptive(limits), lots=[Lot(50_000, 0.5)], lacks=lacks)
    model.run(30)
    assert Knob.KSMD_SCHEDULING not in model.decision.knobs
    assert model.merged == 25_000


def test_without_leave_smart_scan_stays_on() -> None:
    simulation = Simulation(Adaptive(Limits(smart_scan=False)))
    for name in "abc":
        simulation.process(name, half(2000, name))
        simulation.run(20)
    assert (Knob.SMART_SCAN, 0) not in {(knob, value) for _, knob, value in simulation.written}
    assert simulation.number("pages_sharing") == 2000


def test_after_an_unmerging_of_everything_it_begins_anew() -> None:
    simulation = Simulation(Adaptive())
    for name in "ab":
        simulation.process(name, half(2000, name))
    simulation.run(60)
    assert simulation.decision.phase == "background"
    simulation.host.set(Knob.RUN, 2)
    said = [simulation.tick().reasons[0].text for _ in range(20)]
    assert any(text.startswith("quick: everything was un-merged") for text in said)
    assert simulation.number("pages_sharing") == 1000


def test_pages_that_were_never_merged_and_are_written_are_merged_too() -> None:
    """Only merged ones show in cow_ksm, and smart_scan skips the others."""
    simulation = Simulation(Adaptive())
    simulation.process("a", half(4000, "a"))
    pid, start = simulation.process("b", half(4000, "b"))
    simulation.run(400)
    assert simulation.number("pages_sharing") == 2000
    written = [*range(1200, 2000), *range(2000, 3500)]
    for index, page in enumerate(written):
        simulation.machine.write(pid, start + page * PAGE_SIZE, content(f"a {index}"))
    simulation.run(20)
    # 1,200 system pages that are left, all that were written but for those of a that are no more than 2,000.
    assert simulation.number("pages_sharing") == 1200 + 2000
    assert simulation.decision.phase == "background"


def test_an_advisor_that_somebody_switches_on_is_switched_off() -> None:
    simulation = Simulation(Adaptive())
    simulation.process("a", half(2000, "a"))
    simulation.run(20)
    simulation.host.set(Knob.ADVISOR_MODE, "scan-time")
    simulation.run(3)
    assert simulation.host.read(Knob.ADVISOR_MODE) == "none"
    assert simulation.host.read(Knob.PAGES_TO_SCAN) == simulation.decision.knobs[Knob.PAGES_TO_SCAN]


# -- on the model ------------------------------------------------------------------------------------------


def settled(limits: Limits | None = None, lots: int = 8, **kwargs: object) -> Model:
    """A host with so many virtual machines of 1 GiB, scanned twice."""
    model = Model(Adaptive(limits or Limits()), **kwargs)  # type: ignore[arg-type]
    model.lots = [Lot(262_144, 0.4) for _ in range(lots)]
    model.run(60 + 30 * lots)
    assert model.decision.phase == "background"
    return model


def aged(pages: int) -> Model:
    """A host with eight lots of so many pages, most of which smart_scan skips."""
    model = settled(lots=1, unique_cost=5e-6, unskipped_share=0.12)
    model.lots = [Lot(pages, 0.4, scans=5) for _ in range(8)]
    model.run(300)
    return model


def test_a_machine_that_arrives_on_a_large_host_is_merged_at_once() -> None:
    model = settled()
    before = model.merged
    model.lots.append(Lot(262_144, 0.4))
    model.run(60)
    assert model.merged - before > 0.95 * 0.4 * 262_144
    assert model.decision.phase == "background"


@pytest.mark.parametrize("pages", [2_000, 4_000, *range(16_000, 80_000, 4_000), 160_000, 400_000])
def test_a_burst_has_a_full_scan_with_smart_scan_off_from_its_beginning(pages: int) -> None:
    model = aged(pages)
    before, since = model.unskipped, model.now
    model.lots.append(Lot(pages // 2, 0.6))
    model.run(60)
    assert quick(model, since) == 1
    assert model.unskipped > before


@pytest.mark.parametrize("pages", [16_000, 40_000, 76_000])
def test_new_pages_that_the_first_scan_finds_are_merged_in_one_short_burst(pages: int) -> None:
    model = aged(pages)
    before, scans, since = model.merged, model.full_scans, model.now
    model.lots.append(Lot(pages // 2, 0.6))
    model.run(8)
    assert model.merged - before > 0.95 * 0.6 * (pages // 2)
    assert quick(model, since) == 1
    # A page needs two scans; a burst that went on after them would cost time and gain nothing.
    assert model.full_scans - scans <= 3


@pytest.mark.parametrize(("changed", "merged"), [(40_000, 40_000), (200, 0)])
def test_much_that_has_changed_is_scanned_once_more(changed: int, merged: int) -> None:
    model = aged(64_000)
    before = model.merged
    model.lots.insert(0, Lot(changed, 1.0, aged=True))
    model.lots.append(Lot(30_000, 1.0))
    model.run(12)
    assert model.decision.phase == "background"
    assert model.merged - before == 30_000 + merged


def test_new_pages_that_are_scanned_once_more_say_nothing_about_changed_ones() -> None:
    model = Model(Adaptive())
    model.lots = [Lot(100_000, 0.5)]
    while model.full_scans < 2:
        model.tick()
    # They come in the last full scan of the burst, so it has one more for them.
    model.lots.append(Lot(100_000, 0.1))
    model.run(20)
    assert model.full_scans == 4
    assert isinstance(model.policy, Adaptive)
    assert model.policy.backlog.hit_rates[Kind.CHANGED] == INITIAL_HIT_RATES[Kind.CHANGED]


def test_a_little_that_is_new_on_a_large_host_waits_until_it_is_worth_a_burst() -> None:
    model = settled()
    since = model.now
    model.lots.append(Lot(2_000, 0.4))
    model.run(3)
    assert quick(model, since) == 0
    assert "not worth" in model.decision.reasons[0].text
    for _ in range(60):
        model.lots.append(Lot(2_000, 0.4))
        model.run(5)
    assert quick(model, since) >= 1


def test_memory_that_never_merges_causes_fewer_and_fewer_bursts() -> None:
    """A program that takes and gives back memory which ksmd may not scan, for half a day."""
    model = settled(lots=2, tick_seconds=3.0)
    used = model.cpu
    bursts = []
    for _ in range(12):
        begun = len(model.phases)
        for _ in range(60):
            model.lots.append(Lot(100_000, mergeable=False))
            model.run(30)
            model.lots.pop()
            model.run(30)
        bursts.append(sum(phase == "quick" for _, phase in model.phases[begun:]))
    assert max(bursts) < 60
    # At rest it takes 1 %.
    assert model.cpu - used < DAY / 2 * 0.02


def test_pages_that_are_written_as_soon_as_they_are_merged_are_left_alone() -> None:
    model = settled(lots=2)
    flipper = Lot(100_000, 0.9, scans=2)
    model.lots.append(flipper)
    model.run(120)
    used, since = model.cpu, model.now
    while model.now < since + 4 * 3600:
        if flipper.scans >= 2:
            model.cow += flipper.merged
            flipper.scans = 1
        model.tick()
    assert model.cpu - used < 4 * 3600 * 0.05


def test_nothing_oscillates_once_the_load_is_constant() -> None:
    for lots in (1, 16):
        model = settled(lots=lots, tick_seconds=5.0)
        writes, phases, used = len(model.writes), len(model.phases), model.cpu
        model.run(DAY)
        # A look an hour, and pulses of smart_scan at growing intervals.
        assert len(model.phases) - phases <= 2 * (24 + 8)
        assert len(model.writes) - writes < 24 * 12
        assert model.cpu - used < DAY * 0.005


def test_a_periodic_load_is_met_each_time_and_costs_little() -> None:
    """A machine that comes for ten minutes of each hour, for three days."""
    model = settled(lots=4, tick_seconds=10.0)
    used = model.cpu
    for _ in range(3 * 24):
        before = model.merged
        model.lots.append(Lot(262_144, 0.4))
        model.run(120)
        assert model.merged - before > 0.95 * 0.4 * 262_144
        model.run(480)
        model.lots.pop()
        model.run(3000)
    assert (model.cpu - used) / (3 * DAY) < 0.02


def test_ksmd_keeps_its_share_whatever_a_page_costs() -> None:
    for maximum in (0.1, 0.5, 0.8):
        for cost in (5e-7, 5e-6, 1.5e-5):
            model = Model(Adaptive(Limits(max_cpu=maximum)), unique_cost=cost, merged_cost=cost / 10)
            for number in range(60):
                model.lots.append(Lot(262_144, (number % 5) / 5))
                model.run(10)
            assert model.greatest_share(30) <= maximum * 1.15


def test_it_is_gentle_where_tasks_wait_for_a_cpu() -> None:
    model = settled(lots=4)
    model.pressure = 0.95
    model.run(30)
    model.lots.append(Lot(262_144, 0.4))
    model.run(4)
    assert model.decision.phase == "gentle"
    assert "slowed down, as CPU pressure is 9" in model.decision.reasons[0].text
    assert model.decision.reasons[1].text.split(";")[0].endswith("a page")
    model.pressure = 0.0
    model.run(15)
    assert model.decision.phase != "gentle"


def test_huge_pages_that_are_split_count_against_what_is_gained() -> None:
    model = settled(lots=1)
    sample = model.sample()
    assert isinstance(model.policy, Adaptive)
    readings = dict(sample.readings)
    readings |= {"nr_anon_pages": sample.number("nr_anon_pages") + 50_000}  # type: ignore[operator]
    policy: Policy = model.policy
    for later in (1.0, 1.9, 2.1):
        policy, decision = policy.step(Sample(model.now + later, dict(readings)))
        assert decision.phase == ("background" if later < 2 else "quick")
    scans, sharing = sample.number("full_scans"), sample.number("pages_sharing")
    assert scans is not None
    assert sharing is not None
    for number in range(1, 9):
        readings |= {
            "full_scans": scans + number,
            "pages_sharing": sharing + 5000 * number,
            "pages_volatile": 50_000,
            "thp_split_page": 200 * number,
            "ksmd_cpu_seconds": sample.number("ksmd_cpu_seconds") + 0.3 * number,  # type: ignore[operator]
        }
        policy, decision = policy.step(Sample(model.now + 3 + number, dict(readings)))
        if decision.phase == "background":
            break
    # 20,000 pages for 1.2 s would be worth it, but for 800 huge pages.
    assert "huge pages, each of which counts as 32 lost" in decision.reasons[0].text
    assert "split 800 huge pages, each of which counts as 32 lost" in decision.reasons[0].text


def test_zeroes_that_splits_free_are_a_gain_and_not_unlearned() -> None:
    model = settled(lots=1)
    waited = []
    for _ in range(8):
        wave = Lot(2 * 60 * 256, 1.0, huge=True)
        model.lots.append(wave)
        began = model.now
        while not wave.freed and model.now < began + 100:
            model.tick()
        waited.append(model.now - began)
        model.run(60)
    assert isinstance(model.policy, Adaptive)
    assert model.policy.backlog.hit_rates[Kind.NEW] >= INITIAL_HIT_RATES[Kind.NEW], waited
    assert max(waited) < 10, waited
    assert "huge pages, which freed 30," in model.decision.reasons[0].text


@pytest.mark.parametrize("walk", [0.4, 1.5, 6.0])
@pytest.mark.parametrize("pages", [10, 1000, 100_000])
def test_ksmd_keeps_to_its_share_where_it_walks_empty_address_space(walk: float, pages: int) -> None:
    # As on 5.10, which does not count scanned pages either.
    model = Model(Adaptive(), walk=walk, lacks=frozenset({"pages_scanned", "smart_scan", "advisor_mode"}))
    model.lots.append(Lot(pages, 0.4))
    model.run(300)
    # The first burst takes max_cpu, and no more.
    assert model.cpu < 0.8 * 60 + walk
    before = model.cpu
    model.run(2 * 3600)
    assert model.cpu - before < 1.5 * 0.005 * 2 * 3600 + walk
    assert model.full_scans > 5
    # It rests; it has not stopped: what comes is scanned.
    wave = Lot(200_000, 0.5)
    model.lots.append(wave)
    model.run(240)
    assert wave.merged


def test_a_long_rest_says_why() -> None:
    model = Model(Adaptive(Limits(max_cpu=0.1)), walk=1.5)
    model.lots.append(Lot(1000, 0.0))
    said = {model.tick().reasons[1].text for _ in range(400)}
    assert any("ksmd sleeps for 1" in text and "empty address space" in text for text in said)


def test_swap_copies_are_a_reason_to_scan_and_counted() -> None:
    model = settled(lots=1)
    assert isinstance(model.policy, Adaptive)
    readings = dict(model.sample().readings)
    for scan in range(4):
        readings |= {"ksm_swpin_copy": 20_000, "full_scans": model.full_scans + 2 * scan}
        readings["pages_sharing"] = model.sample().number("pages_sharing") + 5_000 * scan  # type: ignore[operator]
        readings["ksmd_cpu_seconds"] = model.sample().number("ksmd_cpu_seconds") + 0.1 * scan  # type: ignore[operator]
        model.policy, decision = model.policy.step(Sample(model.now + 1 + scan, dict(readings)))
        if not scan:
            assert "20,000 merged pages copied by swap" in decision.reasons[0].text
    readings["full_scans"] = model.full_scans + 20
    for later in range(5, 9):
        model.policy, decision = model.policy.step(Sample(model.now + later, dict(readings)))
    assert decision.recovered["swapin"].pulses == 1
    ignoring = Adaptive(Limits(swapin=False))
    assert "swapin" not in ignoring.step(Sample(1.0, readings))[1].recovered


def test_a_reason_says_the_same_whenever_it_is_asked() -> None:
    model = Model(Adaptive())
    said = []
    for number in range(200):
        if number % 40 == 0:
            model.lots.append(Lot(50_000, 0.4))
        reasons = model.tick().reasons
        said.append((reasons, [reason.text for reason in reasons]))
    assert len({texts[0] for _, texts in said}) > 20
    assert all([reason.text for reason in reasons] == texts for reasons, texts in said)


READINGS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "full_scans",
    "pages_scanned",
    "nr_anon_pages",
    "ksmd_cpu_seconds",
    "cow_ksm",
    "ksm_swpin_copy",
    "thp_split_page",
    "cpu_pressure_some_seconds",
    "pressure_some_seconds",
)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 5000),
            st.dictionaries(
                st.sampled_from(READINGS), st.one_of(st.none(), st.integers(0, 10**7), st.integers(0, 100)), max_size=13
            ),
        ),
        min_size=1,
        max_size=30,
    ),
    st.floats(0.01, 1),
    st.floats(0.0005, 1),
)
def test_whatever_counters_do_the_bounds_are_kept(
    ticks: list[tuple[float, dict[str, int | None]]], maximum: float, idle: float
) -> None:
    """They go backwards, jump, are absent, do not change; samples come at once or late."""
    policy, now = Adaptive(Limits(max_cpu=maximum, idle_cpu=min(idle, maximum))), 0.0
    readings: dict[str, Reading] = {"advisor_mode": "none", "smart_scan": 1}
    for seconds, found in ticks:
        now += seconds
        for name, value in found.items():
            readings[name] = Absent("reading", "not here") if value is None else value
        after, decision = policy.step(Sample(now, dict(readings)))
        assert isinstance(after, Adaptive)
        policy = after
        assert policy.rate.share <= maximum
        assert 0 <= decision.knobs[Knob.PAGES_TO_SCAN] <= MOST_PAGES  # type: ignore[operator]
        for knob, value in decision.knobs.items():
            spec = KNOBS[knob]
            assert value in spec.choices if spec.choices else spec.minimum <= value <= spec.maximum  # type: ignore[operator]
        assert decision.reasons
        assert all(reason.text for reason in decision.reasons)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 200_000), st.floats(0, 1), st.booleans()), min_size=1, max_size=25))
def test_ksmd_keeps_its_share_under_any_load(arrivals: list[tuple[int, float, bool]]) -> None:
    model = Model(Adaptive())
    for pages, share, mergeable in arrivals:
        if pages:
            model.lots.append(Lot(pages, share, mergeable))
        elif model.lots:
            model.lots.pop(0)
        model.run(20)
    assert model.greatest_share(20) <= 0.8 * 1.15


def test_kernels_that_lack_readings_are_managed_all_the_same() -> None:
    for lacks in ({"pages_scanned", "smart_scan", "advisor_mode"}, {"ksmd_cpu_seconds"}, {"nr_anon_pages", "cow_ksm"}):
        model = Model(Adaptive(), lacks=frozenset(lacks))
        model.lots = [Lot(100_000, 0.4), Lot(100_000, 0.4)]
        model.run(60)
        assert model.merged == 80_000
        assert model.decision.phase == "background"
        model.lots.append(Lot(100_000, 0.4))
        model.run(2 * 3600)
        assert model.merged == 120_000
        assert ("smart_scan" in lacks) == (Knob.SMART_SCAN not in model.decision.knobs)
        assert ("advisor_mode" in lacks) == (Knob.ADVISOR_MODE not in model.decision.knobs)
    assert any(
        "can't be read" in reason.text for reason in Adaptive().step(replace(model.sample(), readings={}))[1].reasons
    )
