# SPDX-License-Identifier: GPL-2.0-or-later
"""record, report and replay with files that are cut off, damaged or unreadable, and without space: two lines."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.cli.main import main
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.history.file import HistoryFile
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.recording.schema import VERSION
from tests.recording.files import read_all
from tests.replay.recordings import Stage, contents

COMMANDS = ("report", "replay")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    stage = Stage(tmp_path_factory.mktemp("recording") / "r")
    for number in range(2):
        stage.spawn(contents(number, 60), number)
    stage.change(lambda: stage.host.set(Knob.RUN, 1))
    stage.pass_time(3)
    return stage.end().read_bytes()


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """The exit code and the error of a command, which has two lines where there is one."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    if code == ExitCode.DONE:
        assert err == ""
    else:
        assert out == ""
        first, second = err.splitlines()
        assert first.startswith("ksmd-ctl: ")
        assert second.startswith("hint: ")
        assert "bug" not in err
        assert err.isprintable() or err.replace("\n", "").isprintable()
    return code, err


@pytest.mark.parametrize("command", COMMANDS)
def test_cut_off_anywhere(command: str, recording: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(command)
    path = tmp_path / "r"
    for length in [0, 1, 15, 16, 99, 100, 4096, len(recording) - 1, *chance.choices(range(len(recording)), k=150)]:
        path.write_bytes(recording[:length])
        code, _ = said(capsys, command, path)
        assert code != ExitCode.DONE, length
        # Reading it has changed and left nothing.
        assert path.stat().st_size == length
        assert os.listdir(tmp_path) == ["r"]


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_anywhere(command: str, recording: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(command)
    path, refused = tmp_path / "r", 0
    for _ in range(100):
        data = bytearray(recording)
        # Half of a recording is empty.
        for _ in range(chance.choice((1, 10, 100))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        refused += said(capsys, command, path)[0] != ExitCode.DONE
    assert refused > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_a_later_format_another_database_and_no_file(
    command: str, recording: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r"
    path.write_bytes(recording)
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    code, err = said(capsys, command, path)
    assert code == ExitCode.USAGE
    assert f"it has format {VERSION + 1}, and this ksmd-ctl reads formats up to {VERSION}" in err
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA application_id = 1")
    assert "it is an SQLite file and no recording" in said(capsys, command, path)[1]
    assert "there is no such file" in said(capsys, command, tmp_path / "none")[1]
    assert "it is not a regular file" in said(capsys, command, tmp_path)[1]
    assert "it is no recording" in said(capsys, command, Path(sys.executable))[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_history_that_a_service_has_open(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = HistoryFile(tmp_path / "history", 1 << 20)
    try:
        code, err = said(capsys, command, tmp_path / "history")
    finally:
        history.close()
    assert code == ExitCode.USAGE
    assert "it is an SQLite file and no recording" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_others_may_not_read(
    command: str, recording: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    path = tmp_path / "r"
    path.write_bytes(recording)
    path.chmod(0o600)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o711)
    os.seteuid(65534)
    try:
        code, err = said(capsys, command, path)
    finally:
        os.seteuid(0)
    assert code == ExitCode.DENIED
    assert "EACCES" in err
    assert "mode 0600" in err


# -- no space ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Leave so many bytes."""
    free = os.statvfs(folder)
    (folder / "filling").write_bytes(bytes(free.f_bavail * free.f_frsize - leave))


def test_a_disk_that_is_full_from_the_beginning(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(small, 0)
    code, err = said(capsys, "record", "--host", "engine", "-o", small / "r", "--for", "1")
    assert code == ExitCode.UNWRITABLE
    assert "ENOSPC" in err
    assert "make room" in err
    # So that the same command can be given again.
    assert os.listdir(small) == ["filling"]


def test_a_disk_that_fills_up_leaves_what_was_recorded(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ksmd_ctl.recording.recorder._COMMIT_SECONDS", 0.1)
    path, words = small / "r", ("record", "--host", "engine", "--cpu", "1", "--every", "0.1", "-o")
    assert said(capsys, *words, small.parent / "first", "--for", "0.3")[0] == ExitCode.DONE
    # With its journal.
    fill(small, (small.parent / "first").stat().st_size + (160 << 10))
    code, err = said(capsys, *words, path, "--for", "120")
    assert code == ExitCode.UNWRITABLE
    assert "ENOSPC" in err
    assert "what was recorded until some seconds before can be read" in err
    read_all(path)
    assert said(capsys, "report", path)[0] == ExitCode.DONE


@pytest.mark.parametrize("command", COMMANDS)
def test_no_space_for_the_html_file(
    command: str, recording: bytes, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small.parent / "r"
    path.write_bytes(recording)
    fill(small, 4096)
    code, err = said(capsys, command, path, "--html", small / "page.html")
    assert code == ExitCode.UNWRITABLE
    assert "ENOSPC" in err
