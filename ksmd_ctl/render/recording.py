# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings and replays as one HTML file: charts and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Final

from ksmd_ctl.figures import bytes_text, count_text, plural, ranges_text, ratio_text, seconds_text
from ksmd_ctl.render.charts import Axis, Curve, Mark, chart, document, table
from ksmd_ctl.reports.document import number, part, parts, text

# So long without a value, in parts of the whole time, and a line is interrupted; but not for less than a minute.
_HOLE: Final = 1 / 40
_HOLE_SECONDS: Final = 60.0
_SUBJECT: Final = "of kernel same-page merging"
#: What stands in the beginning of each page, and in no other file.
TITLE_ENDS: Final = f"{_SUBJECT}</title>"


def _page(title: str, facts: Sequence[str], sections: Sequence[str]) -> str:
    said = "".join(f'<p class="soft">{escape(fact)}</p>' for fact in facts)
    return document(title, f"<h1>{escape(title)}</h1>{said}{''.join(sections)}")


class _Timeline:
    """Charts of a document's timeline."""

    def __init__(self, report: Mapping[str, object], marks: Sequence[Mark] = ()) -> None:
        self._points = parts(report, "timeline")
        self._times = [number(point, "seconds") or 0.0 for point in self._points]
        length = max(1e-9, *self._times, 0.0)
        begin, middle, end = (seconds_text(round(length * part)) for part in (0, 0.5, 1))
        self._axis = Axis(0.0, length, (begin, middle, end), max(length * _HOLE, _HOLE_SECONDS))
        self._marks = marks

    def chart(self, title: str, name: str, show: Callable[[float], str], sides: Sequence[str] = ()) -> str:
        """A chart of a figure, or of it on several sides."""
        curves = [
            Curve(side, [_known(part(point, side), name) for point in self._points], dashed=index > 0)
            for index, side in enumerate(sides)
        ] or [Curve(name, [_known(point, name) for point in self._points])]
        return chart(title, curves, self._times, self._marks, self._axis, show)


def _known(point: Mapping[str, object], name: str) -> float:
    return math.nan if (value := number(point, name)) is None else value


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
    events = parts(report, "events")
    marks = [Mark(number(one, "seconds") or 0.0, text(one, "text")) for one in events if text(one, "kind") == "knob"]
    timeline = _Timeline(report, marks)
    contents = part(report, "contents")
    page = number(part(report, "recording"), "page_size_bytes") or 0
    facts = [
        *host_lines(part(report, "recording")),
        f"{plural(number(contents, 'looks') or 0, 'look')} at pages, {number(contents, 'cpu_seconds') or 0:.1f} s of "
        f"CPU; the last found {bytes_text(page * (number(contents, 'pages') or 0))} of mergeable memory; merging all "
        f"equal pages would free about {bytes_text(number(contents, 'could_save_bytes') or 0)}",
        *([apart_text(report)] if parts(report, "domains") else ()),
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
    domains = [domain_cells(one) for one in parts(report, "domains")[:50]]
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
        f"Recording {_SUBJECT}",
        facts,
        [
            timeline.chart("Saved", "saved_bytes", bytes_text),
            timeline.chart("Scan speed, pages", "pages_scanned_per_second", _rate),
            timeline.chart("ksmd, of one CPU", "ksmd_cpu_ratio", ratio_text),
            table("Who has most mergeable memory", GROUP_TITLES, groups, 5),
            table("Trust domains", DOMAIN_TITLES, domains, 6),
            table("Who has contents in common", ("one", "other", "in common"), pairs, 1),
            table("What happened", ("at", "kind", "what"), rows),
        ],
    )


GROUP_TITLES: Final = ("group", "processes", "mergeable", "merged", "with an equal", "with one elsewhere")


DOMAIN_TITLES: Final = ("domain", "nodes", "processes", "mergeable", "merged", "with one elsewhere", "could save")


def domain_cells(one: Mapping[str, object]) -> list[str]:
    """A trust domain of a report, as `DOMAIN_TITLES` names it."""
    nodes = one.get("nodes")
    figures = ("mergeable_bytes", "merged_bytes", "shared_bytes", "could_save_bytes")
    return [
        text(one, "domain"),
        ranges_text(map(int, nodes)) if isinstance(nodes, list | tuple) and nodes else "-",
        count_text(number(one, "processes") or 0),
        *(_optional(number(one, key), bytes_text) for key in figures),
    ]


def apart_text(report: Mapping[str, object]) -> str:
    """What all trust domains would save if they were kept apart, as a sentence."""
    apart = sum(number(one, "could_save_bytes") or 0 for one in parts(report, "domains"))
    return f"kept apart from one another, all domains together would save about {bytes_text(apart)}"


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
        rest = "the other knobs" if knobs else "the knobs"
        nothing = f", which writes nothing: {rest} as recorded" if policy == "observe" else ""
        said.append(f'policy "{policy}"{nothing}')
    if report.get("apart"):
        said.append("trust domains kept apart")
    return ", ".join(said) or "the knobs as recorded"


def difference_text(report: Mapping[str, object]) -> str:
    """By how much a replay differs from the recording, as a phrase."""
    found = part(report, "pages_sharing_difference")
    median, largest = number(found, "median"), number(found, "largest")
    if median is None or largest is None:
        return "nothing was merged in the recording"
    at = f", at {seconds_text(number(found, 'largest_at_seconds') or 0.0)}"
    return f"{ratio_text(median)} in the median and {ratio_text(largest)} at most{at}, of the greatest recorded"


def unseen_text(report: Mapping[str, object]) -> str:
    """Why a replay has nothing to merge where the recording had, as a sentence; empty for no reason."""
    sharing = {
        side: max((number(part(point, side), "pages_sharing") or 0 for point in parts(report, "timeline")), default=0)
        for side in ("recorded", "replayed")
    }
    if not sharing["recorded"] or sharing["replayed"]:
        return ""
    return (
        "no look saw the pages that were merged, so they are not replayed: they came and went between two looks, or "
        "the recording is too short for one"
    )


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
    timeline, sides = _Timeline(report), ("recorded", "replayed")
    rows = [
        [
            side,
            _optional(number(part(report, side), "saved_bytes"), bytes_text),
            _optional(number(part(report, side), "ksmd_cpu_seconds"), lambda value: f"{value:.2f} s"),
        ]
        for side in sides
    ]
    domains = [
        [
            text(one, "domain"),
            count_text(number(one, "processes") or 0),
            *(_optional(number(one, key), bytes_text) for key in ("merged_bytes", "shared_bytes")),
        ]
        for one in parts(report, "domains")[:50]
    ]
    return _page(
        f"Replay of a recording {_SUBJECT}",
        [
            *host_lines(part(report, "recording")),
            f"replayed with {choices_text(report)}, profile {text(report, 'profile')}",
            f"difference {difference_text(report)} (pages_sharing)",
            *([unseen] if (unseen := unseen_text(report)) else ()),
            *([f"the sample: {expected}"] if (expected := sampling_text(report)) else ()),
        ],
        [
            timeline.chart("Saved", "saved_bytes", bytes_text, sides),
            timeline.chart("pages_sharing", "pages_sharing", count_text, sides),
            timeline.chart("pages_shared", "pages_shared", count_text, sides),
            timeline.chart("CPU seconds of ksmd", "ksmd_cpu_seconds", lambda value: f"{value:.3g} s", sides),
            table("In the mean", ("", "saved", "ksmd's CPU"), rows, 2),
            table(
                "Trust domains at the end", ("domain", "processes", "merged", "merged with other domains"), domains, 3
            ),
        ],
    )
