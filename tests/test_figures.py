# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.figures import (
    bytes_text,
    count_text,
    plural,
    ratio_text,
    rough_count,
    rough_percent,
    rough_seconds,
    seconds_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (-4096, "-4.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1_024_000_000, "976.6 MiB"),
        (2**64, "16.0 EiB"),
        (2**75, "32768.0 EiB"),
    ],
)
def test_bytes(value: int, text: str) -> None:
    assert bytes_text(value) == text


@given(st.integers(-(2**70), 2**70))
def test_bytes_are_never_many_of_a_unit(value: int) -> None:
    number, unit = bytes_text(value).split()
    assert abs(float(number)) < 1024 or unit == "EiB"


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (250000, "250,000"), (1.5, "1.5"), (1234.5, "1,234")])
def test_counts(value: float, text: str) -> None:
    assert count_text(value) == text


def test_plural() -> None:
    assert [plural(n, "page") for n in (0, 1, 2)] == ["0 pages", "1 page", "2 pages"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25 s"),
        (59.96, "1 min"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (3599.9, "1 h"),
        (7320, "2 h 2 min"),
        (187200, "2 d 4 h"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds_text(value) == text


def test_ratio() -> None:
    assert ratio_text(0.034) == "3.4 %"


def test_rough_figures() -> None:
    assert [rough_count(value) for value in (1.4, 250000, 12_300_000)] == ["1", "250,000", "12.3 million"]
    assert [rough_percent(value) for value in (0.0012, 0.012, 0.58)] == ["0.12 %", "1.2 %", "58 %"]
    assert [rough_seconds(value) for value in (0.42, 12.4, 210, 7560)] == ["0.4 s", "12 s", "3.5 min", "2.1 h"]
