# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests that run inside a guest: one boot, one pytest there."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_inside(
    kernel: str,
    nodes: int,
    *words: str,
    options: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    timeout_seconds: int = 900,
) -> str:
    """pytest with these words in a guest; its output. Nothing may be skipped there, for there everything is.

    :param options: of tests/guest/run
    :param environment: for the tests
    :raises AssertionError: a test failed, or the guest was lost
    """
    guest = [
        str(ROOT / "tests/guest/run"),
        "--kernel",
        kernel,
        "--nodes",
        str(nodes),
        "--timeout",
        str(timeout_seconds),
    ]
    # How often a test is tried holds in there as well.
    handed = {"PYTEST_ADDOPTS": os.environ.get("PYTEST_ADDOPTS", ""), **(environment or {})}
    variables = [f"{name}={value}" for name, value in handed.items()]
    inside = ["env", "KSMD_CTL_FORCE=1", *variables, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    result = subprocess.run([*guest, *options, "--", *inside], capture_output=True, text=True, check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    _, again, rest = result.stdout.partition("tried again:")
    if again:
        # A test that passes is quiet; this must not be.
        warnings.warn(again + rest, stacklevel=2)
    return result.stdout
