# SPDX-License-Identifier: GPL-2.0-or-later
"""Random scenarios: made from a seed, and made smaller where one shows something.

They have few contents, so that pages meet, and few pages, so that a scenario takes milliseconds. Steps are drawn so
that corner cases happen, such as a migration in the middle of a scan, or a fork that outlives its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.scenario.check import State, check
from ksmd_ctl.scenario.model import (
    UNTOUCHED,
    ZERO,
    Advise,
    Batch,
    Break,
    Discard,
    Exit,
    Fork,
    KnobSetting,
    Merge,
    Migrate,
    Observe,
    Protect,
    Region,
    Scan,
    Scenario,
    Set,
    Sleep,
    Step,
    Unmap,
    Unmerge,
    Write,
)
from ksmd_ctl.scenario.runner import ANY_ERROR

_CONTENTS = ("a", "b", "c", "m", "x", "y")
_MOST_PROCESSES = 4
_MOST_STEPS = 22


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the hosts can do that scenarios are made for: none is made that would be skipped.

    :ivar knobs: those that both hosts have
    :ivar merge: prctl(PR_SET_MEMORY_MERGE)
    """

    nodes: int = 2
    knobs: frozenset[Knob] = frozenset(Knob)
    merge: bool = True


def generate(seed: int, number: int, abilities: Abilities) -> Scenario:
    """The scenario of a number in the series of a seed."""
    return _Generator(Random(f"{seed}/{number}"), abilities).scenario(f"random {seed}/{number}")


