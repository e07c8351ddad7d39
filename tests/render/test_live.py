# SPDX-License-Identifier: GPL-2.0-or-later
"""The live view: what stands where, and that it fits whatever the terminal is."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from ksmd_ctl.render.live import View, screen, sparkline
from ksmd_ctl.render.live_events import Events
from ksmd_ctl.render.live_figures import Sort, Trends
from tests.render.reports import example


def view(report: dict[str, Any], events: Events | None = None, **more: Any) -> View:
    trends, found = Trends(), events or Events()
    if report:
        trends.add(report, 0.0)
        found.add(report, 1000.0)
    return View(report, trends, found, 1000.0, **more)


def drawn(shown: View, width: int = 80, height: int = 24, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None, **options)
    lines = console.render_lines(screen(shown, width, height), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def row(lines: list[str], beginning: str) -> str:
    (found,) = [line for line in lines if line.startswith(beginning)]
    return found


def test_what_stands_on_a_terminal_of_the_usual_size() -> None:
    lines = drawn(view(example()))
    assert len(lines) == 24
    assert lines[0].startswith("ksmd-ctl watch  kernel 6.12.107  policy fixed: quick  up 1 h")
    assert lines[1].split("  ")[0] == "saved 960.9 MiB"
    assert "scanned 20,000 pages/s" in lines[1]
    assert "ksmd 3.4 % of a CPU" in lines[1]
    assert row(lines, "node ").split() == ["node", "free", "of", "KSM", "pages", "mapped", "away", "from", "home"]
    assert row(lines, "1  ").split() == ["1", "2.0", "GiB", "4.0", "GiB", "400", "101,000", "24.9", "%"]
    assert row(lines, "web-1").split()[:3] == ["web-1", "553.1", "MiB"]
    assert lines[-1] == "units by saving, surveyed 12 s ago; keys: s saving, c cost, h sharing, q quit"


@pytest.mark.parametrize("sort", Sort)
def test_the_columns_of_the_order_are_there_in_any_case(sort: Sort) -> None:
    title = {Sort.SAVING: "saved", Sort.COST: "huge pages lost", Sort.SHARING: "shared"}[sort]
    assert title in row(drawn(view(example(), sort=sort), 45, 40), "unit ")


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 70),
    nodes=st.integers(0, 40),
    units=st.integers(0, 20),
    events=st.integers(0, 40),
    sort=st.sampled_from(Sort),
    notice=st.sampled_from(["", "no service runs"]),
)
def test_it_fits_any_terminal(
    width: int, height: int, nodes: int, units: int, events: int, sort: Sort, notice: str
) -> None:
    report = example()
    report["nodes"] = {str(node): {"total_bytes": 1 << 32, "free_bytes": 1 << 30} for node in range(nodes)}
    group = report["numa"]["groups"][0]
    report["numa"]["groups"] = [{**group, "group": f"unit-of-a-long-name-{unit}"} for unit in range(units)]
    happened = Events()
    for event in range(events):
        happened.tell(event, f"event {event}")
    lines = drawn(view(report, happened, sort=sort, notice=notice), width, height)
    assert len(lines) == height
    assert max(map(cell_len, lines)) <= width


def test_rows_that_have_no_room_are_counted() -> None:
    report = example()
    report["numa"]["groups"] = [{**report["numa"]["groups"][0], "group": f"unit-{at}"} for at in range(20)]
    lines = drawn(view(report))
    shown = sum(line.startswith("unit-") for line in lines)
    assert shown > 1
    # With web-1, that only the list of who shares has, and "other" there are 22.
    assert row(lines, "and ").strip() == f"and {22 - shown} more"


def test_a_write_that_is_under_way_is_no_warning() -> None:
    report = example()
    assert any("needs a transaction" in line for line in drawn(view(report)))
    report["knobs"]["merge_across_nodes"]["reason"] = "is being written"
    assert not any("is being written" in line for line in drawn(view(report)))


def test_what_is_unknown_is_no_zero() -> None:
    report = example()
    report["derived"] |= {"saved_bytes": None, "saved_frames_bytes": None, "pages_scanned_per_second": None}
    report["numa"]["nodes"] = {}
    lines = drawn(view(report))
    assert "saved ?" in lines[1]
    assert "scanned ? pages/s" in lines[1]
    assert row(lines, "0  ").split()[-3:] == ["?", "?", "?"]


def test_of_a_unit_that_came_after_the_look_it_is_not_known_with_whom_it_shares() -> None:
    report = example()
    report["sharing"]["age_seconds"] = 95.0
    group = report["numa"]["groups"][0]
    report["numa"]["groups"].append({**group, "group": "came-later"})
    lines = drawn(view(report, sort=Sort.SHARING), 100)
    assert row(lines, "came-later").split()[-1] == "?"
    assert "-" not in row(lines, "came-later").split()
    assert lines[-1].startswith("units by sharing of 1 min 35 s ago; keys: ")


def test_before_the_first_report_and_after_the_last_one() -> None:
    assert len(drawn(view({}))) == 24
    lines = drawn(view(example(), notice="these are the last ones: no service runs", old=True))
    assert "figures    these are the last ones: no service runs" in lines


def places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Every object and list of a document, with each key."""
    for key, item in part.items() if isinstance(part, dict) else enumerate(part):
        yield part, key
        if isinstance(item, dict | list):
            yield from places(item)


