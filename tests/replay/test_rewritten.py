# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that every look finds written: the kernel does not merge them, and neither does the replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.page_sample import PageLook, ProcessPages, SampledPage
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.writer import Writer
from ksmd_ctl.replay.rewritten import rewritten
from tests.replay.recordings import Stage, replayed

FACTS = {"program": "0", "kind": "kernel", "release": "6.18", "profile": "7.2", "page_size_bytes": 4096, "begun": 0.0}
MORE = {"keyed": False, "anonymous": False, "numa": True, "service": None}
ONE = ProcessId(1, 1)
# A page that is merged, or shared by fork.
MERGED = 1000


def found(path: Path, looks: Sequence[int | None], *, one_in: int = 1, totals: Sequence[int] = ()) -> set[int]:
    """The looks whose content of the page is taken for one of those; None is a look without the page.

    :param totals: all pages of the process at each look
    """
    writer = Writer(path, 0)
    writer.facts({**FACTS, **MORE, "one_in": one_in})
    for look, number in enumerate(looks):
        sampled = {} if number is None else {0x5000: SampledPage(number % MERGED, 0, number // MERGED)}
        sampled[0x9000] = SampledPage(999, 0)
        one = ProcessPages(ONE, "p", look, totals[look] if totals else 50, sampled=sampled)
        writer.look(PageLook(look, look, 0.1, (one,)), float, lambda _: -1.0)
    writer.close()
    with Recording(path) as recording:
        return {look for look, process, page in rewritten(recording) if (process, page) == (1, 5)}


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([1, 1, 1, 1], set()),
        # Written once.
        ([1, 1, 2, 2], set()),
        ([1, 2, 2, 2], set()),
        # What it had before and after may have been there for long.
        ([1, 1, 2, 3, 3, 3], {3}),
        ([1, 2, 3], {1, 2, 3}),
        ([1, 1, 2, 1, 2, 1, 1], {3, 4, 5}),
        # The third look found it merged.
        ([1, 2, MERGED + 3, 4, 5], {1, 2, 4, 5}),
        # It was freed, and is a new one.
        ([1, None, 2, None, 3], set()),
        ([None, 1, 2], set()),
        ([None, 1, 2, 3], {2, 3, 4}),
    ],
)
def test_what_is_written_between_any_two_looks(looks: list[int | None], expected: set[int], tmp_path: Path) -> None:
    assert found(tmp_path / "r", looks) == expected


@pytest.mark.parametrize(
    ("looks", "totals", "expected"),
    [
        # Written with a content of the sample, and with another one: it was as many pages all the time.
        ([None, 1, None, 2, None], [50] * 5, {2, 4}),
        ([None, 1, 1, None], [50] * 4, set()),
        # It is one of a hundred pages that are new, or are freed.
        ([None, 1, None], [50, 150, 150], set()),
        ([None, 1, None], [50, 50, 0], set()),
    ],
)
def test_in_a_sample_a_page_that_is_written_comes_and_goes(
    looks: list[int | None], totals: list[int], expected: set[int], tmp_path: Path
) -> None:
    assert found(tmp_path / "r", looks, one_in=8, totals=totals) == expected


def test_they_are_not_merged_as_they_were_not(tmp_path: Path) -> None:
    """Half of the pages of two processes always have the same content, and another one at each scan."""
    stage = Stage(tmp_path / "r.ksm")
    stage.host.set(Knob.SMART_SCAN, 0)
    stage.host.set(Knob.PAGES_TO_SCAN, 10)
    pids = [stage.spawn([page_content(f"common {page}") for page in range(40)]) for _ in range(2)]

    def tick() -> None:
        for page in range(20):
            for pid in pids:
                stage.write(pid, page, page_content(f"{stage.host.clock()} {page}"))

    tick()
    stage.host.set(Knob.RUN, 1)
    for _ in range(6):
        stage.recorder.sample()
        stage.recorder.look()
        for _ in range(20):
            stage.host.advance(0.05)
            tick()
    stage.recorder.sample()
    points = replayed(stage.end())
    assert points[-1].recorded.number("pages_sharing") == 20
    assert [point.replayed.number("pages_sharing") for point in points] == [
        point.recorded.number("pages_sharing") for point in points
    ]
    last = points[-1]
    for name in ("pages_volatile", "pages_unshared"):
        assert last.replayed.number(name) == last.recorded.number(name), name
