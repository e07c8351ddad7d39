# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions many times over: in both directions, and killed at every entry, before and after."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest.test_transactions import run_in_guest
from tests.service.test_transactions import killed_at_every_entry

pytestmark = pytest.mark.soak


@pytest.mark.guest
@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_twenty_times_in_both_directions(kernel: str, nodes: int) -> None:
    run_in_guest(kernel, nodes, rounds=20, timeout_seconds=7200)


@pytest.mark.ksm
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("round_number", range(5))
def test_killed_at_every_entry(ksm_host: Path, tmp_path: Path, when: str, round_number: int) -> None:
    assert set(killed_at_every_entry(ksm_host, tmp_path, when)) <= {"rolled_back", "abandoned", "done"}
