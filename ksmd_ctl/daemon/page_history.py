# SPDX-License-Identifier: GPL-2.0-or-later
"""The last hour as the status page shows it: a few fixed arrays of numbers, and marks for what happened.

Nothing grows: an hour of points, as many nodes and marks as are named here. It is no store of figures; that is what
Prometheus is for.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.metrics.document import number, part

__all__ = ["SPAN_SECONDS", "STEP_SECONDS", "Line", "Mark", "PageHistory"]

STEP_SECONDS: Final = 10.0
SPAN_SECONDS: Final = 3600.0

_POINTS: Final = int(SPAN_SECONDS / STEP_SECONDS) + 1
_NODES: Final = 64
_MARKS: Final = 48
_TEXT: Final = 200

_UNKNOWN: Final = math.nan


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
        self._marks: deque[Mark] = deque(maxlen=_MARKS)
        self._knobs: dict[str, object] = {}

    def due(self, now: float) -> bool:
        """Whether it is time for another point."""
        return not self._times or now >= self._times[-1] + STEP_SECONDS

    def add(self, now: float, report: Mapping[str, object]) -> None:
        """A point, out of a report (docs/json.md)."""
        if len(self._times) >= _POINTS:
            for values in (self._times, self._saved, self._speed, *self._nodes.values()):
                del values[0]
        before = len(self._times)
        self._times.append(now)
        derived = part(report, "derived")
        self._saved.append(_number(derived, "saved_bytes"))
        self._speed.append(_number(derived, "pages_scanned_per_second"))
        nodes = part(report, "numa", "nodes")
        for node in nodes:
            if node not in self._nodes and len(self._nodes) < _NODES:
                self._nodes[node] = array("f", [_UNKNOWN] * before)
        for node, values in self._nodes.items():
            values.append(_number(part(nodes, node), "ksm_pages"))
        self._look_at_knobs(now, report)

    def mark(self, now: float, text: str, *, bad: bool = False) -> None:
        """Something happened."""
        self._marks.append(Mark(now, text[:_TEXT], bad))

    def _look_at_knobs(self, now: float, report: Mapping[str, object]) -> None:
        knobs = part(report, "knobs")
        found = {name: part(knobs, name).get("found") for name in knobs}
        for name, value in found.items():
            before = self._knobs.get(name, value)
            if value is not None and before is not None and before != value:
                self.mark(now, f"{name}: {before} → {value}")
        self._knobs = found

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

    def marks(self, since: float) -> list[Mark]:
        """What happened since then, oldest first."""
        return [mark for mark in self._marks if mark.time_seconds >= since]


def _number(values: Mapping[str, object], name: str) -> float:
    found = number(values, name)
    return _UNKNOWN if found is None else float(found)


def _by_number(node: str) -> tuple[int, str]:
    return (int(node) if node.isdecimal() else 1 << 30, node)
