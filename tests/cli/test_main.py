# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ksmd_ctl import __version__
from ksmd_ctl.cli import status
from ksmd_ctl.cli.common import error_text
from ksmd_ctl.cli.main import COMMANDS, main, make_parser
from ksmd_ctl.errors import ConfigError, Denied, ExitCode, KsmdError, Problem, Refused, UsageError
from tests.fakes.ksmfs import FakeKsmFs


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(item for item in make_parser()._actions if isinstance(item, argparse._SubParsersAction))
    return dict(action.choices)


def test_every_command_has_what_all_have() -> None:
    found = subparsers()
    assert tuple(found) == COMMANDS
    for name, parser in found.items():
        if name != "broker":
            host = set() if name in ("report", "replay") else {"--host"}
            assert {"--json", "--debug", "--help"} | host <= set(parser._option_string_actions)


def test_help_shows_what_people_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name in COMMANDS:
        # A long name has a line of its own.
        assert (re.search(rf"^    {name}\s", shown, re.MULTILINE) is not None) is (name != "broker")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ksmd-ctl {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [[], ["nothing"], ["status", "--nothing"], ["status", "--interval", "1000"], ["status", "--interval", "nan"],
     ["status", "--interval", "x"], ["status", "--host", "other"], ["status", "more"]],
)  # fmt: skip
def test_a_wrong_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == ExitCode.USAGE
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("ksmd-ctl: reading the command line: ")
    assert second.startswith("hint: ksmd-ctl ")


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, args: object, out: object) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Refused("a change", "it is too late", hint="be earlier"), 6,
         "ksmd-ctl: a change: it is too late\nhint: be earlier\n"),
        (Denied("a write", "EACCES"), 3, "ksmd-ctl: a write: EACCES\n"),
        (KeyError("x"), 1, "ksmd-ctl: status: KeyError: 'x'\nhint: this is a bug of ksmd-ctl; --debug shows where it "
         "happened\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)  # fmt: skip
def test_errors_are_two_lines_and_a_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "run", Failing(error))
    assert main(["status"]) == code
    assert capsys.readouterr() == ("", said)


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(status, "run", Failing(KsmdError("a", "b")))
    assert main(["status", "--debug"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("ksmd-ctl: a: b\n")


def test_a_bad_configuration_says_all_that_is_wrong() -> None:
    one, two = Problem("/f", "policy", "is none"), Problem("/f", "run", "is none")
    assert error_text(ConfigError("reading it", [one])) == "ksmd-ctl: reading it: /f: policy: is none\n"
    assert error_text(ConfigError("reading it", [one, two], hint="look")) == (
        "ksmd-ctl: reading it: 2 problems\n  /f: policy: is none\n  /f: run: is none\nhint: look\n"
    )


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "ksmd_ctl.cli.main", "metrics", "--socket", str(tmp_path / "s"), "--host", "engine"],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("line", ["status", "nodes", "metrics", "set run=1 --dry-run", "doctor --interval 0.1"])
def test_a_command_closes_what_it_opens(tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    FakeKsmFs(tmp_path)
    before = os.listdir("/proc/self/fd")
    main([*line.split(), "--root", str(tmp_path), "--socket", str(tmp_path / "s")])
    # The traceback of an error keeps what its frames had.
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_another_pipe_that_breaks_is_an_error(tmp_path: Path) -> None:
    program = """
import sys
from ksmd_ctl.cli import main, metrics
def run(args, out):
    raise BrokenPipeError
metrics.run = run
sys.exit(main.main(["metrics"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, "BrokenPipeError" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "knobs"),
    [
        (["replay", "f", "--policy", "adaptive", "run=1", "smart_scan=0"], ["run=1", "smart_scan=0"]),
        (["replay", "f", "run=1", "--policy", "adaptive", "smart_scan=0", "--json"], ["run=1", "smart_scan=0"]),
        (["replay", "--json", "f"], []),
        (["set", "run=1", "--dry-run", "smart_scan=0"], ["run=1", "smart_scan=0"]),
    ],
)
def test_knobs_come_before_and_after_options(words: list[str], knobs: list[str]) -> None:
    assert make_parser([words[0]]).parse_args(words).words == knobs


@pytest.mark.parametrize("words", [["replay", "f", "--json", "run=1", "--nope"], ["report", "f", "--json", "g"]])
def test_what_no_command_takes_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="unrecognized arguments"):
        make_parser([words[0]]).parse_args(words)
