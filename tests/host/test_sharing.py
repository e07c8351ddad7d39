# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted of frames: sums make the whole, coarser groups are as if counted, and a sample tells of all."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.codec import decode, encode
from ksmd_ctl.host.memory import KsmDetection
from ksmd_ctl.host.sharing import (
    GroupFigures,
    Pair,
    Sharing,
    SharingTally,
    figures,
    folded,
    interval,
    pairs,
)

GROUPS = 5
# A frame: how often each group maps it, how often somebody else does, and whether it is a KSM page.
Frame = tuple[dict[int, int], int, bool]


def counted(frames: list[Frame], groups: int = GROUPS, share: float = 1.0) -> Sharing:
    tally = SharingTally()
    for mappings, unseen, merged in frames:
        tally.add(mappings, unseen=unseen, merged=merged)
    alone = tuple(tally.alone.get(group, 0) for group in range(groups))
    return Sharing(0.0, tally.sets(), alone, share, share == 1.0, KsmDetection.ENGINE)


def frames_of(unseen: st.SearchStrategy[int]) -> st.SearchStrategy[list[Frame]]:
    mappings = st.dictionaries(st.integers(0, GROUPS - 1), st.integers(1, 4), min_size=1)
    return st.lists(st.tuples(mappings, unseen, st.booleans()), max_size=30)


SEEN = frames_of(st.just(0))
ANY = frames_of(st.sampled_from([0, 0, 1, 3]))
MAPPED_BY_TWO = [({0: 1, 1: 1}, 0, True)] * 3 + [({0: 2}, 0, True), ({1: 1}, 0, True), ({0: 1, 1: 3}, 0, False)]


@given(SEEN)
def test_the_parts_of_all_make_the_hosts_saving(frames: list[Frame]) -> None:
    sharing = counted(frames)
    mapped = [sum(mappings.values()) for mappings, _, merged in frames if merged]
    assert sharing.saved_pages == sum(mapped) - len(mapped)
    assert sharing.pages == sum(mapped)
    assert sum(one.saved_pages for one in figures(sharing)) == pytest.approx(sharing.saved_pages)
    assert sum(one.merged_pages for one in figures(sharing)) == sharing.pages


@given(ANY)
def test_what_somebody_unseen_maps_is_nobodys_part(frames: list[Frame]) -> None:
    sharing = counted(frames)
    merged = [(sum(mappings.values()), unseen) for mappings, unseen, kind in frames if kind]
    assert sharing.unseen_frames == sum(unseen > 0 for _, unseen in merged)
    # Of n mappings of a frame each saves 1 - 1/n, that of somebody unseen as well.
    theirs = sum(unseen - unseen / (seen + unseen) for seen, unseen in merged)
    assert sum(one.saved_pages for one in figures(sharing)) == pytest.approx(sharing.saved_pages - theirs)


@given(ANY, st.lists(st.integers(0, 2), min_size=GROUPS, max_size=GROUPS))
def test_coarser_groups_are_as_if_they_had_been_counted(frames: list[Frame], labels: list[int]) -> None:
    coarse: list[Frame] = []
    for mappings, unseen, merged in frames:
        sums: Counter[int] = Counter()
        for group, count in mappings.items():
            sums[labels[group]] += count
        coarse.append((dict(sums), unseen, merged))
    found, expected = folded(counted(frames), labels, 3), counted(coarse, 3)
    assert found.alone == expected.alone
    assert len(found.sets) == len(expected.sets)
    for one, other in zip(found.sets, expected.sets, strict=True):
        assert (one.groups, one.frames, one.pages, one.single, one.lone, one.merged, one.unseen) == (
            *(other.groups, other.frames, other.pages, other.single, other.lone, other.merged, other.unseen),
        )
        assert one.parts == pytest.approx(other.parts)
    saved = [0.0, 0.0, 0.0]
    for group, one_group in enumerate(figures(counted(frames))):
        saved[labels[group]] += one_group.saved_pages
    assert [one_group.saved_pages for one_group in figures(found)] == pytest.approx(saved)


