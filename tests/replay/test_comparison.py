# SPDX-License-Identifier: GPL-2.0-or-later
"""What a replay has shown, as figures."""

from __future__ import annotations

import pytest

from ksmd_ctl.host.sample import Sample
from ksmd_ctl.replay.comparison import replay_report
from ksmd_ctl.replay.player import Point
from ksmd_ctl.reports.recording import RecordedHost

HOST = RecordedHost("kernel", "6.18", "7.2", 4096, (0,), "0", 0.0, 3.0, True, 1, False, False, None)


def point(seconds: float, recorded: int | None, replayed: int, cpu: float = 0.0) -> Point:
    def sample(sharing: int | None, base: float) -> Sample:
        readings = {"pages_shared": 1, "pages_unshared": 0, "pages_volatile": 0, "ksmd_cpu_seconds": base + cpu}
        return Sample(seconds, readings if sharing is None else readings | {"pages_sharing": sharing})

    return Point(sample(recorded, 100.0), sample(replayed, 0.0))


def test_the_difference_is_a_share_of_the_greatest_recorded() -> None:
    points = [point(0, 0, 0), point(1, 50, 60), point(2, 200, 160)]
    found = replay_report(HOST, "7.2", {}, "", points, []).pages_sharing_difference
    assert (found.median, found.largest) == (pytest.approx(0.05), pytest.approx(0.2))


def test_without_a_recorded_value_there_is_none() -> None:
    for recorded in (0, None):
        found = replay_report(HOST, "7.2", {}, "", [point(0, recorded, 5), point(1, recorded, 7)], [])
        assert found.pages_sharing_difference.median is None
    assert found.recorded.saved_bytes is None
    assert found.timeline[0].recorded.pages_sharing is None


def test_cpu_seconds_are_since_the_beginning_and_saving_is_in_the_mean() -> None:
    points = [point(0, 10, 20), point(1, 10, 20, 0.5), point(4, 10, 20, 2.0)]
    found = replay_report(HOST, "7.2", {}, "", points, [])
    assert found.recorded.ksmd_cpu_seconds == pytest.approx(2.0)
    assert found.replayed.ksmd_cpu_seconds == pytest.approx(2.0)
    assert found.replayed.saved_bytes == pytest.approx(20 * 4096 - 21 * 64)


def test_the_mean_counts_each_end_of_a_time_alike_and_one_moment_is_its_own() -> None:
    def mean(*points: Point) -> float | None:
        return replay_report(HOST, "7.2", {}, "", points, []).replayed.saved_bytes

    saved = [20 * 4096 - 21 * 64, 60 * 4096 - 61 * 64]
    assert mean(point(0, 0, 20)) == pytest.approx(saved[0])
    assert mean(point(0, 0, 20), point(0, 0, 60)) == pytest.approx(saved[0])
    assert mean(point(0, 0, 20), point(1, 0, 60)) == pytest.approx(sum(saved) / 2)
    # Twice as long as the step.
    assert mean(point(0, 0, 20), point(1, 0, 60), point(3, 0, 60)) == pytest.approx((sum(saved) / 2 + 2 * saved[1]) / 3)


def test_a_long_timeline_is_thinned_and_the_difference_is_of_all() -> None:
    points = [point(second, 100, 100 if second != 777 else 50) for second in range(2000)]
    found = replay_report(HOST, "7.2", {}, "", points, [])
    assert len(found.timeline) == 400
    assert found.pages_sharing_difference.largest == pytest.approx(0.5)
