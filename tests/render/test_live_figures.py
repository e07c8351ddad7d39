# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of the live view: units in their orders, and how the host's went."""

from __future__ import annotations

from typing import Any

from ksmd_ctl.render.live_figures import Sort, Trends, units
from tests.render.reports import example


def group(name: str, saved: int | None, blocks: int | None = 0, remote: int = 0) -> dict[str, Any]:
    found = example()["numa"]["groups"][0]
    sizes = {"share_bytes": saved, "saved_bytes": 7, "split_blocks": blocks, "remote_pages": remote}
    return {**found, "group": name, **sizes}


def shared(name: str, size: int) -> dict[str, Any]:
    return {**example()["sharing"]["groups"][0], "group": name, "shared_bytes": size}


def names(report: dict[str, Any], sort: Sort) -> list[str]:
    return [unit.name for unit in units(report, sort)]


def three() -> dict[str, Any]:
    report = example()
    report["numa"]["groups"] = [group("a", 30, 1), group("b", 20, 5, 1), group("c", 10, 5, 2)]
    report["sharing"]["groups"] = [shared("b", 300), shared("c", 200), shared("a", 100)]
    report["sharing"]["pairs"] = [{"groups": ["c", "b"]}, {"groups": ["a", "c"]}]
    return report


def test_each_order_has_the_largest_first_and_the_others_last() -> None:
    report = three()
    assert names(report, Sort.SAVING) == ["a", "b", "c", "other"]
    assert names(report, Sort.COST) == ["c", "b", "a", "other"]
    assert names(report, Sort.SHARING) == ["b", "c", "a", "other"]


def test_who_shares_most_with_it() -> None:
    assert {unit.name: unit.with_whom for unit in units(three(), Sort.SAVING)} == {
        "a": "c",
        "b": "c",
        "c": "b",
        "other": "",
    }


def test_a_unit_that_only_one_list_has_is_there_with_what_is_known() -> None:
    report = three()
    report["sharing"]["groups"].append(shared("d", 50))
    (found,) = [unit for unit in units(report, Sort.SHARING) if unit.name == "d"]
    assert (found.shared_bytes, found.saved_bytes, found.prevented) == (50, None, None)
    assert found.merged_bytes == 614465536


def test_of_who_is_not_in_the_latest_look_it_is_not_known_what_it_shares() -> None:
    report = three()
    # Both lists name the same, so the others are the same, too.
    assert units(report, Sort.SAVING)[-1].shared_bytes == 412090368
    del report["sharing"]["groups"][0]
    assert units(report, Sort.SAVING)[-1].shared_bytes is None
    assert {unit.shared_bytes for unit in units(report, Sort.SAVING) if unit.name == "b"} == {None}
    report["sharing"]["groups"].append(shared("b", 0))
    assert {unit.shared_bytes for unit in units(report, Sort.SAVING) if unit.name == "b"} == {0}
    # Who shares nothing is named only where it saves something.
    report["sharing"]["groups"].append(shared("alone", 0))
    assert "alone" not in names(report, Sort.SHARING)
    report["sharing"] = None
    assert {unit.shared_bytes for unit in units(report, Sort.SAVING)} == {None}


def test_others_that_have_nothing_merged_are_not_named() -> None:
    report = three()
    other = report["numa"]["other"]
    other |= dict.fromkeys(("share_bytes", "saved_bytes", "merging_pages", "remote_pages", "split_blocks"), 0)
    report["sharing"]["other"]["shared_bytes"] = 0
    assert other["processes"]
    assert names(report, Sort.SAVING) == ["a", "b", "c"]
    # What isn't known is not nothing.
    other["merging_pages"] = report["sharing"]["other"]["merged_bytes"] = None
    assert names(report, Sort.SAVING) == ["a", "b", "c", "other"]


def test_without_parts_of_the_whole_they_are_by_what_un_merging_takes() -> None:
    report = three()
    report["numa"]["groups"][1]["share_bytes"] = None
    assert {unit.saved_bytes for unit in units(report, Sort.SAVING)[:3]} == {7}


def test_no_survey_no_units() -> None:
    report = example()
    report["numa"] = report["sharing"] = None
    assert units(report, Sort.SAVING) == []


def test_a_point_each_step_and_the_last_one_of_now() -> None:
    trends, report = Trends(), example()
    for second in range(12):
        report["derived"]["saved_frames_bytes"] = second
        trends.add(report, second)
    assert list(trends.saved) == [4, 9, 11]
    trends.add(None, 15)
    assert list(trends.saved) == [4, 9, 11, None]
    assert list(trends.cpu) == [0.034] * 3 + [None]
