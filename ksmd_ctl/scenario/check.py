# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a scenario can be carried out: walks its steps without a host.

Processes have to live, regions and pages have to be mapped, and nobody may write where the process would be killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ksmd_ctl.host.fields import FIELDS_BY_NAME, Source
from ksmd_ctl.scenario.model import (
    Exit,
    Expect,
    Fork,
    Merge,
    Observe,
    Protect,
    RegionStep,
    Scenario,
    Step,
    Unmap,
    Write,
)

#: What an observation counts; pages_scanned and pages_skipped from the start of the scenario.
COUNTERS = tuple(
    name
    for name, field_ in FIELDS_BY_NAME.items()
    if field_.source is Source.KSM or name in ("cow_ksm", "ksm_swpin_copy")
)


@dataclass(slots=True)
class _Memory:
    """A region of one process: what is still mapped, and what may be written."""

    length: int
    mapped: set[int]
    locked: set[int] = field(default_factory=set)

    def copy(self) -> _Memory:
        return _Memory(self.length, set(self.mapped), set(self.locked))


class State:
    """Who lives and what is mapped, step by step; the generator asks it what it may do next."""

    def __init__(self, scenario: Scenario) -> None:
        self.processes: dict[str, dict[str, _Memory]] = {}
        self.names: set[str] = set()
        self.pages: set[str] = set()
        for region in scenario.regions:
            length = len(region.pages)
            self.processes.setdefault(region.process, {})[region.name] = _Memory(length, set(range(length)))
            self.pages.update(f"{region.process}.{region.name}.{page}" for page in range(length))
        self.names.update(self.processes)

    def apply(self, step: Step) -> Iterator[str]:
        """Carry a step out; what is wrong with it, if anything is."""
        match step:
            case Fork(process=process, child=child):
                if process not in self.processes:
                    yield self.gone(process)
                elif child in self.names:
                    yield f"there is or was a process {child} already"
                else:
                    memory = {name: memory.copy() for name, memory in self.processes[process].items()}
                    self.processes[child] = memory
                    self.names.add(child)
                    self.pages.update(
                        f"{child}.{name}.{page}" for name, region in memory.items() for page in range(region.length)
                    )
            case Exit(process=process):
                if self.processes.pop(process, None) is None:
                    yield self.gone(process)
            case Merge(process=process):
                if process not in self.processes:
                    yield self.gone(process)
            case RegionStep():
                yield from self.touch(step)

    def gone(self, process: str) -> str:
        return f"process {process} is gone by then" if process in self.names else f"there is no process {process}"

    def touch(self, step: RegionStep) -> Iterator[str]:
        if step.process not in self.processes:
            yield self.gone(step.process)
            return
        memory = self.processes[step.process].get(step.region)
        if memory is None:
            yield f"process {step.process} has no region {step.region}"
            return
        pages = set(range(memory.length)) if step.pages is None else set(step.pages)
        outside = sorted(pages - set(range(memory.length)))
        if outside:
            yield f"region {step.region} has {memory.length} pages, no page {outside[0]}"
            return
        unmapped = sorted(pages - memory.mapped)
        if unmapped:
            yield f"page {unmapped[0]} of {step.process}.{step.region} is not mapped any more"
            return
        match step:
            case Write() if pages & memory.locked:
                yield f"page {min(pages & memory.locked)} can't be written: the process would die"
            case Unmap():
                memory.mapped -= pages
                memory.locked -= pages
            case Protect(writable=writable):
                memory.locked = memory.locked - pages if writable else memory.locked | pages


def step_key(number: int, step: Step) -> str:
    """How errors and reports name a step: its place in the file, from 1 on, and its kind."""
    return f"step {number} ({step.kind})"


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
        if region.node is not None and region.node >= scenario.nodes:
            yield f"{where}: node", f"{region.node}, and the scenario has nodes 0 to {scenario.nodes - 1}"
    state = State(scenario)
    labels: set[str] = set()
    for number, step in enumerate(scenario.steps, 1):
        where = step_key(number, step)
        for problem in state.apply(step):
            yield where, problem
        for key in ("to", "node"):
            node = getattr(step, key, None)
            if node is not None and node >= scenario.nodes:
                yield f"{where}: {key}", f"{node}, and the scenario has nodes 0 to {scenario.nodes - 1}"
        if isinstance(step, Observe):
            if step.label in labels:
                yield where, f"there is an observation {step.label!r} already"
            labels.add(step.label)
    for number, expect in enumerate(scenario.expects, 1):
        yield from _check_expect(f"expect {number}", expect, labels, state.pages)


def _check_expect(where: str, expect: Expect, labels: set[str], pages: set[str]) -> Iterator[tuple[str, str]]:
    if expect.at not in labels:
        yield f"{where}: at", f"there is no observation {expect.at!r}"
    for name in expect.counters:
        if name not in COUNTERS:
            yield f"{where}: {name}", f"is not one of {', '.join(COUNTERS)}"
    named = [page for group in expect.groups for page in group]
    for page in sorted({*named, *expect.nodes} - pages):
        yield where, f"there is no page {page}"
    if len(set(named)) < len(named):
        yield f"{where}: groups", "a page is in two groups"
