# SPDX-License-Identifier: GPL-2.0-or-later
"""What happened, for the live view: the service's history, or without one which knobs have other values than before.

Nothing here reads a clock. Times are Unix seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from ksmd_ctl.history.model import Kind
from ksmd_ctl.render.charts import Mark
from ksmd_ctl.reports.document import number, part, parts, text

_MARKS: Final = 200
# Their texts begin with the verb.
_OF_SERVICE: Final = ("started", "stopped")


class Events:
    """What happened, and what was told besides."""

    def __init__(self) -> None:
        # Apart, as a policy that decides often would displace all others.
        self._decisions: deque[Mark] = deque(maxlen=_MARKS)
        self._others: deque[Mark] = deque(maxlen=_MARKS)
        self._told: deque[Mark] = deque(maxlen=_MARKS)
        self._before: Mapping[str, object] = {}

    def tell(self, now: float, text: str, *, bad: bool = False) -> None:
        """Something that no history says."""
        self._told.append(Mark(now, text, bad))

    def __len__(self) -> int:
        return len(self._decisions) + len(self._others) + len(self._told)

    def latest(self, most: int) -> list[tuple[Mark, bool]]:
        """The latest, the oldest of them first, and of each whether it is a decision of the policy.

        :param most: so many at most; decisions get what others leave
        """
        others = sorted((*self._others, *self._told), key=lambda mark: mark.time_seconds)
        chosen = [(mark, False) for mark in others[max(0, len(others) - most) :]]
        decisions = most - len(chosen)
        chosen += [(mark, True) for mark in list(self._decisions)[-decisions:] if decisions]
        return sorted(chosen, key=lambda found: found[0].time_seconds)

    def hear(self, history: Mapping[str, object], *, anew: bool) -> None:
        """Events of the service's history (docs/json.md).

        :param anew: they take the place of those that were heard before
        """
        if anew:
            self._decisions.clear()
            self._others.clear()
        for event in parts(history, "events"):
            said, fields = text(event, "text"), part(event, "fields")
            decided = text(event, "kind") == Kind.POLICY
            if decided and (written := ", ".join(f"{knob} = {fields[knob]}" for knob in fields if knob != "phase")):
                said = f"{said} ({written})"
            if text(event, "event") in _OF_SERVICE:
                said = f"the service {said}"
            mark = Mark(number(event, "time_seconds") or 0.0, said, text(event, "severity") != "info")
            if decided and self._decisions and self._decisions[-1].text == said:
                # As after each start of a service with one and the same policy.
                self._decisions.pop()
            (self._decisions if decided else self._others).append(mark)

    def add(self, report: Mapping[str, object], now: float) -> None:
        """Another report; where it is no service's, nobody says who changed a knob."""
        before, self._before = self._before, report
        alike = part(before, "host").get("kind") == part(report, "host").get("kind")
        if not alike or part(before, "daemon") or part(report, "daemon"):
            return
        knobs = part(report, "knobs")
        for name in knobs:
            was, found = part(before, "knobs", name).get("found"), part(knobs, name).get("found")
            if was is not None and found is not None and was != found:
                self.tell(now, f"{name}: {was} to {found}")
