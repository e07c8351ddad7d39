# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings and replays as one HTML file: charts as inline SVG and tables. No script, nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from ksmd_ctl import __version__
from ksmd_ctl.figures import bytes_text, count_text, plural, ratio_text, seconds_text
from ksmd_ctl.reports.document import number, part, parts, text

_WIDTH, _HEIGHT = 800, 180
_LEFT, _TOP, _BOTTOM = 78, 8, 22
# So long without a value, in parts of the whole time, and a line is interrupted.
_HOLE: Final = 1 / 40
# Told apart also by those who don't see red and green apart (Okabe and Ito).
_STYLE: Final = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--soft:#5b6470;--rule:#d9dee4;--card:#f5f7f9;--c0:#0072b2;
--c1:#d55e00}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--ink:#e6e9ed;--soft:#a0a9b4;--rule:#353c45;--card:#1d2127;
--c0:#6cb0ff;--c1:#ffab57}}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--ground);color:var(--ink);
font:1rem/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.25rem}h2{font-size:1rem;margin:0 0 .3rem}p{margin:.25rem 0}.soft{color:var(--soft)}
section{background:var(--card);border:1px solid var(--rule);border-radius:.4rem;padding:.6rem .75rem;margin:.6rem 0}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
svg path{fill:none}.rule{stroke:var(--rule)}.mark{stroke:var(--soft);stroke-dasharray:3 3}
.line{stroke-width:2;stroke-linejoin:round}.c0{stroke:var(--c0)}.c1{stroke:var(--c1);stroke-dasharray:6 3}
.legend span{margin-right:1.2rem}.legend svg{display:inline-block;width:2rem;height:.7rem;vertical-align:middle}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{padding:.2rem .6rem .2rem 0;text-align:left;
vertical-align:top;border-top:1px solid var(--rule)}th{color:var(--soft);font-weight:400;border:0}
td.right,th.right{text-align:right;font-variant-numeric:tabular-nums}
"""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart: its points, (seconds, value), with None where there is no value."""

    name: str
    points: Sequence[tuple[float, float | None]]


def chart(title: str, curves: Sequence[Curve], marks: Sequence[tuple[float, str]], show: Callable[[float], str]) -> str:
    """A chart with its heading, axes and legend.

    :param marks: events, (seconds, text)
    :param show: a value as text
    """
    known = [value for curve in curves for _, value in curve.points if value is not None]
    heading = f"<section><h2>{escape(title)}</h2>"
    if not known:
        return f'{heading}<p class="soft">not known on this host</p></section>'
    low, high = min(0.0, *known), max(0.0, *known)
    high = high if high > low else low + 1
    length = max(1e-9, *(seconds for curve in curves for seconds, _ in curve.points))

    def x(seconds: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT) * seconds / length:.1f}"

    def y(value: float) -> str:
        return f"{_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low):.1f}"

    drawn = []
    # The least value has no label where it would cover that of 0.
    for value in {0.0, (low + high) / 2, high, *([low] if low < -(high - low) / 8 else [])}:
        label = f'<text x="{_LEFT - 6}" y="{float(y(value)) + 4:.1f}" text-anchor="end">{escape(show(value))}</text>'
        drawn.append(f'<path class="rule" d="M{_LEFT} {y(value)}H{_WIDTH}"/>{label}')
    for quarter, anchor in ((0, "start"), (1, "middle"), (2, "middle"), (3, "middle"), (4, "end")):
        at = length * quarter / 4
        label = escape(seconds_text(round(at)))
        drawn.append(f'<text x="{x(at)}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    for seconds, said in marks:
        if 0 <= seconds <= length:
            line = f'd="M{x(seconds)} {_TOP}V{_HEIGHT - _BOTTOM}"'
            drawn.append(f'<path class="mark" {line}><title>{escape(said)}</title></path>')
    for index, curve in enumerate(curves):
        drawn.append(f'<path class="line c{index}" d="{_path(curve, x, y, length * _HOLE)}"/>')
    said = f"{title}: from {show(min(known))} to {show(max(known))}"
    picture = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said)}"><title>{escape(said)}</title>'
        f"{''.join(drawn)}</svg>"
    )
    return f"{heading}{picture}{_legend(curves) if len(curves) > 1 else ''}</section>"


