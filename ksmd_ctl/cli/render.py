# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines on a terminal: colours where they are wanted, and no line wider than the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO

from ksmd_ctl.metrics.summary import BAD, GOOD, Line

__all__ = ["WIDTH", "wrapped", "write_lines"]

#: No line of text for people is wider.
WIDTH = 100

_COLOURS = {BAD: "\x1b[1;31m", GOOD: "\x1b[32m"}
_RESET = "\x1b[0m"

# Narrower than this, wrapping makes it worse.
_LEAST_WIDTH = 30


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
        for text in wrapped(str(line), width, line.indent):
            out.write(f"{colour}{text}{_RESET if colour else ''}\n")


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
