# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.kernel.proc_pid import LONGEST_NAME, printable


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    assert printable("web-01 größe \\x2d") == "web-01 größe \\x2d"
    assert printable("a\x1b[31m\n\t\x00\u202e\u2028\udcff") == "a\\x1b[31m\\n\\t\\x00\\u202e\\u2028\\udcff"


def test_long_names_are_cut_and_stay_different() -> None:
    one, other = printable("x" * 125_000), printable("x" * 124_999)
    assert len(one) == len(other) == LONGEST_NAME
    assert one != other
    assert printable("x" * LONGEST_NAME) == "x" * LONGEST_NAME


@given(st.text() | st.binary(max_size=300).map(lambda data: data.decode(errors="surrogateescape")))
def test_any_name_can_be_shown_and_encoded(name: str) -> None:
    shown = printable(name)
    assert shown.isprintable()
    assert len(shown) <= LONGEST_NAME
    assert json.loads(json.dumps(shown, ensure_ascii=False).encode()) == shown
    assert printable(shown) == shown
