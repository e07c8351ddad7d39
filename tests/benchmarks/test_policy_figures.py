# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of the policy benchmark from its samples, and what is drawn and said of them."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policy import picture, report
from benchmarks.policy.figures import (
    Arrival,
    Run,
    Sample,
    Step,
    area,
    end_share,
    mean_time,
    oracle_at,
    quickest,
    time_to_share,
    verdict,
)
from benchmarks.policy.oracle import HugePages

STEPS = [Step(1.0, 1000, 100), Step(11.0, 2000, 200)]
HUGE = HugePages(100, 60, 10, 9)
ARRIVALS = [Arrival(0, 1.0, 11.0), Arrival(1, 11.0, 21.0)]


def sample(at: float, saved: int, ksmd: float = 0.0, service: float = 0.0) -> Sample:
    return Sample(at, saved, saved, 0, ksmd, service, 0, 1, 100, 20, 1)


def run(policy: str, delay: float, cpu: float = 1.0) -> Run:
    """Everything is saved that much after it could be."""
    found = []
    for tick in range(43):
        at = tick / 2
        found.append(sample(at, oracle_at(STEPS, at - delay), ksmd=cpu * at / 21, service=0.1 * cpu * at / 21))
    return Run(policy, found, STEPS, ARRIVALS, HUGE)


def test_the_oracle_is_a_staircase() -> None:
    assert [oracle_at(STEPS, at) for at in (0.0, 0.99, 1.0, 10.9, 11.0, 99.0)] == [0, 0, 100, 100, 200, 200]


def test_area_is_what_was_not_saved_in_time() -> None:
    assert area(run("late", 2.0).samples, STEPS) == (2.0 * 100 + 2.0 * 100, 10 * 100 + 10 * 200)
    assert area(run("soon", 0.0).samples, STEPS)[0] == 0


def test_more_than_could_be_saved_makes_good_for_nothing() -> None:
    samples = [sample(1.0, 0), sample(2.0, 300), sample(3.0, 100)]
    assert area(samples, STEPS) == (100, 200)


@given(st.lists(st.integers(0, 300), min_size=2))
def test_area_lost_is_within_what_could_be(saved: list[int]) -> None:
    lost, could = area([sample(at, value) for at, value in enumerate(saved)], STEPS)
    assert 0 <= lost <= could


@pytest.mark.parametrize(("delay", "times"), [(0.0, [0.0, 0.0]), (3.0, [3.0, 3.0]), (9.5, [9.5, 9.5])])
def test_time_to_95(delay: float, times: list[float]) -> None:
    assert run("", delay).times() == times


def test_who_gets_there_in_the_next_moment_never_did() -> None:
    assert run("", 10.0).times() == [None, None]
    assert mean_time(run("", 10.0)) == 10.0


def test_95_percent_is_enough() -> None:
    samples = [sample(1.0, 94), sample(2.0, 95)]
    assert time_to_share(samples, STEPS, ARRIVALS[0]) == 1.0


def test_an_arrival_has_to_wait_for_those_of_its_moment_that_come_after_it() -> None:
    steps = [Step(1.0, 1000, 100), Step(2.0, 2000, 200)]
    samples = [sample(1.0, 0), sample(2.0, 100), sample(3.0, 150), sample(4.0, 200)]
    assert time_to_share(samples, steps, Arrival(0, 1.0, 20.0)) == 3.0
    assert time_to_share(samples, steps, Arrival(1, 2.0, 20.0)) == 2.0


def test_the_end() -> None:
    assert end_share(run("", 0.0).samples, STEPS) == 1.0
    assert end_share([sample(20.0, 0), sample(28.0, 150), sample(30.0, 170)], STEPS) == pytest.approx(0.8)


def test_the_quickest_is_the_soonest_and_of_equals_the_cheapest() -> None:
    runs = [run("slow and cheap", 4.0, 0.1), run("dear", 1.0, 9.0), run("cheap", 1.0, 3.0)]
    assert quickest(runs).policy == "cheap"


def test_a_verdict_that_holds() -> None:
    found = verdict(run("own", 1.0, 2.0), [run("a", 1.0, 5.0), run("b", 3.0, 1.0)], 0.5)
    assert found.peer == "a"
    assert found.cpu == pytest.approx(0.4)
    assert found.end == 1.0
    assert found.held == {"time": True, "cpu": True, "end": True}


def test_a_verdict_that_does_not() -> None:
    found = verdict(run("own", 4.0, 3.0), [run("a", 1.0, 5.0)], 0.5)
    assert (found.in_time, found.arrivals, found.late) == (0, 2, 3.0)
    assert found.held == {"time": False, "cpu": False, "end": True}


def test_less_than_a_sample_is_not_later() -> None:
    assert verdict(run("own", 1.5), [run("a", 1.0)], 0.5).held["time"]
    assert not verdict(run("own", 2.0), [run("a", 1.0)], 0.5).held["time"]


def test_never_is_late_where_another_got_there_and_only_there() -> None:
    never = run("own", 10.0)
    assert verdict(never, [run("a", 10.0)], 0.5).held["time"]
    assert verdict(never, [run("a", 1.0)], 0.5).late == 9.0


def test_who_ends_below_99_percent_is_told() -> None:
    poor = Run("own", [sample(0.0, 0, 1.0), sample(30.0, 197, 1.0)], STEPS, [], HUGE)
    assert not verdict(Run("own", poor.samples, STEPS, ARRIVALS, HUGE), [run("a", 1.0)], 0.5).held["end"]


def test_the_table_has_a_line_a_policy_and_says_never() -> None:
    lines = report.table([run("one", 1.0), run("two", 10.0)])
    assert len(lines) == 3
    assert lines[1].split()[0] == "one"
    assert lines[1].endswith("60 of 100   9 of 10  1.0 1.0")
    assert lines[2].endswith("never never")


def test_marks_say_what_is_not_reached() -> None:
    good = verdict(run("own", 1.0, 1.0), [run("a", 1.0, 5.0)], 0.5)
    bad = verdict(run("own", 4.0, 5.0), [run("a", 1.0, 5.0)], 0.5)
    assert all("not reached" not in line for line in report.marks("own", [good]))
    time, cpu, end = report.marks("own", [good, bad])
    assert "2 of 4 arrivals; at worst 3.0 s later (not reached)" in time
    assert "60.0% in the mean, 20.0% to 100.0% (mark 50%: not reached); ksmd alone: 60.0%" in cpu
    assert end.endswith("(mark 99%: reached)")


def test_json_holds_every_sample() -> None:
    one = run("one", 1.0)
    document = json.loads(json.dumps(report.document(one)))
    assert document["samples"]["saved"] == [each.saved for each in one.samples]
    assert [arrival["seconds_to_95"] for arrival in document["arrivals"]] == [1.0, 1.0]


def test_the_picture_has_a_line_a_policy_in_each_panel_and_the_oracle() -> None:
    drawn = ElementTree.fromstring(picture.draw("a & b", [run("one", 1.0), run("two", 2.0)], 21.0))
    lines = [element for element in drawn.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 5
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert all(0 <= x <= float(drawn.attrib["width"]) for x, _ in points)
        assert all(0 <= y <= float(drawn.attrib["height"]) for _, y in points)
