# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/engine.md names places and tests that exist, and every corner case has its test."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+\.\d+) \| .* \| (\w+):([\w.]+) \| (test_\w+):(test_\w+) \|$")
TEXT = (ROOT / "docs/engine.md").read_text()
ROWS = [match.groups() for line in TEXT.splitlines() if (match := ROW.match(line))]


def test_all_statements_are_there() -> None:
    numbers = [number for number, *_ in ROWS]
    assert len(numbers) == len(set(numbers)) > 120
    assert {number.split(".")[0] for number in numbers} == {str(section) for section in range(1, 16)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_place_and_test_exist(row: tuple[str, str, str, str, str]) -> None:
    _, module, place, test_module, test = row
    found = importlib.import_module(f"ksmd_ctl.engine.{module}")
    for name in place.split("."):
        found = getattr(found, name)
    assert hasattr(importlib.import_module(f"tests.engine.{test_module}"), test)


KERNEL = TEXT[TEXT.index("| kernel | here |") : TEXT.index("## Profiles")].splitlines()[2:-1]


@pytest.mark.parametrize("row", KERNEL, ids=lambda row: row.split("`")[1] if "`" in row else row)
def test_a_function_of_the_kernel_is_where_the_table_says(row: str) -> None:
    kernel, here = (cell.strip() for cell in row.strip("|").split(" | "))
    assert kernel
    assert here
    for module, place in re.findall(r"`(\w+):([\w.]+)`", here):
        found = importlib.import_module(f"ksmd_ctl.engine.{module}")
        for name in place.split("."):
            found = getattr(found, name)
    for older in re.findall(r"`(\w+)` (?:in|of) older kernels", here):
        assert older in (found.__doc__ or ""), older


def test_the_table_has_the_kernels_functions_once() -> None:
    names = [name for row in KERNEL for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert len(names) == len(set(names)) > 100


def test_every_statement_that_the_code_refers_to_is_explained() -> None:
    known = {number for number, *_ in ROWS} | {"14.15"}
    cited = 0
    for path in (ROOT / "ksmd_ctl").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"semantics \d", text, re.IGNORECASE), path
        for sentence in re.findall(r"engine\.md ((?:\d+\.\d+(?:, | to | and )?)+)", text):
            for number in re.findall(r"\d+\.\d+", sentence):
                assert number in known, (path.name, number)
                cited += 1
    assert cited > 80


def test_every_corner_case_has_a_test() -> None:
    names = dir(importlib.import_module("tests.engine.test_corner_cases"))
    for number in range(1, 38):
        assert any(name.startswith(f"test_c{number}_") for name in names), number
