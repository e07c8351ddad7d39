# SPDX-License-Identifier: GPL-2.0-or-later
"""A recording to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.host.knobs import Knob
from tests.replay.recordings import Stage, contents


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A recording of two processes."""
    stage = Stage(tmp_path / "r.ksm")
    pids = [stage.spawn(contents(number, 60), number) for number in range(2)]
    stage.host.set(Knob.PAGES_TO_SCAN, 60)
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(3)
    stage.change(lambda: stage.write(pids[0], 5, page_content("new")))
    stage.change(lambda: stage.host.machine.exit(pids[1]))
    stage.pass_time(1)
    return stage.end()
