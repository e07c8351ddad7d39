# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens on the host during a run, drawn from a seed: tenants arrive, idle, rewrite some of their pages, leave.

As on real hosts, most of the time nothing happens. What happens comes in *moments*: a few events within seconds of
each other, then quiet until the next moment, and at the end a quarter of the time.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Event", "Kind", "Script", "draw"]

#: One moment for so many seconds.
SECONDS_A_MOMENT = 24.0
#: When the last moment begins at the latest, as a share of the script.
LAST = 0.75
FIRST_SECONDS = 1.0
#: How many arrive in the first moment, and how many events there are in later ones.
FIRST = 5
NUMBERS = {"arrive": (2, 3), "rewrite": (1, 3), "leave": (1, 2)}
#: The share of its pages that a tenant rewrites.
REWRITTEN = (0.05, 0.25)


class Kind(StrEnum):
    ARRIVE = "arrive"
    REWRITE = "rewrite"
    LEAVE = "leave"


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    :ivar at: seconds since the script began
    :ivar moment: number of the moment that it belongs to
    :ivar trace: what an arriving tenant holds, by number
    :ivar places: which pages a tenant rewrites
    :ivar contents: what they hold then, by number
    """

    at: float
    moment: int
    kind: Kind
    tenant: int
    trace: int | None = None
    places: Sequence[int] = ()
    contents: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Script:
    """:ivar events: in the order of their times"""

    seed: int
    seconds: float
    events: tuple[Event, ...]

    def window_end(self, event: Event) -> float:
        """When the next moment begins, or the script ends: an event's effect can be seen until then."""
        return min((other.at for other in self.events if other.moment > event.moment), default=self.seconds)


class _Stage:
    """Who is there while a script is drawn."""

    def __init__(self, source: random.Random, traces: Sequence[array[int]]) -> None:
        self.source = source
        self.traces = traces
        self.live: dict[int, int] = {}  # tenant: trace
        self.fresh = list(range(len(traces)))
        source.shuffle(self.fresh)
        self.arrived = 0

    def room(self) -> bool:
        """Whether there is a trace that nobody holds."""
        if not self.fresh:
            self.fresh = [trace for trace in range(len(self.traces)) if trace not in self.live.values()]
            self.source.shuffle(self.fresh)
        return bool(self.fresh)

    def arrive(self, at: float, moment: int) -> Event:
        """A tenant with a trace that nobody holds, one not seen so far first."""
        tenant, self.arrived = self.arrived, self.arrived + 1
        self.live[tenant] = self.fresh.pop()
        return Event(at, moment, Kind.ARRIVE, tenant, self.live[tenant])

    def leave(self, at: float, moment: int) -> Event:
        tenant = self.source.choice(list(self.live))
        del self.live[tenant]
        return Event(at, moment, Kind.LEAVE, tenant)

    def rewrite(self, at: float, moment: int) -> Event:
        """A share of a tenant's pages get what pages of other traces hold."""
        tenant = self.source.choice(list(self.live))
        own = self.live[tenant]
        count = len(self.traces[own])
        places = sorted(self.source.sample(range(count), max(1, round(count * self.source.uniform(*REWRITTEN)))))
        other = self.source.choice([trace for trace in range(len(self.traces)) if trace != own] or [own])
        contents = self.source.choices(self.traces[other], k=len(places))
        return Event(at, moment, Kind.REWRITE, tenant, None, tuple(places), tuple(contents))


def draw(seed: int, seconds: float, traces: Sequence[array[int]]) -> Script:
    """A script of this length over these traces, each a list of its pages' contents by number."""
    source = random.Random(seed)
    stage = _Stage(source, traces)
    count = max(2, round(seconds / SECONDS_A_MOMENT))
    gap = (LAST * seconds - FIRST_SECONDS) / (count - 1)
    plans = [(Kind.ARRIVE, Kind.REWRITE, Kind.ARRIVE, Kind.LEAVE)[number % 4] for number in range(count - 1)]
    source.shuffle(plans)
    events: list[Event] = []
    for moment, plan in enumerate([Kind.ARRIVE, *plans]):
        at = FIRST_SECONDS + moment * gap - (source.uniform(0, 0.3) * gap if moment else 0)
        number = FIRST if moment == 0 else source.randint(*NUMBERS[plan])
        for _ in range(number):
            if plan is Kind.ARRIVE and stage.room():
                events.append(stage.arrive(at, moment))
            elif plan is not Kind.REWRITE and len(stage.live) > 1:
                events.append(stage.leave(at, moment))
            else:
                events.append(stage.rewrite(at, moment))
            at += source.uniform(0.3, 1.0)
        if plan is Kind.LEAVE and stage.room():  # somebody takes their place
            events.append(stage.arrive(at, moment))
    return Script(seed, seconds, tuple(events))
