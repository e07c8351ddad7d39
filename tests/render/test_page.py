# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page: what it gathers stays small, what it shows is there, and it loads nothing."""

from __future__ import annotations

import copy
import json
import math
import re
import urllib.request
from pathlib import Path
from typing import Any

from ksmd_ctl.history.model import Entry, Kind, Means, Severity
from ksmd_ctl.render.charts import COLOURS
from ksmd_ctl.render.page import page
from ksmd_ctl.render.page_history import SPAN_SECONDS, STEP_SECONDS, PageHistory, Point, Span
from ksmd_ctl.render.summary import summary_text
from tests.render.elements import Elements
from tests.service.running import healthy_service, until

REPORT: dict[str, Any] = json.loads((Path(__file__).parents[1] / "contracts/report.json").read_text())


def report(saved: float | None = 0) -> Any:
    found = copy.deepcopy(REPORT)
    found["derived"] |= {"saved_bytes": saved, "pages_scanned_per_second": 20000}
    return found


def an_hour() -> PageHistory:
    history = PageHistory()
    for step in range(361):
        nodes = {"0": 1000 + step, "1": 2000 if step < 300 else None}
        history.add(step * STEP_SECONDS, Point((1 << 30) + step, 20000 + step, nodes))
    history.mark(1800, "merge_across_nodes = 0: done")
    history.mark(2400, "pages_to_scan was changed by <somebody>", bad=True)
    return history


# -- the history -------------------------------------------------------------------------------------------


def test_an_hour_is_kept_and_no_more() -> None:
    history = PageHistory()
    for step in range(2000):
        history.add(step * STEP_SECONDS, Point(step, step, {str(node): step for node in range(step % 100)}))
        history.mark(step, "x" * 1000)
    times = history.times
    assert times[-1] - times[0] == SPAN_SECONDS
    lines = [history.saved(), history.speed(), *history.nodes()]
    assert len(lines) <= 2 + 64
    assert {len(line.values) for line in lines} == {len(times)}
    marks = history.events(-1)
    assert len(marks) < 100
    assert all(len(mark.text) <= 200 for mark in marks)


def test_a_point_is_due_every_ten_seconds() -> None:
    history = PageHistory()
    assert history.due(5)
    history.add(5, Point())
    assert [history.due(at) for at in (6, 14.9, 15)] == [False, False, True]


def test_what_is_not_known_is_no_zero() -> None:
    history = PageHistory()
    history.add(0, Point())
    history.add(10, Point(7, 8, {"1": 5}))
    assert math.isnan(history.saved().values[0])
    assert history.saved().known() == [7]
    (node,) = history.nodes()
    assert (node.name, node.known(), len(node.values)) == ("node 1", [5], 2)


def test_nodes_are_in_the_order_of_their_numbers() -> None:
    history = PageHistory()
    history.add(0, Point(nodes={"10": 1, "2": 1, "0": 1}))
    assert [line.name for line in history.nodes()] == ["node 0", "node 2", "node 10"]


def test_a_knob_that_changes_is_a_mark() -> None:
    history = PageHistory()
    for at, run in enumerate((1, 1, 0, None, 0)):
        history.add(at * STEP_SECONDS, Point(knobs={"run": run, "sleep_millisecs": 20}))
    assert [(mark.time_seconds, mark.text) for mark in history.changes(0)] == [(20, "run: 1 → 0")]
    assert history.changes(21) == []


def test_a_policy_that_writes_often_pushes_nothing_out_that_happened() -> None:
    history = PageHistory()
    history.mark(5, "run was changed from 1 to 2 by somebody else", bad=True)
    for step in range(300):
        history.add(step * STEP_SECONDS, Point(knobs={"pages_to_scan": step}))
    assert [mark.text for mark in history.events(0)] == ["run was changed from 1 to 2 by somebody else"]
    assert len(history.changes(0)) < 100
    found = Elements(page(report(1), history, 3000.0))
    assert "by somebody else" in found.text
    assert "pages_to_scan: 298 → 299" in found.text


