# SPDX-License-Identifier: GPL-2.0-or-later
"""Draws lines over the last hour as inline SVG.

The SVG holds lines only and is stretched to whatever room there is (vector-effect keeps their width); what is to be
read stands beside it as text, which then has the same size in a narrow window as in a wide one.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ksmd_ctl.daemon.page_history import SPAN_SECONDS, STEP_SECONDS, Line, Mark

__all__ = ["COLOURS", "chart"]

#: So many lines have a colour of their own (`.c0` and so on in the page's style); more begin anew, dashed.
COLOURS: Final = 8

_HEAD: Final = '<section class="chart"><h2>'
_WIDTH: Final = 720
_HEIGHT: Final = 120
# A longer time without a point is shown as a hole: the host slept, or the loop was late.
_HOLE_SECONDS: Final = 3 * STEP_SECONDS


def chart(
    title: str,
    lines: Sequence[Line],
    times: Sequence[float],
    marks: Sequence[Mark],
    now: float,
    show: Callable[[float], str],
) -> str:
    """A chart with its heading and its legend.

    :param show: a value as text
    """
    known = [value for line in lines for value in line.known()]
    if not known:
        return f'{_HEAD}{html.escape(title)}</h2><p class="none">not known on this host yet</p></section>'
    low, high = min(0.0, *known), max(0.0, *known)
    if high == low:
        high = low + 1
    said = f"{title}: from {show(min(known))} to {show(max(known))} in the last hour"
    paths = "".join(
        f'<path class="line {_colour(index)}" d="{_path(line, times, now, low, high)}"/>'
        for index, line in enumerate(lines)
    )
    return (
        f"{_HEAD}{html.escape(title)}</h2>"
        f'<div class="scale"><span>{html.escape(show(high))}</span></div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{html.escape(said)}">'
        f"<title>{html.escape(said)}</title>{_grid(low, high)}{_marks(marks, now)}{paths}</svg>"
        f'<div class="scale"><span>{html.escape(show(low))}</span></div>'
        '<div class="axis"><span>60 min ago</span><span>30</span><span>now</span></div>'
        f"{_legend(lines, show) if len(lines) > 1 else ''}</section>"
    )


def _colour(index: int) -> str:
    return f"c{index % COLOURS}" + (" again" if index >= COLOURS else "")


def _x(time_seconds: float, now: float) -> float:
    return _WIDTH * (1 - (now - time_seconds) / SPAN_SECONDS)


def _grid(low: float, high: float) -> str:
    zero = _HEIGHT * high / (high - low)
    quarters = "".join(f'<path class="grid" d="M{_WIDTH * part // 4} 0V{_HEIGHT}"/>' for part in (1, 2, 3))
    return f'{quarters}<path class="zero" d="M0 {zero:.1f}H{_WIDTH}"/>'


def _marks(marks: Sequence[Mark], now: float) -> str:
    return "".join(
        f'<path class="mark{" bad" if mark.bad else ""}" d="M{_x(mark.time_seconds, now):.1f} 0V{_HEIGHT}">'
        f"<title>{html.escape(mark.text)}</title></path>"
        for mark in marks
    )


def _path(line: Line, times: Sequence[float], now: float, low: float, high: float) -> str:
    return "".join(_moves(line, times, now, low, high))


def _moves(line: Line, times: Sequence[float], now: float, low: float, high: float) -> Iterator[str]:
    before = -math.inf
    scale = _HEIGHT / (high - low)
    for time_seconds, value in zip(times, line.values, strict=True):
        if math.isnan(value):
            before = -math.inf
            continue
        x, y = _x(time_seconds, now), (high - value) * scale
        if x >= 0:
            joined = time_seconds - before <= _HOLE_SECONDS
            # A point that stands alone is a line of no length, which its round cap makes visible.
            yield f"L{x:.1f} {y:.1f}" if joined else f"M{x:.1f} {y:.1f}h0"
            before = time_seconds


def _legend(lines: Sequence[Line], show: Callable[[float], str]) -> str:
    items = "".join(
        f'<li><i class="{_colour(index)}"></i>{html.escape(line.name)}: {html.escape(_last(line, show))}</li>'
        for index, line in enumerate(lines)
    )
    return f'<ul class="legend">{items}</ul>'


def _last(line: Line, show: Callable[[float], str]) -> str:
    value = line.values[-1] if line.values else math.nan
    return "unknown" if math.isnan(value) else show(value)
