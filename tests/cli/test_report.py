# SPDX-License-Identifier: GPL-2.0-or-later
"""report and replay: what people read, the HTML file, and files that are no recordings."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.cli import replay
from ksmd_ctl.cli.main import main
from ksmd_ctl.config.model import PolicyName
from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.figures import seconds_text
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.replay.player import Player, Point
from tests.replay.recordings import Stage, contents


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stage = Stage(tmp_path_factory.mktemp("recording") / "r")
    for number in range(2):
        pid = stage.spawn(contents(number, 200), number)
        stage.host.machine.processes[pid].name = f"guest-{number}"
    stage.host.set(Knob.PAGES_TO_SCAN, 40)
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(20)
    return stage.end()


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main([str(word) for word in words]) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert err == ""
    assert all(len(line) <= 100 for line in out.splitlines())
    return out


def test_a_report_says_what_was_recorded(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "report", path).splitlines()
    assert lines[0].startswith("simulated host, profile 7.2, 2 nodes, 20 s, all pages, by ksmd-ctl")
    assert any(line.startswith("guest-0") for line in lines)
    assert any(line.split()[:2] == ["guest-0", "guest-1"] for line in lines)
    assert any("run: 0 → 1" in line for line in lines)


def test_a_replay_is_shown_beside_the_recording(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "replay", path)
    assert "replayed with the knobs as recorded, profile 7.2" in out
    assert "difference 0.0 % in the median and 0.0 % at most, at 0 s, of the greatest recorded (pages_sharing)" in out
    # All pages were recorded.
    assert "standard error" not in out


def test_a_replay_says_which_error_its_sample_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(tmp_path / "r", one_in=8)
    for number in range(2):
        stage.spawn(contents(number, 800), number)
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(5)
    recording = stage.end()
    error = json.loads(said_json(capsys, "replay", recording, "--json"))["sampling_error"]
    assert 0.01 < error < 0.5
    out = said(capsys, "replay", recording)
    assert f"sample     its standard error is {100 * error:.1f} %" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replay_that_is_stopped_shows_what_was_replayed(
    number: signal.Signals, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Player.play

    def stops(player: Player) -> Iterator[Point]:
        for count, point in enumerate(play(player)):
            if count == 12:
                signal.raise_signal(number)
            yield point

    monkeypatch.setattr(Player, "play", stops)
    assert main(["replay", str(path), "--json"]) == ExitCode.INTERRUPTED
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert len(document["timeline"]) == 12
    assert document["replayed"]["saved_bytes"] is not None
    last = document["timeline"][-1]["seconds"]
    assert err == f"stopped: {seconds_text(last)} of {seconds_text(20)} were replayed\n"


def test_a_replay_with_other_knobs_and_policies(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "replay", path, "merge_across_nodes=0", "run=1", "--profile", "6.12")
    assert "replayed with merge_across_nodes = 0, run = 1, profile 6.12" in out


def test_a_policy_that_writes_nothing_leaves_the_recorded_knobs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "replay", path, "--policy", "observe")
    assert 'policy "observe", which writes nothing: the knobs as recorded' in out
    assert "difference 0.0 % in the median" in out


def test_of_a_policy_that_writes_nothing_the_chosen_knobs_are_told(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = " ".join(said(capsys, "replay", path, "--policy", "observe", "run=1").split())
    assert 'replayed with run = 1, policy "observe", which writes nothing: the other knobs as recorded' in out


def test_pages_that_no_look_saw_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were merged, and are gone before there is a look."""
    stage = Stage(tmp_path / "r")
    stage.host.set(Knob.PAGES_TO_SCAN, 1000)
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    pids = [stage.spawn([page_content("one")] * 20, number) for number in range(2)]
    stage.pass_time(4)
    for pid in pids:
        stage.host.machine.exit(pid)
    stage.pass_time(4)
    out = said(capsys, "replay", stage.end())
    assert "no look saw the pages that were merged, so they are not replayed" in out


def test_a_table_is_as_wide_as_the_terminal(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for command in ("report", "replay"):
        assert max(map(len, said(capsys, command, path).splitlines())) <= (60 if command == "report" else 90)


def test_fixed_knobs_need_a_configuration_that_names_some(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(path), "--policy", "fixed"]) == ExitCode.USAGE
    said_err = capsys.readouterr().err
    assert 'policy "fixed" holds what [knobs] says, and no configuration has none' not in said_err
    assert "there is no configuration" in said_err
    assert "--config FILE names one with [knobs]" in said_err


def said_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main([str(word) for word in words]) == ExitCode.DONE
    return capsys.readouterr().out


