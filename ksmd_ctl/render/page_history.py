# SPDX-License-Identifier: GPL-2.0-or-later
"""The history that the status page shows: an hour, a day or a week in arrays of fixed size, and marks for events.

The size is bounded: the points of that time, and at most as many nodes and marks as are named here.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from ksmd_ctl.history.model import Entry, Kind, Means, Severity
from ksmd_ctl.render.charts import Curve, Mark

STEP_SECONDS: Final = 10.0
SPAN_SECONDS: Final = 3600.0


class Span(StrEnum):
    """How long a time the page shows."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"

    @property
    def seconds(self) -> float:
        return {Span.HOUR: SPAN_SECONDS, Span.DAY: 86400.0, Span.WEEK: 7 * 86400.0}[self]

    @property
    def step_seconds(self) -> float:
        """How far apart its points are."""
        return {Span.HOUR: STEP_SECONDS, Span.DAY: 300.0, Span.WEEK: 1800.0}[self]


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


class PageHistory:
    """The last hour, or what the history has of a longer time. Times are of the host's clock."""

    def __init__(self, span: Span = Span.HOUR) -> None:
        self.span = span
        self._points = int(span.seconds / span.step_seconds) + 1
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
        if len(self._times) >= self._points:
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

    def mark(self, now: float, text: str, *, bad: bool = False, foreign: bool = False) -> None:
        """Add an event."""
        self._events.append(Mark(now, text[:_TEXT], bad, foreign))

    def take(self, means: Sequence[Means], entries: Sequence[Entry], calendar: float, now: float) -> None:
        """Add what was kept, of before now; decisions of the policy are changes.

        :param calendar: the Unix time that the host's clock shows as `now`
        """
        for mean in means:
            point = Point(mean.saved_bytes, mean.pages_scanned_per_second, mean.ksm_pages)
            self.add(mean.time_seconds - calendar + now, point)
        for entry in entries:
            bad, foreign = entry.severity is not Severity.INFO, entry.kind is Kind.FOREIGN
            mark = Mark(entry.time_seconds - calendar + now, entry.text[:_TEXT], bad, foreign)
            (self._changes if entry.kind is Kind.POLICY else self._events).append(mark)

    # -- for drawing ---------------------------------------------------------------------------------------

    @property
    def times(self) -> Sequence[float]:
        """The times of the points, oldest first."""
        return self._times

    def saved(self) -> Curve:
        return Curve("saved", self._saved)

    def speed(self) -> Curve:
        return Curve("pages/s", self._speed)

    def nodes(self) -> list[Curve]:
        """KSM pages by node; empty before the first survey."""
        return [Curve(f"node {node}", self._nodes[node]) for node in sorted(self._nodes, key=_by_number)]

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
