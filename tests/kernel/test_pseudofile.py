# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.pseudofile import parse_list


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3))))
def test_a_list_reads_as_it_was_written(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in ranges)
    assert parse_list(f"{text}\n") == {number for first, more in ranges for number in range(first, first + more + 1)}


@given(st.text(alphabet="0123456789-, \n+_x\u0663", max_size=12))
def test_a_list_is_numbers_and_ranges_only(text: str) -> None:
    parts = text.strip().split(",") if text.strip() else []
    ranges = [part.partition("-") for part in parts]
    good = all(
        first.isascii()
        and first.isdigit()
        and (not dash or (last.isascii() and last.isdigit() and int(first) <= int(last) <= int(first) + (1 << 20)))
        and len(first) < 10
        and len(last) < 10
        for first, dash, last in ranges
    )
    if good:
        assert parse_list(text) == {
            number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)
        }
    else:
        with pytest.raises(ValueError, match="is not a"):
            parse_list(text)


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "1,,2", "0-99999999", "1 2", "1-2-3"])
def test_what_is_not_a_list(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_list(text)


@given(st.text(max_size=40))
def test_any_text_is_a_list_or_a_valueerror(text: str) -> None:
    try:
        parse_list(text)
    except ValueError:
        pass
