# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings and replays as HTML: whole, without a script, and what is from a file can't become markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.render.recording import Curve, chart, recording_page, replay_page, table
from ksmd_ctl.replay.comparison import replay_report
from ksmd_ctl.reports.recording import recorded_host, recording_report
from tests.lint.test_lint import ROOT
from tests.render.recording_picture import picture
from tests.replay.recordings import Stage, contents, replayed

_VOID = {"meta"}
BAD = "<script>alert(1)</script>\"'&"


class Checker(HTMLParser):
    """Every tag is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)


def checked(page: str) -> set[str]:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker.tags


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
    tags = checked(page)
    assert {"svg", "table", "path"} <= tags
    assert not tags & {"script", "img", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import|\son[a-z]+=", page)
    assert BAD not in page
    assert "nan" not in page.lower().replace("nano", "")


def test_a_page_says_what_was_found(pages: dict[str, str]) -> None:
    assert "Who has most mergeable memory" in pages["report"]
    assert "&lt;script&gt;" in pages["report"]
    assert "smart_scan = 0, policy &quot;adaptive&quot;" in pages["replay"]
    assert "differs by 0.0 % in the median and 0.0 % at most" in pages["replay"]


def test_a_line_is_interrupted_where_nothing_is_known() -> None:
    picture = chart("x", [Curve("a", [(0.0, 1.0), (1.0, None), (2.0, 3.0), (3.0, 4.0)])], (), str)
    (path,) = re.findall(r'class="line c0" d="([^"]*)"', picture)
    assert re.sub(r"[^ML]", "", path) == "MML"


def test_a_chart_without_values_says_so() -> None:
    assert "not known on this host" in chart("x", [Curve("a", [(0.0, None)])], (), str)
    assert checked(chart("x", [Curve("a", [(0.0, 0.0)])], [(0.0, BAD)], str)) >= {"svg"}


def test_a_table_without_rows_is_none() -> None:
    assert table("x", ("a",), []) == ""


def test_the_picture_in_the_documents_is_what_is_drawn() -> None:
    """`python -m tests.render.recording_picture >docs/replay.svg` makes it."""
    assert (ROOT / "docs/replay.svg").read_text() == picture()
