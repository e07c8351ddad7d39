# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page while the service runs: the last hour in a few fixed arrays of numbers, and marks for what happened.

Nothing grows: an hour of points, as many nodes and marks as are named here. It is no store of figures; that is what
Prometheus is for.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
    """What is known at one moment; None, or not there, where it isn't.

    :ivar nodes: KSM pages by node
    :ivar knobs: their values, by name
    """

    saved_bytes: float | None = None
    pages_scanned_per_second: float | None = None
    nodes: Mapping[str, float | None] = field(default_factory=dict)
    knobs: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened.

    :ivar bad: somebody has to look at it
    """

    time_seconds: float
    text: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One figure over the last hour: a value for each of the history's times, nan where it wasn't known."""

    name: str
    values: Sequence[float]

    def known(self) -> list[float]:
        return [value for value in self.values if not math.isnan(value)]


class PageHistory:
    """What the page draws. Times are the host's clock."""

    def __init__(self) -> None:
        self._times = array("d")
        self._saved = array("d")
        self._speed = array("f")
        self._nodes: dict[str, array[float]] = {}
        # By themselves, so that a policy that writes often pushes nothing out that has happened.
        self._events: deque[Mark] = deque(maxlen=_MARKS)
        self._changes: deque[Mark] = deque(maxlen=_MARKS)
        self._knobs: Mapping[str, object] = {}

    def due(self, now: float) -> bool:
        """Whether it is time for another point."""
        return not self._times or now >= self._times[-1] + STEP_SECONDS

    def add(self, now: float, point: Point) -> None:
        """Another point; a knob that has changed since the one before is a mark."""
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
        """Something happened."""
        self._events.append(Mark(now, text[:_TEXT], bad))

    # -- for drawing ---------------------------------------------------------------------------------------

    @property
    def times(self) -> Sequence[float]:
        """When the points were, oldest first."""
        return self._times

    def saved(self) -> Line:
        return Line("saved", self._saved)

    def speed(self) -> Line:
        return Line("pages/s", self._speed)

    def nodes(self) -> list[Line]:
        """KSM pages by node; none where nobody has looked at the nodes."""
        return [Line(f"node {node}", self._nodes[node]) for node in sorted(self._nodes, key=_by_number)]

    def events(self, since: float) -> list[Mark]:
        """What happened since then, oldest first."""
        return [mark for mark in self._events if mark.time_seconds >= since]

    def changes(self, since: float) -> list[Mark]:
        """How knobs changed since then, by whomever, oldest first."""
        return [mark for mark in self._changes if mark.time_seconds >= since]


def _known(value: float | None) -> float:
    return _UNKNOWN if value is None else float(value)


def _by_number(node: str) -> tuple[int, str]:
    return (int(node) if node.isdecimal() else 1 << 30, node)


class StatusPage:
    """The page of a service.

    :param point: what the page draws of this moment; it is asked every ten seconds
    :param clock: the host's
    :param status_text: renders a report for people
    """

    def __init__(
        self,
        point: Callable[[], Point],
        clock: Callable[[], float],
        status_text: Callable[[Mapping[str, object]], str] | None = None,
    ) -> None:
        self._point = point
        self._clock = clock
        self._status_text = status_text or (lambda found: json.dumps(found, indent=2))
        self._history = PageHistory()
        self._body: bytes | None = None

    def tick(self, now: float) -> None:
        """There is a new sample, at this time of the host's clock."""
        self._body = None
        if self._history.due(now):
            self._history.add(now, self._point())

    def happened(self, text: str, bad: bool) -> None:
        """Something was logged."""
        self._history.mark(self._clock(), text, bad=bad)

    def body(self, report: Mapping[str, object]) -> bytes:
        """The page, with this report as the present state."""
        if self._body is None:
            # Only here: on most hosts nobody ever looks.
            from ksmd_ctl.daemon.page import page

            self._body = page(report, self._history, self._clock(), self._status_text(report))
        return self._body