def test_what_was_kept_is_shown_with_its_marks_and_decisions_apart() -> None:
    history = PageHistory(Span.DAY)
    minute = 60 * 28_000_000
    means = [Means(minute + step * 300, step, None, None, step, None, {"0": step}) for step in range(400)]
    calendar, now = minute + 400 * 300.0, 50.0
    entries = [
        Entry(calendar - 90000, Kind.SERVICE, "started", Severity.INFO, "of the day before"),
        Entry(calendar - 3600, Kind.FOREIGN, "drift", Severity.WARNING, "run was changed from 1 to 2"),
        Entry(calendar - 60, Kind.SERVICE, "stopped", Severity.INFO, "stopped"),
        Entry(calendar - 30, Kind.POLICY, "decided", Severity.INFO, "quick: 5 pages"),
    ]
    history.take(means, entries, calendar, now)
    assert len(history.times) == 289
    assert history.times[-1] == now - 300
    assert [mark.text for mark in history.events(now - 86400)] == ["run was changed from 1 to 2", "stopped"]
    found = Elements(page(report(), history, now))
    assert found.open == []
    # From the lists on: the charts have the texts of the marks, too.
    texts = ("Changed by others", "run was changed", "What happened", "stopped", "Decisions of the policy", "quick: 5")
    begin = found.text.index(texts[0])
    places = [found.text.index(text, begin) for text in texts]
    assert places == sorted(places)
    # The marks in the charts are without the policy's.
    assert len(found.classed("mark")) == 2 * 3
    assert "24 h ago" in found.text
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert links == ["/?span=hour", "/?span=week", "/metrics"]
    assert all(str(line["d"]).count("M") == 1 for line in found.classed("line"))


# -- the page ----------------------------------------------------------------------------------------------


def test_it_is_whole_and_shows_state_lines_and_marks() -> None:
    found = Elements(page(report(1 << 30), an_hour(), 3600.0))
    assert found.open == []
    for text in (
        "merging",
        "1.0 GiB",
        "251,000",
        summary_text(report(1 << 30)),
        "KSM pages per node",
        "node 1: unknown",
    ):
        assert text in found.text, text
    lines = found.classed("line")
    assert [attributes["class"] for attributes in lines] == ["line c0", "line c0", "line c0", "line c1"]
    assert all(str(attributes["d"]).count("M") == 1 for attributes in lines)
    # Two marks in each of three charts, at the middle and at two thirds.
    assert [attributes["d"] for attributes in found.classed("mark")] == ["M360.0 0V120", "M480.0 0V120"] * 3
    assert len([attributes for attributes in found.classed("mark") if "bad" in str(attributes["class"])]) == 3
    assert "30 min ago" in found.text
    assert "pages_to_scan was changed by <somebody>" in found.text


def test_a_saving_that_may_be_out_of_date_is_said_to_be() -> None:
    found = report(1 << 30)
    assert "out of date" not in page(found, PageHistory(), 0.0).decode()
    found["derived"] |= {"stale": None, "stale_text": "ksmd is stopped"}
    body = page(found, PageHistory(), 0.0).decode()
    assert "960.9 MiB (may be out of date)" in body
    assert "<dt>Saved by the kernel&#x27;s count</dt><dd>1.0 GiB (may be out of date)</dd>" in body


def test_what_splits_freed_is_in_the_saving_and_beside_it() -> None:
    found = report(1 << 30)
    found["numa"] |= {"split_zero_pages": 25_000}
    found["derived"] |= {"split_zero_bytes": 25_000 * 4096, "saved_frames_bytes": (1 << 30) + 25_000 * 4096}
    body = page(found, PageHistory(), 0.0).decode()
    assert "<dt>Saved, in frames</dt><dd>1.1 GiB</dd>" in body
    assert "<dt>Zero pages freed by splits</dt><dd>25,000</dd>" in body
    # Where a survey has not counted them, the kernel's count is what there is.
    found["numa"] |= {"split_zero_pages": None}
    found["derived"] |= {"split_zero_bytes": None, "saved_frames_bytes": None}
    body = page(found, PageHistory(), 0.0).decode()
    assert "<dt>Saved</dt><dd>1.0 GiB</dd>" in body
    assert "<dt>Zero pages freed by splits</dt><dd>unknown</dd>" in body


