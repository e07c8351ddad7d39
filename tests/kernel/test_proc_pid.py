# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Denied, NoSuchProcess, Unreadable
from ksmd_ctl.kernel.proc_pid import LONGEST_NAME, LeftOut, printable, process_file_error


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


def test_a_kernel_thread_is_not_said_to_be_gone(tmp_path: Path) -> None:
    # Files of memory of a thread of the kernel say ESRCH, and the thread is there.
    (tmp_path / "2").mkdir()
    there, not_there = (
        process_file_error(pid, tmp_path / str(pid) / "smaps", ProcessLookupError(errno.ESRCH, "no")) for pid in (2, 3)
    )
    assert isinstance(there, NoSuchProcess)
    assert "it has no memory: it is a kernel thread" in str(there)
    assert "ksmd-ctl processes" in there.hint
    assert isinstance(not_there, NoSuchProcess)
    assert "it is gone" in str(not_there)


def test_of_what_was_left_out_the_last_refusal_is_told_where_nothing_is_left() -> None:
    left_out = LeftOut()
    for pid, error in (
        (1, Denied("process 1", "init is special")),
        (2, Denied("process 2", "it is another user's")),
        (3, Unreadable("process 3", "it keeps its readers waiting")),
        (4, NoSuchProcess("process 4", "it is gone")),
    ):
        with left_out.looking_at(pid):
            raise error
    assert list(left_out.errors) == [1, 2, 3]
    left_out.need([5])
    with pytest.raises(Denied, match="another user's"):
        left_out.need([])
