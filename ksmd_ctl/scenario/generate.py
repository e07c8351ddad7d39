# SPDX-License-Identifier: GPL-2.0-or-later
"""Random scenarios: made from a seed, and made smaller where one shows something.

They have few contents, so that pages meet, and few pages, so that a scenario takes milliseconds. Steps are drawn so
that corner cases happen, such as a migration in the middle of a scan, or a fork that outlives its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from ksmd_ctl.engine.memory import HUGE_PAGES
from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob
from ksmd_ctl.scenario.check import State, check, possible
from ksmd_ctl.scenario.host_steps import Observe, Scan
from ksmd_ctl.scenario.model import Domain, KnobSetting, Region, Scenario, Step
from ksmd_ctl.scenario.steps import KINDS, migrations_during_a_scan
from ksmd_ctl.scenario.values import UNTOUCHED, ZERO

T = TypeVar("T")

_CONTENTS = ("a", "b", "c", "m", "x", "y")
_MOST_PROCESSES = 4
_MOST_STEPS = 22
_MIGRATIONS_WEIGHT = 2.5
#: The share of scenarios with huge pages, where there are such.
HUGE = 0.15


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the hosts can do that scenarios are made for: none is made that would be skipped.

    :ivar knobs: those that both hosts have
    :ivar merge: prctl(PR_SET_MEMORY_MERGE)
    :ivar swap: pages can be swapped out
    :ivar huge: there are huge pages
    :ivar offline: indices of nodes whose memory can go offline
    """

    nodes: int = 2
    knobs: frozenset[Knob] = frozenset(SYSFS_KNOBS)
    merge: bool = True
    swap: bool = True
    huge: bool = True
    offline: frozenset[int] = frozenset()


def generate(seed: int, number: int, abilities: Abilities) -> Scenario:
    """The scenario of a number in the series of a seed."""
    return Draw(Random(f"{seed}/{number}"), abilities).scenario(f"random {seed}/{number}")


class Draw:
    """A scenario that is being made; kinds of steps draw what they need from it.

    :ivar state: after the steps so far
    :ivar children: how many forks there are
    """

    most_processes = _MOST_PROCESSES
    _domains: tuple[Domain, ...] = ()

    def __init__(self, random: Random, abilities: Abilities) -> None:
        self.random = random
        self.abilities = abilities
        self.children = 0
        self._nodes = random.randint(1, abilities.nodes) if random.random() < 0.15 else abilities.nodes
        # Few contents make merges, more make trees with a shape.
        self._labels = random.sample(_CONTENTS, random.choice((1, 2, 2, 3, 4, 6)))
        self._zeroes = random.random() < 0.35
        self._observed = 0

    def scenario(self, name: str) -> Scenario:
        """All of it."""
        knobs, regions = self._knobs(), tuple(self._regions())
        scenario = Scenario(name, regions, (), nodes=self._nodes, knobs=knobs, domains=self._domains)
        self.state = State(scenario)
        return replace(scenario, steps=tuple(possible(self.state, self._steps())))

    def _steps(self) -> Iterator[Step]:
        # In most of them something is merged from the start.
        if self.chance(0.8):
            yield Scan(self.choice((2, 2, 3, 4)))
            yield self.observe()
        kinds = [(kind.random, kind.weight) for kind in KINDS.values() if kind.possible(self.abilities)]
        # Always second: what a seed makes depends on it.
        kinds.insert(1, (migrations_during_a_scan, _MIGRATIONS_WEIGHT))
        weights = [weight for _, weight in kinds]
        for _ in range(self.random.randint(4, _MOST_STEPS)):
            [(make, _weight)] = self.random.choices(kinds, weights)
            yield from make(self)
        yield Scan(1)
        yield self.observe()
        yield Scan(self.random.randint(1, 3))
        yield self.observe()

    def _knobs(self) -> dict[Knob, KnobSetting]:
        knobs: dict[Knob, int | str] = {
            Knob.MERGE_ACROSS_NODES: 1 if self.chance(0.2) else 0,
            Knob.SMART_SCAN: 1 if self.chance(0.25) else 0,
        }
        if self.chance(0.3):
            knobs[Knob.MAX_PAGE_SHARING] = self.choice((2, 2, 3, 4, 8))
        if self._zeroes and self.chance(0.7):
            knobs[Knob.USE_ZERO_PAGES] = 1
        if self.chance(0.15):
            # So long that none is ever due: chains are walked without pruning.
            knobs[Knob.STABLE_NODE_CHAINS_PRUNE_MILLISECS] = 3_600_000
        return {knob: KnobSetting(value, True) for knob, value in knobs.items() if knob in self.abilities.knobs}

    def _regions(self) -> Iterator[Region]:
        for process in range(self.choice((1, 2, 2, 3, 3, _MOST_PROCESSES))):
            for region in range(self.choice((1, 1, 2))):
                node = None if self.chance(0.2) else self.number(self._nodes)
                pages = tuple(self._page() for _ in range(self.choice((1, 2, 2, 3, 4, 6))))
                yield Region(f"p{process}", "ab"[region], pages, node, mergeable=self.chance(0.93))
        if self.abilities.huge and self.chance(HUGE):
            for process in range(self.choice((1, 1, 2))):
                yield Region(
                    f"p{process}", "h", self._huge_page(), self.choice((None, self.number(self._nodes))), huge=True
                )

    # One content, or none that is there twice, and some of the others.
    def _huge_page(self) -> tuple[str, ...]:
        label = self.choice((ZERO, ZERO, self.label(), "h"))
        pages = [f"h{page}" if label == "h" else label for page in range(HUGE_PAGES)]
        for _ in range(self.choice((0, 2, 6))):
            pages[self.number(HUGE_PAGES)] = self.label()
        return tuple(pages)

    def _page(self) -> str:
        return UNTOUCHED if self.chance(0.04) else self.label()

    # -- for steps -----------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        """True as often as that."""
        return self.random.random() < probability

    def choice(self, among: Sequence[T]) -> T:
        """One of them."""
        return self.random.choice(among)

    def number(self, below: int) -> int:
        """A number from 0 on."""
        return self.random.randrange(below)

    def node(self, process: str) -> int:
        """The index of a node for pages of a process."""
        return self.number(self._nodes)

    def label(self) -> str:
        """A content."""
        if self._zeroes and self.chance(0.4):
            return ZERO
        if self.chance(0.06):
            return f"u{self.number(100)}"
        return self.choice(self._labels)

    def process(self) -> str:
        """One that lives; there has to be one."""
        return self.choice(sorted(self.state.processes))

    def place(self) -> tuple[str, str, int] | None:
        """A process, a region of it, and how many pages that has; None where no process lives."""
        if not self.state.processes:
            return None
        process = self.process()
        region = self.choice(sorted(self.state.processes[process]))
        return process, region, self.state.processes[process][region].length

    def pages(self, length: int) -> tuple[int, ...] | None:
        """Adjacent pages of a region, or all of it."""
        if length == 1 or self.chance(0.5):
            return None
        first = self.number(length)
        return tuple(range(first, self.random.randint(first, length - 1) + 1))

    def observe(self) -> Observe:
        """An observation with a label of its own."""
        self._observed += 1
        return Observe(f"{self._observed}")


