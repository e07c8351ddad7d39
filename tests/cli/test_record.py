# SPDX-License-Identifier: GPL-2.0-or-later
"""record: its options, its key file, what it refuses, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ksmd_ctl.cli import record
from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import ExitCode, KsmdError, UsageError
from ksmd_ctl.figures import seconds_text
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.recorder import Recorder
from ksmd_ctl.reports.recording import recorded_host


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("0.5", 0.5), ("10s", 10), ("10min", 600), ("2h", 7200), ("1d", 86400)]
)
def test_a_length_of_time(text: str, seconds: float) -> None:
    assert record.length(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1 min", "10m", "1e9", "nan", "inf", "10minutes", "9999999h", "٣"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no length of time"):
        record.length(text)


def test_a_ratio() -> None:
    assert (record.ratio("1:1"), record.ratio("1:64")) == (1, 64)
    for text in ("64", "2:64", "1:0", "1:70000", "1:-1", "1:", "1:1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not 1:N with N from 1 to 65536"):
            record.ratio(text)


@pytest.mark.parametrize("text", ["0", "0.0", "1.1", "-0.5", "nan", "x", "", "."])
def test_what_is_no_share_of_a_cpu(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--host", "engine", "-o", str(tmp_path / "r"), f"--cpu={text}"]) == ExitCode.USAGE
    assert "is not a share from 0.001 to 1" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


# -- the key -----------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = record.read_key(path)
    assert len(key) == 16
    assert path.stat().st_mode & 0o777 == 0o600
    assert record.read_key(path) == key
    assert record.read_key(tmp_path / "other") != key


@pytest.mark.parametrize("text", ["", "12", "x" * 32, "ab" * 17, "é" * 16])
def test_a_file_that_is_no_key(text: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsageError) as caught:
        record.read_key(path)
    assert "32 hexadecimal digits" in caught.value.hint
    assert path.read_text() == text


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    record.read_key(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="others may read it"):
        record.read_key(path)


@pytest.mark.parametrize("name", ["null", "zero", "folder", "fifo"])
def test_what_is_no_file_is_no_key(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    path = Path("/dev") / name if name in ("null", "zero") else tmp_path / name
    with pytest.raises(UsageError, match="it is not a regular file") as caught:
        record.read_key(path)
    assert "chmod" not in caught.value.hint


def test_a_file_of_another_kind_is_not_to_be_hidden_from_others(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="it is not a key") as caught:
        record.read_key(path)
    assert "chmod" not in caught.value.hint


def test_a_key_that_can_not_be_made_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    for name, code in (
        ("no/key", ExitCode.UNWRITABLE),
        ("file/key", ExitCode.UNWRITABLE),
        ("nowhere", ExitCode.DENIED),
    ):
        with pytest.raises(KsmdError) as caught:
            record.read_key(tmp_path / name)
        assert caught.value.exit_code == code
        assert caught.value.hint
    assert sorted(os.listdir(tmp_path)) == ["file", "nowhere"]


# -- recording ---------------------------------------------------------------------------------------------------


def words(path: Path, *more: str) -> list[str]:
    return ["record", "--host", "engine", "-o", str(path), "--cpu", "1", *more]


def test_the_simulated_host_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r"
    assert main(words(path, "--for", "3.2", "--every", "0.5", "--anonymous")) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert out.startswith(f"{path}: 3.")
    assert re.search(r"\d looks? at all pages", out)
    assert err == ""
    with Recording(path) as recording:
        facts = recording.facts
        assert (facts.kind, facts.one_in, facts.keyed, facts.anonymous, facts.service) == (
            "engine",
            1,
            False,
            True,
            None,
        )
        assert facts.seconds == pytest.approx(3.2, abs=0.5)
        assert len(list(recording.samples())) >= 3
        # Its guests are there and merged, so that there is something to see.
        assert {process.name for process in recording.processes()} == {f"program {at}" for at in range(1, 9)}
        assert {sample.number("run") for sample in recording.samples()} == {1}
        assert all(sample.number("pages_sharing") for sample in recording.samples())


def test_with_a_key_file_digests_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--for", "3", "--key-file", str(tmp_path / "key"), "--sample", "1:4", "--json")
    assert main(words(tmp_path / "r", *more)) == ExitCode.DONE
    document = json.loads(capsys.readouterr().out)
    assert document["one_in"] == 4
    assert document["looks"] >= 1
    key = bytes.fromhex((tmp_path / "key").read_text())
    assert key not in (tmp_path / "r").read_bytes()
    with sqlite3.connect(tmp_path / "r") as database:
        assert database.execute("SELECT count(*) FROM content WHERE digest IS NULL").fetchone() == (0,)


def test_a_file_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r").write_text("mine")
    assert main(words(tmp_path / "r", "--for", "1")) == ExitCode.USAGE
    assert "there is such a file already" in capsys.readouterr().err
    assert (tmp_path / "r").read_text() == "mine"


def test_an_error_before_the_first_sample_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r"
    assert main(words(path, "--for", "0.3", "--config", str(tmp_path / "none"))) == ExitCode.USAGE
    assert os.listdir(tmp_path) == []

    def fails(_: Recorder) -> None:
        raise RuntimeError("no sample")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "sample", fails)
        assert main(words(path, "--for", "0.3")) == ExitCode.CHECK_FAILED
    assert os.listdir(tmp_path) == []
    # So that the command can be given again.
    assert main(words(path, "--for", "0.3")) == ExitCode.DONE


def test_without_the_output_nothing_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "--host", "engine"]) == ExitCode.USAGE
    assert "-o" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path / "no/r", "--for", "1")) == ExitCode.UNWRITABLE
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err


def test_the_key_is_not_the_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "r"
    assert main(words(one, "--for", "1", "--key-file", str(tmp_path / "." / "r"))) == ExitCode.USAGE
    assert "-o and --key-file are one file" in capsys.readouterr().err
    assert not one.exists()


def test_only_root_records_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["record", "--host", "kernel", "-o", str(tmp_path / "r"), "--for", "1"]) == ExitCode.DENIED
    assert capsys.readouterr().err.splitlines() == [
        "ksmd-ctl: recording this host: only root may read the pages of all processes",
        "hint: run as root; without it ksmd-ctl status, nodes and processes show what counters tell",
    ]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_well(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "r"
    command = [sys.executable, "-m", "ksmd_ctl.cli.main", *words(path, "--every", "3600")]
    # Its parent may have blocked the signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            deadline = time.monotonic() + 60
            while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == ExitCode.DONE
    assert out.startswith(f"{path}: ")
    with Recording(path) as recording:
        assert recording.facts.seconds is not None
        assert recording.facts.seconds < 60
        samples = list(recording.samples())
        assert len(samples) > 1
        # A report says the same as record.
        host = recorded_host(recording.facts, recording.nodes(), samples)
    assert out.startswith(f"{path}: {seconds_text(host.seconds)}, ")
