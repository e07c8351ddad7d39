# SPDX-License-Identifier: GPL-2.0-or-later
"""What is observed of a host, what the file expects, and where two hosts differ.

Pages are named process.region.index, nodes are indices among the nodes with memory, so that two hosts compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ksmd_ctl.host.memory import PageState
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.scenario.check import COUNTERS
from ksmd_ctl.scenario.host_steps import Observe
from ksmd_ctl.scenario.model import Expect, Scenario, step_key

# Counters that no knob resets: an observation has them from the start of the scenario.
_SINCE_START = ("pages_scanned", "pages_skipped", "cow_ksm", "ksm_swpin_copy")


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen of a host at one moment.

    :ivar groups: pages that share a frame, present ones only, singles too; sorted
    :ivar nodes: of each page; none for a page that is mapped to the zero page, which all nodes share
    :ivar ksm: the KSM pages
    """

    counters: Mapping[str, int]
    groups: tuple[tuple[str, ...], ...]
    nodes: Mapping[str, int]
    ksm: tuple[str, ...]


def counters_of(sample: Sample) -> dict[str, int]:
    """The counters that a host has."""
    found = {name: sample.number(name) for name in COUNTERS}
    return {name: int(value) for name, value in found.items() if value is not None}


def observe(
    sample: Sample, start: Mapping[str, int], pages: Iterable[tuple[str, PageState]], indices: Mapping[int, int]
) -> Observation:
    """An observation.

    :param start: the counters at the start of the scenario
    :param pages: every page that a process may have, by name
    :param indices: the index of each node number
    """
    counters = counters_of(sample)
    for name in _SINCE_START:
        if name in counters:
            counters[name] -= start.get(name, 0)
    frames: dict[int, list[str]] = {}
    nodes: dict[str, int] = {}
    ksm: list[str] = []
    for name, page in pages:
        if page.frame is None:
            continue
        frames.setdefault(page.frame, []).append(name)
        if page.node is not None:
            nodes[name] = indices[page.node]
        if page.ksm:
            ksm.append(name)
    groups = tuple(sorted(tuple(sorted(names)) for names in frames.values()))
    return Observation(counters, groups, nodes, tuple(sorted(ksm)))


@dataclass(slots=True)
class Outcome:
    """The outcome of a scenario on one host.

    :ivar skipped: why it was not run, empty where it was
    :ivar broken: at which step the host failed, and how; empty where all steps were done
    :ivar events: the results of steps, in order
    :ivar observations: by label, in order
    :ivar expectations: how many things the file expects of the host
    :ivar failures: those of them that don't hold, and steps with another result than the file demands
    :ivar strays: how often a page was seen on a node that is not its domain's
    :ivar across: how often a frame was seen that two domains map
    """

    skipped: str = ""
    broken: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    observations: dict[str, Observation] = field(default_factory=dict)
    expectations: int = 0
    failures: list[str] = field(default_factory=list)
    strays: int = 0
    across: int = 0


def check_expectations(scenario: Scenario, outcome: Outcome, profile: str) -> None:
    """Count what the file expects of a host, and add what doesn't hold to the failures."""
    for expect in scenario.expects:
        found = outcome.observations.get(expect.at)
        if found is not None and (not expect.profiles or profile in expect.profiles):
            outcome.expectations += len(expect.counters.keys() & found.counters.keys())
            outcome.expectations += len(expect.groups) + len(expect.nodes)
            outcome.failures += [f"{expect.at}: {text}" for text in _unmet(expect, found)]


def _unmet(expect: Expect, found: Observation) -> Iterator[str]:
    for name, wanted in expect.counters.items():
        value = found.counters.get(name, wanted)
        if value != wanted:
            yield f"{name} is {value}, not {wanted}"
    for wanted_group in expect.groups:
        group = next((group for group in found.groups if wanted_group[0] in group), ())
        if set(group) != set(wanted_group):
            yield f"{wanted_group[0]} shares its frame with {_names(group)}, not with {_names(wanted_group)}"
    for page, node in expect.nodes.items():
        place = found.nodes.get(page)
        if place != node:
            yield f"{page} is on {'no node' if place is None else f'node {place}'}, not on node {node}"


def _names(group: tuple[str, ...]) -> str:
    return ", ".join(group) or "nothing: it is not there"


