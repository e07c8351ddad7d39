# SPDX-License-Identifier: GPL-2.0-or-later
"""Charts as inline SVG, tables, and the HTML page around them. No script, nothing from a network.

An SVG has only lines and is stretched to the window (vector-effect keeps their width). Labels are HTML text beside it,
so that their size does not depend on the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from ksmd_ctl import __version__

#: Number of colours (`.c0` and so on in the style); further lines repeat them, dashed.
COLOURS: Final = 8
WIDTH: Final = 720
HEIGHT: Final = 120

_STYLE: Final = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#5b6470;--rule:#d9dee4;--card:#f5f7f9;--bad:#b3261e;
--good:#1a7f37;--c0:#0b62c4;--c1:#b35900;--c2:#1a7f37;--c3:#9b2fae;--c4:#00798c;--c5:#c2255c;--c6:#6b6400;--c7:#5b5f97}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--ink:#e6e9ed;--soft:#a0a9b4;--rule:#353c45;--card:#1d2127;
--bad:#ff8a80;--good:#6fd68a;--c0:#6cb0ff;--c1:#ffab57;--c2:#6fd68a;--c3:#dd93ee;--c4:#4dd0e1;--c5:#ff8ab5;--c6:#d8cf5a;
--c7:#b0b4f0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--ground);color:var(--ink);
font:1rem/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.25rem;margin:0 0 .25rem}h2{font-size:1rem;margin:0}
p{margin:.25rem 0}.soft,.scale,.axis,.none{color:var(--soft)}.bad{color:var(--bad)}.good{color:var(--good)}
.chart{background:var(--card);border:1px solid var(--rule);border-radius:.4rem;padding:.6rem .75rem;margin:.5rem 0}
.scale,.axis{font-size:.8rem}.axis{display:grid;grid-template-columns:1fr 1fr 1fr}
.axis :nth-child(2){text-align:center}.axis :nth-child(3){text-align:right}
svg{display:block;width:100%;height:7.5rem;overflow:visible}
svg path{fill:none;vector-effect:non-scaling-stroke;stroke-width:1}
.line{stroke:currentColor;stroke-width:2!important;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:4 3}.grid{stroke:var(--rule)}.zero{stroke:var(--soft)}
.mark{stroke:var(--soft);stroke-dasharray:3 3}.mark.bad{stroke:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;margin:.4rem 0 0;padding:0;font-size:.85rem}
.legend i{display:inline-block;width:.9rem;border-top:3px solid currentColor;margin-right:.35rem;vertical-align:middle}
.legend .dashed{border-top-style:dashed}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}.c7{color:var(--c7)}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{padding:.2rem .5rem .2rem 0;vertical-align:top;
text-align:left;border-top:1px solid var(--rule)}th{color:var(--soft);font-weight:400;border:0}
.text td{white-space:nowrap;padding-right:1rem}.text td:last-child{width:100%;white-space:normal}
td:first-child{color:var(--soft)}.right{text-align:right;font-variant-numeric:tabular-nums}
"""


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure over time: a value for each time, nan if unknown.

    :ivar dashed: its line is, so that another one below it is seen
    """

    name: str
    values: Sequence[float]
    dashed: bool = False

    def known(self) -> list[float]:
        return [value for value in self.values if not math.isnan(value)]


@dataclass(frozen=True, slots=True)
class Mark:
    """An event.

    :ivar bad: it is a warning or worse
    :ivar foreign: somebody else did it
    """

    time_seconds: float
    text: str
    bad: bool = False
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """The time that a chart shows.

    :ivar labels: at its beginning, its middle and its end
    :ivar hole_seconds: after a longer time without a point a line is interrupted
    :ivar words: the time as a phrase
    """

    begins_seconds: float
    ends_seconds: float
    labels: tuple[str, str, str]
    hole_seconds: float
    words: str = ""

    def x(self, time_seconds: float) -> float:
        return WIDTH * (1 - (self.ends_seconds - time_seconds) / (self.ends_seconds - self.begins_seconds))


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a chart's SVG holds, and the values at its lower and upper edge: both 0 where there is no other value."""

    svg: str
    low: float
    high: float


def drawing(curves: Sequence[Curve], times: Sequence[float], marks: Sequence[Mark], axis: Axis) -> Drawing:
    """The lines of a chart of `WIDTH` and `HEIGHT`, of which some value has to be known."""
    known = [value for curve in curves for value in curve.known()]
    low, high = min(0.0, *known), max(0.0, *known)
    # Where all is 0 the line is at the lower edge, and the upper one is no value.
    top = high if high > low else low + 1
    paths = "".join(
        f'<path class="line {_look(curve, index)}" d="{"".join(_moves(curve, times, axis, low, top))}"/>'
        for index, curve in enumerate(curves)
    )
    return Drawing(f"{_grid(low, top)}{_marks(marks, axis)}{paths}", low, high)


