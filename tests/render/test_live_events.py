# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of the live view: the history's, each once, at its time, and the policy's don't displace others."""

from __future__ import annotations

import copy
from typing import Any

from ksmd_ctl.history.model import Entry, Kind, Severity
from ksmd_ctl.render.live_events import Events
from ksmd_ctl.reports.history import history_document
from tests.render.reports import example


def entry(time: float, text: str, kind: Kind = Kind.FOREIGN, event: str = "drift", **fields: str) -> Entry:
    severity = Severity.WARNING if kind is Kind.FOREIGN else Severity.INFO
    return Entry(time, kind, event, severity, text, fields=fields)


def hear(events: Events, *entries: Entry, anew: bool = False) -> None:
    events.hear(history_document(entries, 1000), anew=anew)


def texts(events: Events, most: int = 100) -> list[str]:
    return [mark.text for mark, _ in events.latest(most)]


def test_events_of_the_history_at_their_times() -> None:
    events = Events()
    hear(
        events,
        entry(95.0, "started: merging", Kind.SERVICE, "started", version="1"),
        entry(96.0, "run was changed from 1 to 2 by bash (pid 4711)"),
        anew=True,
    )
    hear(events, entry(99.0, "two", Kind.POLICY, "decided", phase="quick", run="1"))
    hear(events, entry(100.0, "5 more decisions within a minute", Kind.POLICY, "decided"))
    assert [(mark.time_seconds, mark.text, mark.bad, decided) for mark, decided in events.latest(9)] == [
        (95.0, "the service started: merging", False, False),
        (96.0, "run was changed from 1 to 2 by bash (pid 4711)", True, False),
        (99.0, "two (run = 1)", False, True),
        (100.0, "5 more decisions within a minute", False, True),
    ]


def test_a_service_that_answers_again_tells_all_anew() -> None:
    events = Events()
    hear(events, entry(1.0, "one"), entry(2.0, "two", Kind.POLICY), anew=True)
    events.tell(3.0, "the service does not answer", bad=True)
    hear(events, entry(1.0, "one"), entry(2.0, "two", Kind.POLICY), entry(4.0, "three"), anew=True)
    assert texts(events) == ["one", "two", "the service does not answer", "three"]


def test_a_policy_that_decides_often_displaces_no_others() -> None:
    events = Events()
    for second in range(50):
        events.tell(second, f"other {second}")
    hear(events, *(entry(100.0 + number, f"decision {number}", Kind.POLICY) for number in range(30)))
    assert texts(events, 10) == [f"other {second}" for second in range(40, 50)]
    assert sum(text.startswith("decision") for text in texts(events, 60)) == 10
    assert len(texts(events, 1)) == 1
    assert texts(events, 0) == []
    few = Events()
    few.tell(1.0, "other")
    hear(few, *(entry(100.0 + number, f"decision {number}", Kind.POLICY) for number in range(30)))
    assert sum(text.startswith("decision") for text in texts(few, 10)) == 9


def test_a_decision_that_is_taken_again_at_each_start_is_there_once() -> None:
    events = Events()
    for start in (1.0, 11.0, 21.0):
        hear(events, entry(start, "started", Kind.SERVICE, "started"), entry(start + 1, "rests", Kind.POLICY))
        hear(events, entry(start + 5, "stopped", Kind.SERVICE, "stopped"))
    hear(events, entry(30.0, "scans", Kind.POLICY), entry(31.0, "rests", Kind.POLICY))
    assert [(mark.time_seconds, mark.text) for mark, decided in events.latest(20) if decided] == [
        (22.0, "rests"),
        (30.0, "scans"),
        (31.0, "rests"),
    ]
    assert len(events.latest(20)) == 9


def test_nonsense_from_a_socket_is_shown_as_nothing_worse() -> None:
    events = Events()
    events.hear({"events": [{"time_seconds": "x", "text": 7, "fields": []}, 7, {}]}, anew=True)
    events.hear({"events": "?"}, anew=False)
    assert [text for text in texts(events) if text] == []


def changed(report: dict[str, Any], **knobs: object) -> dict[str, Any]:
    after = copy.deepcopy(report)
    for name, value in knobs.items():
        after["knobs"][name]["found"] = value
    return after


def test_knobs_that_change_without_a_service() -> None:
    events, report = Events(), {**example(), "daemon": None}
    events.add(report, 100.0)
    events.add(changed(report, run=0, pages_to_scan=None), 101.0)
    assert texts(events) == ["run: 1 to 0"]


def test_of_a_service_only_the_history_says_what_happened() -> None:
    events, report = Events(), example()
    events.add(report, 100.0)
    events.add(changed(report, run=0), 101.0)
    # Nor is another host a change.
    events.add({**report, "daemon": None}, 102.0)
    events.add({**changed(report, run=0), "daemon": None, "host": {"kind": "engine"}}, 103.0)
    assert texts(events) == []
