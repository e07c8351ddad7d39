# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables for people: columns as wide as what stands in them, numbers to the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ksmd_ctl.control.document import number, part, text
from ksmd_ctl.metrics.figures import bytes_text, count_text, plural, seconds_text

__all__ = ["UNKNOWN", "Column", "bytes_or_unknown", "count_or_unknown", "list_text", "survey_text", "table"]

#: What stands where something isn't known: never a 0.
UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Column:
    """A column; `right` for numbers."""

    title: str
    right: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, its titles first. The last column ends where its text ends."""
    everything = [[column.title for column in columns], *rows]
    widths = [max(len(row[at]) for row in everything) for at in range(len(columns))]
    for row in everything:
        cells = [
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        yield "  ".join(cells).rstrip()


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