@pytest.mark.parametrize("begin", range(4))
def test_a_report_of_another_form_is_shown_as_far_as_it_can_be(begin: int) -> None:
    report = example()
    # Each kind of value at every fourth place: all of them at all places take a minute.
    instead = (None, [{"another": "type"}], "text", -1e300)[begin]
    for part, key in list(places(report))[begin::4]:
        before, part[key] = part[key], instead
        assert len(drawn(view(report))) == 24
        part[key] = before


def test_no_figure_is_cut() -> None:
    report = example()
    happened = Events()
    happened.tell(1000.0, "the last burst merged 1,534,222 pages in 0.125 s, 0.1 s of ksmd's time")
    words = {word for line in drawn(view(report, happened), 300, 60) for word in line.replace("…", "").split()}
    for width in range(20, 120):
        for line in drawn(view(report, happened), width, 60):
            for word in line.split():
                if any(letter.isdigit() for letter in word):
                    assert "…" not in word, (width, line)
                    assert word in words, (width, line)
            # Nor is it without its unit.
            before, cut, _ = line.partition("…")
            assert not cut or not before[-1:].isdigit(), (width, line)


def test_units_are_there_on_a_small_terminal() -> None:
    lines = drawn(view(example()), 40, 10)
    assert len(lines) == 10
    assert row(lines, "web-1").split()[1] == "553.1"
    assert lines[1].strip() == "saved 960.9 MiB"


def test_events_of_another_day_have_the_date() -> None:
    now = datetime(2026, 11, 30, 0, 10).timestamp()
    happened = Events()
    happened.tell(datetime(2026, 11, 29, 23, 59, 58).timestamp(), "yesterday's")
    happened.tell(datetime(2026, 11, 30, 0, 0, 1).timestamp(), "today's")
    lines = drawn(dataclasses.replace(view(example(), happened), now=now))
    assert row(lines, "11-29 23:59:58").split()[2:] == ["yesterday's"]
    assert row(lines, "00:00:01").split()[1:] == ["today's"]


def test_nothing_in_a_name_reaches_the_terminal() -> None:
    report = example()
    report["numa"]["groups"][0]["group"] = "a\x1b[2J\x07\u202eb[bold]c"
    (line,) = [line for line in drawn(view(report)) if line.startswith("a")]
    assert "\x1b" not in line
    assert "\x07" not in line
    assert "\u202e" not in line
    assert "[bold]c" in line


def test_a_simulated_host_says_so() -> None:
    report = example()
    report["host"] |= {"simulated": True}
    assert "SIMULATED (profile 6.12.107)" in drawn(view(report))[0]
    for width in (20, 24, 40, 49, 50, 60):
        assert "SIMULATED" in drawn(view(report), width)[0], width


def test_without_colours_there_are_none() -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, no_color=True)
    console.print(screen(view(example()), 80, 24))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1m" in said
    assert "\x1b[36m" not in said
    assert "\x1b[1;31m" not in said


def test_a_terminal_with_ascii_only_gets_no_other_characters_in_the_lines_of_figures() -> None:
    assert drawn(view(example(), ascii_only=True))[2].isascii()
    assert not drawn(view(example()))[2].isascii()


@given(st.lists(st.none() | st.floats(-1e12, 1e12), max_size=50), st.integers(1, 60))
def test_a_line_of_figures_has_the_lowest_and_the_highest(values: list[float | None], width: int) -> None:
    line = sparkline(values, width, "01234567")
    known = [value for value in values[-width:] if value is not None]
    if not known:
        assert line == ""
        return
    assert len(line) == min(width, len(values))
    assert [one == " " for one in line] == [value is None for value in values[-width:]]
    if max(known) > 0:
        assert line[values[-width:].index(max(known))] == "7"
    if min(known) <= 0 and max(known) > min(known):
        assert line[values[-width:].index(min(known))] == "0"
