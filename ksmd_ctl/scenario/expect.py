# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether observations are as a scenario's [[expect]] says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ksmd_ctl.scenario.model import Expect, Scenario
from ksmd_ctl.scenario.observation import Observation

__all__ = ["expectations", "unmet"]


def unmet(scenario: Scenario, observations: Mapping[str, Observation], profile: str) -> Iterator[str]:
    """What doesn't hold, a sentence each."""
    for expect, found in _expected(scenario, observations, profile):
        for text in _unmet(expect, found):
            yield f"{expect.at}: {text}"


def expectations(scenario: Scenario, observations: Mapping[str, Observation], profile: str) -> int:
    """How many counters, groups and places of pages are expected here."""
    return sum(
        len(expect.counters.keys() & found.counters.keys()) + len(expect.groups) + len(expect.nodes)
        for expect, found in _expected(scenario, observations, profile)
    )


def _expected(
    scenario: Scenario, observations: Mapping[str, Observation], profile: str
) -> Iterator[tuple[Expect, Observation]]:
    for expect in scenario.expects:
        found = observations.get(expect.at)
        if found is not None and (not expect.profiles or profile in expect.profiles):
            yield expect, found


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
