# SPDX-License-Identifier: GPL-2.0-or-later
"""How far ksmd had come: from counters of a recording."""

from __future__ import annotations

import pytest

from ksmd_ctl.host.sample import Sample
from ksmd_ctl.recording.reader import ProcessSample
from ksmd_ctl.replay.progress import Progress, first_reached, read_progress

PROGRESS = Progress((0.0, 1.0, 2.0, 4.0), (0, 0, 1000, 1400), (0, 0, 0, 1), (0.0, 0.0, 0.1, 0.2))


def sample(seconds: float, **readings: int | float) -> Sample:
    return Sample(seconds, dict(readings), {})


def test_what_counts_up_begins_at_the_first_sample() -> None:
    found = read_progress(
        [
            sample(0.5, pages_scanned=500, full_scans=7, ksmd_cpu_seconds=2.0),
            sample(1.5, pages_scanned=800, full_scans=8, ksmd_cpu_seconds=2.5),
        ]
    )
    assert found == Progress([0.5, 1.5], [0, 300], [0, 1], [0.0, 0.5])


def test_without_scanned_pages_there_is_none() -> None:
    assert read_progress([sample(0.0, full_scans=7), sample(1.0, full_scans=8)]) is None


def test_between_two_samples_ksmd_is_as_fast_all_the_time() -> None:
    assert [PROGRESS.pages_at(at) for at in (-1.0, 0.5, 1.5, 2.0, 3.0, 9.0)] == [0, 0, 500, 1000, 1200, 1400]
    assert PROGRESS.cpu_at(3.0) == pytest.approx(0.15)
    assert [PROGRESS.interval(at) for at in (0.0, 0.1, 1.0, 3.9, 9.0)] == [0, 1, 1, 3, 3]


def test_when_ksmd_came_to_a_process() -> None:
    rows = [
        # It was known before the recording began.
        ProcessSample(1.0, 1, 900, 50),
        ProcessSample(1.0, 2, 900, 0),
        ProcessSample(1.0, 3, 900, 0),
        ProcessSample(2.0, 2, 900, 600),
        ProcessSample(2.0, 3, 900, 100),
        ProcessSample(4.0, 3, 900, 900),
        # This kernel does not tell.
        ProcessSample(1.0, 4, 900, None),
        ProcessSample(2.0, 4, 901, None),
    ]
    # 1000 pages had been scanned by 2 s, the last 100 of them its own.
    assert first_reached(PROGRESS, rows) == {2: pytest.approx(1.4), 3: pytest.approx(1.9)}


def test_what_was_long_unchanged_is_not_reached_before_the_sample_that_was_before() -> None:
    rows = [ProcessSample(0.0, 1, 900, 0), ProcessSample(4.0, 1, 900, 400)]
    assert first_reached(PROGRESS, rows) == {1: pytest.approx(2.0)}