class Verdict(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two hosts differ, or one host differs from what the file expects.

    :ivar at: the observation's label, or the step
    :ivar what: a counter's name, groups, nodes of a page, ...
    :ivar sides: what each host shows, by host
    """

    at: str
    what: str
    sides: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        return {"at": self.at, "what": self.what, **self.sides}

    def __str__(self) -> str:
        sides = ", ".join(f"{host} {_shown(value)}" for host, value in self.sides.items())
        return f"{self.at}: {self.what}: {sides}"


@dataclass(slots=True)
class Result:
    """A scenario with its verdict.

    :ivar outcomes: by host
    """

    scenario: Scenario
    verdict: Verdict
    reason: str = ""
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    @property
    def compared(self) -> bool:
        """Whether two hosts were compared, or one with what the file expects."""
        ran = [outcome for outcome in self.outcomes.values() if not outcome.skipped]
        return len(ran) > 1 or any(outcome.expectations or outcome.failures or outcome.broken for outcome in ran)

    @property
    def word(self) -> str:
        """The verdict for people: "ran" where nothing was compared."""
        return "ran" if self.verdict is Verdict.EQUAL and not self.compared else self.verdict.value

    def first(self) -> tuple[str, list[Difference]]:
        """The first observation or step that differs, and how."""
        if not self.differences:
            return "", []
        at = self.differences[0].at
        return at, [difference for difference in self.differences if difference.at == at]


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)


def judge(scenario: Scenario, outcomes: Mapping[str, Outcome]) -> Result:
    """The verdict on a scenario's outcomes on one host or two."""
    for host, outcome in outcomes.items():
        if outcome.skipped:
            return Result(scenario, Verdict.SKIPPED, f"{host}: {outcome.skipped}", outcomes)
    broken = [
        Difference("broken off", outcome.broken, {host: "failed"})
        for host, outcome in outcomes.items()
        if outcome.broken
    ]
    if broken:
        return Result(scenario, Verdict.DIFFERENT, f"{broken[0]}", outcomes, broken)
    differences = [
        Difference("expected", text, {host: "does not hold"})
        for host, outcome in outcomes.items()
        for text in outcome.failures
    ]
    if len(outcomes) == 2:
        (first, one), (second, other) = outcomes.items()
        differences = [*compare(scenario, first, one, second, other), *differences]
    if not differences:
        result = Result(scenario, Verdict.EQUAL, "", outcomes)
        if not result.compared:
            result.reason = "nothing to compare: one host, and the file expects nothing of it"
        return result
    at = differences[0].at
    reason = f"first at {at!r}" if at != "expected" else differences[0].what
    return Result(scenario, Verdict.DIFFERENT, reason, outcomes, differences)


def compare(scenario: Scenario, first: str, one: Outcome, second: str, other: Outcome) -> Iterator[Difference]:
    """Every difference between two outcomes, in the order of the steps."""
    events = [{event["step"]: event for event in outcome.events} for outcome in (one, other)]
    for number, step in enumerate(scenario.steps, 1):
        left, right = (by_step.get(number, {}).get(step.kind) for by_step in events)
        if left != right:
            yield Difference(step_key(number, step), "what it gave", {first: left, second: right})
        if isinstance(step, Observe):
            here, there = one.observations[step.label], other.observations[step.label]
            for what, left, right in _pairs(here, there):
                yield Difference(step.label, what, {first: left, second: right})


def _pairs(one: Observation, other: Observation) -> Iterator[tuple[str, Any, Any]]:
    # Counters that only one of the hosts has say nothing about the other.
    for name, value in one.counters.items():
        if name in other.counters and other.counters[name] != value:
            yield name, value, other.counters[name]
    here, there = set(one.groups), set(other.groups)
    if here != there:
        left, right = sorted(here - there), sorted(there - here)
        yield "groups", [list(group) for group in left], [list(group) for group in right]
    for page in sorted(one.nodes.keys() | other.nodes.keys()):
        if one.nodes.get(page) != other.nodes.get(page):
            yield f"node of {page}", one.nodes.get(page), other.nodes.get(page)
    if one.ksm != other.ksm:
        yield "ksm", sorted(set(one.ksm) - set(other.ksm)), sorted(set(other.ksm) - set(one.ksm))
