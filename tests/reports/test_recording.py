# SPDX-License-Identifier: GPL-2.0-or-later
"""What a recording holds, as a document."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.engine.memory import PAGE_SIZE, page_content
from ksmd_ctl.errors import Unparsable
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.reports.recording import RecordingReport, recording_report, thinned, timeline
from tests.replay.recordings import Stage, contents


def report(path: Path) -> RecordingReport:
    with Recording(path) as recording:
        return recording_report(recording)


def labels(*words: str) -> list[bytes]:
    return [page_content(word) for word in words]


def test_who_has_what_in_common(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    pids = [
        stage.spawn(labels("a", "a", "b", "c", "x"), 0),
        stage.spawn(labels("b", "c", "d", "e"), 1),
        stage.spawn(labels("c", "f"), 0),
    ]
    for pid, unit in zip(pids, ("one", "other", "one"), strict=True):
        stage.host.machine.processes[pid].unit = f"{unit}.service"
        stage.host.machine.processes[pid].name = unit
    stage.recorder.sample()
    stage.recorder.look()
    found = report(stage.end())
    one, other = found.groups
    assert (one.group, one.processes, one.mergeable_bytes) == ("one", 2, 7 * PAGE_SIZE)
    # a and a; b; c and c; and of these b, c and c have one elsewhere.
    assert (one.equal_bytes, one.shared_bytes) == (5 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert (other.equal_bytes, other.shared_bytes) == (2 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert [(pair.groups, pair.common_bytes) for pair in found.pairs] == [(("one", "other"), 2 * PAGE_SIZE)]
    assert (found.contents.pages, found.contents.sampled) == (11, 11)
    assert found.contents.could_save_bytes == (11 - 7) * PAGE_SIZE


@pytest.mark.parametrize("late", [False, True])
def test_what_fork_shares_is_one_page(tmp_path: Path, late: bool) -> None:
    """It is shared already: merging would not free it. Whether it was shared at the first look is the same."""
    stage = Stage(tmp_path / "r")
    parent = stage.spawn(labels("a", "a", "b", "c"), 0)
    stage.spawn(labels("c"), 0)
    if late:
        stage.recorder.sample()
        stage.recorder.look()
    for name in ("first", "second"):
        stage.host.machine.fork(parent, name)
    stage.recorder.sample()
    stage.recorder.look()
    found = report(stage.end())
    assert (found.contents.pages, found.contents.could_save_bytes) == (13, 2 * PAGE_SIZE)


def test_a_ksm_page_has_so_many_places(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    stage.host.set(Knob.MAX_PAGE_SHARING, 4)
    stage.spawn(labels(*["a"] * 10, "b"), 0)
    stage.recorder.sample()
    stage.recorder.look()
    assert report(stage.end()).contents.could_save_bytes == (10 - 3) * PAGE_SIZE


def test_a_limit_that_cannot_be_is_refused(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    stage.spawn(labels("a", "a", "b"), 0)
    stage.recorder.sample()
    stage.recorder.look()
    path = stage.end()
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE sample SET max_page_sharing = 0")
    with pytest.raises(Unparsable, match="max_page_sharing is '0'"):
        report(path)


def test_a_sample_stands_for_all(tmp_path: Path) -> None:
    whole, part = (Stage(tmp_path / str(one_in), one_in=one_in, key=bytes(range(16))) for one_in in (1, 8))
    for stage in (whole, part):
        for number in range(3):
            stage.spawn(contents(number, 6000), 0)
        stage.recorder.sample()
        stage.recorder.look()
    of_all, of_some = report(whole.end()), report(part.end())
    assert of_some.contents.pages == of_all.contents.pages == 18_000
    assert of_some.contents.sampled == pytest.approx(18_000 / 8, rel=0.1)
    assert of_some.contents.could_save_bytes == pytest.approx(of_all.contents.could_save_bytes, rel=0.05)


def test_what_is_gone_at_the_last_look_is_not_counted(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    pids = [stage.spawn(labels("a", "b"), 0), stage.spawn(labels("a", "b", "c"), 0)]
    stage.recorder.sample()
    stage.recorder.look()
    stage.host.machine.exit(pids[0])
    stage.recorder.sample()
    stage.recorder.look()
    found = report(stage.end())
    assert (found.contents.pages, found.contents.could_save_bytes) == (3, 0)
    assert [group.processes for group in found.groups] == [1]
    assert found.pairs == ()
    assert found.contents.looks == 2


def test_without_a_look_there_are_counters_and_events(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    stage.recorder.sample()
    stage.host.set(Knob.RUN, 1)
    stage.pass_time(2)
    found = report(stage.end())
    assert found.groups == found.pairs == ()
    assert found.contents.seconds is None
    assert [event.text for event in found.events] == ["run: 0 → 1"]
    assert [point.run for point in found.timeline] == [0, 1, 1]


def test_rates_are_over_a_second_or_more() -> None:
    samples = [
        Sample(seconds, {"pages_scanned": scanned, "ksmd_cpu_seconds": scanned / 1e5})
        for seconds, scanned in ((0.0, 0), (1.0, 100), (2.0, 200), (2.001, 300), (3.0, 300))
    ]
    found = [point.pages_scanned_per_second for point in timeline(samples, PAGE_SIZE)]
    assert found[0] is None
    assert found[1:] == pytest.approx([100, 100, 200 / 1.001, 100])


def test_what_is_not_known_is_none() -> None:
    (point,) = timeline([Sample(0.0, {})], PAGE_SIZE)
    assert (point.run, point.pages_sharing, point.saved_bytes, point.ksmd_cpu_ratio) == (None,) * 4


@given(st.integers(0, 3000), st.integers(2, 500))
def test_thinned_keeps_both_ends(count: int, most: int) -> None:
    found = thinned(range(count), most)
    assert len(found) == min(count, most)
    assert list(found) == sorted(set(found))
    if count:
        assert (found[0], found[-1]) == (0, count - 1)
