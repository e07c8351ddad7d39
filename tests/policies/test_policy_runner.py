# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy runner: one object for one want, knobs that go back, and what it remembers."""

from __future__ import annotations

import dataclasses

import pytest

from ksmd_ctl.config.model import Config, Heal, PolicyName, Want
from ksmd_ctl.errors import HostError
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.knobs.saved_knobs import SavedKnob
from ksmd_ctl.policies.policy_runner import RECENT, PolicyRunner
from tests.fakes.host import FakeHost

CONFIG = dataclasses.replace(Config(), policy=PolicyName.ADAPTIVE)


def values(runner: PolicyRunner) -> dict[Knob, KnobValue]:
    return {knob: want.value for knob, want in runner.desired.knobs.items()}


def test_what_is_wanted_stays_the_same_object_while_nothing_changes() -> None:
    runner, host = PolicyRunner(CONFIG, 4096), FakeHost()
    for _ in range(6):
        host.now += 1
        runner.tick(host.sample())
    before = runner.desired
    for _ in range(20):
        host.now += 1
        assert runner.tick(host.sample()) is before


@pytest.mark.parametrize("policy", list(PolicyName))
def test_observe_wants_nothing_and_the_others_hold_what_knobs_names(policy: PolicyName) -> None:
    config = dataclasses.replace(Config(), policy=policy, knobs={Knob.USE_ZERO_PAGES: Want(1)})
    runner, host = PolicyRunner(config, 4096), FakeHost()
    runner.tick(host.sample())
    wanted = values(runner)
    assert (Knob.USE_ZERO_PAGES in wanted) == (policy is not PolicyName.OBSERVE)
    assert (Knob.RUN in wanted) == policy.steers
    if policy is PolicyName.OBSERVE:
        assert wanted == {}
    assert runner.section(host.now)["reasons"]


def test_what_this_kernel_lacks_is_not_wanted() -> None:
    host = FakeHost(lacks=[Knob.SMART_SCAN, Knob.ADVISOR_MODE])
    for policy in (PolicyName.KSMTUNED, PolicyName.KERNEL, PolicyName.ADAPTIVE):
        runner = PolicyRunner(dataclasses.replace(Config(), policy=policy), 4096)
        runner.tick(host.sample())
        assert not {Knob.SMART_SCAN, Knob.ADVISOR_MODE} & runner.desired.knobs.keys()
        assert Knob.RUN in runner.desired.knobs


@pytest.mark.parametrize("policy", [PolicyName.OBSERVE, PolicyName.FIXED, PolicyName.KSMTUNED])
def test_after_a_reload_what_was_steered_goes_back_to_what_was_before_the_start(policy: PolicyName) -> None:
    runner, host = PolicyRunner(CONFIG, 4096), FakeHost()
    runner.tick(host.sample())
    steered = values(runner)
    entries = {knob: SavedKnob(value, None, value) for knob, value in host.knobs.items()}
    for knob, value in steered.items():
        host.put(knob, value)
    host.put(Knob.SMART_SCAN, 0)
    named = {Knob.PAGES_TO_SCAN: Want(777)} if policy is PolicyName.FIXED else {}
    runner.take(dataclasses.replace(Config(), policy=policy, knobs=named), entries)
    host.now += 1
    runner.tick(host.sample())
    wanted = values(runner)
    assert wanted[Knob.SMART_SCAN] == 1
    if policy is not PolicyName.KSMTUNED:
        assert wanted[Knob.RUN] == 0
    assert wanted.get(Knob.PAGES_TO_SCAN) != steered[Knob.PAGES_TO_SCAN]
    for knob, value in wanted.items():
        host.put(knob, value)
    host.now += 1
    runner.tick(host.sample())
    assert Knob.SMART_SCAN not in runner.desired.knobs
    assert set(values(runner)) == (set(named) if policy is not PolicyName.KSMTUNED else set(values(runner)))


def test_a_reload_that_changes_nothing_about_the_policy_forgets_nothing() -> None:
    runner, host = PolicyRunner(CONFIG, 4096), FakeHost()
    for _ in range(5):
        host.now += 1
        runner.tick(host.sample())
    recent = runner.section(host.now)["recent"]
    runner.take(dataclasses.replace(CONFIG, sample_interval=2.0, knobs={Knob.MAX_PAGE_SHARING: Want(512)}), {})
    assert runner.section(host.now)["recent"] == recent
    assert values(runner)[Knob.MAX_PAGE_SHARING] == 512
    assert Knob.RUN in values(runner)


