# SPDX-License-Identifier: GPL-2.0-or-later
"""Who was switched on or off, and by whom, as lines for people (docs/switching.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ksmd_ctl.figures import plural, seconds_text
from ksmd_ctl.reports.document import number, part, parts, text

#: Of more than these `status` only says how many there are.
_MOST = 5


def switched_texts(document: Mapping[str, object], most: int | None = _MOST) -> Iterator[tuple[str, bool]]:
    """A text for each process that was switched, the latest first, and whether it is something to look after.

    :param document: a report, or a processes document (docs/json.md)
    :param most: at most so many; None for all
    """
    found = parts(document, "switched")
    for one in found[:most]:
        yield _text(one), bool(part(one, "again")) or not one.get("done")
    if most is not None and len(found) > most:
        yield f"{plural(len(found) - most, 'more process', 'more processes')}: `ksmd-ctl processes` shows all", False


def _text(one: Mapping[str, object]) -> str:
    whose = f"{text(one, 'group') or text(one, 'name')} (pid {number(one, 'pid')})"
    age = number(one, "age_seconds")
    when = "before the last boot" if age is None else f"{seconds_text(round(age))} ago" if age >= 1 else "just now"
    said = f"{'on' if one.get('on') else 'off'}: {whose}, {when}, by {text(one, 'by')}"
    if not one.get("done"):
        return f"{said}: not finished: a part of it may be switched"
    if again := part(one, "again"):
        return f"{said}; started again as pid {number(again, 'pid')}, and is mergeable"
    return f"{said}; ended since" if one.get("ended") else said
