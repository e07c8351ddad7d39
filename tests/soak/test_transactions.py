# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions many times over: in both directions, with little memory, and killed at every entry, before and after."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.inside import run_inside
from tests.service.test_transactions import killed_at_every_entry

pytestmark = pytest.mark.soak


@pytest.mark.guest
@pytest.mark.parametrize(("kernel", "nodes"), [("6.1", 2), ("6.12", 2), ("6.12", 4)])
def test_twenty_times_in_both_directions(kernel: str, nodes: int) -> None:
    rounds = {"KSMD_CTL_ROUNDS": "20", "KSMD_CTL_PAGES": "200"}
    path = "tests/guest_tests/transactions_repeated.py"
    run_inside(kernel, nodes, "-s", path, environment=rounds, timeout_seconds=2400)


@pytest.mark.guest
@pytest.mark.parametrize(("kernel", "nodes"), [("6.1", 2), ("6.12", 4)])
def test_beside_the_naive_sequence(kernel: str, nodes: int) -> None:
    run_inside(kernel, nodes, "-s", "tests/guest_tests/transactions.py")


@pytest.mark.guest
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_with_little_memory(kernel: str) -> None:
    run_inside(kernel, 2, "-s", "tests/guest_tests/little_memory.py", options=("--memory", "400,128"))


@pytest.mark.ksm
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("round_number", range(5))
def test_killed_at_every_entry(ksm_host: Path, tmp_path: Path, when: str, round_number: int) -> None:
    assert set(killed_at_every_entry(ksm_host, tmp_path, when)) <= {"rolled_back", "abandoned", "done"}
