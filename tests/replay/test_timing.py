# SPDX-License-Identifier: GPL-2.0-or-later
"""When pages changed, as far as looks and the growth of processes tell."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from ksmd_ctl.errors import Unparsable
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.page_sample import EqualPages, PageLook, ProcessCounts, ProcessPages, SampledPage
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.writer import Writer
from ksmd_ctl.replay.timing import PageHistory, Shares, read_pages

FACTS = {"program": "0", "kind": "kernel", "release": "6.18", "profile": "7.2", "page_size_bytes": 4096, "begun": 0.0}
ONE = ProcessId(1, 1)


class Made:
    """A recording that is made of looks at one process."""

    def __init__(self, path: Path, one_in: int = 1) -> None:
        self.path = path
        self.writer = Writer(path, 0)
        more = {"one_in": one_in, "keyed": False, "anonymous": False, "numa": True, "service": None}
        self.writer.facts(FACTS | more)

    def look(
        self,
        seconds: float,
        pages: dict[int, int],
        *,
        began: float = -1.0,
        total: int = 0,
        equal: EqualPages | None = None,
    ) -> None:
        sampled = {page << 12: SampledPage(number, 0) for page, number in pages.items()}
        one = ProcessPages(ONE, "p", seconds, total or len(pages), sampled=sampled)
        self.writer.look(PageLook(seconds - 0.5, seconds, 0.1, (one,), equal=equal), float, lambda _: began)

    def read(self) -> PageHistory:
        self.writer.close()
        with Recording(self.path) as recording:
            return read_pages(recording)


def times(history: PageHistory) -> dict[int, list[float]]:
    """By page, when it changed."""
    found: dict[int, list[float]] = {}
    for seconds, changes in sorted(history.changes.items()):
        for rows in changes.values():
            for row in rows:
                found.setdefault(row.page, []).append(seconds)
    return found


def test_what_was_there_before_is_there_from_the_beginning(tmp_path: Path) -> None:
    made = Made(tmp_path / "r")
    made.look(3.0, {10: 1, 12: 2})
    history = made.read()
    assert times(history) == {10: [0.0], 12: [0.0]}
    assert history.places == {1: {10: 0, 12: 1}}


def test_a_page_has_its_place_by_its_address_whenever_it_comes(tmp_path: Path) -> None:
    made = Made(tmp_path / "r")
    made.look(3.0, {10: 1, 30: 2})
    made.look(9.0, {10: 1, 20: 3, 30: 2})
    assert made.read().places == {1: {10: 0, 20: 1, 30: 2}}


def test_what_was_written_between_two_looks_is_spread_over_that_time(tmp_path: Path) -> None:
    made = Made(tmp_path / "r")
    made.look(2.0, {page: 1000 + page for page in range(200)})
    made.look(10.0, {page: 2000 + page for page in range(200)})
    second = [found[1] for found in times(made.read()).values()]
    assert len(second) == 200
    assert min(second) >= 2.0
    assert max(second) == 10.0
    assert len(set(second)) == 8
    assert sum(second) / 200 == pytest.approx(6.5, abs=0.6)


def test_new_pages_come_as_the_process_grew(tmp_path: Path) -> None:
    """A process that starts at 4 s, and writes all of its memory from 7 to 8 s."""
    made = Made(tmp_path / "r")
    made.look(1.0, {})
    for seconds, resident in ((5.0, 100), (6.0, 100), (7.0, 100), (8.0, 1100), (9.0, 1100)):
        made.writer.counts(seconds, {ONE: ProcessCounts(resident)})
    made.look(10.0, {page: 1000 + page for page in range(100)}, began=4.0)
    found = [seconds for (seconds,) in times(made.read()).values()]
    # Its first 100 pages, in memory at 5 s, are counted too.
    assert sum(7.0 <= seconds <= 8.0 for seconds in found) >= 90
    assert found == sorted(found)


def test_of_a_process_that_never_grew_new_pages_come_at_equal_steps(tmp_path: Path) -> None:
    made = Made(tmp_path / "r")
    made.look(2.0, {})
    made.look(10.0, {page: 1000 + page for page in range(4)})
    assert sorted(seconds for (seconds,) in times(made.read()).values()) == [3.0, 5.0, 7.0, 9.0]


def test_for_how_many_pages_one_stands_is_counted(tmp_path: Path) -> None:
    made = Made(tmp_path / "r", one_in=8)
    made.look(1.0, {page: page for page in range(10)}, total=90)
    made.look(9.0, {page: page for page in range(10)}, total=100)
    assert [(at, one.pages) for at, one in made.read().shares] == [(0.0, 9.0), (9.0, 10.0)]


@pytest.mark.parametrize(("total", "share"), [(1, 4.0), (1000, 16.0)])
def test_chance_is_corrected_within_limits(tmp_path: Path, total: int, share: float) -> None:
    made = Made(tmp_path / "r", one_in=8)
    made.look(1.0, {page: page for page in range(10)}, total=total)
    assert [(at, one.pages) for at, one in made.read().shares] == [(0.0, share)]


def test_where_all_pages_are_recorded_each_stands_for_itself(tmp_path: Path) -> None:
    made = Made(tmp_path / "r")
    made.look(1.0, {1: 1}, total=77)
    assert [(at, one.pages) for at, one in made.read().shares] == [(0.0, 1)]


def test_a_page_of_a_process_that_is_not_there(tmp_path: Path) -> None:
    made = Made(tmp_path / "r")
    made.look(1.0, {1: 1})
    made.writer._add("page", [(1, 99, 1, 1, 0, 0)])
    with pytest.raises(Unparsable, match="there is no process 99"):
        made.read()


def test_what_pages_with_equals_stand_for_is_counted_apart(tmp_path: Path) -> None:
    """Two contents of the sample have 5 pages; on the host 30 have 70. Then one of the five is written."""
    made = Made(tmp_path / "r", one_in=16)
    pages = {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 4}
    made.look(1.0, pages, total=112, equal=EqualPages(70, 30))
    made.look(9.0, pages | {4: 5}, total=112, equal=EqualPages(60, 20))
    made.look(19.0, pages | {4: 5}, total=112)
    assert made.read().shares == [
        (0.0, Shares(16.0, 15.0, 40 / 3, {1: 16.0})),
        (9.0, Shares(16.0, 20.0, 20.0, {1: 16.0})),
        # It was not counted.
        (19.0, Shares(16.0, 16.0, 16.0, {1: 16.0})),
    ]


def test_the_error_of_a_sample_is_what_samples_differ_by(tmp_path: Path) -> None:
    """Contents with 2 to 20 pages and many pages of zeroes, sampled a hundred times at 1:8."""
    chance = random.Random(1)
    contents = {number: chance.choice((2, 2, 3, 5, 20)) for number in range(1, 2000)}
    zeroes = 4000
    freed = sum(count - 1 for count in contents.values()) + zeroes - 1
    errors, expected = [], []
    for turn in range(100):
        copies = [number for number, count in contents.items() if chance.random() < 1 / 8 for _ in range(count)]
        copies += [0 for _ in range(zeroes) if chance.random() < 1 / 8]
        made = Made(tmp_path / f"{turn}", one_in=8)
        made.look(1.0, dict(enumerate(copies)))
        found = made.read().sampling_error
        assert found is not None
        expected.append(found)
        errors.append(8 * (len(copies) - len(set(copies))) / freed - 1)
    measured = math.sqrt(sum(error**2 for error in errors) / len(errors))
    assert sum(expected) / len(expected) == pytest.approx(measured, rel=0.25)


def test_where_equal_pages_are_counted_the_error_is_half(tmp_path: Path) -> None:
    pages = {0: 1, 1: 1, 2: 2, 3: 2, 4: 3}
    found = []
    for name, equal in (("counted", EqualPages(30, 15)), ("not", None)):
        made = Made(tmp_path / name, one_in=16)
        made.look(1.0, pages, total=80, equal=equal)
        found.append(made.read().sampling_error)
    assert found == [pytest.approx(math.sqrt(15 / 16 / 2) / 2), pytest.approx(math.sqrt(15 / 16 / 2))]


def test_all_pages_have_no_error_and_pages_without_equals_none_that_is_known(tmp_path: Path) -> None:
    for one_in, error in ((1, 0.0), (16, None)):
        made = Made(tmp_path / f"{one_in}", one_in=one_in)
        made.look(1.0, {0: 1, 1: 2}, total=30)
        assert made.read().sampling_error == error
