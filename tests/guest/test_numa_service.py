# SPDX-License-Identifier: GPL-2.0-or-later
"""The service on a machine with two nodes: one boot runs tests/guest_tests/numa_service.py in it."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside


@pytest.mark.guest
def test_the_service_on_two_nodes() -> None:
    # Other kernels: tests/soak.
    run_inside("6.12", 2, "tests/guest_tests/numa_service.py", options=("--removable", "256"))
