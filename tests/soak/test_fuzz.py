# SPDX-License-Identifier: GPL-2.0-or-later
"""The made-up input of tests/fuzz, as much of it as takes minutes; KSMD_CTL_SEED makes another series."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import test_configurations, test_requests, test_scenarios, test_socket

pytestmark = pytest.mark.soak

SEED = int(os.environ.get("KSMD_CTL_SEED") or time.time())


def said(what: str, fuzz: Callable[[], object]) -> None:
    began = time.monotonic()
    print(f"{what}, seed {SEED}: {fuzz()} taken, in {time.monotonic() - began:.0f} s")


def test_a_million_messages(tmp_path: Path) -> None:
    said("1,000,000 messages", lambda: test_socket.fuzz(tmp_path, 1_000_000, SEED))


def test_a_hundred_thousand_configurations(tmp_path: Path) -> None:
    said("100,000 configurations", lambda: test_configurations.fuzz(tmp_path / "c.toml", 100_000, SEED))


def test_a_hundred_thousand_scenarios(tmp_path: Path) -> None:
    said("100,000 scenarios", lambda: test_scenarios.fuzz(tmp_path / "s.toml", 100_000, SEED))


def test_a_hundred_thousand_requests() -> None:
    said("100,000 requests", lambda: test_requests.fuzz(100_000, SEED))
