# SPDX-License-Identifier: GPL-2.0-or-later
"""A recording that is replayed: exactly where all is known, and nearly where contents are sampled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.errors import UsageError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.replay.player import Choices, Player, Point
from tests.replay.recordings import Stage, contents, replayed

COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "full_scans", "pages_scanned", "stable_node_chains")


def differing(points: list[Point]) -> list[tuple[float, str, object, object]]:
    return [
        (point.recorded.time_seconds, name, point.recorded.number(name), point.replayed.number(name))
        for point in points
        for name in COUNTERS
        if point.recorded.number(name) != point.replayed.number(name)
    ]


def recorded(path: Path, *, one_in: int = 1, pages: int = 300, knobs: dict[Knob, int] | None = None) -> Path:
    """Processes come, write and go on two nodes while ksmd works."""
    stage, chance = Stage(path, one_in=one_in), random.Random(7)
    for knob, value in ({Knob.PAGES_TO_SCAN: pages // 20, Knob.SMART_SCAN: 0} | (knobs or {})).items():
        stage.host.set(knob, value)
    pids = [stage.spawn(contents(number, pages), number % 2) for number in range(3)]
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    for round_ in range(4):
        stage.pass_time(3)
        stage.change(lambda number=round_ + 3: pids.append(stage.spawn(contents(number, pages), number % 2)))
        stage.pass_time(2)
        for page in chance.sample(range(pages), 10):
            stage.write(pids[round_], page, page_content(f"written {round_} {page}"))
        stage.recorder.look()
        stage.recorder.sample()
    stage.change(lambda: stage.host.machine.exit(pids[0]))
    stage.pass_time(5)
    return stage.end()


@pytest.mark.parametrize(
    "knobs",
    [{}, {Knob.SMART_SCAN: 1}, {Knob.MERGE_ACROSS_NODES: 0}, {Knob.USE_ZERO_PAGES: 1}, {Knob.MAX_PAGE_SHARING: 4}],
)
def test_everything_that_is_known_is_replayed_exactly(tmp_path: Path, knobs: dict[Knob, int]) -> None:
    stage = Stage(tmp_path / "r.ksm")
    for knob, value in ({Knob.PAGES_TO_SCAN: 15} | knobs).items():
        stage.host.set(knob, value)
    pids = [stage.spawn(contents(number, 300), number % 2) for number in range(3)]
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(2)
    stage.change(lambda: pids.append(stage.spawn(contents(3, 300), 1)))
    stage.pass_time(2)
    stage.change(lambda: [stage.write(pids[1], page, page_content(f"written {page}")) for page in range(0, 300, 7)])
    stage.pass_time(2)
    stage.change(lambda: stage.host.set(Knob.PAGES_TO_SCAN, 50))
    stage.pass_time(1)
    stage.change(lambda: stage.host.machine.exit(pids[0]))
    stage.pass_time(2)
    points = replayed(stage.end())
    assert points[-1].recorded.number("pages_sharing") > 200  # type: ignore[operator]
    assert differing(points) == []
