# SPDX-License-Identifier: GPL-2.0-or-later
"""Three weeks of each load on the engine, the last three days of them constant; KSMD_CTL_SEED makes others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.weeks.test_weeks import SEED, TEXT, live

pytestmark = pytest.mark.soak

DAY_HOURS = 24


@pytest.mark.parametrize("load", ["periodic", "bursty", "adversarial"])
def test_three_weeks(load: str, tmp_path: Path) -> None:
    print(live(tmp_path, load, SEED, 18 * DAY_HOURS, 3 * DAY_HOURS, 0, TEXT))
