# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.census import BLOCK_FRAMES, Estimate, Sample

Layout = Callable[[random.Random, int], list[int]]


def uniform(chance: random.Random, blocks: int) -> list[int]:
    """Every frame with the same chance, 4 %: a binomial number in each block, as near as a normal one is."""
    return [min(BLOCK_FRAMES, max(0, round(chance.gauss(0.04 * BLOCK_FRAMES, 4.4)))) for _ in range(blocks)]


def clustered(chance: random.Random, blocks: int) -> list[int]:
    """A few runs of full blocks, nothing elsewhere."""
    found = [0] * blocks
    for _ in range(6):
        first = chance.randrange(blocks)
        for block in range(first, min(blocks, first + chance.randrange(1, blocks // 30))):
            found[block] = BLOCK_FRAMES
    return found


def sparse(chance: random.Random, blocks: int) -> list[int]:
    """A handful of blocks that hold something."""
    found = [0] * blocks
    for block in chance.sample(range(blocks), 5):
        found[block] = chance.randrange(1, BLOCK_FRAMES + 1)
    return found


def lonely(chance: random.Random, blocks: int) -> list[int]:
    """All in one place, which most samples miss."""
    found = [0] * blocks
    found[chance.randrange(blocks)] = BLOCK_FRAMES
    return found


def striped(chance: random.Random, blocks: int) -> list[int]:
    """In step with the blocks: what a draw at equal distances would fall for."""
    return [BLOCK_FRAMES if block % 16 == 0 else 0 for block in range(blocks)]


def skewed(chance: random.Random, blocks: int) -> list[int]:
    """Most in a few blocks, a little in all."""
    return [min(BLOCK_FRAMES, int(chance.paretovariate(1.1))) for _ in range(blocks)]


@pytest.mark.parametrize("layout", [uniform, clustered, sparse, lonely, striped, skewed])
@pytest.mark.parametrize("rounds", [(100,), (64, 40, 300), (2,)])
def test_the_interval_holds_as_often_as_it_says(layout: Layout, rounds: tuple[int, ...]) -> None:
    tries, missed = 400, 0
    for seed in range(tries):
        chance = random.Random(seed)
        counts = layout(chance, 2000)
        sample = Sample(len(counts), len(counts) * BLOCK_FRAMES, chance)
        for strata in rounds:
            sample.round(strata, counts.__getitem__)
        found = sample.estimate()
        assert found.low <= found.frames <= found.high
        missed += not found.low <= sum(counts) <= found.high
    assert missed <= tries * 0.05


@pytest.mark.parametrize("layout", [uniform, clustered, striped, skewed])
def test_the_guess_is_right_on_average(layout: Layout) -> None:
    counts = layout(random.Random(1), 2000)
    guesses = []
    for seed in range(400):
        sample = Sample(len(counts), len(counts) * BLOCK_FRAMES, random.Random(seed))
        sample.round(64, counts.__getitem__)
        sample.round(100, counts.__getitem__)
        guesses.append(sample.estimate().frames)
    mean = sum(guesses) / len(guesses)
    deviation = (sum((guess - mean) ** 2 for guess in guesses) / len(guesses)) ** 0.5
    # Four standard errors of the mean of the guesses.
    assert abs(mean - sum(counts)) <= 4 * deviation / len(guesses) ** 0.5 + 1


def test_more_draws_make_it_narrower_and_it_says_something() -> None:
    chance = random.Random(3)
    counts = uniform(chance, 40000)
    widths = []
    for draws in (100, 1000, 10000):
        sample = Sample(len(counts), len(counts) * BLOCK_FRAMES, random.Random(draws))
        sample.round(draws, counts.__getitem__)
        found = sample.estimate()
        widths.append((found.high - found.low) / sum(counts))
    assert widths[0] > 3 * widths[1] > 9 * widths[2]
    assert widths[2] < 0.1


@given(st.lists(st.integers(0, BLOCK_FRAMES), min_size=1, max_size=40), st.data())
def test_what_was_seen_always_bounds_it(counts: list[int], data: st.DataObject) -> None:
    last = data.draw(st.integers(max(1, counts[-1]), BLOCK_FRAMES))
    total = (len(counts) - 1) * BLOCK_FRAMES + last
    sample = Sample(len(counts), total, random.Random(data.draw(st.integers())))
    for strata in data.draw(st.lists(st.integers(1, 60), max_size=4)):
        sample.round(strata, counts.__getitem__)
    found = sample.estimate()
    seen = sum(sample.drawn.values())
    others = sum(min(BLOCK_FRAMES, total - block * BLOCK_FRAMES) - count for block, count in sample.drawn.items())
    assert seen <= found.low <= found.frames <= found.high <= total - others
    if len(sample.drawn) == len(counts):
        assert found == Estimate(sum(counts), sum(counts), sum(counts))


def test_each_block_is_counted_once_however_often_it_is_drawn() -> None:
    asked: list[int] = []
    sample = Sample(3, 3 * BLOCK_FRAMES, random.Random(0))

    def count(block: int) -> int:
        asked.append(block)
        return 1

    for _ in range(20):
        sample.round(2, count)
    assert sorted(asked) == [0, 1, 2]
    assert sample.estimate() == Estimate(3, 3, 3)
