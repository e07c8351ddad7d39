# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
from pathlib import Path

import pytest

from ksmd_ctl.cli.main import main
from ksmd_ctl.daemon import service
from ksmd_ctl.daemon.service import DaemonOptions
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.host.sample import HostKind


def test_the_service_is_told_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def run(options: DaemonOptions) -> int:
        told.append(options)
        return 6

    monkeypatch.setattr(service, "run", run)
    assert main(["daemon"]) == 6
    words = ["daemon", "--host", "engine", "--config", "/f", "--metrics-listen", "", "--restore", "--root", "/r"]
    assert main(words) == 6
    assert told == [
        DaemonOptions(),
        DaemonOptions(
            config="/f",
            metrics_listen="",
            host=HostKind.ENGINE,
            restore=True,
            root=Path("/r"),
        ),
    ]


def test_a_configuration_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[service]\nsample_interval = 2\n")
    bad.write_text('policy = "no policy"\nnothing = 1\n')
    assert main(["daemon", "--check-config", "--config", str(good), "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == {"format": 1, "problems": []}
    assert main(["daemon", "--check-config", "--config", str(bad), "--json"]) == ExitCode.USAGE
    document = json.loads(capsys.readouterr().out)
    assert [(item["path"], item["key"]) for item in document["problems"]] == [
        (str(bad), "policy"),
        (str(bad), "nothing"),
    ]
    assert main(["daemon", "--check-config", "--config", str(bad)]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2 problems" in captured.err
    for problem in document["problems"]:
        assert problem["text"] in captured.err
    # Whoever checks it is not told to check it.
    assert "--check-config" not in captured.err
    assert main(["daemon", "--config", str(bad)]) == ExitCode.USAGE
    assert "hint: `ksmd-ctl daemon --check-config`" in capsys.readouterr().err


def test_knobs_that_nothing_would_hold_pass_no_check_and_start_no_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[knobs]\nrun = 1\n")
    for words in (["--check-config"], []):
        assert main(["daemon", "--host", "engine", *words, "--config", str(path)]) == ExitCode.USAGE
        assert f"{path}: knobs: has no effect: no file sets policy" in capsys.readouterr().err
    path.write_text('policy = "kernel"\n[adaptive]\nworth = 5\n')
    assert main(["daemon", "--check-config", "--config", str(path)]) == ExitCode.DONE
    assert f'not used by policy = "kernel": adaptive ({path})' in capsys.readouterr().out
