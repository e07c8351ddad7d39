# SPDX-License-Identifier: GPL-2.0-or-later
"""A policy at work on the engine, in virtual time: each tick samples, decides, and writes what it wants."""

from __future__ import annotations

from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.engine.profile import CURRENT, Profile
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs.reconcile import Write, ordered
from ksmd_ctl.policies.policy import Policy, PolicyDecision

__all__ = ["Simulation", "content"]


def content(label: str) -> bytes:
    """A page that begins with a label."""
    return label.encode().ljust(PAGE_SIZE, b"\0")


class Simulation:
    """One machine and one policy.

    :ivar written: when which knob got which value
    """

    def __init__(self, policy: Policy, profile: Profile = CURRENT, tick_seconds: float = 1.0) -> None:
        self.machine = Machine(profile=profile)
        self.host = EngineHost(self.machine)
        self.policy = policy
        self.decision = PolicyDecision()
        self.tick_seconds = tick_seconds
        self.written: list[tuple[float, Knob, int | str]] = []
        self.sample: Sample = self.host.sample()
        self.phases: list[tuple[float, str]] = []

    @property
    def now(self) -> float:
        return self.host.clock()

    def number(self, name: str) -> float:
        value = self.host.sample().number(name)
        assert value is not None
        return value

    def process(self, name: str, labels: list[str], *, mergeable: bool = True) -> tuple[int, int]:
        """A process with pages of these contents: its pid, and where they begin."""
        pid = self.machine.spawn(name)
        start = self.machine.mmap(pid, len(labels))
        for index, label in enumerate(labels):
            self.machine.write(pid, start + index * PAGE_SIZE, content(label))
        if mergeable:
            self.machine.madvise(pid, start, len(labels), mergeable=True)
        return pid, start

    def tick(self) -> PolicyDecision:
        """One tick; the writes take effect at once."""
        self.sample = self.host.sample()
        self.policy, self.decision = self.policy.step(self.sample)
        for write in ordered([Write(knob, value) for knob, value in self.decision.knobs.items()]):
            if self.sample.knob(write.knob) not in (None, write.value):
                self.host.set(write.knob, write.value)
                self.written.append((self.now, write.knob, write.value))
        if not self.phases or self.phases[-1][1] != self.decision.phase:
            self.phases.append((self.now, self.decision.phase))
        self.host.advance(min(self.tick_seconds, self.decision.within_seconds or self.tick_seconds))
        return self.decision

    def run(self, seconds: float) -> None:
        """Tick for so long."""
        until = self.now + seconds
        while self.now < until:
            self.tick()