def _path(curve: Curve, x: Callable[[float], str], y: Callable[[float], str], hole: float) -> str:
    path, before = [], -math.inf
    for seconds, value in curve.points:
        if value is None:
            before = -math.inf
            continue
        path.append(f"{'L' if seconds - before <= max(hole, 60.0) else 'M'}{x(seconds)} {y(value)}")
        before = seconds
    return "".join(path)


def _legend(curves: Sequence[Curve]) -> str:
    names = "".join(
        f'<span><svg viewBox="0 0 32 10"><path class="line c{index}" d="M0 5H32"/></svg> {escape(curve.name)}</span>'
        for index, curve in enumerate(curves)
    )
    return f'<p class="legend">{names}</p>'


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """A table with its heading; nothing without rows.

    :param right: so many of the last columns hold numbers
    """
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="right"' if len(cells) - index <= right else "" for index in range(len(cells))]
        shown = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{shown}</tr>"

    body = line(head, "th") + "".join(line(row, "td") for row in rows)
    return f"<section><h2>{escape(title)}</h2><table>{body}</table></section>"


def _page(title: str, facts: Sequence[str], sections: Sequence[str]) -> str:
    said = "".join(f'<p class="soft">{escape(fact)}</p>' for fact in facts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>{said}{''.join(sections)}"
        f'<p class="soft">ksmd-ctl {escape(__version__)}</p></body></html>\n'
    )


def sampled_text(one_in: float) -> str:
    """Which pages a recording has."""
    return "all pages" if one_in == 1 else f"the pages of one of {count_text(one_in)} contents"


def host_lines(host: Mapping[str, object]) -> list[str]:
    """Where and how a recording was made, in sentences."""
    simulated = host.get("kind") == "engine"
    where = f"simulated host, profile {text(host, 'release')}" if simulated else f"kernel {text(host, 'release')}"
    nodes = host.get("nodes")
    count = len(nodes) if isinstance(nodes, list | tuple) else 0
    length = seconds_text(number(host, "seconds") or 0.0)
    end = "" if host.get("complete") else ", without its end"
    kept = sampled_text(number(host, "one_in") or 1)
    found = [f"{where}, {plural(count, 'node')}, {length}{end}, {kept}, by ksmd-ctl {text(host, 'program')}"]
    if host.get("anonymous"):
        found.append("names are replaced by numbers")
    if service := part(host, "service"):
        found.append(f'a service ran: ksmd-ctl {text(service, "version")}, policy "{text(service, "policy")}"')
    return found


def _optional(value: float | None, show: Callable[[float], str]) -> str:
    return "?" if value is None else show(value)


def _rate(value: float) -> str:
    return f"{count_text(round(value))}/s"


def recording_page(report: Mapping[str, object]) -> str:
    """A recording's report (docs/json.md) as HTML."""
    points, events = parts(report, "timeline"), parts(report, "events")
    marks = [(number(one, "seconds") or 0.0, text(one, "text")) for one in events if text(one, "kind") == "knob"]

    def curve(name: str) -> list[Curve]:
        return [Curve(name, [(number(point, "seconds") or 0.0, number(point, name)) for point in points])]

    contents = part(report, "contents")
    page = number(part(report, "recording"), "page_size_bytes") or 0
    facts = [
        *host_lines(part(report, "recording")),
        f"{plural(number(contents, 'looks') or 0, 'look')} at pages, {number(contents, 'cpu_seconds') or 0:.1f} s of "
        f"CPU; the last found {bytes_text(page * (number(contents, 'pages') or 0))} of mergeable memory; merging all "
        f"equal pages would free about {bytes_text(number(contents, 'could_save_bytes') or 0)}",
    ]
    groups = [
        [
            text(one, "group"),
            count_text(number(one, "processes") or 0),
            *(
                _optional(number(one, key), bytes_text)
                for key in ("mergeable_bytes", "merged_bytes", "equal_bytes", "shared_bytes")
            ),
        ]
        for one in parts(report, "groups")[:50]
    ]
    pairs = [
        [*pair_names(one), _optional(number(one, "common_bytes"), bytes_text)] for one in parts(report, "pairs")[:50]
    ]
    rows = [
        [seconds_text(number(one, "seconds") or 0.0), text(one, "kind"), text(one, "text")]
        for one in events
        # What a policy decides every few seconds would hide all else.
        if text(one, "kind") != "policy"
    ]
    return _page(
        "Recording of kernel same-page merging",
        facts,
        [
            chart("Saved", curve("saved_bytes"), marks, bytes_text),
            chart("Scan speed, pages", curve("pages_scanned_per_second"), marks, _rate),
            chart("ksmd, of one CPU", curve("ksmd_cpu_ratio"), marks, ratio_text),
            table("Who has most mergeable memory", GROUP_TITLES, groups, 5),
            table("Who has contents in common", ("one", "other", "in common"), pairs, 1),
            table("What happened", ("at", "kind", "what"), rows),
        ],
    )


