# SPDX-License-Identifier: GPL-2.0-or-later
"""Which KSM pages are more than max_page_sharing explains."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.duplicates import KsmPage, reclaimable, unshare_parts
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import UnsharePart

MOST = 10**6
ONE, OTHER = ProcessId(1, 10), ProcessId(2, 20)


def group(*mapped: int, first: int = 0) -> list[KsmPage]:
    return [KsmPage(first + number, 0, count) for number, count in enumerate(mapped)]


def test_what_the_limit_explains_is_no_twin() -> None:
    for mapped in [(256,), (256, 256, 3), (256, 255), (2,), (300, 256)]:
        assert reclaimable([group(*mapped)], 256, MOST).pages == 0


def test_twins_are_given_up_smallest_first() -> None:
    found = reclaimable([group(2, 3)], 256, MOST)
    assert (found.pages, found.left, found.chosen, found.chosen_mappings) == (1, {}, (0,), 2)
    found = reclaimable([group(5, 3, 200, 1)], 256, MOST)
    assert (found.pages, found.chosen, found.chosen_mappings) == (3, (3, 1, 0), 9)


def test_dups_that_lost_pages_are_twins_too() -> None:
    found = reclaimable([group(130, 120)], 256, MOST)
    assert (found.pages, found.chosen, found.chosen_mappings) == (1, (1,), 120)
    assert reclaimable([group(130, 127)], 256, MOST).pages == 0


def test_a_page_above_the_limit_has_no_room() -> None:
    # 440 mappings need two pages, and there are three: but who maps the first can't come to the second.
    assert reclaimable([group(400, 20, 20)], 256, MOST).chosen == (1,)
    assert reclaimable([group(400, 20)], 256, MOST).pages == 0


def test_groups_share_the_pages_that_may_be_un_merged_and_those_with_most_gain_come_first() -> None:
    groups = [group(4, 4), group(2, 9, first=10), group(3, 3, first=20)]
    found = reclaimable(groups, 256, 5)
    assert (found.pages, found.chosen, found.chosen_mappings) == (3, (10, 20), 5)
    assert reclaimable(groups, 256, 0).chosen == ()


def test_what_is_stuck_is_counted_and_named_and_its_twin_moves_where_it_can() -> None:
    found = reclaimable([[KsmPage(0, 0, 2, "stuck"), KsmPage(1, 0, 5)]], 256, MOST)
    assert (found.pages, found.left, found.chosen) == (1, {}, (1,))
    found = reclaimable([[KsmPage(0, 0, 2, "stuck"), KsmPage(1, 0, 5, "stuck"), KsmPage(2, 0, 1)]], 256, MOST)
    assert (found.pages, found.left, found.chosen) == (2, {"stuck": 1}, (2,))


def test_what_is_in_doubt_comes_last() -> None:
    groups = [[KsmPage(0, 0, 1, doubtful=True), KsmPage(1, 0, 9, doubtful=True)], group(4, 4, first=2)]
    assert reclaimable(groups, 256, MOST).chosen == (2, 0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(2, 9))
def test_as_many_are_given_up_as_can_be_and_those_that_stay_take_all_of_them(mapped: list[int], limit: int) -> None:
    frames = group(*mapped)
    found = reclaimable([frames], limit, MOST)
    assert found.pages == len(found.chosen) == len(set(found.chosen))
    assert found.chosen_mappings == sum(mapped[frame] for frame in found.chosen)

    def fits(gone: tuple[int, ...]) -> bool:
        room = sum(max(0, limit - count) for frame, count in enumerate(mapped) if frame not in gone)
        return sum(mapped[frame] for frame in gone) <= room

    assert fits(found.chosen)
    for size in range(found.pages + 1, len(mapped) + 1):
        assert not any(map(fits, itertools.combinations(range(len(mapped)), size)))
    if max(mapped) <= limit:
        assert len(mapped) - found.pages >= -(-sum(mapped) // limit)


def test_pages_as_ranges_of_processes() -> None:
    found = unshare_parts(
        [(OTHER, 0, 0x3000), (ONE, 1, 0x9000), (ONE, 1, 0x2000), (ONE, 1, 0x1000), (ONE, 0, 0x3000)], 0x1000
    )
    assert found == (
        UnsharePart(ONE, ((0x3000, 0x4000),), 0),
        UnsharePart(ONE, ((0x1000, 0x3000), (0x9000, 0xA000)), 1),
        UnsharePart(OTHER, ((0x3000, 0x4000),), 0),
    )
