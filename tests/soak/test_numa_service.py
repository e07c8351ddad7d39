# SPDX-License-Identifier: GPL-2.0-or-later
"""The service on machines with several nodes, on more kernels than each change is tried on."""

from __future__ import annotations

import pytest

from tests.guest.inside import run_inside

pytestmark = [pytest.mark.soak, pytest.mark.guest]


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "7.2"])
def test_the_service_on_two_nodes(kernel: str) -> None:
    run_inside(kernel, 2, "tests/guest_tests/numa_service.py", options=("--removable", "256"), timeout_seconds=1800)
