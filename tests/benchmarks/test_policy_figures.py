# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of the policy benchmark from its samples, and what is drawn and said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policy import picture, report, results
from benchmarks.policy.contenders import CONTENDERS, OFF
from benchmarks.policy.figures import (
    Arrival,
    Run,
    Sample,
    Step,
    Total,
    Verdict,
    area,
    best_of,
    end_share,
    mean_time,
    oracle_at,
    time_to_share,
    verdict,
)
from benchmarks.policy.host import Unfit
from benchmarks.policy.latency import Latency, summarise
from benchmarks.policy.oracle import HugePages
from benchmarks.policy.thp import Memory

STEPS = [Step(1.0, 1000, 100), Step(11.0, 2000, 200)]
HUGE = HugePages(100, 60, 10, 9, 4)
ARRIVALS = [Arrival(0, 1.0, 11.0), Arrival(1, 11.0, 21.0)]


def sample(at: float, saved: int, ksmd: float = 0.0, service: float = 0.0) -> Sample:
    return Sample(at, saved, saved, 0, ksmd, service, 0, 1, 100, 20, 1)


LATENCY = Latency(10, 200.0, 900.0, 5000.0, [(215, 9), (5120, 1)])


def run(policy: str, delay: float, cpu: float = 1.0) -> Run:
    """Everything is saved that much after it could be."""
    found = []
    for tick in range(43):
        at = tick / 2
        found.append(sample(at, oracle_at(STEPS, at - delay), ksmd=cpu * at / 21, service=0.1 * cpu * at / 21))
    return Run(policy, found, STEPS, ARRIVALS, HUGE, LATENCY)


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


def test_no_more_can_be_lost_than_could_be_saved() -> None:
    assert area([sample(1.0, -10), sample(2.0, -10)], STEPS) == (100, 100)


def test_the_end() -> None:
    assert end_share(run("", 0.0).samples, STEPS) == 1.0
    assert end_share([sample(20.0, 0), sample(28.0, 150), sample(30.0, 170)], STEPS) == pytest.approx(0.8)


def test_the_best_lost_least_and_of_equals_it_is_the_cheapest() -> None:
    runs = [run("slow and cheap", 4.0, 0.1), run("dear", 1.0, 9.0), run("cheap", 1.0, 3.0)]
    assert best_of(runs).policy == "cheap"
    # Neither gets to 95 %: who saves more is better, whatever it costs.
    idle, slow = (replace(run(name, 99.0, cpu), samples=samples) for name, cpu, samples in (
        ("idle", 0.0, [sample(10.0, 0), sample(30.0, 0)]), ("slow", 9.0, [sample(10.0, 50), sample(30.0, 100)])
    ))  # fmt: skip
    assert best_of([idle, slow]).samples[-1].saved == 100


def judged(own: Run, *others: Run, off: Run | None = None) -> Verdict:
    return verdict(own, others, off, 0.5)


def test_a_verdict_that_holds() -> None:
    slow = replace(LATENCY, p99=1080.0)
    found = judged(
        replace(run("own", 1.0, 2.0), latency=slow), run("a", 1.0, 5.0), run("b", 3.0, 1.0), off=run("", 9.0)
    )
    assert found.peer == "a"
    assert found.cpu == pytest.approx(0.4)
    assert found.end == 1.0
    assert found.latency == pytest.approx(1.2)
    assert Total([found]).held == {"time": True, "cpu": True, "end": True, "huge_pages": True, "latency": True}


def test_a_verdict_that_does_not() -> None:
    poor = replace(run("own", 4.0, 3.0), latency=replace(LATENCY, p99=1081.0), huge_pages=HugePages(100, 60, 10, 7))
    found = judged(poor, run("a", 1.0, 5.0), off=run("", 9.0))
    assert (found.in_time, found.arrivals, found.late) == (0, 2, 3.0)
    assert Total([found]).held == {"time": False, "cpu": False, "end": True, "huge_pages": False, "latency": False}