def test_healing_can_be_switched_on_for_fixed() -> None:
    config = dataclasses.replace(
        Config(), policy=PolicyName.FIXED, knobs={Knob.RUN: Want(1)}, heal_smart_scan=Heal.ON, heal_swapin=Heal.OFF
    )
    runner, host = PolicyRunner(config, 4096), FakeHost()
    runner.tick(host.sample())
    assert values(runner) == {Knob.RUN: 1, Knob.SMART_SCAN: 1}
    assert runner.section(host.now)["healed"] == {"smart_scan": {"pulses": 0, "pages": 0}}


@pytest.mark.parametrize(("policy", "heal", "held"), [
    (PolicyName.FIXED, Heal.ON, True), (PolicyName.KSMTUNED, Heal.ON, True), (PolicyName.ADAPTIVE, Heal.ON, True),
    (PolicyName.ADAPTIVE, Heal.ADAPTIVE, True), (PolicyName.FIXED, Heal.ADAPTIVE, False),
    (PolicyName.ADAPTIVE, Heal.OFF, False), (PolicyName.OBSERVE, Heal.ON, False),
])  # fmt: skip
def test_use_zero_pages_is_held_unless_it_is_declared_or_not_counted(
    policy: PolicyName, heal: Heal, held: bool
) -> None:
    config = dataclasses.replace(Config(), policy=policy, heal_zero_pages=heal)
    assert wants(config, counted=True).get(Knob.USE_ZERO_PAGES) == (1 if held else None)
    assert Knob.USE_ZERO_PAGES not in wants(config, counted=False)
    declared = dataclasses.replace(config, knobs={Knob.USE_ZERO_PAGES: Want(0)})
    assert wants(declared, counted=True).get(Knob.USE_ZERO_PAGES) == (0 if policy.writes else None)


@pytest.mark.parametrize("policy", list(PolicyName))
def test_ksmds_scheduling_class_is_chosen_unless_it_is_declared(policy: PolicyName) -> None:
    config = dataclasses.replace(Config(), policy=policy)
    chosen = "idle" if policy is PolicyName.ADAPTIVE else None
    assert wants(config, counted=True).get(Knob.KSMD_SCHEDULING) == chosen
    assert config.holds(Knob.KSMD_SCHEDULING) == (chosen is not None)
    declared = dataclasses.replace(config, knobs={Knob.KSMD_SCHEDULING: Want("batch")})
    assert wants(declared, counted=True).get(Knob.KSMD_SCHEDULING) == ("batch" if policy.writes else None)


def wants(config: Config, *, counted: bool) -> dict[Knob, object]:
    """What the policy of a configuration wants of the knobs, where ksm_zero_pages is counted and where it is not."""
    runner, host = PolicyRunner(config, 4096), FakeHost()
    sample = host.sample()
    readings = {name: found for name, found in sample.readings.items() if name != "ksm_zero_pages"}
    runner.tick(dataclasses.replace(sample, readings=readings | ({"ksm_zero_pages": 0} if counted else {})))
    return dict(values(runner))


def test_no_more_than_the_latest_decisions_are_kept() -> None:
    config = dataclasses.replace(Config(), policy=PolicyName.KSMTUNED, ksmtuned_interval=1.0)
    runner, host = PolicyRunner(config, 4096), FakeHost()
    for number in range(100):
        host.now += 10
        host.counters |= {
            "mem_total_bytes": 1 << 36,
            "mem_available_bytes": (1 << 34) + (1 << 35) * (number % 2),
            "nr_anon_pages": 1000,
        }
        runner.tick(host.sample())
    recent = runner.section(host.now)["recent"]
    assert isinstance(recent, list)
    assert len(recent) <= RECENT
    ages = [past["age_seconds"] for past in recent]
    assert ages == sorted(ages)


