# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables for people: columns as wide as what stands in them, numbers to the right."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ksmd_ctl.control.document import number, part, text
from ksmd_ctl.metrics.figures import bytes_text, count_text, plural, seconds_text

__all__ = ["UNKNOWN", "Column", "bytes_or_unknown", "count_or_unknown", "list_text", "survey_text", "table"]

#: What stands where something isn't known: never a 0.
UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Column:
    """A column; `right` for numbers, `wraps` for texts that may be cut and go on in the next line."""

    title: str
    right: bool = False
    wraps: bool = False


#: Between two columns.
_GAP = "  "
#: No column that wraps is narrower.
_LEAST_WIDTH = 8


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], most: int | None = None) -> Iterator[str]:
    """The lines of a table, its titles first. The last column ends where its text ends.

    :param most: the width of a line, which columns are made narrower for; None for no limit
    """
    everything = [[column.title for column in columns], *rows]
    widths = _narrow(columns, everything, sys.maxsize if most is None else most)
    for row in everything:
        parts = [_parts(cell, width) for cell, width in zip(row, widths, strict=True)]
        for at in range(max(map(len, parts))):
            cells = [part[at] if at < len(part) else "" for part in parts]
            aligned = [
                cell.rjust(width) if column.right else cell.ljust(width)
                for cell, width, column in zip(cells, widths, columns, strict=True)
            ]
            yield _GAP.join(aligned).rstrip()


def _narrow(columns: Sequence[Column], everything: Sequence[Sequence[str]], most: int) -> list[int]:
    """The widths of columns: as wide as their texts, or the widest ones less, until a line is not wider than `most`."""
    widths = [max(len(row[at]) for row in everything) for at in range(len(columns))]
    # A number is never cut, though its title may wrap.
    least = [
        _LEAST_WIDTH if column.wraps else max(map(len, [*column.title.split(), *(row[at] for row in everything[1:])]))
        for at, column in enumerate(columns)
    ]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > most:
        room = [at for at in range(len(widths)) if widths[at] > least[at]]
        if not room:
            break
        widths[max(room, key=lambda at: widths[at])] -= 1
    return widths


def _parts(cell: str, width: int) -> list[str]:
    """A cell's text in parts that are not wider than its column: at blanks, else anywhere."""
    found = []
    while len(cell) > width:
        cut = cell.rfind(" ", 1, width + 1)
        cut = width if cut < 0 else cut
        found.append(cell[:cut].rstrip())
        cell = cell[cut:].lstrip()
    return [*found, cell]


def count_or_unknown(value: int | float | None) -> str:
    """As in ``250,000``."""
    return UNKNOWN if value is None else count_text(value)


def bytes_or_unknown(value: int | float | None) -> str:
    """As in ``976.6 MiB``."""
    return UNKNOWN if value is None else bytes_text(value)


def list_text(numbers: Iterable[int]) -> str:
    """Numbers as the kernel writes a list of them: ``0-3,8``; a dash where there are none."""
    runs: list[list[int]] = []
    for one in sorted(set(numbers)):
        if runs and runs[-1][1] == one - 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "-"


def survey_text(document: Mapping[str, object]) -> str:
    """Of when a document's figures are, and how sure; empty where it doesn't say."""
    survey = part(document, "survey")
    age = number(survey, "age_seconds")
    if age is None:
        return ""
    said = ["looked just now" if age < 1 else f"looked {seconds_text(age)} ago"]
    lacking = text(survey, "lacking")
    if lacking:
        said.append(f"KSM pages could not be counted: {lacking}")
    elif survey.get("complete") is False:
        said.append("KSM pages estimated from a sample (95 % interval in brackets)")
    elif survey.get("complete"):
        said.append(f"all frames counted ({text(survey, 'witness')})")
    cpu = number(survey, "cpu_seconds")
    if cpu is not None:
        said.append(f"{plural(round(cpu * 1000), 'ms', 'ms')} of CPU")
    return ", ".join(said)
