# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import NoSuchProcess
from ksmd_ctl.kernel.proc_pid import LONGEST_NAME, printable, process_file_error


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
