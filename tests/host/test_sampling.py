# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of a sample: on the average they are right, and their intervals hold what is true."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.sampling import EXACTLY_ALL, Remaining, ratio, remaining, sampled, scored, spread_of_count

LIMIT = 256
#: How many pages each content has: a host of one system, one of many, one where little is equal, and heavy ones.
HOSTS = {
    "pairs": [2] * 2000 + [1] * 4000,
    "unique": [1] * 8000,
    "pairs among many": [2] * 100 + [1] * 8000,
    "three each": [3] * 3000,
    "many of each": [20] * 300 + [1] * 2000,
    "a long tail": [max(1, round(3000 / rank)) for rank in range(1, 3000)],
}


def freed(sizes: Sequence[int]) -> int:
    return sum(size - -(-size // LIMIT) for size in sizes if size > 1)


def by_contents(sizes: Sequence[int], share: float, chance: random.Random) -> tuple[float, float]:
    taken = [size - -(-size // LIMIT) for size in sizes if size > 1 and chance.random() < share]
    return sum(taken), sum(one * one for one in taken)


def by_pages(sizes: Sequence[int], share: float, chance: random.Random) -> Counter[int]:
    return Counter(found for size in sizes if (found := sum(chance.random() < share for _ in range(size))))


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("name", [name for name in HOSTS if name != "a long tail"])
def test_a_sample_of_contents(name: str, share: float) -> None:
    """Unbiased, and the interval holds the truth in at least 93 % of the time."""
    sizes, chance, rounds = HOSTS[name], random.Random(1), 1000
    found = [scored(*by_contents(sizes, share, chance), share) for _ in range(rounds)]
    truth = freed(sizes)
    mean = sum(one.found for one in found) / rounds
    # Three standard errors of a mean of so many.
    error = (sum((one.found - mean) ** 2 for one in found) / rounds / rounds) ** 0.5
    assert abs(mean - truth) <= 3 * error + 1e-9
    assert sum(one.low <= truth <= one.high for one in found) >= 0.93 * rounds


@pytest.mark.parametrize("share", [0.3, 0.1, 0.02])
@pytest.mark.parametrize("name", HOSTS)
def test_a_sample_of_pages(name: str, share: float) -> None:
    """Its interval holds the truth, and where equal pages are many it says so."""
    sizes, chance, rounds = HOSTS[name], random.Random(2), 60
    truth = freed(sizes)
    found = [sampled(by_pages(sizes, share, chance), share, LIMIT) for _ in range(rounds)]
    assert sum(one.low - 1 <= truth <= one.high + 1 for one in found) >= 0.95 * rounds
    assert all(one.low <= one.found <= one.high for one in found)


def test_an_interval_narrows_the_more_is_read() -> None:
    sizes, chance = HOSTS["pairs"], random.Random(3)
    widths = []
    for share in (0.02, 0.1, 0.5):
        one = sampled(by_pages(sizes, share, chance), share, LIMIT)
        widths.append(one.high - one.low)
    assert widths == sorted(widths, reverse=True)


@given(st.lists(st.integers(1, 1000), max_size=200))
def test_all_of_it_is_exact(sizes: list[int]) -> None:
    truth = freed(sizes)
    assert scored(truth, truth**2, 1.0) == (truth, truth, truth)
    assert sampled(Counter(sizes), 1.0, LIMIT) == (truth, truth, truth)


@given(st.dictionaries(st.integers(1, 500), st.integers(1, 10_000)), st.floats(1e-4, 0.99))
def test_bounds_are_in_order(seen: dict[int, int], share: float) -> None:
    one = sampled(seen, share, LIMIT)
    assert 0 <= one.low <= one.found <= one.high


def test_what_was_not_found_may_be_there() -> None:
    low, high = scored(0, 0, 0.1)[1:]
    assert low == 0
    assert 20 < high < 60
    assert spread_of_count(0, 0.1) > 10
    assert spread_of_count(10, 1.0) == 0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_a_ratio(share: float) -> None:
    chance, count, rounds = random.Random(4), 400, 300
    found = [ratio(sum(chance.random() < share for _ in range(count)), count) for _ in range(rounds)]
    assert sum(one.low <= share <= one.high for one in found) >= 0.93 * rounds


@pytest.mark.parametrize("stay", [0.0, 0.6, 0.98, 1.0])
@pytest.mark.parametrize("taken", [0.1, 0.5])
def test_what_remains(stay: float, taken: float) -> None:
    """Contents change or stay as a whole; a part of them was looked at again."""
    chance, rounds, held = random.Random(5), 200, 0
    for _ in range(rounds):
        everything = [
            Remaining(size, size if chance.random() < stay else 0.0, 0) for size in chance.choices((1, 2, 5), k=1000)
        ]
        truth = sum(one.left for one in everything) / sum(one.freed for one in everything)
        one = remaining([one for one in everything if chance.random() < taken], taken)
        held += one.low - 1e-9 <= truth <= one.high + 1e-9
    assert held >= 0.93 * rounds


def test_all_contents_looked_at_again_are_exact() -> None:
    assert remaining([Remaining(3, 3, 0), Remaining(1, 0, 0)], 1.0) == (0.75, 0.75, 0.75)
    assert remaining([], 1.0) == EXACTLY_ALL
    # Of one content a part was looked at.
    one = remaining([Remaining(1000, 1000, 64)], 1.0)
    assert one.low < one.found == one.high == 1.0