def test_nothing_is_judged_that_was_not_measured() -> None:
    held = Total([judged(replace(run("own", 1.0), huge_pages=HugePages()), run("a", 1.0))]).held
    assert (held["huge_pages"], held["latency"]) == (None, None)


def test_less_than_a_sample_is_not_later() -> None:
    assert judged(run("own", 1.5), run("a", 1.0)).in_time == 2
    assert judged(run("own", 2.0), run("a", 1.0)).in_time == 0


def test_never_is_late_where_another_got_there_and_only_there() -> None:
    never = run("own", 10.0)
    assert judged(never, run("a", 10.0)).in_time == 2
    assert judged(never, run("a", 1.0)).late == 9.0


def test_who_ends_below_99_percent_is_told() -> None:
    poor = replace(run("own", 0.0), samples=[sample(0.0, 0, 1.0), sample(30.0, 197, 1.0)])
    assert not Total([judged(poor, run("a", 1.0))]).held["end"]


def test_nine_of_ten_arrivals_and_huge_pages_are_judged_over_all_scripts() -> None:
    good = Verdict(10, 10, 0.0, "a", 0.4, 0.4, 1.0, HugePages(100, 50, 10, 10), 0.01, 1.0)
    poor = replace(good, in_time=8, late=1.0, cpu=0.6, huge_pages=HugePages(100, 50, 10, 6))
    assert all(Total([good, poor]).held.values())
    assert not any(Total([poor]).held[mark] for mark in ("time", "cpu", "huge_pages"))
    # These hold in each script or not at all.
    for bad, mark in ((replace(good, end=0.98), "end"), (replace(good, latency=1.3), "latency")):
        assert Total([good, good, bad]).held[mark] is False


def test_the_table_has_a_line_a_policy_and_says_never() -> None:
    off, one, two = report.table([run(OFF, 0.0), run("one", 1.0), run("two", 10.0)])[1:]
    assert off.split()[0] == OFF
    assert off.endswith("0.90    5.0")
    assert one.split()[0] == "one"
    assert one.endswith("60 of 100  9 of 10  0.20  0.90 (1.00 x)    5.0  1.0 1.0")
    assert two.endswith("never never")


def test_marks_say_what_is_missed() -> None:
    good = judged(run("own", 1.0, 1.0), run("a", 1.0, 5.0), off=run("", 9.0))
    bad = judged(run("own", 4.0, 5.0), run("a", 1.0, 5.0), off=run("", 9.0))
    assert all("missed" not in line for line in report.marks("own", Total([good])))
    end, time, cpu, huge, latency = report.marks("own", Total([good, bad]))
    assert end.endswith("(mark 99%: reached)")
    assert "after 2 of 4 arrivals, at worst 3.0 s later (mark 90%: missed)" in time
    assert "60.0% in the mean, 20.0% to 100.0% (mark at most 50%: missed); ksmd alone 60.0%" in cpu
    assert "18 of 20, 90%; at most 2.0% in the mean, 2.0% to 2.0% of the saving is in them (mark 80%: reached)" in huge
    assert "1.00 x in the mean, 1.00 to 1.00 (mark at most 1.2: reached)" in latency
    without = report.marks("own", Total([judged(run("own", 1.0), run("a", 1.0))]))
    assert "not measured (mark at most 1.2: nothing to judge)" in without[-1]


def test_marks_say_where_there_are_no_huge_pages() -> None:
    none = judged(replace(run("own", 1.0), huge_pages=HugePages()), run("a", 1.0))
    assert report.marks("own", Total([none]))[3].endswith("left: there are none (mark 80%: nothing to judge)")


