# SPDX-License-Identifier: GPL-2.0-or-later
"""What happened, told by what changes from one report to the next (docs/json.md).

Nothing here reads a clock. Times are of whoever shows them, in seconds; a report has ages only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

from ksmd_ctl.render.page_history import Mark
from ksmd_ctl.reports.document import number, part, parts, text

_MARKS: Final = 200
# Older events are no news when the first report comes.
_FIRST_SECONDS: Final = 3600.0
# Two ages of one moment differ by how numbers of floating point round.
_SAME_SECONDS: Final = 0.001


class Events:
    """What happened, by what changes from one report to the next."""

    def __init__(self) -> None:
        # Apart, as a policy that decides often would displace all others.
        self._decisions: deque[Mark] = deque(maxlen=_MARKS)
        self._others: deque[Mark] = deque(maxlen=_MARKS)
        self._before: Mapping[str, object] = {}
        # The service that reports are from, and by its clock the time of the latest decision of its policy.
        self._pid: object = None
        self._decided = 0.0
        self._changes: frozenset[object] = frozenset()

    def tell(self, now: float, text: str, *, bad: bool = False) -> None:
        """Something that no report says."""
        self._others.append(Mark(now, text, bad))

    def __len__(self) -> int:
        return len(self._decisions) + len(self._others)

    def latest(self, most: int) -> list[tuple[Mark, bool]]:
        """The latest, the oldest of them first, and of each whether it is a decision of the policy.

        :param most: so many at most; half of them are left to others than the policy, where there are so many
        """
        others = list(self._others)
        decisions = max(most - len(others), most // 2)
        chosen = [(mark, True) for mark in list(self._decisions)[-decisions:] if decisions]
        chosen += [(mark, False) for mark in others[-(most - len(chosen)) :] if most > len(chosen)]
        return sorted(chosen, key=lambda found: found[0].time_seconds)

    def add(self, report: Mapping[str, object], now: float) -> None:
        """Another report."""
        before, self._before = self._before, report
        if part(before, "host").get("kind") != part(report, "host").get("kind"):
            # Another host, or the first report.
            before, self._changes = {}, frozenset()
        daemon = part(report, "daemon")
        found = [*self._foreign(report, now)]
        decided: list[Mark] = []
        if daemon:
            if daemon.get("pid") != self._pid:
                self._decided = 0.0
                if self._pid is not None:
                    found.append(Mark(now - (number(daemon, "uptime_seconds") or 0.0), "the service was started"))
            self._pid = daemon.get("pid")
            decided += self._decided_since(report, now)
        elif not part(before, "daemon"):
            found += _knobs(before, report, now)
        if before:
            found += (Mark(now, said, bad) for said, bad in _changes(before, report))
        self._others.extend(sorted(found, key=lambda mark: mark.time_seconds))
        self._decisions.extend(sorted(decided, key=lambda mark: mark.time_seconds))

    def _foreign(self, report: Mapping[str, object], now: float) -> Iterator[Mark]:
        """What others changed. They may be seen later than what comes after them, so none is known by its time."""
        seen = set()
        for change in parts(report, "foreign_changes"):
            key = tuple(str(change.get(name)) for name in ("knob", "from", "to", "times"))
            age = number(change, "age_seconds") or 0.0
            seen.add(key)
            if key not in self._changes and age <= _FIRST_SECONDS:
                names = change.get("writers")
                running = f" (running: {', '.join(map(str, names))})" if isinstance(names, list) and names else ""
                said = f"{text(change, 'knob')}: {change.get('from')} to {change.get('to')} by somebody else{running}"
                yield Mark(now - age, said, bool(change.get("held")))
        self._changes = frozenset(seen)

    def _decided_since(self, report: Mapping[str, object], now: float) -> Iterator[Mark]:
        uptime = number(part(report, "daemon"), "uptime_seconds") or 0.0
        latest = self._decided
        for past in parts(part(report, "decision"), "recent"):
            age = number(past, "age_seconds") or 0.0
            if uptime - age > self._decided + _SAME_SECONDS and age <= _FIRST_SECONDS:
                knobs = part(past, "knobs")
                written = ", ".join(f"{knob} = {knobs[knob]}" for knob in knobs)
                yield Mark(now - age, text(past, "text") + (f" ({written})" if written else ""))
                latest = max(latest, uptime - age)
        self._decided = latest


def _knobs(before: Mapping[str, object], after: Mapping[str, object], now: float) -> Iterator[Mark]:
    """Knobs that have other values, where no service says who changed them."""
    knobs = part(after, "knobs")
    for name in knobs:
        was, found = part(before, "knobs", name).get("found"), part(knobs, name).get("found")
        if was is not None and found is not None and was != found:
            yield Mark(now, f"{name}: {was} to {found}")


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    """What has changed from one report to the next, as a text and whether it is bad."""
    yield from _transactions(part(before, "transaction"), part(after, "transaction"))
    for words, path, name in (
        ("the new configuration is invalid", ("daemon",), "reload_error"),
        ("the survey failed", ("numa",), "error"),
        ("the look at who shares memory failed", ("sharing",), "error"),
        ("the audit of domains failed", ("domains",), "error"),
        ("ksmd is stopped", ("domains", "measures"), "stopped"),
    ):
        said = text(part(after, *path), name)
        if said and said != text(part(before, *path), name):
            yield f"{words}: {said}", True
    healed = text(part(after, "healing"), "text")
    if healed and healed != text(part(before, "healing"), "text"):
        yield healed, False
    policies = text(before, "policy"), text(after, "policy")
    if all(policies) and len(set(policies)) > 1:
        yield f"policy: {policies[0]} to {policies[1]}", False
    verdicts = _verdicts(before)
    for domain, verdict in _verdicts(after).items():
        if verdicts.get(domain, verdict) != verdict:
            yield f"domain {domain}: {verdict}", verdict == "not isolated"


def _transactions(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    last, running = part(after, "last"), part(after, "running")
    if text(last, "id") != text(part(before, "last"), "id"):
        result, reason = text(last, "result"), text(last, "reason")
        yield f"{text(last, 'who')}: {result}" + (f": {reason}" if reason else ""), result != "done"
    if running and any(running.get(name) != part(before, "running").get(name) for name in ("id", "phase")):
        yield f"{text(running, 'who')}: {text(running, 'phase')}", False


def _verdicts(report: Mapping[str, object]) -> dict[str, str]:
    return {text(one, "domain"): text(one, "verdict") for one in parts(part(report, "domains"), "domains")}