def test_a_policy_of_a_configuration(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text("policy = 'fixed'\n[knobs]\nrun = 1\npages_to_scan = 7\n")
    document = json.loads(said_json(capsys, "replay", path, "--config", config, "--json"))
    assert document["policy"] == "fixed"
    assert 0 < document["replayed"]["ksmd_cpu_seconds"] < document["recorded"]["ksmd_cpu_seconds"]


@pytest.mark.parametrize("command", ["report", "replay"])
def test_the_html_file(command: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    said(capsys, command, path, "--html", page)
    assert page.stat().st_mode & 0o777 == 0o600
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main([command, str(path), "--html", str(path)]) == ExitCode.USAGE
    assert main([command, str(path), "--html", str(tmp_path / "no/page.html")]) == ExitCode.UNWRITABLE
    # Nobody reads it.
    os.mkfifo(tmp_path / "fifo")
    assert main([command, str(path), "--html", str(tmp_path / "fifo")]) == ExitCode.UNWRITABLE
    assert "there is no folder" in capsys.readouterr().err
    # The recording is still one.
    said(capsys, command, path)


@pytest.mark.parametrize("command", ["report", "replay"])
def test_the_html_file_replaces_an_earlier_page_only(
    command: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, other, link = tmp_path / "page.html", tmp_path / "other.html", tmp_path / "link.html"
    page.touch()
    said(capsys, command, path, "--html", page)
    said(capsys, "replay", path, "--html", page)
    other.write_bytes(path.read_bytes())
    link.symlink_to(other)
    (tmp_path / "mine.html").write_text("<!DOCTYPE html>\n<title>mine</title>")
    for name in (other, link, tmp_path / "mine.html"):
        before = name.read_bytes()
        assert main([command, str(path), "--html", str(name)]) == ExitCode.USAGE
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"ksmd-ctl: writing {name}: there is another file, which is no page of ksmd-ctl"
        assert second == "hint: name another file after --html"
        assert name.read_bytes() == before
    # What is no regular file holds nothing that could be lost.
    said(capsys, command, path, "--html", "/dev/null")


@pytest.mark.parametrize("name", ["", "-"])
@pytest.mark.parametrize(
    "words",
    [
        ["report", "r", "--html={}"],
        ["replay", "r", "--html={}"],
        ["report", "{}"],
        ["record", "--host", "engine", "-o{}", "--for", "0.1"],
        ["record", "--host", "engine", "-o", "r", "--for", "0.1", "--key-file={}"],
    ],
)
def test_what_is_no_name_of_a_file(
    words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [part for word in words for part in (["-o", name] if word == "-o{}" else [word.format(name)])]
    assert main(words) == ExitCode.USAGE
    why = "- is not taken for stdin or stdout; a file of that name is ./-" if name else "the name of a file is empty"
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["report", "replay"])
def test_a_file_that_is_no_recording(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("x" * 5000)
    for name in ("empty", "text", "none"):
        assert main([command, str(tmp_path / name)]) == ExitCode.USAGE
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[1] == "hint: ksmd-ctl record makes one"


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("smartscan=0", "'smartscan' is no knob; did you mean smart_scan?"),
        ("ksmd_nice=0", "'ksmd_nice' is no knob"),
        ("run", "'run' is not KNOB=VALUE"),
        ("run=2", "run: 2"),
        ("run=x", "run: 'x' is not a whole number"),
    ],
)
def test_a_knob_that_can_not_be_chosen(word: str, why: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["replay", str(path), word])
    if word == "run=2":
        # The kernel takes it: everything is un-merged, and nothing merges.
        assert code == ExitCode.DONE
        return
    assert code == ExitCode.USAGE
    assert why in capsys.readouterr().err


def test_the_policies_are_those_that_there_are() -> None:
    assert tuple(PolicyName) == replay._POLICIES


def test_a_knob_is_given_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(path), "run=1", "run=0"]) == ExitCode.USAGE
    assert "run is given twice" in capsys.readouterr().err


def test_the_domains_of_a_configuration_are_recorded_reported_and_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, recording = tmp_path / "c.toml", tmp_path / "d"
    config.write_text('[domains.gold]\nunits = ["gold.service"]\n')
    words = ("record", "--host", "engine", "-o", recording, "--for", "0.5", "--cpu", "1", "--config", config)
    assert main([str(word) for word in words]) == ExitCode.DONE
    capsys.readouterr()
    out = said(capsys, "report", recording, "--html", tmp_path / "report.html")
    assert "all domains together would save about" in out
    page = (tmp_path / "report.html").read_text()
    assert "Trust domains" in page
    assert "all domains together would save about" in page
    out = said(capsys, "replay", recording, "--apart", "--html", tmp_path / "replay.html")
    assert "replayed with merge_across_nodes = 0, use_zero_pages = 0, trust domains kept apart" in out
    assert "Trust domains at the end" in (tmp_path / "replay.html").read_text()


def test_domains_that_were_not_recorded_and_a_knob_that_joins_them(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(path), "--apart"]) == ExitCode.USAGE
    assert capsys.readouterr().err.splitlines() == [
        "ksmd-ctl: keeping domains apart: no domains were recorded",
        "hint: ksmd-ctl record takes them from the [domains] of its configuration (--config)",
    ]
    assert main(["replay", str(path), "--apart", "merge_across_nodes=1"]) == ExitCode.USAGE
    assert "--apart needs merge_across_nodes = 0" in capsys.readouterr().err
