# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a scenario can be carried out: walks its steps without a host.

Processes have to live, regions and pages have to be mapped, and nobody may write where the process would be killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ksmd_ctl.engine.memory import HUGE_PAGES
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.fields import FIELDS_BY_NAME, Source
from ksmd_ctl.scenario.host_steps import Observe
from ksmd_ctl.scenario.model import Domain, Expect, Region, Scenario, Step, arguments, step_key
from ksmd_ctl.scenario.values import NODE

#: What an observation counts; pages_scanned and pages_skipped from the start of the scenario.
COUNTERS = tuple(
    name
    for name, field_ in FIELDS_BY_NAME.items()
    if field_.source is Source.KSM or name in ("cow_ksm", "ksm_swpin_copy")
)


@dataclass(slots=True)
class Memory:
    """A region of one process: its declaration, which pages are still mapped, and which are read-only."""

    region: Region
    mapped: set[int]
    locked: set[int] = field(default_factory=set)

    def new(self) -> Memory:
        """As it was at first."""
        return Memory(self.region, set(range(self.length)))

    @property
    def length(self) -> int:
        """How many pages it had at first."""
        return len(self.region.pages)

    def copy(self) -> Memory:
        return Memory(self.region, set(self.mapped), set(self.locked))


class State:
    """Who lives and what is mapped, step by step.

    :ivar processes: the regions of those that live
    :ivar domains: of all processes that there are or were; not of those that are in none
    :ivar names: of all processes that there are or were
    :ivar pages: the process, region and number of each page that there is or was, by its name
    :ivar labels: of the observations so far
    """

    def __init__(self, scenario: Scenario) -> None:
        self.processes: dict[str, dict[str, Memory]] = {}
        self.domains = {process: domain for domain in scenario.domains for process in domain.processes}
        self.names: set[str] = set()
        self.pages: dict[str, tuple[str, str, int]] = {}
        self.labels: set[str] = set()
        for process in scenario.processes():
            regions = [region for region in scenario.regions if region.process == process]
            self.add(process, {region.name: Memory(region, set()).new() for region in regions})

    def add(self, process: str, memory: dict[str, Memory]) -> None:
        """A process is there from now on."""
        self.processes[process] = memory
        self.names.add(process)
        for name, region in memory.items():
            self.pages.update({f"{process}.{name}.{page}": (process, name, page) for page in range(region.length)})

    def process(self, name: str) -> dict[str, Memory]:
        """The regions of a process.

        :raises ValueError: it does not live
        """
        if name not in self.processes:
            raise ValueError(f"process {name} is gone by then" if name in self.names else f"there is no process {name}")
        return self.processes[name]

    def touch(self, process: str, region: str, pages: tuple[int, ...] | None) -> tuple[Memory, set[int]]:
        """A region, and the pages of it that a step is about.

        :raises ValueError: there is no such region, or the pages are not mapped
        """
        memory = self.process(process).get(region)
        if memory is None:
            raise ValueError(f"process {process} has no region {region}")
        wanted = set(range(memory.length) if pages is None else pages)
        outside = [page for page in wanted if page >= memory.length]
        if outside:
            raise ValueError(f"region {region} has {memory.length} pages, no page {min(outside)}")
        if not wanted <= memory.mapped:
            raise ValueError(f"page {min(wanted - memory.mapped)} of {process}.{region} is not mapped any more")
        return memory, wanted

    def whole(self, process: str, region: str, pages: tuple[int, ...] | None) -> tuple[Memory, set[int]]:
        """As `touch`, for steps that only take all of a region with huge pages.

        :raises ValueError: as `touch`, or it is a part of one
        """
        memory, wanted = self.touch(process, region, pages)
        if memory.region.huge and len(wanted) < memory.length:
            raise ValueError(f"{process}.{region} has huge pages: all of it or nothing")
        return memory, wanted


def possible(state: State, steps: Iterable[Step]) -> Iterator[Step]:
    """Those of the steps that can be carried out one after the other."""
    for step in steps:
        try:
            step.check(state)
        except ValueError:
            continue
        yield step


def check(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """What is wrong with a scenario beyond its form: (where, what)."""
    if not scenario.regions:
        yield "region", "a scenario needs at least one"
    if not any(isinstance(step, Observe) for step in scenario.steps):
        yield "step", "a scenario needs at least one observe"
    seen: set[tuple[str, str]] = set()
    for number, region in enumerate(scenario.regions, 1):
        where = f"region {number}"
        if (region.process, region.name) in seen:
            yield f"{where}: name", f"process {region.process} has a region {region.name} already"
        seen.add((region.process, region.name))
        if region.huge and len(region.pages) % HUGE_PAGES:
            yield f"{where}: pages", f"{len(region.pages)}, and huge pages have {HUGE_PAGES} each"
        yield from _check_nodes(where, region, scenario.nodes)
    yield from _check_domains(scenario)
    state = State(scenario)
    for number, step in enumerate(scenario.steps, 1):
        where = step_key(number, step)
        try:
            step.check(state)
        except ValueError as error:
            yield where, str(error)
        yield from _check_nodes(where, step, scenario.nodes)
    for number, expect in enumerate(scenario.expects, 1):
        yield from _check_expect(f"expect {number}", expect, state)


def _check_domains(scenario: Scenario) -> Iterator[tuple[str, str]]:
    names: set[str] = set()
    nodes: dict[int, str] = {}
    domains: dict[str, Domain] = {}
    for number, domain in enumerate(scenario.domains, 1):
        where = f"domain {number}"
        if domain.name in names:
            yield f"{where}: name", f"there is a domain {domain.name} already"
        names.add(domain.name)
        for node in domain.nodes:
            if node >= scenario.nodes:
                yield f"{where}: nodes", f"{node}, and the scenario has nodes 0 to {scenario.nodes - 1}"
            elif nodes.setdefault(node, domain.name) != domain.name:
                yield f"{where}: nodes", f"node {node} is domain {nodes[node]}'s"
        for process in domain.processes:
            if process not in scenario.processes():
                yield f"{where}: processes", f"no region has a process {process}"
            elif domains.setdefault(process, domain) is not domain:
                yield f"{where}: processes", f"process {process} is in domain {domains[process].name} already"
    for number, region in enumerate(scenario.regions, 1):
        home = domains.get(region.process)
        if home is not None and region.node is not None and region.node not in home.nodes:
            yield f"region {number}: node", f"{region.node}, and domain {home.name} has {ranges_text(home.nodes)}"


def _check_nodes(where: str, item: Region | Step, nodes: int) -> Iterator[tuple[str, str]]:
    for argument in arguments(type(item)):
        node = getattr(item, argument.attribute)
        if argument.type is NODE and node is not None and node >= nodes:
            yield f"{where}: {argument.key}", f"{node}, and the scenario has nodes 0 to {nodes - 1}"


def _check_expect(where: str, expect: Expect, state: State) -> Iterator[tuple[str, str]]:
    if expect.at not in state.labels:
        yield f"{where}: at", f"there is no observation {expect.at!r}"
    for name in expect.counters:
        if name not in COUNTERS:
            yield f"{where}: {name}", f"is not one of {', '.join(COUNTERS)}"
    named = [page for group in expect.groups for page in group]
    for page in sorted({*named, *expect.nodes} - state.pages.keys()):
        yield where, f"there is no page {page}"
    if len(set(named)) < len(named):
        yield f"{where}: groups", "a page is in two groups"
