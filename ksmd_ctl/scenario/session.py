# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios one after the other, on kernel and engine or on one of them, each with its verdict.

Which of the engine's profiles a kernel behaves like is found by the files that it has and then by small scenarios:
distributions carry changes back, and a kernel between 6.8 and 6.10 has the files of 6.12 and orders its tests as 6.1
does. The first profile that shows the same is the one. Releases are not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ksmd_ctl.codec import encode
from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.engine.profile import PROFILES, profile_for
from ksmd_ctl.errors import Absent, ReadError
from ksmd_ctl.host.interface import Inspect, Lab
from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob
from ksmd_ctl.host.memory import KsmDetection
from ksmd_ctl.scenario.compare import Outcome, Result, Verdict, compare, judge
from ksmd_ctl.scenario.format import PROBES, load
from ksmd_ctl.scenario.generate import Abilities
from ksmd_ctl.scenario.generate_domains import LEAST_NODES
from ksmd_ctl.scenario.host_steps import Batch, Offline, Set
from ksmd_ctl.scenario.memory_steps import REFUSED, Collapse, Exec, Fork, Migrate, Remap
from ksmd_ctl.scenario.model import Scenario, Step
from ksmd_ctl.scenario.runner import Run, Watch, run

KERNEL = "kernel"
ENGINE = "engine"

# Nodes that the engine has where no kernel says how many.
_ENGINE_NODES = 4


def engine_for(profile: str, nodes: int) -> EngineHost:
    """A new machine for one scenario; its time passes by `sleep` steps and by what operations cost."""
    return open_engine_host(profile, nodes, demo=False, source=None)


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel that scenarios run on.

    :ivar nodes: how many nodes with memory it has
    :ivar detection: how KSM pages are told from others on it
    :ivar ksm_witness: the same by its name before, deprecated
    """

    release: str
    nodes: int
    detection: KsmDetection
    ksm_witness: KsmDetection


@dataclass(slots=True)
class Session:
    """The hosts, and the results of scenarios so far.

    :ivar kernel: None where only the engine runs
    :ivar engine: False where only the kernel runs
    :ivar uncompared: how many ran without anything to compare
    :ivar happened: in how many scenarios a fact was seen in the engine's state
    """

    profile: str
    kernel: Lab | None = None
    engine: bool = True
    happened: Counter[Fact] = field(default_factory=Counter)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    uncompared: int = 0

    @property
    def nodes(self) -> int:
        """How many nodes with memory a scenario may have."""
        return _ENGINE_NODES if self.kernel is None else len(self.kernel.topology().with_memory())

    def run(self, scenario: Scenario, watch: Callable[[str], Watch] | None = None) -> Result:
        """One scenario on all hosts.

        :param watch: gives a host's watcher by the host's name
        :raises Refused: somebody else uses KSM on this machine
        """
        outcomes: dict[str, Outcome] = {}
        if self.kernel is not None:
            outcomes[KERNEL] = run(scenario, self.kernel, self.profile, *([watch(KERNEL)] if watch else []))
        if self.engine and not any(outcome.skipped for outcome in outcomes.values()):
            engine = engine_for(self.profile, self.nodes)
            finder = FactFinder(engine)
            outcomes[ENGINE] = run(scenario, engine, self.profile, finder, *([watch(ENGINE)] if watch else []))
            self.happened.update(finder.facts)
        self.happened.update(_domain_facts(outcomes.values()))
        result = judge(scenario, outcomes)
        if result.verdict is Verdict.DIFFERENT and ENGINE in outcomes and engine.machine.ksm.heads_in_doubt:
            result = self._with_addresses_used_again(result)
        self.verdicts[result.verdict] += 1
        self.uncompared += result.verdict is Verdict.EQUAL and not result.compared
        return result

    # Where an rmap_item's head is a stable node that was freed, a kernel that gives its address to another takes the
    # item for listed there. Whether it does is its allocator's choice, so either is right (engine.md, C9).
    def _with_addresses_used_again(self, result: Result) -> Result:
        engine = engine_for(self.profile, self.nodes)
        engine.machine.ksm.reuse_addresses = True
        outcomes = {**result.outcomes, ENGINE: run(result.scenario, engine, self.profile)}
        other = judge(result.scenario, outcomes)
        if other.verdict is not Verdict.EQUAL:
            return result
        self.happened[Fact.ADDRESS] += 1
        return other

    def lacks_domains(self) -> str:
        """Why there can be no scenarios with domains here; empty where there can."""
        if self.nodes < LEAST_NODES:
            return "this host has one node with memory"
        return self.kernel.lacks_cpusets() if self.kernel is not None else ""

    def counts(self) -> str:
        """How many scenarios had which verdict, as text."""
        counts = {verdict.value: self.verdicts[verdict] for verdict in Verdict}
        counts[Verdict.EQUAL.value] -= self.uncompared
        text = ", ".join(f"{count} {word}" for word, count in counts.items())
        return f"{text}, {self.uncompared} ran without anything to compare" if self.uncompared else text

    def abilities(self) -> Abilities:
        """What random scenarios may use here."""
        engine = abilities_of(engine_for(self.profile, self.nodes), self.nodes)
        if self.kernel is None:
            return engine
        kernel = abilities_of(self.kernel, self.nodes)
        merge, huge = engine.merge and kernel.merge, engine.huge and kernel.huge
        return Abilities(self.nodes, engine.knobs & kernel.knobs, merge, kernel.swap, huge, kernel.offline)


def abilities_of(lab: Lab, nodes: int) -> Abilities:
    """What one host can do."""
    knobs = set()
    for knob in SYSFS_KNOBS:
        try:
            lab.read(knob)
            knobs.add(knob)
        except Absent:
            continue
    # prctl came with the same release as this counter.
    merge = lab.sample().number("general_profit") is not None
    numbers = sorted(node.number for node in lab.topology().with_memory())
    offline = frozenset(numbers.index(node) for node in lab.removable_nodes())
    return Abilities(nodes, frozenset(knobs), merge, not lab.lacks_swap(), not lab.lacks_huge_pages(), offline)


def results_document(result: Result) -> dict[str, Any]:
    """One scenario's entry in the JSON document (docs/json.md)."""
    return {
        "file": result.scenario.file,
        "name": result.scenario.name,
        "verdict": result.verdict.value,
        "compared": result.compared,
        "reason": result.reason,
        "observations": {host: encode(outcome.observations) for host, outcome in result.outcomes.items()},
        "differences": [difference.document() for difference in result.differences],
    }