def chart(
    title: str,
    curves: Sequence[Curve],
    times: Sequence[float],
    marks: Sequence[Mark],
    axis: Axis,
    show: Callable[[float], str],
) -> str:
    """A chart with its heading and its legend.

    :param show: a value as text
    """
    known = [value for curve in curves for value in curve.known()]
    heading = f'<section class="chart"><h2>{escape(title)}</h2>'
    if not known:
        return f'{heading}<p class="none">not known on this host</p></section>'
    drawn = drawing(curves, times, marks, axis)
    said = escape(f"{title}: from {show(min(known))} to {show(max(known))}{axis.words}")
    return (
        f'{heading}<div class="scale"><span>{escape(show(drawn.high)) if drawn.high > drawn.low else ""}</span></div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{said}">'
        f"<title>{said}</title>{drawn.svg}</svg>"
        f'<div class="scale"><span>{escape(show(drawn.low))}</span></div>'
        f'<div class="axis">{"".join(f"<span>{escape(at)}</span>" for at in axis.labels)}</div>'
        f"{_legend(curves, show) if len(curves) > 1 else ''}</section>"
    )


def _look(curve: Curve, index: int) -> str:
    return f"c{index % COLOURS}" + (" dashed" if curve.dashed or index >= COLOURS else "")


def _grid(low: float, high: float) -> str:
    zero = HEIGHT * high / (high - low)
    quarters = "".join(f'<path class="grid" d="M{WIDTH * part // 4} 0V{HEIGHT}"/>' for part in (1, 2, 3))
    return f'{quarters}<path class="zero" d="M0 {zero:.1f}H{WIDTH}"/>'


def _marks(marks: Sequence[Mark], axis: Axis) -> str:
    return "".join(
        f'<path class="mark{" bad" if mark.bad else ""}" d="M{axis.x(mark.time_seconds):.1f} 0V{HEIGHT}">'
        f"<title>{escape(mark.text)}</title></path>"
        for mark in marks
        if axis.begins_seconds <= mark.time_seconds <= axis.ends_seconds
    )


def _moves(curve: Curve, times: Sequence[float], axis: Axis, low: float, high: float) -> Iterator[str]:
    before = -math.inf
    scale = HEIGHT / (high - low)
    for time_seconds, value in zip(times, curve.values, strict=True):
        if math.isnan(value):
            before = -math.inf
            continue
        x, y = axis.x(time_seconds), (high - value) * scale
        if x >= 0:
            joined = time_seconds - before <= axis.hole_seconds
            # A single point is a line without length, visible by its round cap.
            yield f"L{x:.1f} {y:.1f}" if joined else f"M{x:.1f} {y:.1f}h0"
            before = time_seconds


def _legend(curves: Sequence[Curve], show: Callable[[float], str]) -> str:
    items = "".join(
        f'<li><i class="{_look(curve, index)}"></i>{escape(curve.name)}: {escape(_last(curve, show))}</li>'
        for index, curve in enumerate(curves)
    )
    return f'<ul class="legend">{items}</ul>'


def _last(curve: Curve, show: Callable[[float], str]) -> str:
    value = curve.values[-1] if curve.values else math.nan
    return "unknown" if math.isnan(value) else show(value)


def table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0, bad: Container[int] = ()
) -> str:
    """A table with its heading; nothing without rows.

    :param head: empty for none
    :param right: so many of the last columns hold numbers
    :param bad: the rows that tell of a warning or worse
    """
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str, tone: str = "") -> str:
        kinds = [' class="right"' if len(cells) - index <= right else "" for index in range(len(cells))]
        shown = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr{tone}>{shown}</tr>"

    kind = "figures" if right else "text"
    lines = [line(row, "td", ' class="bad"' if index in bad else "") for index, row in enumerate(rows)]
    return (
        f'<section class="chart"><h2>{escape(title)}</h2><table class="{kind}">{line(head, "th") if head else ""}'
        f"{''.join(lines)}</table></section>"
    )


def document(title: str, body: str, *, style: str = "", refresh_seconds: int = 0, foot: str = "") -> str:
    """A page.

    :param style: more than that of charts and tables
    :param refresh_seconds: after so long it is loaded again; 0 for never
    :param foot: HTML before the program's version
    """
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">{refresh}<style>{_STYLE}{style}</style>'
        f'</head>\n<body>{body}<p class="soft">{foot}ksmd-ctl {escape(__version__)}</p></body></html>\n'
    )
