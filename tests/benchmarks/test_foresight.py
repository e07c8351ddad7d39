# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark of estimates: its figures, and one small case on this host's KSM."""

from __future__ import annotations

import subprocess
import sys
from array import array

import pytest

from benchmarks.foresight import __main__ as foresight
from benchmarks.foresight.__main__ import Case, Figure
from benchmarks.policy.host import guarded
from benchmarks.policy.stage import Library, Tenant
from benchmarks.policy.thp import Memory
from tests.benchmarks.test_policy_live import TRACES


def case(found: float, reached: int, early: tuple[tuple[float, float], ...] = ((0, 1000),)) -> Case:
    figures = tuple(Figure("sample", 1.0, 10, low, high) for low, high in early)
    return Case("", "small", False, 4000, reached, (Figure("final", 5, found, found - 5, found + 5),), figures,
                (1.1, 1.3, 1.0), 0.03, (2.0, 0.5), (1.0, 1.0))  # fmt: skip


def test_marks() -> None:
    cases = [case(100, 100)] * 19 + [case(100, 200, ((0, 10), (0, 300)))]
    error, held, cost, first, share, until_merged, later = foresight._marks(cases)
    assert error.startswith("error at the 95th percentile 0.00 %".replace(" %", "%"))
    assert "final 95%, all 95%" in held
    assert "a pass: 1.10" in cost
    assert "1.0 s" in first
    assert "3.00%" in share
    assert "median 2.00" in until_merged
    assert "median 0.50" in later
    worse = [*foresight._marks([case(100, 100)] * 18 + [case(100, 200)] * 2)]
    assert worse[0].startswith("error at the 95th percentile 50.00%")


@pytest.mark.ksm
@pytest.mark.parametrize("memory", [Memory.QEMU, Memory.SMALL])
def test_a_small_case(ksm_host: object, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "_INTERVAL_SECONDS", 0.1)
    monkeypatch.setattr(foresight, "_LITTLE_CPU", 0.5)
    library = Library(TRACES)
    with guarded(memory) as host:
        tenants = [Tenant(library.pool, host) for _ in TRACES]
        try:
            for tenant, pages in zip(tenants, library.traces, strict=True):
                tenant.tell(b"F", array("I", pages))
            found = foresight._case("two", host, [tenant.process.pid for tenant in tenants], zero=False)
        finally:
            for tenant in tenants:
                tenant.leave()
    assert found.reached > 300
    assert found.error < 0.01
    assert found.held(found.figures[-1])
    assert "two" not in foresight._line(found)
    assert min(*found.predicted, *found.taken) > 0


def test_it_says_what_it_needs() -> None:
    command = [sys.executable, "-m", "benchmarks.foresight", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "--guests" in done.stdout or "it takes root" in done.stderr
