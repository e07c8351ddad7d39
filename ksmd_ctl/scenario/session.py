# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios one after the other, on kernel and engine or on one of them, each with its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.errors import Absent
from ksmd_ctl.host.interface import Lab
from ksmd_ctl.knobs import KNOBS
from ksmd_ctl.scenario.compare import Result, Verdict, judge
from ksmd_ctl.scenario.facts import Fact, Witness
from ksmd_ctl.scenario.generate import Abilities
from ksmd_ctl.scenario.model import Scenario
from ksmd_ctl.scenario.runner import Outcome, Watch, run

__all__ = ["ENGINE", "KERNEL", "Session", "abilities_of", "engine_for", "results_document"]

KERNEL = "kernel"
ENGINE = "engine"

# Nodes that the engine has where no kernel says how many.
_ENGINE_NODES = 4


def engine_for(profile: str, nodes: int) -> EngineHost:
    """A new machine for one scenario, its time standing still but for what things cost."""
    return open_engine_host(profile, nodes, demo=False, source=None)


@dataclass(slots=True)
class Session:
    """The hosts, and what has come of scenarios so far.

    :ivar kernel: None where only the engine runs
    :ivar engine: False where only the kernel runs
    :ivar uncompared: how many ran without anything to compare
    :ivar happened: in how many scenarios something really happened, by the engine's state
    """

    profile: str
    kernel: Lab | None = None
    engine: bool = True
    happened: Counter[Fact] = field(default_factory=Counter)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    uncompared: int = 0

    @property
    def nodes(self) -> int:
        """How many nodes with memory a scenario may have."""
        return _ENGINE_NODES if self.kernel is None else len(self.kernel.topology().with_memory())

    def run(self, scenario: Scenario, watch: Callable[[str], Watch] | None = None) -> Result:
        """One scenario on all hosts.

        :param watch: gives a host's watcher by the host's name
        :raises Refused: somebody else uses KSM on this machine
        """
        outcomes: dict[str, Outcome] = {}
        if self.kernel is not None:
            outcomes[KERNEL] = run(scenario, self.kernel, self.profile, watch(KERNEL) if watch else None)
        if self.engine and not any(outcome.skipped for outcome in outcomes.values()):
            engine = engine_for(self.profile, self.nodes)
            witness = Witness(engine)
            outer = watch(ENGINE) if watch else None
            outcomes[ENGINE] = run(scenario, engine, self.profile, _both(witness, outer))
            self.happened.update(witness.facts)
        result = judge(scenario, outcomes)
        self.verdicts[result.verdict] += 1
        self.uncompared += result.verdict is Verdict.EQUAL and not result.compared
        return result

    def counts(self) -> str:
        """How many scenarios came to what, for people."""
        counts = {verdict.value: self.verdicts[verdict] for verdict in Verdict}
        counts[Verdict.EQUAL.value] -= self.uncompared
        text = ", ".join(f"{count} {word}" for word, count in counts.items())
        return f"{text}, {self.uncompared} ran without anything to compare" if self.uncompared else text

    def abilities(self) -> Abilities:
        """What random scenarios may use here."""
        engine = abilities_of(engine_for(self.profile, self.nodes), self.nodes)
        if self.kernel is None:
            return engine
        kernel = abilities_of(self.kernel, self.nodes)
        merge = kernel.merge and engine.merge
        return Abilities(self.nodes, engine.knobs & kernel.knobs, merge)


def abilities_of(lab: Lab, nodes: int) -> Abilities:
    """What one host can do."""
    knobs = set()
    for knob in KNOBS:
        try:
            lab.read(knob)
            knobs.add(knob)
        except Absent:
            continue
    # prctl came with the same release as this counter.
    merge = "general_profit" in lab.sample().readings and lab.sample().number("general_profit") is not None
    return Abilities(nodes, frozenset(knobs), merge)


def _both(first: Watch, second: Watch | None) -> Watch:
    if second is None:
        return first

    def watch(*seen: Any) -> None:
        first(*seen)
        second(*seen)

    return watch


def results_document(result: Result) -> dict[str, Any]:
    """One scenario's entry in the JSON document (docs/json.md)."""
    return {
        "file": result.scenario.file,
        "name": result.scenario.name,
        "verdict": result.verdict.value,
        "compared": result.compared,
        "reason": result.reason,
        "observations": {
            host: {label: seen.document() for label, seen in outcome.observations.items()}
            for host, outcome in result.outcomes.items()
        },
        "differences": [difference.document() for difference in result.differences],
    }
