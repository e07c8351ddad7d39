# SPDX-License-Identifier: GPL-2.0-or-later
"""Points in time as people write them for ``--since`` and ``--until``; those that journalctl takes most often."""

from __future__ import annotations

import argparse
import calendar
import re
import time
from typing import Final

_UNITS: Final = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
    **dict.fromkeys(("w", "week", "weeks"), 7 * 86400),
}
_SPAN: Final = re.compile(r"(\d{1,9})\s*([a-z]+)\s*", re.ASCII)
_DATE: Final = re.compile(
    r"(?:(?P<date>\d{4}-\d{2}-\d{2})|(?P<day>yesterday|today|tomorrow))?"
    r"(?:(?:[ T]|^)(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?P<fraction>\.\d{1,6})?)?)?"
    r"(?P<utc> UTC)?",
    re.ASCII,
)
_DAYS: Final = {"yesterday": -1, "tomorrow": 1}


def moment(text: str, now: float | None = None) -> float:
    """A point in time in Unix seconds, for argparse.

    A length of time, as in ``10min``, ``2h``, ``1d`` or ``1h30min``, with or without ``ago`` or a minus: that long ago.
    Or ``2026-11-29 12:00:00.5`` (local time, or with `` UTC`` at the end; the fraction, the seconds, the time or the
    date may lack), ``yesterday``, ``today`` or ``tomorrow`` instead of the date, ``now``, or ``@`` and Unix seconds.

    :param now: Unix seconds, None for the present
    """
    now = time.time() if now is None else now
    said = text.strip()
    found = _unix(said) if said.startswith("@") else now if said == "now" else None
    if found is None:
        span = _span(said.removesuffix("ago").strip().removeprefix("-"))
        found = _date(said, now) if span is None else now - span
    if found is None:
        form = "10min, 2h, 1d, yesterday, '2026-11-29 12:00' or @SECONDS"
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a time such as {form}")
    return found


def _unix(text: str) -> float | None:
    digits = text[1:]
    return float(digits) if re.fullmatch(r"-?\d{1,12}(\.\d{1,6})?", digits, re.ASCII) else None


def _span(text: str) -> float | None:
    """How many seconds it is; None if it is no length of time."""
    seconds, at = 0.0, 0
    while found := _SPAN.match(text, at):
        if found[2] not in _UNITS:
            return None
        seconds += int(found[1]) * _UNITS[found[2]]
        at = found.end()
    return seconds if at == len(text) and at else None


def _date(text: str, now: float) -> float | None:
    found = _DATE.fullmatch(text)
    if found is None or not text:
        return None
    broken_down = time.gmtime if found["utc"] else time.localtime
    year, month, day = map(int, found["date"].split("-")) if found["date"] else broken_down(now)[:3]
    day += _DAYS.get(found["day"], 0)
    hour, minute, second = (int(found[name] or 0) for name in ("hour", "minute", "second"))
    try:
        parts = year, month, day, hour, minute, second, 0, 0, -1
        seconds = float(calendar.timegm(parts)) if found["utc"] else time.mktime(parts)
    except (OverflowError, ValueError):
        return None
    # mktime(3) takes 31 February for 3 March.
    date_wrong = found["date"] and broken_down(seconds)[:3] != (year, month, day)
    wrong = date_wrong or hour > 23 or minute > 59 or second > 59
    return None if wrong else seconds + float(found["fraction"] or 0)
