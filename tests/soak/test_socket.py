# SPDX-License-Identifier: GPL-2.0-or-later
"""Fifty clients and twenty scrapes a second for ten minutes, or KSMD_CTL_SECONDS: on time, and no memory lost.

The simulated host has the CPU to itself only where the machine does: its lateness is that of a quiet machine.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.load.clients import SCRAPES_PER_SECOND
from tests.load.test_load import under_load

pytestmark = pytest.mark.soak

SECONDS = float(os.environ.get("KSMD_CTL_SECONDS") or 600)
#: The simulated guests arrive within 30 s, and the status page draws its first lines.
WARM_UP_SECONDS = 60.0
#: An hour of figures for the status page is not full after ten minutes.
MOST_GROWTH_BYTES = 2 << 20


@pytest.mark.parametrize("host", ["kernel", "engine"])
def test_ten_minutes_under_load(tmp_path: Path, host: str) -> None:
    figures = under_load(tmp_path, host, SECONDS, WARM_UP_SECONDS)
    first, last = (size / (1 << 20) for size in figures.resident_bytes)
    print(
        f"{host}: {figures.ticks} ticks, {figures.late} over 50 ms late, {figures.lateness_seconds:.2f} s late in all; "
        f"CPU {figures.cpu_seconds:.1f} s; memory {first:.1f} MiB, then {last:.1f} MiB; {figures.seen}; "
        f"load average at the end {os.getloadavg()[0]:.1f}"
    )
    assert figures.seen["scrapes begun"] > 0.95 * SCRAPES_PER_SECOND * (SECONDS + WARM_UP_SECONDS)
    assert figures.late <= 0.01 * figures.ticks
    assert figures.resident_bytes[1] - figures.resident_bytes[0] < MOST_GROWTH_BYTES
