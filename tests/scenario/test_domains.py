# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains in scenarios: their format, the check that they stay apart and that it can fail, random ones, and cpusets."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from ksmd_ctl.cli import main as command_line
from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.errors import ConfigError, HostError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import PageState
from ksmd_ctl.scenario import generate_domains
from ksmd_ctl.scenario.compare import Outcome, Verdict, judge
from ksmd_ctl.scenario.cpusets import GROUP, Cpusets
from ksmd_ctl.scenario.format import LIBRARY, load, parse, text_of
from ksmd_ctl.scenario.generate import Abilities, shrink
from ksmd_ctl.scenario.generate_domains import Mode, generate
from ksmd_ctl.scenario.host_steps import Home, Offline
from ksmd_ctl.scenario.model import Domain, Scenario
from ksmd_ctl.scenario.runner import run
from ksmd_ctl.scenario.separation import Separation
from ksmd_ctl.scenario.session import DOMAIN_FACTS, Fact, Session, engine_for

KERNELS = [name for name in PROFILES if name != "seed"]

TEXT = """
format = 1
name = "test"
nodes = 3
[knobs]
merge_across_nodes = 0
smart_scan = { value = 0, optional = true }
[[domain]]
name = "gold"
nodes = "0,2"
processes = ["g"]
[[domain]]
name = "silver"
nodes = "1"
processes = ["s"]
[[region]]
process = "g"
name = "a"
node = 2
pages = ["x", "x"]
[[region]]
process = "s"
name = "a"
pages = ["x", "x"]
[[step]]
scan = 3
[[step]]
observe = "end"
"""


def on_engine(scenario: Scenario, profile: str = "6.12", nodes: int = 4) -> Outcome:
    return run(scenario, engine_for(profile, nodes), profile)


def steps(text: str) -> str:
    return TEXT + "".join(f"[[step]]\n{step}\n" for step in text.split("; "))


# -- the format ----------------------------------------------------------------------------------------------


def test_domains_read_and_read_back() -> None:
    scenario = parse(TEXT)
    assert scenario.domains == (Domain("gold", (0, 2), ("g",)), Domain("silver", (1,), ("s",)))
    assert parse(text_of(scenario)) == scenario


