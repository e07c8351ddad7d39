# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl verify`` killed at many moments, it and its processes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenario.test_killed import child_killed, killed_and_started_again, told_to_stop

pytestmark = [pytest.mark.soak, pytest.mark.ksm]


@pytest.mark.parametrize("starter", ["observe", "fixed", "verify", "unit"])
def test_killed_and_started_again(ksm_host: Path, tmp_path: Path, starter: str) -> None:
    for seed in range(100, 130):
        (tmp_path / str(seed)).mkdir()
        killed_and_started_again(ksm_host, tmp_path / str(seed), starter, seed)


def test_its_processes_killed(ksm_host: Path) -> None:
    for seed in range(100, 130):
        child_killed(ksm_host, seed)


def test_told_to_stop(ksm_host: Path) -> None:
    for seed in range(100, 160):
        told_to_stop(ksm_host, seed)
