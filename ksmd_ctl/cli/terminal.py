# SPDX-License-Identifier: GPL-2.0-or-later
"""Text on a terminal: lines with colours and of limited width, tables, and how far something is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, TextIO

from ksmd_ctl.figures import bytes_text, count_text, plural, ranges_text, ratio_text
from ksmd_ctl.render.summary import BAD, GOOD, Line
from ksmd_ctl.reports.document import number, text

#: No line of text for people is wider.
WIDTH = 100
#: What stands where something isn't known: never a 0.
UNKNOWN = "?"

_COLOURS = {BAD: "\x1b[1;31m", GOOD: "\x1b[32m"}
_RESET = "\x1b[0m"
# Narrower than this, wrapping makes it worse.
_LEAST_WIDTH = 30
#: Between two columns of a table.
_GAP = "  "
#: No column that wraps is narrower.
_LEAST_COLUMN = 8


def write_lines(
    lines: Iterable[Line], out: TextIO, environ: Mapping[str, str] = os.environ, most: int | None = None
) -> None:
    """Write lines as the output takes them.

    :param most: the width that no line exceeds, whatever the output takes

    Colours go to terminals only, and not with NO_COLOR (https://no-color.org). Wrapped is at COLUMNS where it is
    set, else at the terminal's width; what is neither is not wrapped, so that programs get whole lines.
    """
    coloured = _is_terminal(out) and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    width = _width(out, environ)
    if most is not None:
        width = most if width is None else min(width, most)
    for line in lines:
        colour = _COLOURS.get(line.tone, "") if coloured else ""
        for piece in wrapped(str(line), width, line.indent):
            out.write(f"{colour}{piece}{_RESET if colour else ''}\n")


def write_wrapped(lines: Iterable[str], width: int, out: TextIO) -> None:
    """Write texts for people, in lines of a width."""
    for line in lines:
        for piece in wrapped(line, width, 2):
            out.write(f"{piece}\n")


def text_width(out: TextIO, environ: Mapping[str, str] = os.environ) -> int:
    """The width of a text for people: the terminal's, `WIDTH` at most."""
    return max(_LEAST_WIDTH, min(WIDTH, _width(out, environ) or WIDTH))


def _is_terminal(out: TextIO) -> bool:
    try:
        return out.isatty()
    except ValueError:
        return False


def _width(out: TextIO, environ: Mapping[str, str]) -> int | None:
    columns = environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns) > 0:
        return int(columns)
    if not _is_terminal(out):
        return None
    try:
        return os.get_terminal_size(out.fileno()).columns or None
    except (OSError, ValueError):
        return None


def wrapped(text: str, width: int | None, indent: int) -> Iterator[str]:
    """A text in lines of a width, cut at blanks; all but the first are indented."""
    if width is None or len(text) <= max(width, _LEAST_WIDTH):
        yield text
        return
    width = max(width, _LEAST_WIDTH)
    while len(text) > width:
        cut = text.rfind(" ", indent + 1, width + 1)
        if cut < 0:
            cut = text.find(" ", width)
            if cut < 0:
                break
        yield text[:cut].rstrip()
        text = " " * indent + text[cut:].lstrip()
    yield text


class ProgressLine:
    """The line; it is gone when this is left."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._on = out.isatty()
        self._shown = ""

    def at(self, done: int | float, total: int | float, unit: str) -> None:
        """Show how far it is; without a total only what is done."""
        if not (done or total):
            return
        said = f"{count_text(done)} of {count_text(total)}" if total else count_text(done)
        share = f" ({ratio_text(min(1.0, done / total))})" if total else ""
        self.say(f"{said} {unit}{share}")

    def tell(self, at: Mapping[str, object]) -> None:
        """Show how far it is by a progress document (docs/json.md)."""
        self.at(number(at, "done") or 0, number(at, "total") or 0, text(at, "unit"))

    def say(self, line: str) -> None:
        """Show a text."""
        if self._on and line != self._shown:
            self._shown = line
            self._write(f"\r\x1b[K{line}")

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._shown = ""
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        # What is under way has to come to its end, also where the terminal was closed.
        with suppress(OSError):
            self._out.write(text)
            self._out.flush()


class Column(NamedTuple):
    """A column; `right` for numbers, `wraps` for texts that may be cut and go on in the next line."""

    title: str
    right: bool = False
    wraps: bool = False


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
        _LEAST_COLUMN if column.wraps else max(map(len, [*column.title.split(), *(row[at] for row in everything[1:])]))
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


def more(count: int, what: str, many: str = "") -> Iterator[str]:
    """That there are so many more, if there are.

    :param many: the plural, where it is not only an s more
    """
    if count > 0:
        several = many or f"{what}s"
        yield f"{plural(count, f'more {what}', f'more {several}')}; --json has more"


def count_or_unknown(value: int | float | None) -> str:
    """As in ``250,000``."""
    return UNKNOWN if value is None else count_text(value)


def bytes_or_unknown(value: int | float | None) -> str:
    """As in ``976.6 MiB``."""
    return UNKNOWN if value is None else bytes_text(value)


def list_text(numbers: Iterable[int]) -> str:
    """Numbers as the kernel writes a list of them: ``0-3,8``; a dash where there are none."""
    return ranges_text(numbers) or "-"
