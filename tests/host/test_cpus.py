# SPDX-License-Identifier: GPL-2.0-or-later
"""Lists of CPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.cpus import parse_cpus
from ksmd_ctl.kernel.pseudofile import parse_list


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", "0"), ("2-5,0", "0,2-5"), ("8-15:3", "8,11,14"), (" 1 , 3", "1,3"), ("0-3,2-4", "0-4"), ("8191", "8191")],
)
def test_what_taskset_takes(text: str, cpus: str) -> None:
    assert ranges_text(parse_cpus(text)) == cpus


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "3-1", "-1", "0x3", "1-", "0-9:0", "8192", "0-8192", "+1", "all", 3, None]
)
def test_what_is_no_list(text: object) -> None:
    with pytest.raises(ValueError, match="is not a list of CPUs"):
        parse_cpus(text)


@given(st.frozensets(st.integers(0, 8191), min_size=1))
def test_what_is_written_is_read_back_here_and_as_the_kernel_writes_it(cpus: frozenset[int]) -> None:
    text = ranges_text(cpus)
    assert parse_cpus(text) == parse_list(text) == cpus
