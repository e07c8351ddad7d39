# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages are in a sample."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.page_sample import MOST_ONE_IN, ProcessPages, SampledPage, Selection

KEY = bytes(range(16))
ZEROES = bytes(4096)


def content(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(4088)


def seen(selection: Selection, contents: list[bytes], pid: int = 1) -> ProcessPages:
    """What a look finds of a process with these pages."""
    found = ProcessPages(ProcessId(pid, 1), "p", 0.0, len(contents))
    for page, each in enumerate(contents):
        number, address = selection.number(each), page << 12
        if selection.may_keep(number, pid, address):
            found.sampled[address] = SampledPage(number, 0)
    return found


def test_all_pages_are_in_a_sample_of_all() -> None:
    selection = Selection()
    found = seen(selection, [content(1), content(1), ZEROES])
    selection.settle((found,))
    assert len(found.sampled) == 3


@given(st.integers(2, 64), st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_a_content_is_in_it_with_all_of_its_pages_or_with_none(one_in: int, numbers: list[int]) -> None:
    """None of these has so many pages that it is a frequent one."""
    selection = Selection(one_in, KEY)
    contents = [content(1000 * repeat + number) for repeat, number in enumerate(numbers) for _ in range(3)]
    found = seen(selection, contents)
    selection.settle((found,))
    kept = {page.number for page in found.sampled.values()}
    assert len(found.sampled) == sum(selection.number(each) in kept for each in contents)


def test_about_one_content_in_so_many_is_kept() -> None:
    selection = Selection(8, KEY)
    found = seen(selection, [content(number) for number in range(16_000)])
    selection.settle((found,))
    assert len(found.sampled) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("frequent", [ZEROES, content(77)])
def test_of_a_frequent_content_one_page_in_so_many_is_kept(frequent: bytes) -> None:
    selection = Selection(8, KEY)
    found = seen(selection, [frequent] * 16_000)
    selection.settle((found,))
    assert len(found.sampled) == pytest.approx(2000, rel=0.1)
    # In the next look the same ones are.
    again = seen(selection, [frequent] * 16_000)
    selection.settle((again,))
    assert again.sampled == found.sampled


def test_which_of_a_frequent_content_are_kept_differs_by_process() -> None:
    selection = Selection(8, KEY)
    one, other = (seen(selection, [ZEROES] * 4000, pid) for pid in (1, 2))
    selection.settle((one, other))
    assert one.sampled.keys() != other.sampled.keys()


def test_numbers_depend_on_the_key() -> None:
    pages = [random.Random(number).randbytes(4096) for number in range(50)]
    with_key = [Selection(1, KEY).number(page) for page in pages]
    assert with_key == [Selection(1, KEY).number(page) for page in pages]
    assert not set(with_key) & {Selection(1, bytes(16)).number(page) for page in pages}
    assert not set(with_key) & {Selection(1).number(page) for page in pages}
    assert all(0 <= number < 1 << 64 for number in with_key)


@pytest.mark.parametrize("one_in", [0, -1, MOST_ONE_IN + 1])
def test_a_sample_of_a_strange_size_is_refused(one_in: int) -> None:
    with pytest.raises(ValueError, match="is not between"):
        Selection(one_in)
