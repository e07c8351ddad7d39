# SPDX-License-Identifier: GPL-2.0-or-later
"""Who was switched, as people read it."""

from __future__ import annotations

import pytest

from ksmd_ctl.render.switched import switched_texts

WEB = "web-1 (pid 4711)"
RECORD: dict[str, object] = {
    "pid": 4711,
    "name": "qemu",
    "group": "web-1",
    "on": False,
    "by": "somebody",
    "age_seconds": 0.2,
    "done": True,
    "ended": False,
    "again": None,
}


@pytest.mark.parametrize(
    ("more", "said", "bad"),
    [
        ({}, "off: web-1 (pid 4711), just now, by somebody", False),
        ({"on": True, "group": ""}, "on: qemu (pid 4711), just now, by somebody", False),
        ({"age_seconds": None, "ended": True}, f"off: {WEB}, before the last boot, by somebody; ended since", False),
        ({"done": False}, f"off: {WEB}, just now, by somebody: not finished: a part of it may be switched", True),
        (
            {"ended": True, "again": {"pid": 5}, "age_seconds": 90.0},
            "off: web-1 (pid 4711), 1 min 30 s ago, by somebody; started again as pid 5, and is mergeable",
            True,
        ),
    ],
)  # fmt: skip
def test_a_record(more: dict[str, object], said: str, bad: bool) -> None:
    assert list(switched_texts({"switched": [RECORD | more]})) == [(said, bad)]


def test_of_many_only_some_are_shown() -> None:
    found = {"switched": [RECORD] * 8}
    assert [text for text, _ in switched_texts(found)][5:] == ["3 more processes: `ksmd-ctl processes` shows all"]
    assert len(list(switched_texts(found, None))) == 8


@pytest.mark.parametrize("switched", [None, [], "x", [7], {}])
def test_what_is_no_list_of_records(switched: object) -> None:
    assert list(switched_texts({"switched": switched})) == []
