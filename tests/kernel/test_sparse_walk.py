# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the kernel walks empty address space when it un-merges: measured in a child, judged here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.kernel.sparse_walk import judged, measured, seconds_per_gib


def test_a_kernel_that_walks_is_told_with_its_speed() -> None:
    # 4096 pages in 240 us: 59 ns a page, as on 6.18. Delays of single rounds change nothing.
    found = judged([(4_000, 240_000), (2_500, 9_000_000), (7_000_000, 250_000)])
    assert found == pytest.approx(237_500e-9 * 64)


def test_a_kernel_that_skips_is_told_though_one_round_was_delayed() -> None:
    assert judged([(2_500, 3_900_000), (2_600, 4_000), (2_700, 2_900)]) == 0.0


@pytest.mark.parametrize(
    "rounds",
    [
        [],
        [(2_500, 240_000), (2_500, 240_000)],
        [(2_500, 25_000), (2_500, 25_000), (2_500, 25_000)],
    ],
    ids=["no KSM", "too busy", "neither one nor the other"],
)
def test_what_can_not_be_told(rounds: list[tuple[int, int]]) -> None:
    assert judged(rounds) is None


def children() -> set[str]:
    """This process's, those that other tests have left included."""
    path = Path("/proc/thread-self/children")
    return set(path.read_text().split()) if path.exists() else set()


def test_the_child_is_ended_at_the_deadline() -> None:
    # It has to start first.
    before = children()
    assert judged(measured(0.0)) is None
    assert children() <= before


def test_this_kernel_is_measured_once_and_this_process_is_left_alone() -> None:
    found = seconds_per_gib()
    assert found is None or found >= 0
    assert seconds_per_gib() is found
    assert not any(item.mergeable for item in read_ranges(os.getpid()))