# -- making a scenario smaller ----------------------------------------------------------------------------------------


def shrink(scenario: Scenario, shows: Callable[[Scenario], bool], most_tries: int = 400) -> Scenario:
    """The smallest scenario found that still `shows` something, as the one given does.

    It is tried without some steps, a region, a page or a knob, and with smaller numbers.

    :param shows: runs a scenario
    """
    tries = 0
    smaller: Scenario | None = scenario
    while smaller is not None:
        scenario, smaller = smaller, None
        for candidate in _smaller(scenario):
            if next(check(candidate), None) is not None:
                continue
            if tries >= most_tries:
                return scenario
            tries += 1
            if shows(candidate):
                smaller = candidate
                break
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Smaller ones, the boldest first."""
    steps, regions = scenario.steps, scenario.regions
    length = len(steps) // 2
    while length:
        # From the end: what comes after the difference never matters.
        for first in range(len(steps) - length, -1, -length):
            yield replace(scenario, steps=steps[:first] + steps[first + length :])
        length //= 2
    for process in scenario.processes():
        yield _with_regions(scenario, (region for region in regions if region.process != process))
    for left_out in regions:
        yield _with_regions(scenario, (region for region in regions if region is not left_out))
    for region in regions:
        pages = region.pages
        smaller = [replace(region, pages=pages[:count]) for count in (len(pages) // 2, len(pages) - 1) if count]
        if region.huge:
            smaller.insert(0, replace(region, huge=False))
        for shorter in smaller:
            yield _with_regions(scenario, (shorter if each is region else each for each in regions))
    for knob in scenario.knobs:
        yield replace(scenario, knobs={other: setting for other, setting in scenario.knobs.items() if other != knob})
    for number, step in enumerate(steps):
        for less in step.smaller():
            yield replace(scenario, steps=(*steps[:number], less, *steps[number + 1 :]))
    if scenario.nodes > 1:
        yield replace(scenario, nodes=scenario.nodes - 1)


def _with_regions(scenario: Scenario, regions: Iterable[Region]) -> Scenario:
    """With other regions, and without the steps that can't be carried out then."""
    changed = replace(scenario, regions=tuple(regions))
    there = changed.processes()
    left = [replace(each, processes=tuple(p for p in each.processes if p in there)) for each in scenario.domains]
    changed = replace(changed, domains=tuple(each for each in left if each.processes))
    return replace(changed, steps=tuple(possible(State(changed), scenario.steps)))
