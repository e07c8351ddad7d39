# SPDX-License-Identifier: GPL-2.0-or-later
"""For people: what a service left changed that ended without a stop, and what others changed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Final

from ksmd_ctl.control.document import number, part, parts, text
from ksmd_ctl.metrics.figures import plural, seconds_text
from ksmd_ctl.metrics.summary import BAD, PLAIN, Line

__all__ = ["every_change", "foreign_lines", "left_lines", "left_text", "restore_command"]

# So many knobs have a line of their own; --explain has them all.
_MOST_LINES: Final = 4


def left_lines(left: Mapping[str, object]) -> Iterator[Line]:
    """The lines for what a service left (docs/json.md, ``left_by_service``); none where it left nothing."""
    if not left:
        return
    yield Line("ended", left_text(left), PLAIN if left.get("may_be_restarted") else BAD)
    knobs = part(left, "knobs")
    changed = (
        f"{name} = {_value(part(knobs, name).get('found'))} (was {_value(part(knobs, name).get('at_start'))})"
        for name in knobs
    )
    yield Line("left", ", ".join(changed), BAD)
    yield Line(
        "restore",
        f"`{restore_command(left)}` puts back the first state of this boot; a service that is started again puts back, "
        "at its stop, what was before",
    )


def left_text(left: Mapping[str, object]) -> str:
    """Which service ended, and since when, as a sentence without a full stop."""
    started, seen = number(left, "started_age_seconds") or 0, number(left, "seen_age_seconds")
    when = f"last seen {_ago(seen)}" if seen is not None else "no longer there"
    said = f"a service (pid {number(left, 'pid')}, started {_ago(started)}, {when}) died and left knobs changed"
    return f"{said}; systemd may be starting it again" if left.get("may_be_restarted") else said


def restore_command(left: Mapping[str, object]) -> str:
    """The command that puts back what a service left."""
    config = text(left, "config")
    return "ksmd-ctl daemon --restore" + (f" --config {shlex.quote(config)}" if config.isprintable() and config else "")


def foreign_lines(report: Mapping[str, object]) -> Iterator[Line]:
    """A line for each knob that others changed within a day, the latest first."""
    changes = parts(report, "foreign_changes")
    by_knob: dict[str, list[Mapping[str, object]]] = {}
    for change in changes:
        by_knob.setdefault(text(change, "knob"), []).append(change)
    for of_knob in list(by_knob.values())[:_MOST_LINES]:
        times = sum(int(number(change, "times") or 1) for change in of_knob)
        more = f"; {times} changes in a day" if times > 1 else ""
        yield Line("changed", _change(of_knob[0]) + more, _tone(of_knob[0]))
    if len(by_knob) > _MOST_LINES:
        yield Line("changed", f"{plural(len(by_knob) - _MOST_LINES, 'more knob')} by others: --explain shows them")


def every_change(report: Mapping[str, object]) -> Iterator[Line]:
    """A line for each change by others within a day, the latest first."""
    for change in parts(report, "foreign_changes"):
        times = int(number(change, "times") or 1)
        first = f"; {times} times, first {_ago(number(change, 'first_age_seconds') or 0)}" if times > 1 else ""
        yield Line("changed", _change(change) + first, _tone(change))


def _change(change: Mapping[str, object]) -> str:
    names = change.get("writers")
    running = ", ".join(map(str, names)) if isinstance(names, list | tuple) else ""
    who = f"by somebody else (running: {running})" if running else "by somebody else"
    held = "" if change.get("held") else ", not held"
    ago = _ago(number(change, "age_seconds") or 0)
    return f"{text(change, 'knob')} {_value(change.get('from'))} to {_value(change.get('to'))} {who}, {ago}{held}"


def _tone(change: Mapping[str, object]) -> str:
    return BAD if change.get("held") else PLAIN


def _ago(seconds: float) -> str:
    return f"{seconds_text(round(seconds))} ago" if seconds >= 1 else "just now"


def _value(value: object) -> str:
    return "unknown" if value is None else str(value)
