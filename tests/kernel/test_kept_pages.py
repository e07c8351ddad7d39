# SPDX-License-Identifier: GPL-2.0-or-later
"""What is kept of pages, by a threshold of the number of their content."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.host.estimate import Contents, PageKind, Rules
from ksmd_ctl.host.merging import estimate
from ksmd_ctl.kernel.content_numbers import ZERO, ContentSample
from ksmd_ctl.kernel.kept_pages import KeptPages, Row
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

BLOCK = 64


def number(chance: random.Random) -> int:
    return chance.randrange(-(1 << 63), 1 << 63)


def filled(most: int, owners: Mapping[int, Sequence[int]], chance: random.Random) -> KeptPages:
    """What is kept of processes with these numbers, which are read in blocks in random order."""
    kept = KeptPages(most, sum(map(len, owners.values())))
    blocks = [(owner, first) for owner, found in owners.items() for first in range(0, len(found), BLOCK)]
    chance.shuffle(blocks)
    for owner, first in blocks:
        kind = kept.kind(PageKind(0, (owner,)))
        numbers = owners[owner][first : first + BLOCK]
        kept.count(ZERO, kind, numbers.count(ZERO))
        kept.add(kind, first * PAGE_SIZE, numbers, numbers.count(ZERO))
    return kept


def freed(contents: Contents) -> tuple[float, float, float]:
    # So many pages that their number is no bound.
    return estimate(contents, {(0, True): 1 << 30}, Rules(256), 8).outcomes[0].freed


@settings(max_examples=100)
@given(
    st.dictionaries(st.integers(0, 3), st.lists(st.integers(-5, 40) | st.just(ZERO), max_size=200), max_size=4),
    st.randoms(use_true_random=False),
)
def test_as_long_as_all_is_kept_it_is_exact(owners: dict[int, list[int]], chance: random.Random) -> None:
    kept = filled(1 << 20, owners, chance)
    several = kept.several()
    contents, (again, taken) = several.contents(), several.again(1 << 20)
    expected = Counter(one for found in owners.values() for one in found)
    zeroes = expected.pop(ZERO, 0)
    assert sum(contents.zeroes.values()) == zeroes == kept.zero_pages()
    assert freed(contents)[0] == sum(n - -(-n // 256) for n in expected.values() if n > 1) + max(
        0, zeroes - -(-zeroes // 256)
    )
    # All pages of all contents that there are several of are looked at again.
    assert taken == 1
    assert sum(one.seen for one in again) == sum(count for count in expected.values() if count > 1)
    for one in again:
        for row in one.rows:
            assert owners[row.owner][row.address // PAGE_SIZE] == row.number


@pytest.mark.parametrize("many", [False, True])
def test_what_is_kept_stands_for_all(many: bool) -> None:
    """On the average it is right, the interval holds the truth, and no more is kept than it may be."""
    chance, rounds, held, total = random.Random(1), 120, 0, 0.0
    for _ in range(rounds):
        pairs = [number(chance) for _ in range(1500)]
        owners = {owner: [*pairs, *(number(chance) for _ in range(1500))] for owner in (0, 1)}
        heavy = [number(chance) for _ in range(4)] if many else []
        for numbers in owners.values():
            numbers.extend(heavy * 500)
            chance.shuffle(numbers)
        kept = filled(2500, owners, chance)
        assert len(kept) <= 2500
        contents = kept.several().contents()
        assert contents.share < 1
        truth = 1500 + len(heavy) * (1000 - 4)
        found, low, high = freed(contents)
        held += low <= truth <= high
        total += found / truth
    assert held >= 0.93 * rounds
    assert abs(total / rounds - 1) < 0.02


def test_where_many_pages_will_come_most_contents_are_given_up_at_once() -> None:
    """Whoever reads on is told which contents are kept, so that no others are hashed."""
    chance, sample = random.Random(6), ContentSample()
    kept = KeptPages(1000, 16_000, sample)
    kind = kept.kind(PageKind(0, (0,)))
    heavy = number(chance)
    kept.add(kind, 0, [number(chance) for _ in range(936)] + [heavy] * 64, 0)
    assert (kept.share, sample) == (1.0, ContentSample())
    kept.add(kind, 0, [number(chance)], 0)
    expected = ContentSample()
    expected.take(1 / 16, {ZERO, heavy})
    assert (kept.share, sample) == (1 / 16, expected)
    assert kept.sure_pages() == 64
    # However many there were in the end, there is a bound.
    for _ in range(20_000):
        kept.add(kind, 0, [number(chance)], 0)
    assert len(kept) <= 1000
    assert sample.threshold == kept.threshold


def test_some_are_looked_at_again() -> None:
    chance = random.Random(2)
    pairs = [number(chance) for _ in range(30_000)]
    kept = filled(1 << 20, {0: pairs, 1: pairs}, chance)
    again, taken = kept.several().again(1000)
    assert 800 < sum(len(one.rows) for one in again) <= 1000
    assert taken == pytest.approx(500 / 30_000, rel=0.3)
    assert all(one.seen == len(one.rows) == 2 for one in again)


def test_of_one_content_a_few_are_looked_at_again() -> None:
    kept = filled(1 << 20, {0: [7] * 1000}, random.Random(3))
    (one,), taken = kept.several().again(1000)
    assert (one.seen, len(one.rows), taken) == (1000, 64, 1)


def test_the_only_content_that_several_have_is_all_of_them() -> None:
    """However small the chance was that it would be looked at again."""
    kept = KeptPages(1 << 20, 1 << 40)
    kept.add(kept.kind(PageKind(0, (0,))), 0, [-(1 << 63)] * 1000, 0)
    (_,), taken = kept.several().again(1000)
    assert taken == 1


def test_frames_that_several_map() -> None:
    kept = KeptPages(1 << 20)
    for frame, content, places in ((1, 7, [(9, 1), (9, 1)]), (2, 8, [(9, 2), (0, 3)]), (3, ZERO, [(0, 1), (0, 2)])):
        found = kept.add_shared(frame, content, 0, Row(content, 0, frame * PAGE_SIZE), split_frees=False)
        assert found is not None
        for owner, (family, address) in enumerate(places):
            found.add(owner, family, address, marked=True)
            kept.mapped()
    several = kept.several()
    contents, (again, _) = several.contents(), several.again(10)
    # What fork shares is one page; the other was merged, as were the zeroes.
    assert freed(contents) == (2, 2, 2)
    assert [one.rows[0].number for one in again] == [8]
    assert (len(kept), kept.given_up) == (6, set())


def test_of_frames_that_several_map_no_more_are_kept_than_may_be() -> None:
    chance, kept = random.Random(4), KeptPages(1000)
    for frame in range(3000):
        found = kept.add_shared(frame, number(chance), 0, Row(0, 0, 0), split_frees=False)
        if found is not None:
            for owner in (0, 1):
                found.add(owner, 0, frame, marked=True)
                kept.mapped()
    assert len(kept) <= 1000
    assert len(kept.shared) + len(kept.given_up) == 3000
    contents = kept.several().contents()
    _, low, high = freed(contents)
    assert low < 3000 < high


def test_how_often_contents_were_found_so_far() -> None:
    chance = random.Random(5)
    pairs = [number(chance) for _ in range(4000)]
    kept = filled(1 << 20, {0: [*pairs, ZERO], 1: [*pairs, *(number(chance) for _ in range(1000))]}, chance)
    assert kept.occupancy(1 << 20) == ({2: 4000, 1: 1000}, 1.0)
    part, share = kept.occupancy(900)
    assert share == pytest.approx(0.1, rel=0.01)
    assert part[2] == pytest.approx(400, rel=0.25)
    assert (kept.sure_pages(), kept.zero_pages()) == (1, 1)