# -- which profile a kernel behaves like ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """The profile that a kernel behaves like.

    :ivar certain: every probe showed the same on both; else the profile is found by the files alone
    """

    profile: str
    certain: bool


def find_profile(lab: Lab, ksm_stat: set[str]) -> Found:
    """Run the probes.

    :param ksm_stat: the names of the lines in /proc/PID/ksm_stat, empty where there is none
    """
    readings = lab.sample().readings
    files = {name for name, reading in readings.items() if not isinstance(reading, ReadError)}
    likely = profile_for(files, ksm_stat=ksm_stat).name
    probes = [load(path) for path in sorted(PROBES.glob("*.toml"))]
    seen = [(probe, run(probe, lab, likely)) for probe in probes]
    for name in _candidates(lab, likely):
        if all(_same(probe, name, outcome) for probe, outcome in seen):
            return Found(name, True)
    return Found(likely, False)


def _candidates(lab: Lab, likely: str) -> Iterator[str]:
    yield likely
    knobs = abilities_of(lab, 1).knobs
    for name in PROFILES:
        # With other knobs it is another kernel, whatever these probes show.
        if name != likely and abilities_of(engine_for(name, 1), 1).knobs == knobs:
            yield name


def _same(probe: Scenario, profile: str, there: Outcome) -> bool:
    here = run(probe, engine_for(profile, probe.nodes), profile)
    if here.skipped or there.skipped:
        return True
    return not any(compare(probe, KERNEL, there, ENGINE, here))


# -- what happened -------------------------------------------------------------------------------------------------


class Fact(StrEnum):
    """Something that may happen in a scenario."""

    MIGRATION = "migration"
    EXILE = "exile"
    CHAIN = "chain"
    FORK = "fork"
    LIMIT = "limit"
    PARTIAL_SCAN = "partial scan"
    ZERO_PAGE = "zero page"
    SKIP = "smart-scan skip"
    EXEC = "exec"
    MREMAP = "mremap"
    SWAP_IN = "swap-in"
    HUGE_PAGE_SPLIT = "huge-page split"
    ZERO_SUBPAGE = "zero subpage"
    COLLAPSE = "collapse"
    OFFLINE = "offlined block"
    ADDRESS = "address used again"
    REFUSED_KNOB = "refused knob"
    REFUSED_MOVE = "refused migration"
    STRAY = "stray page"
    ACROSS = "frame across domains"


#: What random scenarios without domains have seldom or never.
DOMAIN_FACTS = frozenset({Fact.REFUSED_KNOB, Fact.REFUSED_MOVE, Fact.STRAY, Fact.ACROSS})


# Found on each host by itself, so that a kernel alone tells, too.
def _domain_facts(outcomes: Collection[Outcome]) -> Iterator[Fact]:
    if any(outcome.strays for outcome in outcomes):
        yield Fact.STRAY
    if any(outcome.across for outcome in outcomes):
        yield Fact.ACROSS


def stable_nodes(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every stable node of the engine's state that has a page, in trees, chains and exile."""
    for tree in state["stable_trees"]:
        for node in tree["nodes"]:
            yield from node.get("dups", (node,))
    yield from state["migrate_nodes"]


