# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes a scenario smaller for as long as it still shows what it shows.

Tries, over and over, the same scenario without some steps, a region, a page or a knob, and with smaller numbers;
each try is one run, so there is a limit on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ksmd_ctl.scenario.check import check
from ksmd_ctl.scenario.model import Batch, Observe, Scan, Scenario, Step

__all__ = ["shrink"]


def shrink(scenario: Scenario, shows: Callable[[Scenario], bool], most_tries: int = 400) -> Scenario:
    """The smallest scenario found that still `shows` it; it has been seen to.

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
