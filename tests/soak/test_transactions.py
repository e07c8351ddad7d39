# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions many times over: in both directions, with little memory, disturbed, and killed at every step."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.guest.inside import ROOT, run_inside
from tests.service.test_transactions import (
    child_killed_at_every_step,
    killed_at_every_entry,
    service_killed_at_every_entry,
)

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


@pytest.mark.guest
def test_while_others_write_the_knobs() -> None:
    program = subprocess.run(
        [ROOT / "tools/deb-program", "ksmtuned", "ksmtuned"], capture_output=True, text=True, check=True
    )
    environment = {"KSMD_CTL_KSMTUNED": program.stdout.strip(), "KSMD_CTL_PAGES": "200"}
    path = "tests/guest_tests/disturbed.py"
    run_inside("6.12", 2, "-s", path, options=("--removable", "256"), environment=environment)


@pytest.mark.ksm
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("round_number", range(5))
def test_killed_at_every_entry(ksm_host: Path, tmp_path: Path, when: str, round_number: int) -> None:
    assert set(killed_at_every_entry(ksm_host, tmp_path, when)) <= {"rolled_back", "abandoned", "done"}


@pytest.mark.ksm
@pytest.mark.parametrize("milliseconds", [0, 5, 20, 50, 100, 200])
def test_the_process_of_each_step_killed_alone(ksm_host: Path, tmp_path: Path, milliseconds: int) -> None:
    results = child_killed_at_every_step(ksm_host, tmp_path, milliseconds)
    print(results)
    assert set().union(*results.values()) <= {"done", "abandoned", "rolled_back"}


@pytest.mark.ksm
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_service_killed_at_every_entry(ksm_host: Path, tmp_path: Path, when: str) -> None:
    results = service_killed_at_every_entry(ksm_host, tmp_path, when)
    print(results)
    assert len(results) >= 8
    assert set(results) <= {"rolled_back", "abandoned", "done"}
