# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page: the present figures, charts of an hour, a day or a week as inline SVG, and events.

An SVG has only lines and is stretched to the window (vector-effect keeps their width). Labels are HTML text beside it,
so that their size does not depend on the window.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from ksmd_ctl import __version__
from ksmd_ctl.figures import bytes_text, count_text, ratio_text, seconds_text
from ksmd_ctl.render.page_history import Line, Mark, PageHistory, Span
from ksmd_ctl.render.summary import summary_text
from ksmd_ctl.reports.document import doubted, number, part, parts, text

#: Number of colours (`.c0` and so on in the style); further lines repeat them, dashed.
COLOURS: Final = 8

_HEAD: Final = '<section class="chart"><h2>'
_WIDTH: Final = 720
_HEIGHT: Final = 120
# After a longer time without a point, the line is interrupted; of before a start there are points a minute apart.
_HOLES_SECONDS: Final = {Span.HOUR: 150.0, Span.DAY: 900.0, Span.WEEK: 5400.0}
_AXES: Final = {
    Span.HOUR: ("60 min ago", "30", "now"),
    Span.DAY: ("24 h ago", "12", "now"),
    Span.WEEK: ("7 days ago", "3.5", "now"),
}


def chart(
    title: str,
    lines: Sequence[Line],
    times: Sequence[float],
    marks: Sequence[Mark],
    now: float,
    show: Callable[[float], str],
    span: Span = Span.HOUR,
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
    said = f"{title}: from {show(min(known))} to {show(max(known))} in the last {span}"
    paths = "".join(
        f'<path class="line {_colour(index)}" d="{_path(line, times, now, low, high, span)}"/>'
        for index, line in enumerate(lines)
    )
    return (
        f"{_HEAD}{html.escape(title)}</h2>"
        f'<div class="scale"><span>{html.escape(show(high))}</span></div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{html.escape(said)}">'
        f"<title>{html.escape(said)}</title>{_grid(low, high)}{_marks(marks, now, span)}{paths}</svg>"
        f'<div class="scale"><span>{html.escape(show(low))}</span></div>'
        f'<div class="axis">{"".join(f"<span>{at}</span>" for at in _AXES[span])}</div>'
        f"{_legend(lines, show) if len(lines) > 1 else ''}</section>"
    )


def _colour(index: int) -> str:
    return f"c{index % COLOURS}" + (" again" if index >= COLOURS else "")


def _x(time_seconds: float, now: float, span: Span) -> float:
    return _WIDTH * (1 - (now - time_seconds) / span.seconds)


def _grid(low: float, high: float) -> str:
    zero = _HEIGHT * high / (high - low)
    quarters = "".join(f'<path class="grid" d="M{_WIDTH * part // 4} 0V{_HEIGHT}"/>' for part in (1, 2, 3))
    return f'{quarters}<path class="zero" d="M0 {zero:.1f}H{_WIDTH}"/>'


def _marks(marks: Sequence[Mark], now: float, span: Span) -> str:
    return "".join(
        f'<path class="mark{" bad" if mark.bad else ""}" d="M{_x(mark.time_seconds, now, span):.1f} 0V{_HEIGHT}">'
        f"<title>{html.escape(mark.text)}</title></path>"
        for mark in marks
    )


def _path(line: Line, times: Sequence[float], now: float, low: float, high: float, span: Span) -> str:
    return "".join(_moves(line, times, now, low, high, span))


def _moves(line: Line, times: Sequence[float], now: float, low: float, high: float, span: Span) -> Iterator[str]:
    before = -math.inf
    scale = _HEIGHT / (high - low)
    for time_seconds, value in zip(times, line.values, strict=True):
        if math.isnan(value):
            before = -math.inf
            continue
        x, y = _x(time_seconds, now, span), (high - value) * scale
        if x >= 0:
            joined = time_seconds - before <= _HOLES_SECONDS[span]
            # A single point is a line without length, visible by its round cap.
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


_REFRESH_SECONDS: Final = {Span.HOUR: 10, Span.DAY: 60, Span.WEEK: 60}
_MARKS_SHOWN: Final = 12
_GROUPS_SHOWN: Final = 8

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
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.5rem;margin:1rem 0;padding:0}
.tiles div,.chart,details{background:var(--card);border:1px solid var(--rule);border-radius:.4rem;padding:.6rem .75rem}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.2rem;font-variant-numeric:tabular-nums}
.chart,details{margin:.5rem 0}.scale,.axis{font-size:.8rem}.axis{display:grid;grid-template-columns:1fr 1fr 1fr}
.axis :nth-child(2){text-align:center}.axis :nth-child(3){text-align:right}
svg{display:block;width:100%;height:7.5rem}
svg path{fill:none;vector-effect:non-scaling-stroke;stroke-width:1}
.line{stroke:currentColor;stroke-width:2!important;stroke-linejoin:round;stroke-linecap:round}
.again{stroke-dasharray:4 3}.grid{stroke:var(--rule)}.zero{stroke:var(--soft)}
.mark{stroke:var(--soft);stroke-dasharray:3 3}.mark.bad{stroke:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;margin:.4rem 0 0;padding:0;font-size:.85rem}
.legend i{display:inline-block;width:.9rem;border-top:3px solid currentColor;margin-right:.35rem;vertical-align:middle}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}.c7{color:var(--c7)}
table{border-collapse:collapse;width:100%;font-size:.9rem}td{padding:.2rem .5rem .2rem 0;vertical-align:top;
border-top:1px solid var(--rule)}td:first-child{white-space:nowrap;color:var(--soft)}
pre{white-space:pre-wrap;margin:.5rem 0 0;font-size:.85rem}a{color:var(--c0)}
"""

_RUN: Final = {0: "stopped", 1: "merging", 2: "un-merged, stopped"}


def page(report: Mapping[str, object], history: PageHistory, now: float) -> bytes:
    """The page as HTML.

    :param report: the latest one (docs/json.md)
    :param now: the host's clock
    """
    span = history.span
    events, changes = history.events(now - span.seconds), history.changes(now - span.seconds)
    # What a policy decides in a day would hide all else.
    marks = sorted((*events, *(changes if span is Span.HOUR else ())), key=lambda mark: mark.time_seconds)
    figures: tuple[tuple[str, Sequence[Line], Callable[[float], str]], ...] = (
        ("Saved", [history.saved()], bytes_text),
        ("Scan speed", [history.speed()], lambda value: f"{count_text(value)} pages/s"),
        ("KSM pages per node", history.nodes(), count_text),
    )
    charts = [chart(title, lines, history.times, marks, now, show, span) for title, lines, show in figures]
    foreign, own = ([mark for mark in events if mark.foreign is others] for others in (True, False))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>ksmd-ctl</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS[span]}"><style>{_STYLE}</style></head>\n<body>'
        f"{_top(report)}{_tiles(report)}{_links(span)}{''.join(charts)}{_sharing(part(report, 'sharing'))}"
        f"{_happened('Changed by others', foreign, now)}{_happened('What happened', own, now)}"
        f"{_happened('Knob changes' if span is Span.HOUR else 'Decisions of the policy', changes, now)}"
        f"<details open><summary>All of it, in words</summary><pre>{html.escape(summary_text(report))}</pre></details>"
        f'<p class="soft"><a href="/metrics">Metrics</a> for Prometheus. ksmd-ctl {html.escape(__version__)}</p>'
        "</body></html>\n"
    ).encode()


def _links(shown: Span) -> str:
    """Links to the page of an hour, a day and a week."""
    links = (
        f'<b aria-current="page">{span}</b>' if span is shown else f'<a href="/?span={span}">{span}</a>'
        for span in Span
    )
    return f'<nav class="soft">The last {" · ".join(links)}</nav>'


def _top(report: Mapping[str, object]) -> str:
    host = part(report, "host")
    release = html.escape(text(host, "release", "unknown"))
    if host.get("simulated"):
        where = f'<p class="bad">SIMULATED (profile {release}): none of this is this machine\'s memory</p>'
    else:
        where = f'<p class="soft">this machine, kernel {release}</p>'
    error = text(part(report, "daemon"), "reload_error")
    refused = f'<p class="bad">The new configuration is bad, and the old one stays: {html.escape(error)}</p>'
    return f"<header><h1>Kernel same-page merging</h1>{where}{refused if error else ''}</header>"


def _tiles(report: Mapping[str, object]) -> str:
    readings, derived = part(report, "readings"), part(report, "derived")
    run = number(readings, "run")
    policy = text(report, "policy", "unknown")
    states = [text(part(report, "knobs", name), "state") for name in part(report, "knobs")]
    wrong = sum(state in ("drifted", "failed", "lacking") for state in states)
    pending = states.count("pending")
    held = f"{states.count('held')} held" + (f", {pending} pending" if pending else "")
    if wrong:
        held = f"{wrong} not as wanted"
    counted, frames = number(derived, "saved_bytes"), number(derived, "saved_frames_bytes")
    saved = counted if frames is None else frames
    saving, by_count = (
        "unknown" if found is None else doubted(bytes_text(found), text(derived, "stale_text"))
        for found in (saved, counted)
    )
    tiles = (
        ("KSM", "unknown" if run is None else _RUN.get(int(run) & 3, f"run = {run}"), ""),
        ("Policy", policy + (" (nothing is written)" if policy == "observe" else ""), ""),
        ("Knobs", held, "bad" if wrong else ""),
        ("Saved" if frames is None else "Saved, in frames", saving, "bad" if saved is not None and saved < 0 else ""),
        ("Saved by the kernel's count", by_count, ""),
        ("Zero pages freed by splits", _shown(number(part(report, "numa"), "split_zero_pages"), count_text), ""),
        ("Huge pages prevented", _shown(number(part(report, "numa"), "split_blocks"), count_text), ""),
        ("Merged pages", _shown(number(derived, "merged_pages"), count_text), ""),
        ("KSM pages", _shown(number(readings, "pages_shared"), count_text), ""),
        ("Pages scanned per second", _shown(number(derived, "pages_scanned_per_second"), count_text), ""),
        ("One full scan", _shown(number(derived, "full_scan_seconds"), seconds_text), ""),
        ("ksmd, of one CPU", _shown(number(derived, "ksmd_cpu_ratio"), ratio_text), ""),
    )
    shown = (
        f"<div><dt>{html.escape(name)}</dt><dd{f' class={tone!r}' if tone else ''}>{html.escape(value)}</dd></div>"
        for name, value, tone in tiles
    )
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def _shown(value: float | None, show: Callable[[float], str]) -> str:
    return "unknown" if value is None else show(value)


def _sharing(sharing: Mapping[str, object]) -> str:
    """Who shares most, and with whom."""
    keys = ("merged_bytes", "shared_bytes", "saved_bytes", "leaving_costs_bytes")
    groups = [
        (text(one, "group"), *(_shown(number(one, key), bytes_text) for key in keys))
        for one in parts(sharing, "groups")[:_GROUPS_SHOWN]
    ]
    pairs = []
    for pair in parts(sharing, "pairs"):
        names = pair.get("groups")
        both = " and ".join(map(str, names)) if isinstance(names, list | tuple) else ""
        pairs.append((both, _shown(number(pair, "shared_bytes"), bytes_text)))
    head = ("group", "merged", "shared with others", "saved in all", "leaving costs")
    return _table("Who shares merged memory", head, groups) + _table("With whom", ("groups", "both map"), pairs)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in (head, *rows))
    return f'<section class="chart"><h2>{title}</h2><table>{lines}</table></section>'


def _happened(title: str, marks: Sequence[Mark], now: float) -> str:
    if not marks:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(seconds_text(max(0, round(now - mark.time_seconds))))} ago</td>"
        f"<td{' class=bad' if mark.bad else ''}>{html.escape(mark.text)}</td></tr>"
        for mark in reversed(marks[-_MARKS_SHOWN:])
    )
    return f'<section class="chart"><h2>{title}</h2><table>{rows}</table></section>'
