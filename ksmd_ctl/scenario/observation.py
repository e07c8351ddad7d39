# SPDX-License-Identifier: GPL-2.0-or-later
"""What is seen of a host at one moment: counters, who shares a frame with whom, where, and which pages are KSM's.

Pages are named process.region.index, nodes are indices among the nodes with memory, so that two hosts compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ksmd_ctl.host.memory import PageState
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.scenario.check import COUNTERS

__all__ = ["SINCE_START", "Observation", "counters_of", "observe"]

#: Counters that no knob resets: an observation has them from the start of the scenario.
SINCE_START = ("pages_scanned", "pages_skipped", "cow_ksm", "ksm_swpin_copy")


@dataclass(frozen=True, slots=True)
class Observation:
    """One look.

    :ivar groups: pages that share a frame, present ones only, singles too; sorted
    :ivar nodes: of each page; none for a page that is mapped to the zero page, which all nodes share
    :ivar ksm: the KSM pages
    """

    counters: Mapping[str, int]
    groups: tuple[tuple[str, ...], ...]
    nodes: Mapping[str, int]
    ksm: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "counters": dict(self.counters),
            "groups": [list(group) for group in self.groups],
            "nodes": dict(self.nodes),
            "ksm": list(self.ksm),
        }


def counters_of(sample: Sample) -> dict[str, int]:
    """The counters that a host has."""
    found = {name: sample.number(name) for name in COUNTERS}
    return {name: int(value) for name, value in found.items() if value is not None}


def observe(
    sample: Sample, start: Mapping[str, int], pages: Iterable[tuple[str, PageState]], indices: Mapping[int, int]
) -> Observation:
    """Put a look together.

    :param start: the counters at the start of the scenario
    :param pages: every page that a process may have, by name
    :param indices: the index of each node number
    """
    counters = counters_of(sample)
    for name in SINCE_START:
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