def test_housekeeping_stands_for_what_was_found_last() -> None:
    want = Want("housekeeping", True, "c.toml")
    config = dataclasses.replace(Config(), policy=PolicyName.FIXED, knobs={Knob.KSMD_CPUS: want})
    runner, host = PolicyRunner(config, 4096), FakeHost()
    assert runner.needs_housekeeping
    # Nothing is held, and nothing is wrong, before it is known.
    assert runner.tick(host.sample()).knobs == {}
    runner.set_housekeeping("0-1")
    assert runner.tick(host.sample()).knobs == {Knob.KSMD_CPUS: dataclasses.replace(want, value="0-1")}
    runner.set_housekeeping(HostError("looking for housekeeping CPUs", "no CPU is left"))
    assert runner.tick(host.sample()).knobs == {Knob.KSMD_CPUS: dataclasses.replace(want, unknown="no CPU is left")}
    runner.take(dataclasses.replace(config, knobs={Knob.KSMD_CPUS: Want("1")}), {})
    assert not runner.needs_housekeeping
    assert values(runner) == {Knob.KSMD_CPUS: "1"}
    runner.take(dataclasses.replace(config, policy=PolicyName.OBSERVE), {})
    assert not runner.needs_housekeeping


def entries(at_start: int) -> dict[Knob, SavedKnob]:
    return {Knob.RUN: SavedKnob(at_start, 0, at_start)}


@pytest.mark.parametrize("policy", [PolicyName.FIXED, PolicyName.ADAPTIVE, PolicyName.KERNEL, PolicyName.KSMTUNED])
def test_while_ksmd_is_stopped_nothing_else_decides_about_run(policy: PolicyName) -> None:
    knobs = {Knob.RUN: Want(1)} if policy is PolicyName.FIXED else {Knob.MAX_PAGE_SHARING: Want(256)}
    config = dataclasses.replace(Config(), policy=policy, knobs=knobs)
    runner, host = PolicyRunner(config, 4096), FakeHost({Knob.RUN: 1})
    before = runner.tick(host.sample())
    runner.stop("a domain is not isolated", {})
    for _ in range(3):
        host.now += 10
        assert runner.tick(host.sample()).knobs[Knob.RUN] == Want(0, True, "a domain is not isolated")
    assert runner.desired.knobs.keys() >= before.knobs.keys()
    runner.take(dataclasses.replace(config, ksmtuned_npages_max=99), {})
    assert runner.tick(host.sample()).knobs[Knob.RUN].value == 0
    runner.stop("", entries(1))
    host.now += 10
    after = runner.tick(host.sample())
    assert after.knobs.get(Knob.RUN) == runner.desired.knobs.get(Knob.RUN)
    if policy is PolicyName.FIXED:
        assert after.knobs[Knob.RUN].value == 1


@pytest.mark.parametrize(("at_start", "after"), [(1, 1), (0, None), (2, None)])
def test_run_goes_back_to_what_it_was_where_nobody_wants_anything_of_it(at_start: int, after: int | None) -> None:
    config = dataclasses.replace(Config(), policy=PolicyName.FIXED, knobs={Knob.MAX_PAGE_SHARING: Want(256)})
    runner, host = PolicyRunner(config, 4096), FakeHost({Knob.RUN: 0})
    runner.stop("a domain is not isolated", {})
    runner.tick(host.sample())
    runner.stop("", entries(at_start))
    want = runner.tick(host.sample()).knobs.get(Knob.RUN)
    assert (None if want is None else want.value) == after
    host.put(Knob.RUN, 1)
    runner.tick(host.sample())
    if after:
        assert runner.given_back == {Knob.RUN: 1}
    assert Knob.RUN not in runner.tick(host.sample()).knobs


def test_a_service_that_was_killed_while_ksmd_was_stopped_gives_run_back_later() -> None:
    config = dataclasses.replace(Config(), policy=PolicyName.FIXED, knobs={Knob.MAX_PAGE_SHARING: Want(256)})
    runner, host = PolicyRunner(config, 4096, entries(1)), FakeHost({Knob.RUN: 0})
    runner.stop("no audit yet", entries(1))
    assert runner.tick(host.sample()).knobs[Knob.RUN].value == 0
    runner.stop("", entries(1))
    assert runner.tick(host.sample()).knobs[Knob.RUN].value == 1
