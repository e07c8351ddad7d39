# SPDX-License-Identifier: GPL-2.0-or-later
"""Of contents that are not in the sample not all bytes are hashed; the others have the numbers that they had before."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.content_numbers import READ_PAGES, ZERO, ContentSample, numbers_of, threshold_of
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

ZEROES = bytes(PAGE_SIZE)


def contents(count: int, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(PAGE_SIZE) for _ in range(count)]


def numbers(sample: ContentSample, pages: list[bytes]) -> list[int]:
    found: list[int] = []
    for first in range(0, len(pages), READ_PAGES):
        found += sample.numbers(b"".join(pages[first : first + READ_PAGES]))
    return found


def test_as_long_as_all_are_taken_equal_contents_have_equal_numbers() -> None:
    sample, pages = ContentSample(), contents(100, 1)
    # One byte differs, at a place that doesn't tell whether it is taken.
    nearly = [page[:7] + bytes([page[7] ^ 1]) + page[8:] for page in pages]
    found = numbers(sample, pages)
    assert found == numbers(sample, pages)
    assert len({*found, *numbers(sample, nearly)}) == 200


@given(st.integers(1, 20), st.integers(0, 1000))
def test_what_is_taken_keeps_its_number(halvings: int, seed: int) -> None:
    sample, pages, share = ContentSample(), contents(64, seed), 0.5**halvings
    before = numbers(sample, pages)
    sure = set(before[:5])
    sample.take(share, sure)
    for earlier, later in zip(before, numbers(sample, pages), strict=True):
        if earlier < threshold_of(share) or earlier in sure:
            assert later == earlier
        else:
            assert later >= threshold_of(share)
            assert later not in sure


def test_the_share_of_contents_that_is_taken() -> None:
    sample, pages = ContentSample(), contents(4000, 2)
    sample.take(0.25, set())
    taken = sum(number < threshold_of(0.25) for number in numbers(sample, pages))
    assert 850 < taken < 1150


def test_zeroes_and_what_is_nearly_nothing_else() -> None:
    """They have the same bytes at most places: they are taken by all of their bytes, and not together."""
    sample = ContentSample()
    sample.take(0.5, set())
    sparse = [ZEROES[:7] + number.to_bytes(4, "little") + ZEROES[11:] for number in range(1, 2001)]
    found = numbers(sample, [ZEROES, *sparse])
    assert found[0] == ZERO
    assert found[1:] == [hash(page) for page in sparse]
    assert 850 < sum(number < threshold_of(0.5) for number in found[1:]) < 1150


def test_a_piece_of_a_page_has_no_number() -> None:
    data = b"".join(contents(3, 3))
    assert len(ContentSample().numbers(data[:-1])) == 2
    assert list(numbers_of(data[:-1])) == [hash(data[:PAGE_SIZE]), hash(data[PAGE_SIZE : 2 * PAGE_SIZE])]
    assert ContentSample().numbers(b"") == []
