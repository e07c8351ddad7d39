# SPDX-License-Identifier: GPL-2.0-or-later
"""The live view of ``ksmd-ctl watch``: a report and what came before it, as rich's renderables.

Every line is one row: what is too long for it ends in an ellipsis, so that nothing moves while figures change. No
figure is cut: a part of it would be another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ksmd_ctl.figures import bytes_text, count_text, ratio_text, seconds_text
from ksmd_ctl.knobs.reconcile import WRITING
from ksmd_ctl.render.live_events import Events
from ksmd_ctl.render.live_figures import Sort, Trends, Unit, saved, units
from ksmd_ctl.render.summary import BAD, GOOD, Line, summary
from ksmd_ctl.reports.document import doubted, number, part, text
from ksmd_ctl.reports.numa import OTHER


@dataclass(frozen=True, slots=True)
class View:
    """What is shown.

    :ivar report: the latest one (docs/json.md), empty before the first
    :ivar now: the time that the ages in it go back from, in seconds since the epoch
    :ivar notice: where figures are from, or why there are none; empty for from the service
    :ivar old: there are no new ones
    :ivar keys: keys can be pressed
    :ivar ascii_only: the terminal has no other characters
    """

    report: Mapping[str, object]
    trends: Trends
    events: Events
    now: float
    sort: Sort = Sort.SAVING
    notice: str = ""
    old: bool = False
    keys: bool = True
    ascii_only: bool = False


_UNKNOWN: Final = "?"
_STYLES: Final = {BAD: "bold red", GOOD: "green"}
_SOFT: Final = "dim"
_HEAD: Final = "bold"
_LEVELS: Final = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS: Final = "_.-=+*#@"
# Lines of `status` that are shown where they are not bad.
_LINES: Final = ("why", "ksm", "saved", "merged", "scanning")
# Bad ones are, too, but what others say here, and so many at most.
_SAID: Final = ("host", "changed", *_LINES)
_MOST_BAD: Final = 3
_LABEL: Final = 11
# The least columns of a figure at the top: "scanned 1,000,000 pages/s".
_TILE: Final = 24
# A table of fewer rows says nothing.
_LEAST_ROWS: Final = 3
_LEAST_NAME: Final = 12
_GAP: Final = 2
# A title that is narrower has no room for more than one thing.
_WIDE: Final = 60


def screen(view: View, width: int, height: int) -> RenderableType:
    """All of it, in as many columns and rows as there are."""
    lines = list(summary(view.report)) if view.report else []
    nodes, units = _nodes(view.report), _units(view, width)
    least = min(len(units), _LEAST_ROWS)
    top = [_title(view, width), *_tiles(view, width)][: max(1, height - 1)]
    # What comes and goes is below, so that the tables stay where they are.
    bottom = [*_warnings(view, lines, width), _footer(view, width)]
    bottom = bottom[-max(1, min(len(bottom), height - len(top) - least)) :][: height - len(top)]
    top += _summary(lines, width)[: max(0, height - len(top) - len(bottom) - least)]
    room = height - len(top) - len(bottom)
    share = _shares(room, len(nodes), len(units), 1 + max(1, len(view.events)))
    tables = [_table(rows[: share[at]], len(rows), width) for at, rows in enumerate((nodes, units)) if share[at]]
    events = [_events(view, share[2], width)] if share[2] else []
    return Group(*top, *tables, *events, *[Text()] * (room - sum(share)), *bottom)


def _shares(room: int, nodes: int, units: int, events: int) -> tuple[int, int, int]:
    """How many of the rows that are wanted each table gets, its titles among them; 0 where too few would be left.

    Nodes and events may have a third each; where that leaves too little for units, nodes have none.
    """
    kept = max(0, min(events, max(_LEAST_ROWS, room // 3), room - min(units, _LEAST_ROWS)))
    some = min(nodes, room // 3)
    if some < min(nodes, _LEAST_ROWS) or room - some - kept < min(units, _LEAST_ROWS):
        some = 0
    most = min(units, room - some - kept)
    if most < min(units, _LEAST_ROWS):
        most = 0
    rest = min(events, room - some - most)
    return some, most, rest if rest > 1 else 0


def _table(rows: Sequence[Sequence[Text]], count: int, width: int) -> Table:
    """A table of names and numbers.

    The last columns are left out if there is no room for them.

    :param rows: titles first; the last row gives way to how many are left out, if any are
    :param count: how many rows there were
    """
    if len(rows) < count:
        rows = [*rows[:-1], [_plain(f"and {count - len(rows) + 1} more", _SOFT), *[Text()] * (len(rows[0]) - 1)]]
    widths = [max(row[at].cell_len for row in rows) for at in range(len(rows[0]))]
    while len(widths) > 1 and min(widths[0], _LEAST_NAME) + sum(widths[1:]) + _GAP * (len(widths) - 1) > width:
        widths.pop()
    names = max(1, min(widths[0], width - sum(widths[1:]) - _GAP * (len(widths) - 1)))
    table = Table.grid(padding=(0, _GAP, 0, 0))
    for at in range(len(widths)):
        table.add_column(
            no_wrap=True, overflow="ellipsis", justify="right" if at else "left", width=widths[at] if at else names
        )
    for row in rows:
        table.add_row(*row[: len(widths)])
    return table


def _plain(said: str, style: str = "") -> Text:
    """A text in one row. It may come from elsewhere: nothing in it moves the cursor or changes colours."""
    shown = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in said)
    return Text(shown, style, no_wrap=True, overflow="ellipsis")


def _fitted(said: str, room: int) -> str:
    """A text in so many columns; one that is too long ends in an ellipsis, after a word that is no figure."""
    if cell_len(said) <= room:
        return said
    words = said[: len(set_cell_size(said, max(0, room - 1)).rstrip()) + 1].split(" ")[:-1]
    while words and any(letter.isdigit() for letter in words[-1]):
        words.pop()
    # Without a blank it is a name.
    return f"{' '.join(words)}…" if words else said


# -- the top ---------------------------------------------------------------------------------------------------


def _title(view: View, width: int) -> Text:
    report = view.report
    host, daemon = part(report, "host"), part(report, "daemon")
    release = text(host, "release", "unknown")
    said = [_plain("ksmd-ctl watch", _HEAD)]
    if host.get("simulated") and width < _WIDE:
        # It must not be what a narrow terminal has no room for.
        said = [_plain("SIMULATED", _STYLES[BAD])]
    elif host.get("simulated"):
        said.append(_plain(f"  SIMULATED (profile {release})", _STYLES[BAD]))
    elif host:
        said.append(_plain(f"  kernel {release}"))
    if daemon:
        phase = text(part(report, "decision"), "phase")
        policy = text(report, "policy", "unknown")
        said.append(_plain(f"  policy {policy}" + (f": {phase}" if phase and phase != policy else "")))
        said.append(_plain(f"  up {seconds_text(number(daemon, 'uptime_seconds') or 0)}", _SOFT))
    clock = _clock(view.now)
    while len(said) > 1 and sum(one.cell_len for one in said) + 1 + len(clock) > width:
        said.pop()
    title = Text.assemble(*said, no_wrap=True, overflow="ellipsis")
    title.truncate(max(0, width - len(clock) - 1), overflow="ellipsis", pad=True)
    return title.append_text(Text(f" {clock}", _SOFT))


def _clock(seconds: float, now: float | None = None) -> str:
    """The time of day, after month and day if it is not the day of `now`."""
    try:
        when = datetime.fromtimestamp(seconds)
        other_day = now is not None and when.date() != datetime.fromtimestamp(now).date()
        return when.strftime("%m-%d %H:%M:%S" if other_day else "%H:%M:%S")
    except (OverflowError, OSError, ValueError):
        # A report came over a socket.
        return _UNKNOWN


def _tiles(view: View, width: int) -> list[Text]:
    """Three figures beside each other, or as many as have room, and below each how it went."""
    derived = part(view.report, "derived")
    saving = _shown(saved(view.report), bytes_text)
    tiles = (
        ("saved", doubted(saving, text(derived, "stale_text")), view.trends.saved),
        ("scanned", f"{_shown(number(derived, 'pages_scanned_per_second'), count_text)} pages/s", view.trends.speed),
        ("ksmd", f"{_shown(number(derived, 'ksmd_cpu_ratio'), ratio_text)} of a CPU", view.trends.cpu),
    )
    count = max(1, min(len(tiles), (width + _GAP) // (_TILE + _GAP)))
    each = max(1, (width + _GAP) // count - _GAP)
    figures, lines = Text(no_wrap=True), Text(no_wrap=True)
    for name, value, points in tiles[:count]:
        shown = _fitted(value, each - len(name) - 1)
        figure = Text.assemble((f"{name} ", _SOFT), (shown, _HEAD))
        figure.truncate(each, overflow="ellipsis", pad=True)
        figures.append_text(figure).append(" " * _GAP)
        levels = _ASCII_LEVELS if view.ascii_only else _LEVELS
        lines.append(sparkline(points, each, levels).rjust(each), "cyan").append(" " * _GAP)
    return [figures, lines]


def sparkline(values: Iterable[float | None], width: int, levels: str = _LEVELS) -> str:
    """The last values as a line of characters from the lowest to the highest; a blank where one isn't known.

    The lowest is 0, or what is below it.
    """
    latest = list(values)[-width:]
    known = [value for value in latest if value is not None]
    if not known:
        return ""
    low = min(0.0, *known)
    span = max(0.0, *known) - low or 1.0
    top = len(levels) - 1
    return "".join(" " if value is None else levels[round((value - low) / span * top)] for value in latest)


def _shown(value: int | float | None, show: Callable[[float], str]) -> str:
    return _UNKNOWN if value is None else show(value)


def _summary(lines: Sequence[Line], width: int) -> list[Text]:
    """The lines of `status` that say what is merged and done."""
    # Where the policy has a reason, that says whether ksmd works.
    left_out = "ksm" if any(line.label == "why" for line in lines) else ""
    return [_line(line, width) for line in lines if line.label in _LINES and line.label != left_out]


def _warnings(view: View, lines: Sequence[Line], width: int) -> list[Text]:
    """The lines of `status` that need attention, and where figures are from if not from the service."""
    # A write that is under way needs nobody's attention, and is over before it is read.
    bad = [line for line in lines if line.tone == BAD and line.label not in _SAID and not line.text.endswith(WRITING)]
    notice = [Line("figures", view.notice, BAD if view.old else "")] if view.notice else []
    return [_line(line, width) for line in [*bad[:_MOST_BAD], *notice]]


def _line(line: Line, width: int) -> Text:
    return Text.assemble(
        (f"{line.label:{_LABEL - 1}} ", _SOFT),
        _plain(_fitted(line.text, width - _LABEL), _STYLES.get(line.tone, "")),
        no_wrap=True,
        overflow="ellipsis",
    )


# -- tables ----------------------------------------------------------------------------------------------------


def _heads(*titles: str) -> list[Text]:
    return [Text(title, _HEAD) for title in titles]


def _nodes(report: Mapping[str, object]) -> list[list[Text]]:
    """Memory of each node, and KSM pages on it; empty where there are none."""
    nodes, numa = part(report, "nodes"), part(report, "numa", "nodes")
    rows = [_heads("node", "free", "of", "KSM pages", "mapped", "away from home")] if nodes else []
    for node in nodes:
        memory, pages = part(nodes, node), part(numa, node)
        mapped, remote = number(pages, "mapped_pages"), number(pages, "remote_pages")
        away = None if mapped is None or remote is None else remote / mapped if mapped else 0.0
        rows.append(
            [
                _plain(node),
                *(Text(_shown(number(memory, name), bytes_text)) for name in ("free_bytes", "total_bytes")),
                Text(_shown(number(pages, "ksm_pages"), count_text)),
                Text(_shown(mapped, count_text)),
                Text(_shown(away, ratio_text)),
            ]
        )
    return rows


#: Titles and values of columns, and by what a column sorts. Those that are first are kept where there is no room.
_COLUMNS: Final[Sequence[tuple[str, Callable[[Unit], str], Sort]]] = (
    ("saved", lambda one: _shown(one.saved_bytes, bytes_text), Sort.SAVING),
    ("shared", lambda one: _shown(one.shared_bytes, bytes_text), Sort.SHARING),
    ("huge pages lost", lambda one: _shown(one.prevented, count_text), Sort.COST),
    ("away", lambda one: _shown(one.away_bytes, bytes_text), Sort.COST),
    ("merged", lambda one: _shown(one.merged_bytes, bytes_text), Sort.SAVING),
    ("most with", lambda one: one.with_whom or (_UNKNOWN if one.shared_bytes is None else "-"), Sort.SHARING),
)
_WITH_WHOM: Final = 24


def _units(view: View, width: int) -> list[list[Text]]:
    found = units(view.report, view.sort)
    if not found:
        return []
    columns = sorted(_COLUMNS, key=lambda column: column[2] is not view.sort)
    kept: list[tuple[str, list[str], bool]] = []
    room = width - _LEAST_NAME
    for title, value, sort in columns:
        cells = [value(one)[:_WITH_WHOM] for one in found]
        needs = _GAP + max(map(cell_len, (title, *cells)))
        if needs <= room:
            room -= needs
            kept.append((title, cells, sort is view.sort))
    order = [title for title, _, _ in _COLUMNS]
    kept.sort(key=lambda column: order.index(column[0]))
    rows = [[Text("unit", _HEAD), *(Text(title, "bold reverse" if by else _HEAD) for title, _, by in kept)]]
    for at, one in enumerate(found):
        style = _SOFT if one.name == OTHER else ""
        rows.append([_plain(one.name, style), *(_plain(cells[at], style) for _, cells, _ in kept)])
    return rows


def _events(view: View, rows: int, width: int) -> Table:
    """What happened, the latest last."""
    table = Table.grid(padding=(0, _GAP, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_row(*_heads("events", ""))
    marks = view.events.latest(rows - 1)
    times = [_clock(mark.time_seconds, view.now) for mark, _ in marks]
    room = width - max(map(len, times), default=0) - _GAP
    for (mark, decided), when in zip(marks, times, strict=True):
        style = _SOFT if decided else _STYLES[BAD] if mark.bad else ""
        table.add_row(Text(when, _SOFT), _plain(_fitted(mark.text, room), style))
    if not view.events:
        table.add_row(Text("none yet", _SOFT), Text())
    return table


def _footer(view: View, width: int) -> Text:
    looked, verb = ("sharing", " of") if view.sort is Sort.SHARING else ("numa", ", surveyed")
    age = number(part(view.report, looked), "age_seconds")
    said = f"units by {view.sort}" + ("" if age is None else f"{verb} {seconds_text(max(1, round(age)))} ago")
    if view.keys:
        said += "; keys: s saving, c cost, h sharing, q quit"
    return _plain(_fitted(said, width), _SOFT)