class _Generator:
    def __init__(self, random: Random, abilities: Abilities) -> None:
        self.random = random
        self.abilities = abilities
        self.nodes = random.randint(1, abilities.nodes) if random.random() < 0.15 else abilities.nodes
        # Few contents make merges, more make trees with a shape.
        self.labels = random.sample(_CONTENTS, random.choice((1, 2, 2, 3, 4, 6)))
        self.zeroes = random.random() < 0.35
        self.steps: list[Step] = []
        self.looks = 0
        self.children = 0

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def scenario(self, name: str) -> Scenario:
        scenario = Scenario(name=name, nodes=self.nodes, knobs=self.knobs(), regions=tuple(self.regions()), steps=())
        self.state = State(scenario)
        # Most stories begin with something merged.
        if self.chance(0.8):
            self.add(Scan(self.random.choice((2, 2, 3, 4))))
            self.look()
        for _ in range(self.random.randint(4, _MOST_STEPS)):
            self.step()
        self.add(Scan(1))
        self.look()
        self.add(Scan(self.random.randint(1, 3)))
        self.look()
        return replace(scenario, steps=tuple(self.steps))

    def knobs(self) -> dict[Knob, KnobSetting]:
        knobs: dict[Knob, int | str] = {
            Knob.MERGE_ACROSS_NODES: 1 if self.chance(0.2) else 0,
            Knob.SMART_SCAN: 1 if self.chance(0.25) else 0,
        }
        if self.chance(0.3):
            knobs[Knob.MAX_PAGE_SHARING] = self.random.choice((2, 2, 3, 4, 8))
        if self.zeroes and self.chance(0.7):
            knobs[Knob.USE_ZERO_PAGES] = 1
        if self.chance(0.15):
            # So long that none is ever due: chains are walked without pruning.
            knobs[Knob.STABLE_NODE_CHAINS_PRUNE_MILLISECS] = 3_600_000
        return {knob: KnobSetting(value, True) for knob, value in knobs.items() if knob in self.abilities.knobs}

    def regions(self) -> list[Region]:
        found = []
        for process in range(self.random.choice((1, 2, 2, 3, 3, _MOST_PROCESSES))):
            for region in range(self.random.choice((1, 1, 2))):
                node = None if self.chance(0.2) else self.random.randrange(self.nodes)
                pages = tuple(self.page() for _ in range(self.random.choice((1, 2, 2, 3, 4, 6))))
                mergeable = self.chance(0.93)
                found.append(Region(f"p{process}", "ab"[region], pages, node, mergeable))
        return found

    def page(self) -> str:
        return UNTOUCHED if self.chance(0.04) else self.label()

    def label(self) -> str:
        if self.zeroes and self.chance(0.4):
            return ZERO
        if self.chance(0.06):
            return f"u{self.random.randrange(100)}"
        return self.random.choice(self.labels)

    # -- steps ---------------------------------------------------------------------------------------------

    def add(self, step: Step) -> bool:
        """Append a step if it can be carried out."""
        # A refused step must leave no trace, so it is tried on the real state only when it is known to be good.
        problems = list(self.state.apply(step))
        if problems:
            return False
        self.steps.append(step)
        return True

    def look(self) -> None:
        self.looks += 1
        self.steps.append(Observe(f"{self.looks}"))

    def step(self) -> None:
        choices: list[tuple[float, Callable[[], object]]] = [
            (5, self.migrate),
            (2.5, self.story),
            (4, self.scan),
            (4, self.batch),
            (3, self.write),
            (1.2, lambda: self.take_away(Discard)),
            (0.6, lambda: self.take_away(Unmap)),
            (1.5, self.unshare),
            (0.8, self.advise),
            (0.3, self.protect),
            (1.5, self.fork),
            (0.8, self.exit),
            (0.8, self.set),
            (0.25, lambda: self.add(Unmerge())),
            (0.1, lambda: self.add(Sleep(1))),
            (3, self.look),
        ]
        if self.abilities.merge:
            choices.append((0.25, self.prctl))
        weights = [weight for weight, _ in choices]
        self.random.choices([act for _, act in choices], weights)[0]()

    def place(self) -> tuple[str, str, int] | None:
        """A process, a region of it, and how many pages that has."""
        if not self.state.processes:
            return None
        process = self.random.choice(sorted(self.state.processes))
        region = self.random.choice(sorted(self.state.processes[process]))
        return process, region, self.state.processes[process][region].length

    def pages(self, length: int) -> tuple[int, ...] | None:
        if length == 1 or self.chance(0.5):
            return None
        first = self.random.randrange(length)
        return tuple(range(first, self.random.randint(first, length - 1) + 1))

    def node(self) -> int:
        return self.random.randrange(self.nodes)

    def migrate(self) -> None:
        if place := self.place():
            process, region, length = place
            self.add(Migrate(process, region, self.node(), pages=self.pages(length), shared=self.chance(0.92)))

    def story(self) -> None:
        """Pages move in the middle of a scan, and somebody looks at each batch."""
        if self.chance(0.5):
            self.batch()
        self.migrate()
        if self.chance(0.4):
            self.migrate()
        if self.chance(0.4):
            self.write()
        if self.chance(0.3):
            self.fork()
        self.batch()
        self.look()
        if self.chance(0.3):
            self.exit()
        self.add(Scan(1))
        self.look()

    def scan(self) -> None:
        self.add(Scan(self.random.choice((1, 1, 1, 2, 3))))
        if self.chance(0.5):
            self.look()

    def batch(self) -> None:
        self.add(Batch(self.random.choice((1, 1, 2, 3, 5, 8))))
        if self.chance(0.3):
            self.look()

    def write(self) -> None:
        if place := self.place():
            process, region, length = place
            pages = self.pages(length) if self.chance(0.3) else (self.random.randrange(length),)
            label = self.label()
            self.add(Write(process, region, label, pages=pages))

    def take_away(self, kind: type[Discard] | type[Unmap]) -> None:
        if place := self.place():
            self.add(kind(place[0], place[1], pages=self.pages(place[2])))

    def unshare(self) -> None:
        if place := self.place():
            self.add(
                Break(place[0], place[1], pages=self.pages(place[2]), node=None if self.chance(0.5) else self.node())
            )

    def advise(self) -> None:
        if place := self.place():
            pages = self.pages(place[2]) if self.chance(0.4) else None
            self.add(Advise(place[0], place[1], self.chance(0.5), pages=pages))

    def protect(self) -> None:
        if place := self.place():
            self.add(Protect(place[0], place[1], self.chance(0.3), pages=self.pages(place[2])))

    def fork(self) -> None:
        if self.state.processes and len(self.state.processes) < _MOST_PROCESSES + 1:
            self.children += 1
            self.add(Fork(self.random.choice(sorted(self.state.processes)), f"c{self.children}"))

    def exit(self) -> None:
        # The last one goes seldom: nothing happens afterwards.
        if len(self.state.processes) > 1 or (self.state.processes and self.chance(0.1)):
            self.add(Exit(self.random.choice(sorted(self.state.processes))))

    def prctl(self) -> None:
        if self.state.processes:
            self.add(Merge(self.random.choice(sorted(self.state.processes)), self.chance(0.7)))

    def set(self) -> None:
        values: dict[Knob, tuple[int, ...]] = {
            Knob.MERGE_ACROSS_NODES: (0, 1),
            Knob.MAX_PAGE_SHARING: (2, 3, 256),
            Knob.SMART_SCAN: (0, 1),
            Knob.USE_ZERO_PAGES: (0, 1),
        }
        knob = self.random.choice(sorted(values.keys() & self.abilities.knobs))
        # Some are refused while pages are merged: then the hosts have to agree on that.
        self.add(Set({knob: self.random.choice(values[knob])}, ANY_ERROR))


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
    steps = scenario.steps
    length = len(steps) // 2
    while length:
        # From the end: what comes after the difference never matters.
        for first in range(len(steps) - length, -1, -length):
            yield replace(scenario, steps=steps[:first] + steps[first + length :])
        length //= 2
    for process in scenario.processes():
        yield _without_process(scenario, process)
    for number in range(len(scenario.regions)):
        regions = scenario.regions[:number] + scenario.regions[number + 1 :]
        yield _only_possible(replace(scenario, regions=regions))
    for number, region in enumerate(scenario.regions):
        if len(region.pages) > 1:
            shorter = replace(region, pages=region.pages[:-1])
            regions = (*scenario.regions[:number], shorter, *scenario.regions[number + 1 :])
            yield _only_possible(replace(scenario, regions=regions))
    for knob in scenario.knobs:
        yield replace(scenario, knobs={other: setting for other, setting in scenario.knobs.items() if other != knob})
    for number, step in enumerate(steps):
        for less in _lesser(step):
            yield replace(scenario, steps=(*steps[:number], less, *steps[number + 1 :]))
    if scenario.nodes > 1:
        yield replace(scenario, nodes=scenario.nodes - 1)


def _lesser(step: Step) -> Iterator[Step]:
    if isinstance(step, Scan) and step.times > 1:
        yield replace(step, times=step.times - 1)
    if isinstance(step, Batch) and step.size > 1:
        yield replace(step, size=step.size - 1)


def _without_process(scenario: Scenario, process: str) -> Scenario:
    regions = tuple(region for region in scenario.regions if region.process != process)
    return _only_possible(replace(scenario, regions=regions))


def _only_possible(scenario: Scenario) -> Scenario:
    """Without the steps that can't be carried out any more; observations stay."""
    while True:
        wrong = {where for where, _ in check(scenario)}
        kept = tuple(
            step
            for number, step in enumerate(scenario.steps, 1)
            if isinstance(step, Observe) or not any(where.startswith(f"step {number} ") for where in wrong)
        )
        if len(kept) == len(scenario.steps):
            return scenario
        scenario = replace(scenario, steps=kept)