@given(ANY)
def test_figures_and_pairs_are_what_the_frames_say(frames: list[Frame]) -> None:
    sharing = counted(frames)
    for group, found in enumerate(figures(sharing)):
        mine = [(mappings, unseen) for mappings, unseen, merged in frames if merged and group in mappings]
        others = [sum(mappings.values()) - mappings[group] + unseen for mappings, unseen in mine]
        assert found.merged_pages == sum(mappings[group] for mappings, _ in mine)
        assert found.frames == len(mine) == found.own_frames + found.shared_frames
        assert found.own_frames == others.count(0)
        assert found.shared_low == found.shared_frames == found.shared_high
        assert found.shared_pages == sum(
            mappings[group] for (mappings, _), rest in zip(mine, others, strict=True) if rest
        )
        assert found.saved_alone_pages == found.merged_pages - found.frames
        assert found.leaving_costs_pages == sum(
            rest == 1 and not unseen for (_, unseen), rest in zip(mine, others, strict=True)
        )
    both: Counter[tuple[int, int]] = Counter()
    forked: Counter[tuple[int, int]] = Counter()
    for mappings, _, merged in frames:
        (both if merged else forked).update(combinations(sorted(mappings), 2))
    found_pairs = {pair.groups: pair for pair in pairs(sharing)}
    assert {groups: pair.frames for groups, pair in found_pairs.items() if pair.frames} == both
    assert {groups: pair.forked_frames for groups, pair in found_pairs.items() if pair.forked_frames} == forked


def test_an_example() -> None:
    sharing = counted(MAPPED_BY_TWO, 2)
    assert pairs(sharing) == (Pair((0, 1), 3, 3, 3, (3, 3), 1),)
    # The first has 5 pages in 4 frames, one frame of which it maps twice and alone.
    assert figures(sharing) == (
        GroupFigures(5, 4, 1, 3, 3, 3, 3, 1, 2.5, 3, 1, 1),
        GroupFigures(4, 4, 1, 3, 3, 3, 3, 0, 1.5, 3, 3, 1),
    )
    assert (sharing.pages, sharing.saved_pages, sharing.unseen_frames) == (9, 4, 0)


def test_those_who_share_most_come_first() -> None:
    sharing = counted([({0: 1, 1: 1}, 0, True), *[({1: 1, 2: 1}, 0, True)] * 2, ({0: 1, 2: 1}, 0, False)])
    assert [pair.groups for pair in pairs(sharing)] == [(1, 2), (0, 1), (0, 2)]


def test_a_sample_stands_for_all() -> None:
    sharing = counted(MAPPED_BY_TWO, 2, share=0.25)
    (pair,) = pairs(sharing)
    assert (pair.frames, pair.pages, pair.forked_frames) == (12, (12, 12), 4)
    assert pair.low < 12 < pair.high
    assert figures(sharing)[0].shared_frames == 12
    assert sharing.saved_pages == 16
    # What is mapped once comes from smaps, which counts all.
    assert figures(sharing)[1].merged_pages == 1 + 12


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
@pytest.mark.parametrize("frames", [0, 3, 40, 5000])
def test_the_interval_has_the_truth_in_it_most_of_the_time(share: float, frames: int) -> None:
    chance = random.Random(frames)
    hits = 0
    for _ in range(400 if frames < 1000 else 100):
        low, high = interval(sum(chance.random() < share for _ in range(frames)), share)
        hits += low <= frames <= high
    assert hits >= 0.9 * (400 if frames < 1000 else 100)
    assert interval(frames, 1.0) == (frames, frames)
    assert interval(0, share)[1] > 0


def test_it_crosses_to_another_process_whole() -> None:
    sharing = counted(MAPPED_BY_TWO, 2)
    assert decode(Sharing, encode(sharing)) == sharing