@pytest.mark.parametrize(
    ("old", "new", "key", "said"),
    [
        ('nodes = "1"', 'nodes = "1-2"', "domain 2: nodes", "node 2 is domain gold's"),
        ('nodes = "1"', 'nodes = "3"', "domain 2: nodes", "nodes 0 to 2"),
        ('nodes = "1"', 'nodes = "64"', "domain 2: nodes", "nodes below 64"),
        ('nodes = "1"', "nodes = 1", "domain 2: nodes", 'as in "0"'),
        ('nodes = "1"\n', "", "domain 2: nodes", "missing"),
        ('name = "silver"', 'name = "gold"', "domain 2: name", "already"),
        ('["s"]', '["q"]', "domain 2: processes", "no region has a process q"),
        ('["s"]', '["g"]', "domain 2: processes", "in domain gold already"),
        ('["s"]', "[]", "domain 2: processes", "at least one"),
        ('["s"]', '["s", "s"]', "domain 2: processes", "each once"),
        ('["s"]', '["s"]\ncolour = 1', "domain 2: colour", "unknown"),
        ("node = 2", "node = 1", "region 1: node", "domain gold has 0,2"),
        ("scan = 3", "offline = 1", "step 1 (offline)", "no memory goes offline"),
    ],
)
def test_mistakes(old: str, new: str, key: str, said: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(ConfigError) as caught:
        parse(TEXT.replace(old, new), "some.toml")
    [problem] = [str(problem) for problem in caught.value.problems]
    assert problem.startswith(f"some.toml: {key}: ")
    assert said in problem


def test_pages_go_home_in_scenarios_with_domains_only() -> None:
    without = TEXT[: TEXT.index("[[domain]]")] + TEXT[TEXT.index("[[region]]") :]
    parse(without)
    with pytest.raises(ConfigError, match="there is no domain"):
        parse(without + "[[step]]\nhome = true\n")


# -- the check -----------------------------------------------------------------------------------------------


def page(frame: int, node: int | None) -> PageState:
    return PageState(frame, node, False)


def test_a_frame_of_two_domains_is_found_unless_a_page_of_it_had_strayed() -> None:
    gold, silver = Domain("gold", (0,), ("g",)), Domain("silver", (1,), ("s",))
    domains = {"g": gold, "s": silver, "h": gold}
    numbers = {4: 0, 6: 1}
    look = Separation(domains, numbers)
    assert look.look([("g.a.0", page(1, 4)), ("h.a.0", page(1, 4)), ("s.a.0", page(2, 6))]) == []
    assert (look.with_strays, look.with_across) == (0, 0)
    # The zero page is on no node; a page of nobody's domain is nobody's stray.
    nothing = [("g.a.0", page(9, None)), ("s.a.0", page(9, None)), ("s.a.1", PageState(None, None, False))]
    assert look.look([*nothing, ("x.a.0", page(3, 4)), ("g.a.1", page(3, 4))]) == []
    assert (look.with_strays, look.with_across) == (0, 0)
    across = [("g.a.0", page(1, 4)), ("h.a.0", page(1, 4)), ("s.a.0", page(1, 4))]
    assert look.look(across) == [["g.a.0", "h.a.0", "s.a.0"]]
    assert (look.with_strays, look.with_across) == (1, 1)
    # It is told once, and not of who had strayed before.
    assert look.look(across) == []
    look = Separation(domains, numbers)
    assert look.look([("g.a.0", page(1, 4)), ("s.a.0", page(2, 4))]) == []
    assert look.look(across) == []
    assert (look.with_strays, look.with_across) == (2, 1)
    assert look.look([*across, ("s.a.1", page(1, 4))]) == [["g.a.0", "h.a.0", "s.a.0", "s.a.1"]]


def test_domains_apart_are_something_to_compare() -> None:
    outcome = on_engine(parse(TEXT))
    assert (outcome.expectations, outcome.failures, outcome.strays, outcome.across) == (1, [], 0, 0)
    assert set(outcome.observations["end"].groups) == {("g.a.0", "g.a.1"), ("s.a.0", "s.a.1")}
    assert outcome.observations["end"].nodes == {"g.a.0": 2, "g.a.1": 2, "s.a.0": 1, "s.a.1": 1}
    assert judge(parse(TEXT), {"engine": outcome}).word == "equal"


def test_with_merging_across_nodes_it_only_counts() -> None:
    outcome = on_engine(parse(TEXT.replace("merge_across_nodes = 0", "merge_across_nodes = 1")))
    assert outcome.failures == []
    assert outcome.strays == outcome.across > 0


@pytest.mark.parametrize("step", ["scan", "batch"])
def test_an_engine_with_one_tree_for_all_nodes_fails(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trees.get_kpfn_nid", "trees.page_to_nid", "scan.get_kpfn_nid"):
        monkeypatch.setattr(f"ksmd_ctl.engine.{name}", lambda *_: 0, raising=False)
    many = "; ".join([f"{step} = {1 if step == 'scan' else 7}"] * 6)
    scenario = parse(TEXT.replace("[[step]]\nscan = 3\n", "".join(f"[[step]]\n{each}\n" for each in many.split("; "))))
    outcome = on_engine(scenario)
    assert outcome.across > 0
    [failure] = outcome.failures
    assert f"({step}): " in failure
    assert "share a frame across domains" in failure
    assert judge(scenario, {"engine": outcome}).verdict is Verdict.DIFFERENT


def test_a_migration_to_another_domain_is_refused_and_hosts_have_to_agree() -> None:
    moves = "migrate = { process = 's', region = 'a', to = 0 }; migrate = { process = 'g', region = 'a', to = 0 }"
    outcome = on_engine(parse(steps(f"{moves}; observe = 'moved'")))
    assert [event["migrate"] for event in outcome.events if "migrate" in event] == ["EACCES", [0]]
    assert outcome.observations["moved"].nodes == {"g.a.0": 0, "g.a.1": 0, "s.a.0": 1, "s.a.1": 1}


def test_strays_go_home() -> None:
    fault = "break = { process = 's', region = 'a', node = 0 }; observe = 'strays'; home = true; observe = 'home'"
    outcome = on_engine(parse(steps(fault)))
    assert outcome.events[-1] == {"step": 5, "home": {"g": [], "s": [1, 1]}}
    assert outcome.observations["strays"].nodes["s.a.0"] == 0
    assert outcome.observations["home"].nodes["s.a.0"] == 1
    assert (outcome.failures, outcome.strays, outcome.across) == ([], 1 + 1, 0)


# -- random ones ---------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_ones_in_both_modes() -> None:
    abilities = Abilities(nodes=4)
    for number in range(40):
        apart, across = (generate(5, number, abilities, mode) for mode in Mode)
        assert apart == generate(5, number, abilities, Mode.SEPARATE)
        assert parse(text_of(apart)) == apart
        assert apart.knobs.keys() == across.knobs.keys()
        assert [apart.knobs[Knob.MERGE_ACROSS_NODES].value, across.knobs[Knob.MERGE_ACROSS_NODES].value] == [0, 1]
        assert (apart.regions, apart.domains) == (across.regions, across.domains)
        assert [step.kind for step in apart.steps] == [step.kind for step in across.steps]
        assert not any(isinstance(step, Offline) for step in apart.steps)


@pytest.mark.parametrize("profile", KERNELS)
def test_domains_stay_apart_unless_pages_merge_across_nodes(profile: str) -> None:
    count = 60 if profile == "6.12" else 25
    for mode in Mode:
        session = Session(profile)
        abilities = session.abilities()
        scenarios = [generate(31, number, abilities, mode) for number in range(count)]
        for scenario in scenarios:
            assert session.run(scenario).differences == []
        assert session.verdicts == {Verdict.EQUAL: count}
        assert session.uncompared == 0
        if mode is Mode.SEPARATE:
            assert session.happened[Fact.ACROSS] == 0
        else:
            assert session.happened[Fact.ACROSS] > count / 2
        for fact in (Fact.STRAY, Fact.REFUSED_MOVE, Fact.REFUSED_KNOB):
            assert session.happened[fact] > count / 10, fact
    assert any(Home() in scenario.steps for scenario in scenarios)
    assert any(len(domain.nodes) > 1 for scenario in scenarios for domain in scenario.domains)


def test_two_nodes_are_enough() -> None:
    for number in range(20):
        scenario = generate(1, number, Abilities(nodes=2), Mode.SEPARATE)
        assert sorted(domain.nodes for domain in scenario.domains) == [(0,), (1,)]


def test_one_that_shows_something_is_shrunk_with_its_domains() -> None:
    def shows(scenario: Scenario) -> bool:
        return on_engine(scenario).across > 0

    found = next(
        each for each in (generate(2, number, Abilities(nodes=3), Mode.ACROSS) for number in range(20)) if shows(each)
    )
    least = shrink(found, shows, 1000)
    assert parse(text_of(least)) == replace(least, file="")
    assert len(least.domains) == 2
    assert sum(len(region.pages) for region in least.regions) <= 4


def ksmd_ctl(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = command_line.main(["verify", "--host", "engine", *words])
    except SystemExit as stop:
        code = int(str(stop.code))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("mode", Mode)
def test_the_command_counts_scenarios_with_frames_across(mode: Mode, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ksmd_ctl("--random", "4", "--count", "20", "--domains", mode, capsys=capsys)
    assert code == 0
    assert out.splitlines()[0].endswith(": 20 equal, 0 different, 0 skipped")
    assert ("frame across domains" in out) == (mode is Mode.ACROSS)


def test_what_the_command_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = ksmd_ctl("--domains", "separate", capsys=capsys)
    assert (code, "--domains need --random" in err) == (2, True)
    assert ksmd_ctl("--random", "1", "--domains", "apart", capsys=capsys)[0] == 2
    monkeypatch.setattr("ksmd_ctl.scenario.session._ENGINE_NODES", 1)
    code, out, err = ksmd_ctl("--random", "1", "--domains", "separate", capsys=capsys)
    assert (code, out) == (4, "")
    assert "this host has one node with memory" in err
    assert "numa=fake" in err


def test_a_host_without_cpusets_skips_it_and_says_so() -> None:
    engine = engine_for("6.12", 4)
    engine.lacks_cpusets = lambda: "needs cpusets, and there are none"  # type: ignore[method-assign]
    assert run(parse(TEXT), engine, "6.12").skipped == "needs cpusets, and there are none"
    assert Session("6.12", engine).lacks_domains() == "needs cpusets, and there are none"
    assert Session("6.12").lacks_domains() == ""


def test_the_facts_of_domains_are_facts() -> None:
    assert set(Fact) > DOMAIN_FACTS
    assert generate_domains.LEAST_NODES == 2


def test_the_library_has_domains_that_stay_apart_and_others_that_do_not() -> None:
    outcomes = {path.stem: on_engine(load(path)) for path in (LIBRARY / "domains").glob("*.toml")}
    across = {name for name, outcome in outcomes.items() if outcome.across}
    assert across == {"nothing-else-separates", "stray-of-an-unmerging"}
    assert not any(outcome.failures for outcome in outcomes.values())


# -- cpusets, on a made-up tree ------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mounts").write_text("proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    top = tmp_path / "sys/fs/cgroup"
    top.mkdir(parents=True)
    (top / "cgroup.controllers").write_text("cpu cpuset memory\n")
    (top / "cgroup.subtree_control").write_text("memory\n")
    return tmp_path


def group(tree: Path, *names: str) -> Path:
    path = tree.joinpath("sys/fs/cgroup", GROUP, *names)
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.subtree_control").write_text("")
    return path


def test_a_process_is_confined_by_a_cpuset(tree: Path) -> None:
    cpusets = Cpusets(tree)
    assert cpusets.lacks() == ""
    group(tree)
    child = group(tree, "0,2-3")
    (child / "cpuset.mems.effective").write_text("0,2-3\n")
    cpusets.confine(77, frozenset({0, 2, 3}))
    assert [(child / name).read_text() for name in ("cpuset.mems", "cgroup.procs")] == ["0,2-3", "77"]
    assert [(path / "cgroup.subtree_control").read_text() for path in (child.parents[1], child.parent)] == [
        "+cpuset"
    ] * 2


def test_what_the_kernel_does_not_allow_is_no_success(tree: Path) -> None:
    group(tree)
    child = group(tree, "1")
    (child / "cpuset.mems.effective").write_text("0\n")
    with pytest.raises(HostError, match="it has 0"):
        Cpusets(tree).confine(77, frozenset({1}))
    (child / "cpuset.mems").unlink()
    (child / "cpuset.mems").mkdir()
    with pytest.raises(HostError, match="confining process 77 to the nodes 1") as caught:
        Cpusets(tree).confine(77, frozenset({1}))
    assert (caught.value.errno, caught.value.path) == (errno.EISDIR, str(child / "cpuset.mems"))


def test_empty_cgroups_are_removed_and_others_stay(tree: Path) -> None:
    for name in ("0", "1"):
        (tree / "sys/fs/cgroup" / GROUP / name).mkdir(parents=True)
    # As if a process were in it.
    (tree / "sys/fs/cgroup" / GROUP / "1/cgroup.procs").write_text("77")
    Cpusets(tree).close()
    assert [path.name for path in (tree / "sys/fs/cgroup" / GROUP).iterdir()] == ["1"]
    (tree / "sys/fs/cgroup" / GROUP / "1/cgroup.procs").unlink()
    Cpusets(tree).close()
    assert not (tree / "sys/fs/cgroup" / GROUP).exists()
    # Somebody else's controllers are left on.
    assert (tree / "sys/fs/cgroup/cgroup.subtree_control").read_text() == "memory\n"


def test_it_says_what_is_lacking(tree: Path, tmp_path: Path) -> None:
    (tree / "sys/fs/cgroup/cgroup.controllers").write_text("cpu memory\n")
    assert "does not have them (version 1 may)" in Cpusets(tree).lacks()
    (tree / "proc/self/mounts").write_text("proc /proc proc rw 0 0\n")
    assert Cpusets(tree).lacks() == "needs cpusets, and cgroup version 2 is not mounted"
    assert "not mounted" in Cpusets(tmp_path / "nowhere").lacks()
    Cpusets(tmp_path / "nowhere").close()
