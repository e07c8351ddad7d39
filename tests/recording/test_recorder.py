# SPDX-License-Identifier: GPL-2.0-or-later
"""When a recorder takes samples and looks at pages, and what that may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.page_sample import LookSteps, PageLook, ProcessCounts
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.recorder import Heard, Recorder, ServiceEvent
from tests.replay.recordings import Stage


class Busy:
    """A sampler whose looks take CPU time in many steps of about a millisecond.

    :param first: done in the first step of each look
    """

    def __init__(self, steps: int, first: Callable[[], object] = lambda: None) -> None:
        self.steps = steps
        self.first = first
        self.worked = 0.0

    def pages(self) -> int:
        return 0

    def counts(self, known: Collection[ProcessId]) -> Mapping[ProcessId, ProcessCounts]:
        return {}

    def look(self, *, zero_pages: bool = False) -> LookSteps:
        self.first()
        for _ in range(self.steps):
            before = time.process_time()
            while time.process_time() < before + 0.001:
                pass
            self.worked += time.process_time() - before
            yield
        return PageLook(0.0, 0.0, self.worked, ())


def test_looks_take_no_more_than_their_share(tmp_path: Path) -> None:
    stage, busy = Stage(tmp_path / "r"), Busy(10_000)
    recording = Recorder(stage.host, busy, stage.writer, cpu=0.1)
    began = time.monotonic()
    # The simulated host's time follows this machine's.
    stage.host._source, stage.host._offset = time.monotonic, -began
    recording.run(lambda: False, 1.5, 0.25, lambda: None)
    # One step of a look may be ahead.
    assert 0 < busy.worked <= 0.1 * (time.monotonic() - began) + 0.1
    stage.end()
    with Recording(tmp_path / "r") as found:
        # It was still at its first look, and took samples all the same.
        assert found.looks() == ()
        assert len(list(found.samples())) >= 4


def test_a_knob_that_changes_is_seen_before_the_next_sample(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    busy = Busy(1, lambda: stage.host.set(Knob.RUN, 1))
    recording = Recorder(stage.host, busy, stage.writer, cpu=1.0)
    stage.host._source, stage.host._offset = time.monotonic, -time.monotonic()
    recording.run(lambda: False, 1.0, 3600.0, lambda: None)
    stage.end()
    with Recording(tmp_path / "r") as found:
        # The last is that of its end.
        assert [sample.number("run") for sample in found.samples()] == [0, 1, 1]
        assert [sample.time_seconds < 0.9 for sample in found.samples()] == [True, True, False]
        assert [event.text for event in found.events()] == ["run: 0 → 1"]


def test_it_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    stage, busy = Stage(tmp_path / "r"), Busy(10_000)
    recording = Recorder(stage.host, busy, stage.writer, cpu=1.0)
    stage.host._source, stage.host._offset = time.monotonic, -time.monotonic()
    # Long before the next sample.
    recording.run(lambda: recording.seconds > 0.3, 3600.0, 3600.0, lambda: None)
    assert recording.looks == 0
    stage.end()
    with Recording(tmp_path / "r") as found:
        # The last is that of its end.
        _, last = found.samples()
        assert 0.3 < last.time_seconds < 60


def test_who_wrote_a_knob_and_what_a_service_tells_are_events(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    told = [Heard({Knob.RUN: "bash (pid 7)"}, (ServiceEvent(time.time() + 3, "foreign", "run was changed"),))]

    def listen(seconds: float) -> Heard:
        if told:
            stage.host.set(Knob.RUN, 1)
            return told.pop()
        stage.host.advance(max(seconds, 0.01))
        return Heard()

    recording = Recorder(stage.host, Busy(1), stage.writer, listen=listen)
    recording.run(lambda: False, 1.0, 0.5, lambda: None)
    stage.host.set(Knob.RUN, 0)
    recording.sample()
    stage.end()
    with Recording(tmp_path / "r") as found:
        events = [event for event in found.events() if event.kind != "process"]
    assert [(event.kind, event.text, event.service) for event in events] == [
        ("knob", "run: 0 → 1 by bash (pid 7)", False),
        # Nobody told who this was.
        ("knob", "run: 1 → 0", False),
        ("foreign", "run was changed", True),
    ]
    assert events[-1].seconds == pytest.approx(3.0, abs=0.5)


def test_who_wrote_may_be_told_after_the_change_was_seen_and_before(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    told: list[Mapping[Knob, str]] = []

    def listen(seconds: float) -> Heard:
        return Heard(told.pop(0) if told else {})

    recording = Recorder(stage.host, Busy(1), stage.writer, listen=listen)
    recording.sample()
    stage.host.set(Knob.RUN, 1)
    told += [{Knob.RUN: "late (pid 1)"}]
    recording.sample()
    # A truncation is told before the write that follows.
    told += [{Knob.RUN: "early (pid 2)"}]
    recording.sample()
    stage.host.set(Knob.RUN, 0)
    recording.sample()
    stage.host.set(Knob.RUN, 1)
    recording.sample()
    stage.end()
    with Recording(tmp_path / "r") as found:
        assert [event.text for event in found.events()] == [
            "run: 0 → 1 by late (pid 1)",
            "run: 1 → 0 by early (pid 2)",
            "run: 0 → 1",
        ]


def test_samples_that_take_long_leave_time_for_looks(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "r")
    source, began = time.monotonic, time.monotonic()
    stage.host._source, stage.host._offset = source, -began
    recording = Recorder(stage.host, busy := Busy(20), stage.writer, cpu=1.0)
    recording.run(lambda: False, 1.0, 0.01, lambda: time.sleep(0.05))
    assert busy.worked > 0.015
    assert recording.looks == 1
    stage.end()
