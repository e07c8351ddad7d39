# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings and replays as HTML: whole, without a script, and what is from a file can't become markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.render.recording import recording_page, replay_page
from ksmd_ctl.replay.comparison import replay_report
from ksmd_ctl.reports.recording import recorded_host, recording_report
from tests.lint.test_lint import ROOT
from tests.render.elements import Elements
from tests.render.recording_picture import picture
from tests.replay.recordings import Stage, contents, replayed

BAD = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path: Path = tmp_path_factory.mktemp("recording") / "r"
    stage = Stage(path)
    for number in range(2):
        stage.host.machine.processes[stage.spawn(contents(number, 60), number)].name = BAD
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(5)
    stage.writer.event(2.0, "knob", BAD)
    stage.end()
    with Recording(path) as recording:
        document = encode_fields(recording_report(recording))
        host = recorded_host(recording.facts, recording.nodes(), list(recording.samples()))
    points = replayed(path)
    replay = encode_fields(replay_report(host, "7.2", {"smart_scan": 0}, "adaptive", points, [BAD]))
    return {"report": recording_page(document), "replay": replay_page(replay)}


@pytest.mark.parametrize("name", ["report", "replay"])
def test_a_page_is_whole_and_needs_nothing_else(name: str, pages: dict[str, str]) -> None:
    page = pages[name]
    elements = Elements(page)
    assert elements.open == []
    tags = {tag for tag, _ in elements.tags}
    assert {"svg", "table", "path"} <= tags
    assert not tags & {"script", "img", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import|\son[a-z]+=", page)
    assert BAD not in page
    assert "nan" not in page.lower().replace("nano", "")


def test_a_page_says_what_was_found(pages: dict[str, str]) -> None:
    assert "Who has most mergeable memory" in pages["report"]
    assert "&lt;script&gt;" in pages["report"]
    assert "smart_scan = 0, policy &quot;adaptive&quot;" in pages["replay"]
    assert "difference 0.0 % in the median and 0.0 % at most" in pages["replay"]


def test_the_picture_in_the_documents_is_what_is_drawn() -> None:
    """`python -m tests.render.recording_picture >docs/replay.svg` makes it."""
    assert (ROOT / "docs/replay.svg").read_text() == picture()
