# SPDX-License-Identifier: GPL-2.0-or-later
"""Two outcomes of one scenario, side by side: where they differ, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ksmd_ctl.scenario.check import step_key
from ksmd_ctl.scenario.model import Observe, Scenario
from ksmd_ctl.scenario.observation import Observation
from ksmd_ctl.scenario.runner import Outcome

__all__ = ["Difference", "Result", "Verdict", "compare", "judge"]


class Verdict(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that one host shows otherwise than the other, or than the file expects.

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
        """Whether anything was: what two hosts show, or what one shows with what the file expects."""
        ran = [outcome for outcome in self.outcomes.values() if not outcome.skipped]
        return len(ran) > 1 or any(outcome.expectations or outcome.failures or outcome.broken for outcome in ran)

    @property
    def word(self) -> str:
        """The verdict for people, whom "equal" would mislead where nothing was compared."""
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
    """The verdict on what came of a scenario on one host or two."""
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
