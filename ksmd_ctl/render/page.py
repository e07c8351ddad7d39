# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page: the present figures, charts of an hour, a day or a week, and events."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ksmd_ctl.figures import bytes_text, count_text, ratio_text, seconds_text
from ksmd_ctl.render.charts import Axis, Curve, Mark, chart, document, table
from ksmd_ctl.render.page_history import PageHistory, Span
from ksmd_ctl.render.summary import summary_text
from ksmd_ctl.reports.document import doubted, number, part, parts, text

# After a longer time without a point, the line is interrupted; of before a start there are points a minute apart.
_HOLES_SECONDS: Final = {Span.HOUR: 150.0, Span.DAY: 900.0, Span.WEEK: 5400.0}
_AXES: Final = {
    Span.HOUR: ("60 min ago", "30", "now"),
    Span.DAY: ("24 h ago", "12", "now"),
    Span.WEEK: ("7 days ago", "3.5", "now"),
}


_REFRESH_SECONDS: Final = {Span.HOUR: 10, Span.DAY: 60, Span.WEEK: 60}
_MARKS_SHOWN: Final = 12
_GROUPS_SHOWN: Final = 8

_STYLE: Final = """
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.5rem;margin:1rem 0;padding:0}
.tiles div,details{background:var(--card);border:1px solid var(--rule);border-radius:.4rem;padding:.6rem .75rem}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.2rem;font-variant-numeric:tabular-nums}
details{margin:.5rem 0}pre{white-space:pre-wrap;margin:.5rem 0 0;font-size:.85rem}a{color:var(--c0)}
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
    figures: tuple[tuple[str, Sequence[Curve], Callable[[float], str]], ...] = (
        ("Saved", [history.saved()], bytes_text),
        ("Scan speed", [history.speed()], lambda value: f"{count_text(value)} pages/s"),
        ("KSM pages per node", history.nodes(), count_text),
    )
    axis = Axis(now - span.seconds, now, _AXES[span], _HOLES_SECONDS[span], f" in the last {span}")
    charts = [chart(title, curves, history.times, marks, axis, show) for title, curves, show in figures]
    foreign, own = ([mark for mark in events if mark.foreign is others] for others in (True, False))
    body = (
        f"{_top(report)}{_tiles(report)}{_links(span)}{''.join(charts)}{_sharing(part(report, 'sharing'))}"
        f"{_happened('Changed by others', foreign, now)}{_happened('What happened', own, now)}"
        f"{_happened('Knob changes' if span is Span.HOUR else 'Decisions of the policy', changes, now)}"
        f"<details open><summary>All of it, in words</summary><pre>{html.escape(summary_text(report))}</pre></details>"
    )
    foot = '<a href="/metrics">Metrics</a> for Prometheus. '
    return document("ksmd-ctl", body, style=_STYLE, refresh_seconds=_REFRESH_SECONDS[span], foot=foot).encode()


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
        if number(one, "shared_bytes") != 0
    ]
    pairs = []
    for pair in parts(sharing, "pairs"):
        names = pair.get("groups")
        both = " and ".join(map(str, names)) if isinstance(names, list | tuple) else ""
        pairs.append((both, _shown(number(pair, "shared_bytes"), bytes_text)))
    head = ("group", "merged", "shared with others", "saved in all", "leaving costs")
    return table("Who shares merged memory", head, groups, 4) + table("With whom", ("groups", "both map"), pairs, 1)


def _happened(title: str, marks: Sequence[Mark], now: float) -> str:
    shown = marks[-_MARKS_SHOWN:][::-1]
    rows = [(f"{seconds_text(max(0, round(now - mark.time_seconds)))} ago", mark.text) for mark in shown]
    return table(title, (), rows, bad=[index for index, mark in enumerate(shown) if mark.bad])
