# SPDX-License-Identifier: GPL-2.0-or-later
"""smart_scan and the advisor: statements 12 and 13 of docs/engine.md, by number."""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.scan import scan_time_advisor, skip_age
from ksmd_ctl.engine.state import NONE, Ksm
from ksmd_ctl.engine.sysfs import ksm_store
from tests.engine.lab import NEW, Lab
from tests.engine.test_corner_cases import processed

each = pytest.mark.parametrize("profile", NEW)


@each
def test_12_1_merged_pages_are_not_skipped_and_do_not_age(profile: str) -> None:
    lab = Lab(profile, smart_scan=1)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(20)
    assert lab.ksm.pages_skipped == 0
    assert pages.item(0).age == 2  # type: ignore[union-attr]


@each
def test_12_1_age_stops_at_255(profile: str) -> None:
    lab = Lab(profile, smart_scan=1)
    pages = lab.region("p", ["x"], 0)
    lab.machine.scan(300)
    assert pages.item(0).age == 255  # type: ignore[union-attr]


@each
def test_12_2_a_skipped_item_leaves_its_tree(profile: str) -> None:
    lab = Lab(profile, smart_scan=1)
    pages = lab.region("p", ["x"], 0)
    lab.scan(4)
    assert lab.counts == (0, 0, 1, 0)
    lab.scan(1)
    assert lab.counts == (0, 0, 0, 1)
    assert pages.item(0).state == NONE  # type: ignore[union-attr]


def test_12_3_how_often_an_age_is_passed_over() -> None:
    assert [skip_age(age) for age in range(12)] == [1, 1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8]
    assert skip_age(255) == 8


def test_12_4_the_schedule() -> None:
    assert processed(60) == [1, 2, 3, 4, 6, 9, 14, 23, 32, 41, 50, 59]


@each
def test_12_5_only_freeing_the_item_resets_its_age(profile: str) -> None:
    lab = Lab(profile, smart_scan=1)
    pages = lab.region("p", ["x", "y"], 0)
    lab.scan(5)
    pages.write(0, "z")
    lab.scan(1)
    assert pages.item(0).age == 6  # type: ignore[union-attr]
    pages.discard(0, 1)
    lab.scan(1)
    pages.write(0, "z")
    lab.scan(1)
    assert pages.item(0).age == 1  # type: ignore[union-attr]


@each
def test_12_6_unique_pages_show_mostly_as_volatile(profile: str) -> None:
    lab = Lab(profile, smart_scan=1)
    lab.region("p", ["a", "b", "c"], 0)
    seen = [lab.scan(1).counts[2] for _ in range(60)]
    assert seen.count(0) > seen.count(3)


def advised(pages_to_scan: int, seconds: float, cpu_seconds: float, **knobs: int) -> Ksm:
    """KSM's state after the advisor's evaluation of a scan of some length and cost."""
    machine = Machine(1)
    machine.store("advisor_min_pages_to_scan", pages_to_scan)
    for name, value in knobs.items():
        machine.store(name, value)
    machine.store("advisor_mode", "scan-time")
    ksm = machine.ksm
    ksm.now_ns, ksm.cpu_ns = round(seconds * 1e9), round(cpu_seconds * 1e9)
    scan_time_advisor(ksm)
    return ksm


def test_13_1_to_13_5_one_evaluation() -> None:
    # 100 s at 20 % of a CPU: factor 200, change 30, so 10000 * 100 / 200 * 30 / 100 = 1500; the cost of a
    # percent is 500 pages, so at least 5000.
    ksm = advised(10_000, 100, 20)
    assert ksm.pages_to_scan == 5000
    assert (ksm.advisor_ctx.change, ksm.advisor_ctx.scan_time) == (30, 100)
    # At 400 s, 20 %: factor 50, change 30: 10000 * 2 * 0.3 = 6000.
    assert advised(10_000, 400, 80).pages_to_scan == 6000


def test_13_2_change_is_an_average_of_what_came_before() -> None:
    ksm = advised(10_000, 100, 20, advisor_max_cpu=10)
    ksm.now_ns += 200_000_000_000
    ksm.advisor_ctx.start_scan_ns = ksm.now_ns - 200_000_000_000
    ksm.cpu_ns += 40_000_000_000
    scan_time_advisor(ksm)
    assert ksm.advisor_ctx.change == (70 * 30 + 30 * 200) // 100
    # 5000 * 81 / 100, but 20 percent of a CPU for 5000 pages: at most 10 percent's 2500.
    assert ksm.pages_to_scan == 2500
    ksm_store(ksm, "advisor_mode", "none", 0)
    ksm_store(ksm, "advisor_mode", "scan-time", 0)
    assert ksm.advisor_ctx.change == 0


def test_13_4_limits() -> None:
    assert advised(10_000, 100, 50, advisor_target_scan_time=1).pages_to_scan == 14_000  # 70 percent of a CPU
    assert advised(10_000, 100, 1, advisor_target_scan_time=1).pages_to_scan == 30_000  # advisor_max_pages_to_scan
    assert advised(10_000, 100, 1, advisor_max_pages_to_scan=777).pages_to_scan == 777


def test_13_0_the_first_evaluation_counts_all_of_ksmds_life() -> None:
    # 15 s of CPU before, and a scan of 1 s: it seems to use 1500 % of a CPU.
    assert advised(500, 1, 15).pages_to_scan == 10


@each
def test_13_6_min_pages_is_the_start_only(profile: str) -> None:
    lab = Lab(profile, advisor_mode="scan-time")
    assert lab.machine.show("pages_to_scan") == "500\n"
    lab.store("advisor_min_pages_to_scan", 900)
    assert lab.machine.show("pages_to_scan") == "500\n"


@each
def test_13_7_switching_it_off_sets_100(profile: str) -> None:
    lab = Lab(profile, pages_to_scan=12_345)
    lab.store("advisor_mode", "none")
    assert lab.machine.show("pages_to_scan") == "12345\n"
    lab.store("advisor_mode", "scan-time")
    assert lab.machine.show("advisor_mode") == "none [scan-time]\n"
    lab.store("advisor_mode", "none")
    assert lab.machine.show("pages_to_scan") == "100\n"


@each
def test_13_8_a_tiny_load(profile: str) -> None:
    lab = Lab(profile, advisor_mode="scan-time")
    lab.region("p", ["a", "b"], 0)
    seen = []
    for _ in range(2):
        lab.scan(1)
        seen.append(lab.ksm.pages_to_scan)
    assert seen == [5000, 30_000]
