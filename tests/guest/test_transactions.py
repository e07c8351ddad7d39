# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions on machines with two nodes: one boot runs tests/guest_tests/transactions.py in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = str(ROOT / "tests/guest/run")


def run_in_guest(kernel: str, nodes: int, rounds: int = 1, timeout_seconds: int = 700) -> None:
    """All of it on one kernel; nothing may be skipped there, for there everything is."""
    cpus = ",".join(["1"] * nodes)
    options = ["--kernel", kernel, "--nodes", str(nodes), "--cpus", cpus, "--timeout", str(timeout_seconds)]
    environment = ["env", "KSMD_CTL_FORCE=1", f"KSMD_CTL_ROUNDS={rounds}"]
    inside = ["python", "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "tests/guest_tests/transactions.py"]
    result = subprocess.run([RUN, *options, "--", *environment, *inside], capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.guest
def test_transactions_on_two_nodes() -> None:
    # Other kernels and four nodes: tests/soak.
    run_in_guest("6.12", 2)
