# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading recordings: files that are none, are damaged, or were changed by somebody."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, KsmdError, Unparsable, Unreadable, UsageError
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.schema import VERSION
from tests.recording.files import read_all

NO_RECORDINGS = {
    "empty": (b"", "it is empty"),
    "text": (b"hello\n" * 100, "it is no recording"),
    "header": (b"SQLite format 3\0", "it is"),
    "noise": (b"SQLite format 3\0" + b"\xff" * 5000, "it is"),
}


@pytest.mark.parametrize("name", NO_RECORDINGS)
def test_a_file_that_is_no_recording(name: str, tmp_path: Path) -> None:
    data, why = NO_RECORDINGS[name]
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(KsmdError, match=why) as caught:
        Recording(tmp_path / "r")
    assert caught.value.hint


def test_no_file_a_folder_a_fifo_and_another_database(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        Recording(tmp_path / "r")
    with pytest.raises(UsageError, match="is not a regular file"):
        Recording(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="is not a regular file"):
        Recording(tmp_path / "fifo")
    with sqlite3.connect(tmp_path / "other") as database:
        database.execute("CREATE TABLE fact (name, value)")
    with pytest.raises(UsageError, match="an SQLite file and no recording"):
        Recording(tmp_path / "other")


def test_a_file_of_somebody_else(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(Unreadable, match="EACCES"):
        Recording(made)


def test_a_recording_that_does_not_say_its_format(made: Path) -> None:
    with sqlite3.connect(made) as database:
        database.execute("PRAGMA user_version = 0")
    with pytest.raises(Unparsable, match="it does not say which format it has"):
        Recording(made)


def test_a_later_format_is_refused_and_a_later_table_or_column_is_not(made: Path) -> None:
    with sqlite3.connect(made) as database:
        database.execute("CREATE TABLE later (it)")
        database.execute("ALTER TABLE sample ADD COLUMN later INTEGER")
        database.execute("ALTER TABLE sample DROP COLUMN thp_split_page")
    with Recording(made) as recording:
        assert isinstance(next(iter(recording.samples())).readings["thp_split_page"], Absent)
    with sqlite3.connect(made) as database:
        database.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(UsageError, match=f"it has format {VERSION + 1}"):
        Recording(made)


def test_a_recording_that_was_made_before_there_were_domains(made: Path) -> None:
    with sqlite3.connect(made) as database:
        database.execute("DROP TABLE domain")
        database.execute("ALTER TABLE process DROP COLUMN domain")
        database.execute("DELETE FROM fact WHERE name = 'domains'")
    with Recording(made) as recording:
        assert recording.facts.domains is None
        assert recording.domains() == {}
        assert [process.domain for process in recording.processes()] == [None, None]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_recording_that_is_cut_off(made: Path, part: float) -> None:
    data = made.read_bytes()
    made.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(Unparsable, match="is cut off"):
        read_all(made)


def test_a_damaged_recording_is_an_error_or_is_read(made: Path) -> None:
    """Never anything else: each page of the file is overwritten once."""
    data = made.read_bytes()
    refused = 0
    for start in range(0, len(data), 4096):
        made.write_bytes(data[:start] + b"\xa5" * 2048 + data[start + 2048 :])
        try:
            read_all(made)
        except KsmdError:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("DROP TABLE page", "it has no table page"),
        ("DROP TABLE event; CREATE VIEW event AS SELECT 1.0 AS seconds, '' AS text", "it has no table event"),
        ("DELETE FROM fact WHERE name = 'one_in'", "it has no fact one_in"),
        ("UPDATE fact SET value = '0' WHERE name = 'one_in'", "out of its range"),
        ("UPDATE fact SET value = '3' WHERE name = 'page_size_bytes'", "out of its range"),
        ("UPDATE page SET content = 99999999 WHERE content > 0", "there is no content 99999999"),
        ("UPDATE fact SET value = '{' WHERE name = 'kind'", "is no JSON"),
        ("DROP TABLE page; CREATE TABLE page (look, process, page, content, node, frame); "
         "INSERT INTO page VALUES (1, 1, 'x', 1, 0, 0)", "of a wrong type"),
        ("UPDATE sample SET seconds = 9e999", "out of range"),
        ("UPDATE event SET text = CAST(x'ff41' AS TEXT)", "a text is no UTF-8"),
        ("UPDATE sample SET advisor_mode = CAST(x'ff1b5b' AS TEXT)", "a text is no UTF-8"),
        ("PRAGMA writable_schema = ON; "
         "UPDATE sqlite_schema SET sql = 'CREATE TABLE sample (\x1b[2J' WHERE name = 'sample'", r"\\x1b"),
        ("UPDATE event SET text = char(27) || '[2J'", "cannot be shown"),
        ("UPDATE process SET grouped = char(27) || '[31m'", "cannot be shown"),
        ("UPDATE sample SET advisor_mode = char(27) || '[31m'", "advisor_mode is"),
        ("UPDATE fact SET value = '\"\\u001b[31m\"' WHERE name = 'release'", "cannot be shown"),
        ("UPDATE fact SET value = '{\"version\": \"\\u001b[31m\"}' WHERE name = 'service'", "cannot be shown"),
        ("UPDATE fact SET value = '1e400' WHERE name = 'begun'", "out of its range"),
        ("INSERT INTO node VALUES (100000, '', 0, '{}')", "there is no node 100000"),
        ("INSERT INTO domain VALUES ('gold', '0-x')", "are no nodes"),
        ("INSERT INTO domain VALUES ('gold', '1-2000')", "no node"),
        ("INSERT INTO domain VALUES (char(27) || '[2J', '0')", "cannot be shown"),
        ("UPDATE fact SET value = '7' WHERE name = 'domains'", "no fact domains"),
        ("UPDATE fact SET value = '-1' WHERE name = 'seconds'", "out of its range"),
        ("UPDATE sample SET pages_sharing = 9223372036854775807", "pages_sharing is '9223372036854775807'"),
        ("UPDATE sample SET pages_sharing = -1", "pages_sharing is '-1'"),
        ("UPDATE sample SET general_profit = -9223372036854775808", "general_profit is"),
        ("UPDATE sample SET run = 7", "run is '7'"),
        ("UPDATE sample SET merge_across_nodes = 2", "merge_across_nodes is '2'"),
        ("UPDATE sample SET seconds = -1", "out of range"),
        ("UPDATE look SET ended = -1", "out of range"),
        ("UPDATE process_look SET pages = -1", "out of range"),
        ("UPDATE process_sample SET resident_pages = -1", "out of range"),
        ("DELETE FROM process WHERE process = 1", "there is no process 1"),
        ("DELETE FROM look WHERE look = 2", "there is no look 2"),
    ],
)  # fmt: skip
def test_a_recording_that_somebody_has_changed(made: Path, statement: str, why: str) -> None:
    with sqlite3.connect(made) as database:
        database.executescript(statement)
    with pytest.raises(Unparsable, match=why):
        read_all(made)
