# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.cli.terminal import more, write_lines
from ksmd_ctl.render.summary import BAD, Line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(out: io.StringIO, environ: dict[str, str], text: str = "pages_to_scan: wanted 1000, found 100") -> str:
    write_lines([Line("drifted", text, BAD), Line("ksm", "merging")], out, environ)
    return out.getvalue()


def test_colours_are_for_terminals() -> None:
    assert written(Terminal(), {"TERM": "xterm"}).startswith("\x1b[1;31mdrifted")
    assert "\x1b" not in written(io.StringIO(), {"TERM": "xterm"})


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colours_gets_none(environ: dict[str, str]) -> None:
    assert "\x1b" not in written(Terminal(), environ)


def test_an_empty_no_color_is_none() -> None:
    assert "\x1b" in written(Terminal(), {"NO_COLOR": ""})


def test_columns_wrap_and_keep_the_column_of_labels() -> None:
    assert written(io.StringIO(), {"COLUMNS": "32"}) == (
        "drifted    pages_to_scan: wanted\n           1000, found 100\nksm        merging\n"
    )


def test_no_terminal_and_no_columns_is_not_wrapped() -> None:
    assert written(io.StringIO(), {}, "x " * 500).count("\n") == 2


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=300), st.integers(1, 120))
def test_wrapping_loses_nothing(text: str, columns: int) -> None:
    out = io.StringIO()
    write_lines([Line("label", text)], out, {"COLUMNS": str(columns)})
    found = out.getvalue()
    assert found.split() == f"label {text}".split()
    longest = max([len(word) for word in text.split()] or [0]) + 11
    assert all(len(line) <= max(columns, 30, longest) for line in found.splitlines())


def test_how_many_more_there_are() -> None:
    assert list(more(0, "unit")) == []
    assert list(more(2, "unit")) == ["2 more units; --json has more"]
    assert list(more(2, "process", "processes")) == ["2 more processes; --json has more"]
