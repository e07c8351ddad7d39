# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of docs/json.md, "Exit codes": one thing that is wrong has one code in every command that can meet it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.cli.main import main

DOCS = Path(__file__).parents[2] / "docs/json.md"

#: What is wrong, as the table has it; its code; command lines that meet it.
TABLE = {
    "a process, node, knob or command that is not there": (
        2,
        [
            ["unmerge", "--pid", "4000000"],
            ["unmerge", "--pid", "4000000", "--dry-run"],
            ["migrate", "--pid", "4000000", "--to", "0"],
            ["unmerge", "--pid", "1000", "--to", "9"],
            ["migrate", "--pid", "1000", "--to", "9"],
            ["set", "page_to_scan=1"],
            ["stat"],
        ],
    ),
    "a value that a knob doesn't take": (
        2,
        [["set", "run=-1"], ["set", "smart_scan=on"], ["set", "advisor_mode=fast"]],
    ),
    "a process or unit without mergeable memory": (
        6,
        [["unmerge", "--unit", "nobody"], ["migrate", "--unit", "nobody", "--to", "0"]],
    ),
}


@pytest.mark.parametrize(
    ("code", "words"), [(code, words) for code, lines in TABLE.values() for words in lines], ids=str
)
def test_the_table(code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if words == ["stat"] else ["--host", "engine"]
    assert main([*words, *more]) == code
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()[-2:]
    assert first.startswith("ksmd-ctl: ")
    assert second.startswith("hint: ")


def test_the_documents_have_the_table() -> None:
    text = DOCS.read_text()
    for wrong, (code, _) in TABLE.items():
        assert f"| {wrong} | {code} |" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["set", "page_to_scan=1"], "did you mean pages_to_scan?"),
        (["set", "run=-1"], "run takes a whole number from 0 to 2"),
        (["set", "smart_scan=on"], "smart_scan takes 0 or 1"),
        (["stat"], "did you mean status?"),
        (["unmerge", "--pid", "4000000"], "there is no process 4000000"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, *([] if words == ["stat"] else ["--host", "engine"])])
    err = capsys.readouterr().err
    assert said in err
    assert "broker" not in err


def test_run_2_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    main(["set", "run=2", "--dry-run", "--host", "engine"])
    assert "warning: run = 2 un-merges everything" in capsys.readouterr().err
