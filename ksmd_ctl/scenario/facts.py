# SPDX-License-Identifier: GPL-2.0-or-later
"""What really happened in a scenario, told by the engine's state, so that an empty generator can't pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from ksmd_ctl.host.interface import Inspect
from ksmd_ctl.knobs import Knob
from ksmd_ctl.scenario.model import Batch, Fork, Migrate, Step
from ksmd_ctl.scenario.runner import Run

__all__ = ["Fact", "Witness", "stable_nodes"]


class Fact(StrEnum):
    """Something that a scenario may have made happen."""

    MIGRATION = "migration"
    EXILE = "exile"
    CHAIN = "chain"
    FORK = "fork"
    LIMIT = "limit"
    PARTIAL_SCAN = "partial scan"
    ZERO_PAGE = "zero page"
    SKIP = "smart-scan skip"


def stable_nodes(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every stable node of the engine's state that has a page, in trees, chains and exile."""
    for tree in state["stable_trees"]:
        for node in tree["nodes"]:
            yield from node.get("dups", (node,))
    yield from state["migrate_nodes"]


class Witness:
    """Watches one scenario on the engine; a `Watch`.

    :ivar facts: what has been seen
    """

    def __init__(self, engine: Inspect) -> None:
        self._engine = engine
        self.facts: set[Fact] = set()
        self._places: dict[int, tuple[int, int]] = {}

    def __call__(self, number: int, step: Step | None, run: Run) -> None:
        state: Mapping[str, Any] = self._engine.state()
        nodes = list(stable_nodes(state))
        places = {node["id"]: (node["nid"], node["node_of_kpfn"]) for node in nodes}
        before = {key: self._places[key] for key in places.keys() & self._places.keys()}
        if isinstance(step, Migrate) and any(places[key][1] != place[1] for key, place in before.items()):
            self.facts.add(Fact.MIGRATION)
        # Where own items find it, a node is back in a tree when the step ends: then its nid tells.
        if state["migrate_nodes"] or any(places[key][0] != place[0] for key, place in before.items()):
            self.facts.add(Fact.EXILE)
        if any(node["kind"] == "dup" for node in nodes):
            self.facts.add(Fact.CHAIN)
        limit = int(state["knobs"].get(Knob.MAX_PAGE_SHARING, 0))
        if limit and any(len(node["items"]) >= limit for node in nodes):
            self.facts.add(Fact.LIMIT)
        if isinstance(step, Fork) and any(page.frame is not None for _, page in run.pages()):
            self.facts.add(Fact.FORK)
        if isinstance(step, Batch) and state["cursor"] is not None:
            self.facts.add(Fact.PARTIAL_SCAN)
        if state["counters"].get("ksm_zero_pages"):
            self.facts.add(Fact.ZERO_PAGE)
        if state["counters"].get("pages_skipped"):
            self.facts.add(Fact.SKIP)
        self._places = places
