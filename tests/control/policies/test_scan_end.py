# SPDX-License-Identifier: GPL-2.0-or-later
"""When a full scan seems to end."""

from __future__ import annotations

import pytest

from ksmd_ctl.control.policies.burst import Burst
from ksmd_ctl.control.policies.debts import PRIORS
from ksmd_ctl.control.policies.scan_end import left, progress
from ksmd_ctl.host.sample import Sample


def sample(time: float, scanned: float, skipped: float = 0.0, known: float = 10_000) -> Sample:
    base = {"pages_shared": 0, "pages_sharing": 0, "pages_volatile": 0, "pages_unshared": known}
    return Sample(time, {**base, "pages_scanned": scanned, "pages_skipped": skipped})


def burst(start: Sample, scan: Sample) -> Burst:
    return Burst(start, scan, scan, PRIORS, 0, "something has come")


def test_pages_that_smart_scan_skips_are_behind_it_as_well() -> None:
    assert progress(sample(0, 500), sample(1, 1500, 4000)) == 0.5
    assert progress(sample(0, 500), sample(1, 50_000)) == 1.0
    assert progress(sample(0, 500), sample(1, 1500, known=0)) is None
    assert progress(sample(0, 500), Sample(1, {"pages_scanned": 1500})) is None


def test_a_scan_that_began_in_the_background_ends_at_the_speed_of_the_burst() -> None:
    scan, start = sample(0, 0), sample(100, 4000)
    assert left(sample(100, 4000), burst(start, scan), 1.0) == pytest.approx((0.6, 1.0))
    # In a tenth of a second 30 % of it.
    assert left(sample(100.1, 6000, 1000), burst(start, scan), 1.0) == pytest.approx((0.1, 1 / 3))


def test_little_progress_says_little() -> None:
    start = sample(100, 4000)
    assert left(sample(100.5, 6000), burst(start, start), 3.0) == pytest.approx((2.4, 3.0))


def test_without_progress_the_clock_has_to_do() -> None:
    start = Sample(100, {})
    assert left(Sample(101, {}), burst(start, start), 3.0) == (2.0, 3.0)
