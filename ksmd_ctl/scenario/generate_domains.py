# SPDX-License-Identifier: GPL-2.0-or-later
"""Random scenarios with domains: each process is confined to the nodes of its domain, and all have the same contents.

Faults are part of them: migrations to nodes that the cpuset does not have, and un-merging by somebody elsewhere, which
leaves strays where a region has no policy. Strays go home before ksmd works again, as in a service that looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from random import Random

from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.scenario.generate import HUGE, Abilities, Draw
from ksmd_ctl.scenario.host_steps import ANY_ERROR, Batch, Home, Scan, Set, Unmerge
from ksmd_ctl.scenario.memory_steps import Break
from ksmd_ctl.scenario.model import Domain, KnobSetting, Region, Scenario, Step

_MOST_DOMAINS = 3
#: So many nodes with memory are needed.
LEAST_NODES = 2


class Mode(StrEnum):
    """Whether domains stay apart: with merge_across_nodes = 0 they do, with 1 they don't."""

    SEPARATE = "separate"
    ACROSS = "across"


def generate(seed: int, number: int, abilities: Abilities, mode: Mode) -> Scenario:
    """The scenario of a number in the series of a seed; but for merge_across_nodes, it is the same in both modes."""
    return _DomainDraw(Random(f"{seed}/{number}"), abilities, mode).scenario(f"random {seed}/{number} {mode}")


class _DomainDraw(Draw):
    def __init__(self, random: Random, abilities: Abilities, mode: Mode) -> None:
        # Memory that goes offline goes to any node.
        super().__init__(random, replace(abilities, offline=frozenset()))
        self._nodes = abilities.nodes
        self._merge_across = int(mode is Mode.ACROSS)
        # In half of them some regions have no policy, so that there can be strays.
        self._unbound = self.chance(0.5)
        self._domains = self._draw_domains()

    def _draw_domains(self) -> tuple[Domain, ...]:
        processes = [f"p{number}" for number in range(self.choice((2, 2, 3, 3, self.most_processes)))]
        nodes = self.random.sample(range(self._nodes), self._nodes)
        count = self.random.randint(2, min(_MOST_DOMAINS, self._nodes, len(processes)))
        members = [[process] for process in processes[:count]]
        for process in processes[count:]:
            self.choice(members).append(process)
        homes = [[node] for node in nodes[:count]]
        for node in nodes[count:]:
            # Some nodes are nobody's.
            if self.chance(0.7):
                self.choice(homes).append(node)
        names = ("gold", "silver", "bronze")
        return tuple(
            Domain(name, tuple(sorted(home)), tuple(each))
            for name, home, each in zip(names, homes, members, strict=False)
        )

    def _knobs(self) -> dict[Knob, KnobSetting]:
        return super()._knobs() | {Knob.MERGE_ACROSS_NODES: KnobSetting(self._merge_across)}

    def _regions(self) -> Iterator[Region]:
        for domain in self._domains:
            for process in domain.processes:
                for name in "ab"[: self.choice((1, 1, 2))]:
                    node = None if self._unbound and self.chance(0.6) else self.choice(domain.nodes)
                    pages = tuple(self._page() for _ in range(self.choice((1, 2, 2, 3, 4, 6))))
                    yield Region(process, name, pages, node, mergeable=self.chance(0.95))
        if self.abilities.huge and self.chance(HUGE):
            for domain in self._domains[:2]:
                yield Region(
                    self.choice(domain.processes), "h", self._huge_page(), self.choice(domain.nodes), huge=True
                )

    def _steps(self) -> Iterator[Step]:
        for step in super()._steps():
            if isinstance(step, Scan) and self._unbound:
                # A merge that fails half way leaves a stray, too.
                for _ in range(step.times):
                    yield from (Scan(1), Home())
                if (place := self.place()) and self.chance(0.5):
                    # Somebody un-merges from elsewhere.
                    yield from (Break(*place[:2], node=self.number(self._nodes)), Home())
            elif isinstance(step, Set) and Knob.MERGE_ACROSS_NODES in step.knobs:
                yield from self._switch()
            else:
                yield step
                if self._unbound and isinstance(step, Batch | Break | Unmerge):
                    yield Home()
            if isinstance(step, Scan) and self.chance(0.1):
                yield from self._switch()

    # Refused while pages are merged. Where it is taken, it is taken back before ksmd works.
    def _switch(self) -> Iterator[Step]:
        for value in (1 - self._merge_across, self._merge_across):
            yield Set({Knob.MERGE_ACROSS_NODES: value}, ANY_ERROR)

    def node(self, process: str) -> int:
        home = self.state.domains[process].nodes
        return self.choice(home) if self.chance(0.75) else self.number(self._nodes)