def test_the_summary_is_a_table_a_group() -> None:
    first, second = [run(OFF, 0.0), run("one", 1.0)], [run(OFF, 0.0), run("one", 10.0, 3.0)]
    total = Total([judged(first[1], run("a", 1.0))])
    lines = report.summary({"small, quiet": [first, second], "other": [first]}, {"small, quiet": total}, "one")
    assert [line for line in lines if line.startswith("#")] == ["### Small, quiet", "### Other"]
    tables = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1
    assert tables[2] == "| off |  |  | 0 | 120 of 200 | 18 of 20 | 0.20, 0.90, 5.0 |  |"
    assert tables[3].startswith("| one | 80.0% in the mean, 60.0% to 100.0% | 5.5 in the mean; 2 of 4 never | 2.2 s in")
    assert tables[3].endswith(" | 1.00 x in the mean, 1.00 to 1.00 |")
    assert sum(line.startswith("- one: ") for line in lines) == 5


def test_latencies_are_told_by_nearest_rank() -> None:
    found = summarise([1000 * number for number in range(200, 0, -1)])
    assert (found.requests, found.p50, found.p99, found.worst) == (200, 100.0, 198.0, 200.0)
    with pytest.raises(ValueError, match="no latency"):
        summarise([])


@given(st.lists(st.integers(0, 10**10), min_size=1))
def test_the_histogram_has_every_request(nanoseconds: list[int]) -> None:
    found = summarise(nanoseconds)
    assert sum(count for _, count in found.histogram) == len(nanoseconds) == found.requests
    bounds = [bound for bound, _ in found.histogram]
    assert bounds == sorted(set(bounds))
    for bound in bounds:
        below = sum(count for other, count in found.histogram if other <= bound)
        assert below == sum(value <= 1000 * bound for value in nanoseconds)


def test_a_run_comes_back_from_its_document() -> None:
    one = replace(run("one", 1.0), others=2.5, not_huge=3)
    document = json.loads(json.dumps(results.document(one)))
    assert document["samples"]["saved"] == [each.saved for each in one.samples]
    assert document["seconds_to_95"] == [1.0, 1.0]
    back = results.restored(document)
    assert json.loads(json.dumps(results.document(back))) == document
    assert (back.times(), back.cpu, back.huge_pages) == (one.times(), one.cpu, one.huge_pages)


def test_runs_are_found_again_only_where_nothing_has_changed(tmp_path: Path) -> None:
    case, contender = results.Case(601, 120.0, Memory.QEMU, 2), CONTENDERS["ksmtuned"]
    results.Results(tmp_path, "contents").keep(case, contender, run("ksmtuned", 1.0), {"notes": ["a"]})
    assert json.loads((tmp_path / "seed-601-qemu-busy-2/ksmtuned.json").read_text())["notes"] == ["a"]
    there = results.Results(tmp_path, "contents")
    assert (found := there.find(case, contender)) is not None
    assert found.times() == [1.0, 1.0]
    assert there.find(case, CONTENDERS["advisor"]) is None
    assert there.find(replace(case, seed=602), contender) is None
    assert there.find(replace(case, seconds=60.0), contender) is None
    assert results.Results(tmp_path, "other").find(case, contender) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "7", None])
def test_a_damaged_run_is_named_and_not_repeated_over(tmp_path: Path, damage: str | None) -> None:
    case, contender = results.Case(601, 120.0, Memory.QEMU, 2), CONTENDERS["ksmtuned"]
    there = results.Results(tmp_path, "contents")
    there.keep(case, contender, run("ksmtuned", 1.0), {})
    path = tmp_path / "seed-601-qemu-busy-2/ksmtuned.json"
    # With None what it depends on is whole, and its samples are not there.
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"samples": {}}) if damage is None else damage)
    with pytest.raises(Unfit, match=r"ksmtuned\.json is damaged: .*\nhint: remove it"):
        there.find(case, contender)


def test_the_picture_has_a_line_a_policy_in_each_panel_and_the_oracle() -> None:
    drawn = ElementTree.fromstring(picture.draw("a & b", "c", [run("one", 1.0), run("two", 2.0)], 21.0))
    lines = [element for element in drawn.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 5
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert all(0 <= x <= float(drawn.attrib["width"]) for x, _ in points)
        assert all(0 <= y <= float(drawn.attrib["height"]) for _, y in points)
