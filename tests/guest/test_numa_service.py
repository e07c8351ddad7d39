# SPDX-License-Identifier: GPL-2.0-or-later
"""The service on machines with two nodes: one boot for each kernel runs tests/guest_tests/numa_service.py in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "tests/guest/run")


@pytest.mark.guest
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_the_service_on_two_nodes(kernel: str) -> None:
    options = ["--kernel", kernel, "--nodes", "2", "--removable", "256", "--timeout", "600"]
    inside = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/guest_tests/numa_service.py"]
    # In the guest nothing may be skipped: there everything is.
    result = subprocess.run(
        [RUN, *options, "--", "env", "KSMD_CTL_FORCE=1", *inside], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
