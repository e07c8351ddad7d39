# SPDX-License-Identifier: GPL-2.0-or-later
"""What a policy is, and what it says: which values knobs shall have, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.sample import Sample


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that was decided.

    :ivar subject: what it is about, as a word or a knob's name
    :ivar said: what was decided, and the evidence with its figures; or what puts that into words once somebody asks:
        most of it nobody reads
    """

    subject: str
    said: str | Callable[[], str]

    @property
    def text(self) -> str:
        return self.said if isinstance(self.said, str) else self.said()


@dataclass(frozen=True, slots=True)
class Intervention:
    """What was recovered by writing knobs for a while.

    :ivar pulses: how often
    :ivar pages: pages that were merged meanwhile, which without it would not have been, as far as that can be told
    """

    pulses: int = 0
    pages: int = 0

    def and_one(self, pages: int) -> Intervention:
        """With one more, that brought so many pages."""
        return Intervention(self.pulses + 1, self.pages + pages)


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """What a policy wants at one moment.

    :ivar knobs: values for what it steers; a knob that isn't here is left as it is
    :ivar reasons: the main one first
    :ivar phase: the mode that it is in, a word; empty where it has none
    :ivar within_seconds: when it wants to see the next sample at the latest, None for whenever it is due
    :ivar recovered: by kind of recovery, what it did since the policy began
    :ivar unrealised: by kind, pages that could be merged and are not yet, where a figure is known
    """

    knobs: Mapping[Knob, KnobValue] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    phase: str = ""
    within_seconds: float | None = None
    recovered: Mapping[str, Intervention] = field(default_factory=dict)
    unrealised: Mapping[str, int] = field(default_factory=dict)


class Policy(Protocol):
    """A policy at work: an immutable value that holds what it has learned.

    :ivar fresh: it decides on what is around ksmd (vmstat, pressure), so samples should not reuse older readings
    """

    fresh: ClassVar[bool]

    def step(self, sample: Sample) -> tuple[Policy, PolicyDecision]:
        """Take a sample in; the policy after it, and what it wants now.

        The sample may be the first one, may come long after the one before, lack any reading, and hold counters that
        went backwards. It is not to be blamed for that, and never raises.
        """
