# SPDX-License-Identifier: GPL-2.0-or-later
"""Healing of migrated twins on a machine with two nodes: one boot runs tests/guest_tests/twins.py in it."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside


@pytest.mark.guest
def test_migrated_twins_are_healed() -> None:
    # Other kernels, and more pages: tests/soak.
    print(run_inside("6.12", 2, "-s", "tests/guest_tests/twins.py", environment={"KSMD_CTL_CONTENTS": "1500"}))
