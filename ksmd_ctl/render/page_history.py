# SPDX-License-Identifier: GPL-2.0-or-later
"""The history that the status page shows: the last hour in arrays of fixed size, and marks for events.

The size is bounded: an hour of points, and at most as many nodes and marks as are named here.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

STEP_SECONDS: Final = 10.0
SPAN_SECONDS: Final = 3600.0

_POINTS: Final = int(SPAN_SECONDS / STEP_SECONDS) + 1
_NODES: Final = 64
_MARKS: Final = 48
_TEXT: Final = 200

_UNKNOWN: Final = math.nan


@dataclass(frozen=True, slots=True)
class Point:
    """Values at one moment; None or absent if unknown.

    :ivar nodes: KSM pages by node
    :ivar knobs: their values, by name
    """

    saved_bytes: float | None = None
    pages_scanned_per_second: float | None = None
    nodes: Mapping[str, float | None] = field(default_factory=dict)
    knobs: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mark:
    """An event.

    :ivar bad: it is a warning or worse
    """

    time_seconds: float
    text: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A figure over the last hour: a value for each time of the history, nan if unknown."""

    name: str
    values: Sequence[float]

    def known(self) -> list[float]:
        return [value for value in self.values if not math.isnan(value)]


class PageHistory:
    """The last hour. Times are of the host's clock."""

    def __init__(self) -> None:
        self._times = array("d")
        self._saved = array("d")
        self._speed = array("f")
        self._nodes: dict[str, array[float]] = {}
        # In a list of their own, so that a policy that writes often does not displace events.
        self._events: deque[Mark] = deque(maxlen=_MARKS)
        self._changes: deque[Mark] = deque(maxlen=_MARKS)
        self._knobs: Mapping[str, object] = {}

    def due(self, now: float) -> bool:
        """Whether it is time for the next point."""
        return not self._times or now >= self._times[-1] + STEP_SECONDS

    def add(self, now: float, point: Point) -> None:
        """Add a point, and a mark for each knob that has changed."""
        if len(self._times) >= _POINTS:
            for values in (self._times, self._saved, self._speed, *self._nodes.values()):
                del values[0]
        before = len(self._times)
        self._times.append(now)
        self._saved.append(_known(point.saved_bytes))
        self._speed.append(_known(point.pages_scanned_per_second))
        for node in point.nodes:
            if node not in self._nodes and len(self._nodes) < _NODES:
                self._nodes[node] = array("f", [_UNKNOWN] * before)
        for node, values in self._nodes.items():
            values.append(_known(point.nodes.get(node)))
        for name, value in point.knobs.items():
            was = self._knobs.get(name, value)
            if value is not None and was is not None and was != value:
                self._changes.append(Mark(now, f"{name}: {was} → {value}"))
        self._knobs = point.knobs

    def mark(self, now: float, text: str, *, bad: bool = False) -> None:
        """Add an event."""
        self._events.append(Mark(now, text[:_TEXT], bad))

    # -- for drawing ---------------------------------------------------------------------------------------

    @property
    def times(self) -> Sequence[float]:
        """The times of the points, oldest first."""
        return self._times

    def saved(self) -> Line:
        return Line("saved", self._saved)

    def speed(self) -> Line:
        return Line("pages/s", self._speed)

    def nodes(self) -> list[Line]:
        """KSM pages by node; empty before the first survey."""
        return [Line(f"node {node}", self._nodes[node]) for node in sorted(self._nodes, key=_by_number)]

    def events(self, since: float) -> list[Mark]:
        """Events since then, oldest first."""
        return [mark for mark in self._events if mark.time_seconds >= since]

    def changes(self, since: float) -> list[Mark]:
        """Changes of knobs since then, oldest first."""
        return [mark for mark in self._changes if mark.time_seconds >= since]


def _known(value: float | None) -> float:
    return _UNKNOWN if value is None else float(value)


def _by_number(node: str) -> tuple[int, str]:
    return (int(node) if node.isdecimal() else 1 << 30, node)