GROUP_TITLES: Final = ("group", "processes", "mergeable", "merged", "with an equal", "with one elsewhere")


def pair_names(pair: Mapping[str, object]) -> tuple[str, str]:
    """The groups of a pair."""
    found = pair.get("groups")
    one, other = found if isinstance(found, list | tuple) and len(found) == 2 else ("?", "?")
    return str(one), str(other)


def choices_text(report: Mapping[str, object]) -> str:
    """What was other in a replay than recorded, as a phrase."""
    knobs = part(report, "knobs")
    said = [f"{name} = {knobs[name]}" for name in knobs]
    if policy := text(report, "policy"):
        said.append(
            f'policy "{policy}"' + (", which writes nothing: the knobs as recorded" if policy == "observe" else "")
        )
    return ", ".join(said) or "the knobs as recorded"


def difference_text(report: Mapping[str, object]) -> str:
    """By how much a replay differs from the recording, as a phrase."""
    found = part(report, "pages_sharing_difference")
    median, largest = number(found, "median"), number(found, "largest")
    if median is None or largest is None:
        return "nothing was merged in the recording"
    at = f", at {seconds_text(number(found, 'largest_at_seconds') or 0.0)}"
    return f"{ratio_text(median)} in the median and {ratio_text(largest)} at most{at}, of the greatest recorded"


def sampling_text(report: Mapping[str, object]) -> str:
    """What error is to be expected of a replay's sample, as a sentence; nothing where all pages were recorded."""
    if number(part(report, "recording"), "one_in") == 1:
        return ""
    if (error := number(report, "sampling_error")) is None:
        return "it has no equal pages: it is too small to say what is saved"
    return (
        f"its standard error is {ratio_text(error)}; two samples of three differ by less, one of twenty by twice that"
    )


def replay_page(report: Mapping[str, object]) -> str:
    """A replay's document (docs/json.md) as HTML."""
    points = parts(report, "timeline")

    def curves(name: str) -> list[Curve]:
        return [
            Curve(side, [(number(point, "seconds") or 0.0, number(part(point, side), name)) for point in points])
            for side in ("recorded", "replayed")
        ]

    rows = [
        [
            side,
            _optional(number(part(report, side), "saved_bytes"), bytes_text),
            _optional(number(part(report, side), "ksmd_cpu_seconds"), lambda value: f"{value:.2f} s"),
        ]
        for side in ("recorded", "replayed")
    ]
    return _page(
        "Replay of a recording of kernel same-page merging",
        [
            *host_lines(part(report, "recording")),
            f"replayed with {choices_text(report)}, profile {text(report, 'profile')}",
            f"pages_sharing differs by {difference_text(report)}",
            *([f"the sample: {expected}"] if (expected := sampling_text(report)) else ()),
        ],
        [
            chart("Saved", curves("saved_bytes"), (), bytes_text),
            chart("pages_sharing", curves("pages_sharing"), (), count_text),
            chart("pages_shared", curves("pages_shared"), (), count_text),
            chart("CPU seconds of ksmd", curves("ksmd_cpu_seconds"), (), lambda value: f"{value:.3g} s"),
            table("In the mean", ("", "saved", "ksmd's CPU"), rows, 2),
        ],
    )
