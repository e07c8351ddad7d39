# SPDX-License-Identifier: GPL-2.0-or-later
"""Which KSM pages are more than max_page_sharing explains."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.memory import ProcessId, TwinPart
from ksmd_ctl.twins import TwinFrame, judge, parts_of

MOST = 10**6
ONE, OTHER = ProcessId(1, 10), ProcessId(2, 20)


def group(*mapped: int, first: int = 0, stuck: str = "") -> list[TwinFrame]:
    return [TwinFrame(first + number, count, stuck) for number, count in enumerate(mapped)]


def test_what_the_limit_explains_is_no_twin() -> None:
    for mapped in [(256,), (256, 256, 3), (256, 255), (2,), (300, 256)]:
        assert judge([group(*mapped)], 256, MOST).unrealised == 0


def test_twins_are_given_up_smallest_first() -> None:
    found = judge([group(2, 3)], 256, MOST)
    assert (found.unrealised, found.left, found.chosen, found.pages) == (1, {}, (0,), 2)
    found = judge([group(5, 3, 200, 1)], 256, MOST)
    assert (found.unrealised, found.chosen, found.pages) == (3, (3, 1, 0), 9)


def test_dups_that_lost_pages_are_twins_too() -> None:
    found = judge([group(130, 120)], 256, MOST)
    assert (found.unrealised, found.chosen, found.pages) == (1, (1,), 120)
    assert judge([group(130, 127)], 256, MOST).unrealised == 0


def test_a_page_above_the_limit_has_no_room() -> None:
    # 440 mappings need two pages, and there are three: but who maps the first can't come to the second.
    assert judge([group(400, 20, 20)], 256, MOST).chosen == (1,)
    assert judge([group(400, 20)], 256, MOST).unrealised == 0


def test_groups_share_the_pages_that_may_be_un_merged_and_those_with_most_gain_come_first() -> None:
    groups = [group(4, 4), group(2, 9, first=10), group(3, 3, first=20)]
    found = judge(groups, 256, 5)
    assert (found.unrealised, found.chosen, found.pages) == (3, (10, 20), 5)
    assert judge(groups, 256, 0).chosen == ()


def test_what_is_stuck_is_counted_and_named_and_its_twin_moves_where_it_can() -> None:
    found = judge([[TwinFrame(0, 2, "stuck"), TwinFrame(1, 5)]], 256, MOST)
    assert (found.unrealised, found.left, found.chosen) == (1, {}, (1,))
    found = judge([[TwinFrame(0, 2, "stuck"), TwinFrame(1, 5, "stuck"), TwinFrame(2, 1)]], 256, MOST)
    assert (found.unrealised, found.left, found.chosen) == (2, {"stuck": 1}, (2,))


def test_what_is_in_doubt_comes_last() -> None:
    groups = [[TwinFrame(0, 1, doubtful=True), TwinFrame(1, 9, doubtful=True)], group(4, 4, first=2)]
    assert judge(groups, 256, MOST).chosen == (2, 0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(2, 9))
def test_as_many_are_given_up_as_can_be_and_those_that_stay_take_all_of_them(mapped: list[int], limit: int) -> None:
    frames = group(*mapped)
    found = judge([frames], limit, MOST)
    assert found.unrealised == len(found.chosen) == len(set(found.chosen))
    assert found.pages == sum(mapped[frame] for frame in found.chosen)

    def fits(gone: tuple[int, ...]) -> bool:
        room = sum(max(0, limit - count) for frame, count in enumerate(mapped) if frame not in gone)
        return sum(mapped[frame] for frame in gone) <= room

    assert fits(found.chosen)
    for size in range(found.unrealised + 1, len(mapped) + 1):
        assert not any(map(fits, itertools.combinations(range(len(mapped)), size)))
    if max(mapped) <= limit:
        assert len(mapped) - found.unrealised >= -(-sum(mapped) // limit)


def test_pages_as_ranges_of_processes() -> None:
    found = parts_of(
        [(OTHER, 0, 0x3000), (ONE, 1, 0x9000), (ONE, 1, 0x2000), (ONE, 1, 0x1000), (ONE, 0, 0x3000)], 0x1000
    )
    assert found == (
        TwinPart(ONE, 0, ((0x3000, 0x4000),)),
        TwinPart(ONE, 1, ((0x1000, 0x3000), (0x9000, 0xA000))),
        TwinPart(OTHER, 0, ((0x3000, 0x4000),)),
    )
