# SPDX-License-Identifier: GPL-2.0-or-later
"""Healing of migrated twins on more kernels, and with more pages, than each change is tried on."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside

pytestmark = [pytest.mark.soak, pytest.mark.guest]


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "7.2"])
def test_migrated_twins_are_healed(kernel: str) -> None:
    print(run_inside(kernel, 2, "-s", "tests/guest_tests/twins.py", timeout_seconds=3600))