class FactFinder:
    """Watches one scenario on the engine; a `Watch`. The facts show that random scenarios do test something.

    :ivar facts: what has happened
    """

    def __init__(self, engine: Inspect) -> None:
        self._engine = engine
        self.facts: set[Fact] = set()
        self._places: dict[int, tuple[int, int]] = {}

    def __call__(self, number: int, step: Step | None, run: Run) -> None:
        state: Mapping[str, Any] = self._engine.state()
        nodes = list(stable_nodes(state))
        places = {node["id"]: (node["nid"], node["node_of_kpfn"]) for node in nodes}
        before = {key: self._places[key] for key in places.keys() & self._places.keys()}
        limit = int(state["knobs"].get(Knob.MAX_PAGE_SHARING, 0))
        happened = {
            Fact.MIGRATION: isinstance(step, Migrate)
            and any(places[key][1] != place[1] for key, place in before.items()),
            # Where own items find it, a node is back in a tree when the step ends: then its nid tells.
            Fact.EXILE: state["migrate_nodes"] or any(places[key][0] != place[0] for key, place in before.items()),
            Fact.CHAIN: any(node["kind"] == "dup" for node in nodes),
            Fact.LIMIT: limit and any(len(node["items"]) >= limit for node in nodes),
            Fact.FORK: isinstance(step, Fork) and any(page.frame is not None for _, page in run.pages()),
            Fact.PARTIAL_SCAN: isinstance(step, Batch) and state["cursor"] is not None,
            Fact.ZERO_PAGE: state["counters"].get("ksm_zero_pages"),
            Fact.SKIP: state["counters"].get("pages_skipped"),
            Fact.EXEC: isinstance(step, Exec),
            Fact.MREMAP: isinstance(step, Remap),
            Fact.SWAP_IN: state["swap_ins"],
            Fact.HUGE_PAGE_SPLIT: state["huge_page_splits"],
            Fact.ZERO_SUBPAGE: state["freed_by_splits"],
            Fact.OFFLINE: isinstance(step, Offline) and run.outcome.events[-1].get(step.kind),
            Fact.COLLAPSE: isinstance(step, Collapse) and any(run.outcome.events[-1].get(step.kind, ())),
            Fact.REFUSED_KNOB: isinstance(step, Set) and any(run.outcome.events[-1][step.kind].values()),
            Fact.REFUSED_MOVE: isinstance(step, Migrate) and run.outcome.events[-1][step.kind] == REFUSED,
        }
        self.facts.update(fact for fact, seen in happened.items() if seen)
        self._places = places