def test_it_loads_nothing() -> None:
    body = page(report(), an_hour(), 3600.0)
    links = {value for _, attributes in Elements(body).tags for name, value in attributes.items() if name == "href"}
    assert links == {"/metrics", "/?span=day", "/?span=week"}
    assert not re.search(r"url\(|@import|<script|<link|<img|<iframe|\bsrc=|//", body.decode().replace("<!DOCTYPE", ""))


def test_whatever_a_report_says_is_only_text() -> None:
    evil = '"><script>alert(1)</script>&amp;'
    found = report()
    found["host"]["release"] = found["policy"] = found["daemon"]["reload_error"] = evil
    history = PageHistory()
    history.add(0, Point(nodes={evil: 1, "1": 2}))
    history.mark(1, evil)
    elements = Elements(page(found, history, 10.0))
    assert "script" not in {tag for tag, _ in elements.tags}
    assert elements.text.count(evil) >= 5


def test_a_hole_in_time_is_a_hole_in_the_line() -> None:
    history = PageHistory()
    for at in (0, 10, 20, 500, 510):
        history.add(at, Point(100))
    (line,) = Elements(page(report(), history, 3600.0)).classed("line")
    assert str(line["d"]).count("M") == 2


def test_what_was_never_known_says_so() -> None:
    history = PageHistory()
    history.add(0, Point())
    elements = Elements(page(report(None), history, 10.0))
    assert elements.text.count("not known on this host") == 3
    assert elements.classed("line") == []


def test_less_than_nothing_has_room_below_the_line() -> None:
    history = PageHistory()
    for at, saved in enumerate((-100, 300)):
        history.add(at * STEP_SECONDS, Point(saved))
    elements = Elements(page(report(-100), history, 10.0))
    assert [attributes["d"] for attributes in elements.classed("zero")] == ["M0 90.0H720"]
    assert "-100 bytes" in elements.text


def test_more_nodes_than_colours_are_told_apart() -> None:
    history = PageHistory()
    for at in (0, 10):
        history.add(at, Point(nodes={str(node): node for node in range(COLOURS + 2)}))
    assert len(Elements(page(report(), history, 10.0)).classed("dashed")) == 2 * 2


def test_a_simulated_host_says_so() -> None:
    found = report()
    found["host"]["simulated"] = True
    assert b"SIMULATED" in page(found, PageHistory(), 0.0)
    assert b"SIMULATED" not in page(report(), PageHistory(), 0.0)


def test_a_running_service_serves_it(tmp_path: Path) -> None:
    with healthy_service(tmp_path, 'policy = "fixed"\nknobs.run = 1', "engine") as service:

        def look() -> Elements | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/") as response:
                found = Elements(response.read())
            # What is logged after the first tick, the start itself, is a mark.
            return found if "started: " in found.text else None

        found = until("the page", look)
    assert "SIMULATED" in found.text
    assert len(found.classed("line")) >= 1
    assert found.classed("mark")


def test_it_shows_who_shares_most_and_with_whom() -> None:
    shown = report()
    shown["sharing"]["groups"][0]["group"] = "<web-1>"
    found = Elements(page(shown, PageHistory(), 0.0))
    assert found.open == []
    for text in ("Who shares merged memory", "<web-1>", "393.0 MiB", "With whom", "web-1 and other", "2.0 MiB"):
        assert text in found.text
    shown["sharing"] = None
    assert "Who shares" not in Elements(page(shown, PageHistory(), 0.0)).text
