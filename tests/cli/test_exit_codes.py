# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of docs/json.md, "Exit codes": one thing that is wrong has one code in every command that can meet it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ksmd_ctl.cli.main import main
from ksmd_ctl.knobs import KNOBS

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
            ["--debug", "stat"],
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
    assert main([*words, *([] if "stat" in words else ["--host", "engine"])]) == code
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
        (["--debug", "stat"], "did you mean status?"),
        (["unmerge", "--pid", "1000", "--to", "9"], "un-merging to node 9: there is no such node"),
        (["migrate", "--pid", "1000", "--to", "9"], "moving memory to node 9: there is no such node"),
        (["unmerge", "--pid", "4000000"], "there is no process 4000000"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, *([] if "stat" in words else ["--host", "engine"])])
    err = capsys.readouterr().err
    assert said in err
    assert "broker" not in err


def test_an_option_before_the_command_is_said_to_go_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "status"]) == 2
    assert "give it after status" in capsys.readouterr().err


#: What Python takes for a number, or nearly, and no person writes on purpose.
NO_NUMBERS = ("-0", "+1", " 1", "1 ", "0x1", "1_0", "\N{ARABIC-INDIC DIGIT ONE}", "\N{SUPERSCRIPT TWO}", "", "9" * 5000)


@pytest.mark.parametrize("number", NO_NUMBERS, ids=lambda number: ascii(number)[:12])
@pytest.mark.parametrize(
    "line",
    [
        *(f"set {knob}={{}}" for knob, spec in KNOBS.items() if not spec.choices),
        "set run=0 --wait={}",
        "status --interval={}",
        "doctor --interval={}",
        "processes --top={}",
        "processes --pid={}",
        "unmerge --pid={}",
        "unmerge --pid=1000 --to={}",
        "migrate --to=0 --pid={}",
        "migrate --pid=1000 --to={}",
        "verify --random={}",
        "verify --random=1 --count={}",
        "verify --random=1 --first={}",
    ],
)
def test_what_only_looks_like_a_number_is_refused(line: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*(word.format(number) for word in line.split()), "--host", "engine"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert max(map(len, err.splitlines())) < 300
    assert "Exceeds the limit" not in err
    assert "unrecognized" not in err


@pytest.mark.parametrize("address", [one for one in NO_NUMBERS if one != "0x1"], ids=lambda one: ascii(one)[:12])
def test_what_only_looks_like_an_address_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "--pid", "1000", "--to", "0", f"--range={address}-7f00", "--host", "engine"]) == 2
    assert "is not of the form" in capsys.readouterr().err


def test_run_2_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    main(["set", "run=2", "--dry-run", "--host", "engine"])
    assert "warning: run = 2 un-merges everything" in capsys.readouterr().err
