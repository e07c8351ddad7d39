# SPDX-License-Identifier: GPL-2.0-or-later
"""The runner on the engine: lockstep, what is skipped, refused and expected; comparison, facts, profiles, shrinking."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.codec import encode
from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.errors import CheckFailed, Refused
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.scenario.compare import Outcome, Result, Verdict, judge
from ksmd_ctl.scenario.format import LIBRARY, load_all, parse, text_of
from ksmd_ctl.scenario.generate import Abilities, generate, shrink
from ksmd_ctl.scenario.host_steps import Home, Observe
from ksmd_ctl.scenario.memory_steps import Discard
from ksmd_ctl.scenario.model import Scenario
from ksmd_ctl.scenario.report import Report
from ksmd_ctl.scenario.runner import run
from ksmd_ctl.scenario.session import DOMAIN_FACTS, Fact, Session, engine_for, find_profile
from ksmd_ctl.scenario.steps import KINDS
from tests.engine.validate import validate

SCENARIOS = load_all([LIBRARY])
KERNELS = [name for name in PROFILES if name != "seed"]


def small(steps: str, regions: str = "", knobs: str = "smart_scan = { value = 0, optional = true }") -> Scenario:
    regions = regions or '[[region]]\nprocess = "p"\nname = "a"\nnode = 0\npages = ["x", "x", "y"]\n'
    text = "\n".join(f"[[step]]\n{step}" for step in steps.split("; "))
    return parse(f'format = 1\nname = "small"\nnodes = 2\n[knobs]\n{knobs}\n{regions}\n{text}\n')


def on_engine(scenario: Scenario, profile: str = "6.12", nodes: int = 2) -> Outcome:
    return run(scenario, engine_for(profile, nodes), profile)


def two_engines(scenario: Scenario, first: str, second: str, nodes: int = 4) -> Result:
    outcomes = {
        "kernel": run(scenario, engine_for(first, nodes), first),
        "engine": run(scenario, engine_for(second, nodes), second),
    }
    return judge(scenario, outcomes)


# -- lockstep ------------------------------------------------------------------------------------------------


def test_a_scan_finishes_the_one_under_way_and_that_counts() -> None:
    outcome = on_engine(small('batch = 2; observe = "middle"; scan = 1; observe = "one"; scan = 2; observe = "three"'))
    counters = {label: seen.counters for label, seen in outcome.observations.items()}
    assert [counters[label]["full_scans"] for label in ("middle", "one", "three")] == [0, 1, 3]
    assert [counters[label]["pages_scanned"] for label in ("middle", "one", "three")] == [2, 3, 9]
    assert [event["scan"] for event in outcome.events] == [1, 2]


def test_a_scan_with_nobody_registered_does_nothing() -> None:
    outcome = on_engine(small('exit = { process = "p" }; scan = 3; observe = "end"'))
    assert [event["scan"] for event in outcome.events] == [0]
    # One that reaps what is left of the process, and then none.
    outcome = on_engine(small('scan = 2; exit = { process = "p" }; scan = 3; observe = "end"'))
    assert [event["scan"] for event in outcome.events] == [2, 1]


def test_observation_as_documented() -> None:
    document: Any = encode(on_engine(small('scan = 2; observe = "end"')).observations["end"])
    assert document["groups"] == [["p.a.0", "p.a.1"], ["p.a.2"]]
    assert document["nodes"] == {"p.a.0": 0, "p.a.1": 0, "p.a.2": 0}
    assert document["ksm"] == ["p.a.0", "p.a.1"]
    assert document["counters"]["pages_shared"] == 1
    assert document["counters"]["pages_sharing"] == 1


def test_the_zero_page_is_told_from_nothing() -> None:
    region = '[[region]]\nprocess = "p"\nname = "a"\npages = ["0", "0", "-"]\n'
    knobs = "use_zero_pages = 1\nsmart_scan = { value = 0, optional = true }"
    seen = on_engine(small('scan = 3; observe = "end"', region, knobs)).observations["end"]
    assert seen.groups == (("p.a.0", "p.a.1"),)
    assert seen.nodes == {}


def test_too_few_nodes_and_missing_knobs_are_skipped() -> None:
    assert on_engine(small('observe = "end"'), nodes=1).skipped == "needs 2 nodes with memory; this host has 1"
    plain = small('observe = "end"', knobs="smart_scan = 0")
    assert "no smart_scan" in on_engine(plain, "6.1").skipped
    assert not on_engine(plain).skipped
    assert not on_engine(small('observe = "end"'), "6.1").skipped
    assert "no smart_scan" in on_engine(small('set = { smart_scan = 0 }; observe = "end"', knobs=""), "6.1").skipped
    assert "no prctl" in on_engine(small('prctl = { process = "p", on = true }; observe = "end"'), "6.1").skipped


def test_foreign_memory_is_refused() -> None:
    engine = engine_for("6.12", 2)
    other = engine.spawn("other")
    address = engine.map(other, 1, None)
    engine.store(other, address, [b"x" * 4096])
    engine.advise(other, address, 1, mergeable=True)
    with pytest.raises(Refused, match="somebody else"):
        run(small('observe = "end"'), engine, "6.12")
    engine.exit(other)
    assert run(small('observe = "end"'), engine, "6.12").observations


def test_a_write_without_pages_is_to_the_whole_region() -> None:
    steps = 'write = { process = "p", region = "a", label = "new" }; scan = 2; observe = "end"'
    named = steps.replace("label", 'pages = "0-2", label')
    found, same = on_engine(small(steps)), on_engine(small(named))
    assert (found.failures, found.broken) == ([], "")
    assert found.observations == same.observations


def test_what_is_refused_has_to_be_expected() -> None:
    steps = 'scan = 2; set = { merge_across_nodes = 0 }; observe = "end"'
    assert on_engine(small(steps)).failures == ["step 2 (set): merge_across_nodes = 0 was EBUSY, not taken"]
    fails = steps.replace("; observe", '\nfails = "EBUSY"; observe')
    assert on_engine(small(fails)).failures == []
    taken = on_engine(small(fails.replace("scan = 2", "scan = 1"))).failures
    assert taken == ["step 2 (set): merge_across_nodes = 0 was taken, not EBUSY"]
    assert on_engine(small(fails.replace("EBUSY", "any"))).events[-1]["set"] == {"merge_across_nodes": "EBUSY"}


def test_a_second_wake_is_noticed() -> None:
    class Restless(EngineHost):
        def batch(self, pages: int) -> None:
            super().batch(pages)
            super().batch(pages)

    engine = engine_for("6.12", 2)
    engine.__class__ = Restless
    outcome = run(small('scan = 1; observe = "end"'), engine, "6.12")
    assert "full_scans went up by 2" in outcome.broken
    assert issubclass(CheckFailed, Exception)


def test_a_host_that_fails_is_different_and_not_a_crash() -> None:
    class Failing(EngineHost):
        def discard(self, process: ProcessId, start: int, pages: int) -> None:
            raise CheckFailed("discarding", "it did not")

    scenario = small('discard = { process = "p", region = "a" }; observe = "end"')
    engine = engine_for("6.12", 2)
    engine.__class__ = Failing
    result = judge(scenario, {"kernel": run(scenario, engine, "6.12"), "engine": on_engine(scenario)})
    assert result.verdict is Verdict.DIFFERENT
    assert "step 1 (discard): discarding: it did not" in result.reason


@pytest.mark.parametrize(
    ("expect", "said"),
    [
        ("pages_shared = 2", "pages_shared is 1, not 2"),
        ('groups = [["p.a.0"]]', "p.a.0 shares its frame with p.a.0, p.a.1, not with p.a.0"),
        ('nodes = { "p.a.0" = 1 }', "p.a.0 is on node 0, not on node 1"),
        ('profile = "6.1"\npages_shared = 2', ""),
        ('profile = ["6.1", "6.12"]\npages_shared = 2', "pages_shared is 1, not 2"),
    ],
)
def test_expectations(expect: str, said: str) -> None:
    scenario = parse(text_of(small('scan = 2; observe = "end"')) + f'[[expect]]\nat = "end"\n{expect}\n')
    assert on_engine(scenario).failures == ([f"end: {said}"] if said else [])


# -- the library ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", KERNELS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: Path(scenario.file).stem)
def test_the_library_holds_on_the_engine(scenario: Scenario, profile: str) -> None:
    outcome = on_engine(scenario, profile, 4)
    assert outcome.failures == []
    assert outcome.broken == ""
    if outcome.skipped:
        assert "this kernel has no" in outcome.skipped


def test_the_library_makes_everything_happen() -> None:
    session = Session("6.12")
    for scenario in SCENARIOS:
        session.run(scenario)
    assert session.happened.keys() == set(Fact) - {Fact.ADDRESS}
    assert session.verdicts == {Verdict.EQUAL: len(SCENARIOS)}


def test_the_seed_differs_at_the_first_finding() -> None:
    """What its authors thought would happen to a colliding page, against what a kernel with chains does."""
    scenario = next(each for each in SCENARIOS if Path(each.file).stem == "collision-is-for-ever")
    result = two_engines(scenario, "6.12", "seed")
    assert result.verdict is Verdict.DIFFERENT
    at, differences = result.first()
    assert at == "met"
    sides = {difference.what: difference.sides for difference in differences}
    assert sides["pages_shared"] == {"kernel": 8, "engine": 4}
    assert sides["pages_sharing"] == {"kernel": 8, "engine": 12}


def test_profiles_differ_somewhere_in_the_library() -> None:
    """Two profiles that no scenario tells apart behave alike: these two pairs differ in files and counters only."""
    alike = {
        (one, other)
        for number, one in enumerate(PROFILES)
        for other in list(PROFILES)[number + 1 :]
        if all(two_engines(scenario, one, other).verdict is not Verdict.DIFFERENT for scenario in SCENARIOS)
    }
    assert alike == {("5.10", "6.1"), ("6.12", "7.2")}


@pytest.mark.parametrize("reuse", [False, True])
def test_an_address_that_a_kernel_uses_again_is_no_difference(reuse: bool) -> None:
    kernel = engine_for("7.2", 1)
    kernel.machine.ksm.reuse_addresses = reuse
    session = Session("7.2", kernel)
    [scenario] = load_all([LIBRARY / "corners/c09-head-at-a-used-address.toml"])
    assert session.run(scenario).verdict is Verdict.EQUAL
    assert session.happened[Fact.ADDRESS] == reuse

    class Forgetful(EngineHost):
        def discard(self, process: ProcessId, start: int, pages: int) -> None:
            pass

    # Only this is excused.
    kernel.__class__ = Forgetful
    *steps, end = scenario.steps
    wrong = replace(scenario, steps=(*steps, Discard("q", "a"), end))
    assert session.run(wrong).verdict is Verdict.DIFFERENT


def test_memory_goes_offline_and_comes_back() -> None:
    region = '[[region]]\nprocess = "p"\nname = "a"\nnode = 1\npages = ["x", "x", "u", "0"]\n'
    region += '[[region]]\nprocess = "q"\nname = "a"\nnode = 0\npages = ["x"]\n'
    scenario = small(
        'scan = 3; offline = 1; observe = "moved"; scan = 1; observe = "end"', region, "merge_across_nodes = 0"
    )
    outcome = on_engine(scenario)
    assert [event for event in outcome.events if "offline" in event] == [{"step": 2, "offline": True}]
    assert set(outcome.observations["moved"].nodes.values()) == {0}
    assert ("p.a.0", "p.a.1", "q.a.0") in outcome.observations["end"].groups
    assert "needs two nodes" in on_engine(small('offline = 0; observe = "end"')).skipped


# -- random scenarios ----------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_scenarios() -> None:
    first = [text_of(generate(5, number, Abilities())) for number in range(30)]
    assert first == [text_of(generate(5, number, Abilities())) for number in range(30)]
    assert len(set(first)) == 30
    assert first != [text_of(generate(6, number, Abilities())) for number in range(30)]


def test_random_scenarios_reach_everything() -> None:
    session = Session("6.12")
    abilities = session.abilities()
    kinds: Counter[str] = Counter()
    nodes: Counter[int] = Counter()
    policies: Counter[bool] = Counter()
    for number in range(150):
        scenario = generate(11, number, abilities)
        session.run(scenario)
        kinds.update({step.kind for step in scenario.steps})
        nodes[scenario.nodes] += 1
        policies.update(region.node is None for region in scenario.regions)
    assert session.verdicts == {Verdict.EQUAL: 150}
    assert kinds.keys() == KINDS.keys() - {Home.kind}
    assert nodes.keys() == {1, 2, 3, 4}
    assert policies.keys() == {True, False}
    # Whether an address is used again is a kernel's choice.
    assert min(session.happened[fact] for fact in set(Fact) - {Fact.ADDRESS, *DOMAIN_FACTS}) >= 8, session.happened


@settings(max_examples=25)
@given(st.integers(0, 10**9), st.sampled_from(KERNELS))
def test_what_a_host_lacks_is_not_asked_for(seed: int, profile: str) -> None:
    session = Session(profile)
    assert session.run(generate(seed, 0, session.abilities())).verdict is Verdict.EQUAL


@pytest.mark.parametrize("profile", KERNELS)
def test_what_must_hold_holds_after_each_step(profile: str) -> None:
    abilities = Session(profile).abilities()
    for number in range(25):
        engine = engine_for(profile, 4)
        outcome = run(generate(17, number, abilities), engine, profile, lambda *_: validate(engine.machine))  # noqa: B023
        assert outcome.observations


# -- shrinking, probing, report ------------------------------------------------------------------------------


def test_a_difference_is_shrunk_to_what_it_needs() -> None:
    def differs(scenario: Scenario) -> bool:
        return two_engines(scenario, "6.12", "6.1").verdict is Verdict.DIFFERENT

    found = next(
        scenario
        for scenario in (generate(3, number, Abilities(nodes=2, huge=False)) for number in range(100))
        if differs(scenario) and len(scenario.steps) > 12
    )
    least = shrink(found, differs, 2000)
    assert differs(least)
    assert parse(text_of(least)) == replace(least, file="")
    assert len(least.steps) <= 6
    assert sum(len(region.pages) for region in least.regions) <= 6
    assert sum(isinstance(step, Observe) for step in least.steps) == 1


def test_shrinking_stops_at_its_limit() -> None:
    tries = 0

    def always(_scenario: Scenario) -> bool:
        nonlocal tries
        tries += 1
        return True

    shrink(generate(1, 1, Abilities()), always, 5)
    assert tries == 5


@pytest.mark.parametrize("profile", [name for name in KERNELS if name not in ("4.1", "7.2")])
def test_a_kernel_is_known_by_what_it_does(profile: str) -> None:
    stat = {"ksm_rmap_items"} if profile in ("6.1", "6.12") else set()
    found = find_profile(engine_for(profile, 2), stat)
    assert (found.profile, found.certain) == (profile, True)


def test_a_kernel_is_known_by_what_it_does_whatever_its_files_say() -> None:
    """A kernel with 6.12's files that orders its tests as 6.1 does is like none; the files decide, and it says so."""
    engine = engine_for("6.12", 2)
    engine.machine.ksm.profile = replace(engine.machine.ksm.profile, checksum_first=False)
    found = find_profile(engine, {"ksm_rmap_items"})
    assert (found.profile, found.certain) == ("6.12", False)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs


def test_the_report_is_one_file_with_pictures(tmp_path: Path) -> None:
    session = Session("6.12")
    report = Report(session)
    chosen = [scenario for scenario in SCENARIOS if "/seed/" in scenario.file]
    for scenario in chosen:
        report.add(session.run(replace(scenario, name="<b>&"), report.watch))
    path = tmp_path / "report.html"
    report.write(path, None, "6.12")
    text = path.read_text()
    page = _Page()
    page.feed(text)
    assert page.tags["svg"] > len(chosen)
    assert page.tags["b"] == sum(isinstance(step, Observe) for scenario in chosen for step in scenario.steps)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert not [
        value for name, value in page.attributes if name in ("src", "href") and not (value or "").startswith("#")
    ]
    assert not re.search(r"https?:", text)
    assert "migrate_nodes" in text


def test_knobs_are_back_after_a_run() -> None:
    engine = engine_for("6.12", 2)
    before: dict[Knob, Any] = {knob: engine.read(knob) for knob in Knob}
    run(small('scan = 2; observe = "end"', knobs="max_page_sharing = 3"), engine, "6.12")
    engine.close()
    assert {knob: engine.read(knob) for knob in Knob} == before
