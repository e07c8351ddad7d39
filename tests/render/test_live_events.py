# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of the live view: each is told once, at its time, and the policy's don't displace others."""

from __future__ import annotations

import copy
from typing import Any

from ksmd_ctl.render.live_events import Events
from tests.render.reports import example


def quiet() -> dict[str, Any]:
    """A report in which nothing has happened."""
    report = example()
    report["foreign_changes"] = []
    report["decision"]["recent"] = []
    return report


def later(report: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The same after some seconds, in which nothing happened."""
    found = copy.deepcopy(report)
    if found["daemon"]:
        found["daemon"]["uptime_seconds"] += seconds
    for past in (*found["decision"]["recent"], *found["foreign_changes"]):
        past["age_seconds"] += seconds
    return found


def decision(text: str, age: float, **knobs: object) -> dict[str, Any]:
    return {"age_seconds": age, "phase": "quick", "text": text, "knobs": knobs}


def change(knob: str, age: float, *, held: bool = True, times: int = 1) -> dict[str, Any]:
    found = {"knob": knob, "from": 1, "to": 0, "held": held, "writers": ["ksmtuned"], "times": times}
    return {**found, "age_seconds": age, "first_age_seconds": age}


def texts(events: Events, most: int = 100) -> list[str]:
    return [mark.text for mark, _ in events.latest(most)]


def test_a_decision_is_told_once_at_its_time() -> None:
    events, report = Events(), quiet()
    report["decision"]["recent"] = [decision("two", 1.0, run=1), decision("one", 5.0)]
    events.add(report, 100.0)
    for seconds in range(1, 4):
        events.add(later(report, seconds), 100.0 + seconds)
    assert [(mark.time_seconds, mark.text) for mark, _ in events.latest(9)] == [(95.0, "one"), (99.0, "two (run = 1)")]
    following = later(report, 4)
    following["decision"]["recent"].insert(0, decision("three", 0.5))
    events.add(following, 104.0)
    assert texts(events) == ["one", "two (run = 1)", "three"]


def test_what_others_change_is_told_once_with_who() -> None:
    events, report = Events(), quiet()
    events.add(report, 100.0)
    # It is known later than what came after it: the program that did it is looked for first.
    report["decision"]["recent"] = [decision("one", 0.0)]
    events.add(later(report, 1), 101.0)
    report["foreign_changes"] = [change("run", 0.5)]
    events.add(later(report, 2), 102.0)
    events.add(later(report, 3), 103.0)
    assert texts(events) == ["run: 1 to 0 by somebody else (running: ksmtuned)", "one"]
    assert [mark.bad for mark, _ in events.latest(9)] == [True, False]
    report["foreign_changes"] = [change("run", 0.0, times=2)]
    events.add(later(report, 4), 104.0)
    assert len(texts(events)) == 3


def test_old_events_are_no_news() -> None:
    events, report = Events(), quiet()
    report["foreign_changes"] = [change("run", 7200.0)]
    report["decision"]["recent"] = [decision("one", 7200.0)]
    events.add(report, 10_000.0)
    assert texts(events) == []


def test_a_policy_that_decides_often_leaves_room_for_others() -> None:
    events = Events()
    for second in range(50):
        events.tell(second, f"other {second}")
    report = quiet()
    report["decision"]["recent"] = [decision(f"decision {age}", age) for age in range(30)]
    events.add(report, 100.0)
    assert sum(text.startswith("other") for text in texts(events, 10)) == 5
    assert sum(text.startswith("decision") for text in texts(events, 10)) == 5
    assert len(texts(events, 1)) == 1
    assert texts(events, 0) == []
    few = Events()
    few.tell(1.0, "other")
    few.add(report, 100.0)
    assert sum(text.startswith("decision") for text in texts(few, 10)) == 9


def test_a_new_service_is_told_and_its_decisions_are_its_own() -> None:
    events, report = Events(), quiet()
    report["decision"]["recent"] = [decision("one", 0.0)]
    events.add(report, 100.0)
    report["daemon"] |= {"pid": 1, "uptime_seconds": 2.0}
    report["decision"]["recent"] = [decision("two", 1.0)]
    events.add(report, 110.0)
    found = sorted((mark.time_seconds, mark.text) for mark, _ in events.latest(9))
    assert found == [(100.0, "one"), (108.0, "the service was started"), (109.0, "two")]


def test_the_same_service_after_own_reports_tells_nothing_twice() -> None:
    events, report = Events(), quiet()
    report["decision"]["recent"] = [decision("one", 0.0)]
    events.add(report, 100.0)
    events.add({**quiet(), "daemon": None}, 101.0)
    events.add(later(report, 2.0), 102.0)
    assert texts(events) == ["one"]


def test_knobs_that_change_without_a_service() -> None:
    events, report = Events(), {**quiet(), "daemon": None}
    events.add(report, 100.0)
    after = copy.deepcopy(report)
    after["knobs"]["run"]["found"] = 0
    after["knobs"]["pages_to_scan"]["found"] = None
    events.add(after, 101.0)
    assert texts(events) == ["run: 1 to 0"]


def test_what_else_happens() -> None:
    events, report = Events(), quiet()
    events.add(report, 100.0)
    after = later(report, 1)
    after["policy"] = "adaptive"
    after["daemon"]["reload_error"] = "x.toml: policy: no such policy"
    after["numa"]["error"] = "no permission"
    after["healing"]["text"] = "un-merging 2 pages brought 1 of 1 pages"
    after["transaction"]["last"] |= {"id": "another", "result": "abandoned", "reason": "interrupted"}
    after["transaction"]["running"] = {"id": "third", "who": "ksmd-ctl set run=2", "phase": "planned"}
    events.add(after, 101.0)
    events.add(later(after, 1), 102.0)
    who = "ksmd-ctl set merge_across_nodes=0, pid 4711, uid 0"
    assert [(mark.text, mark.bad) for mark, _ in events.latest(99)] == [
        (f"{who}: abandoned: interrupted", True),
        ("ksmd-ctl set run=2: planned", False),
        ("the new configuration is invalid: x.toml: policy: no such policy", True),
        ("the survey failed: no permission", True),
        ("un-merging 2 pages brought 1 of 1 pages", False),
        ("policy: fixed to adaptive", False),
    ]


def test_a_verdict_that_changes() -> None:
    events, report = Events(), quiet()
    report["domains"] = {"domains": [{"domain": "blue", "verdict": "isolated"}]}
    events.add(report, 100.0)
    after = later(report, 1)
    after["domains"] = {"domains": [{"domain": "blue", "verdict": "not isolated"}]}
    events.add(after, 101.0)
    assert [(mark.text, mark.bad) for mark, _ in events.latest(9)] == [("domain blue: not isolated", True)]
