# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of the history: what is written is read, in order; it stays within its bounds, and survives what happens."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, ExitCode, HostError, NotRecorded, Unparsable, Unreadable
from ksmd_ctl.history.file import DAY_SECONDS, LONG_SECONDS, HistoryFile, put_aside
from ksmd_ctl.history.model import Entry, Kind, Means, Query, Severity, history_path
from ksmd_ctl.history.reading import VERSION, read_copy
from tests.history.killing import kill_again_and_again

MIB = 1 << 20
EVERYTHING = Query(limit=1 << 30)


def entry(number: int, kind: Kind = Kind.FOREIGN, text: str = "", time: float | None = None) -> Entry:
    at = 100.0 * number if time is None else time
    return Entry(at, kind, "drift", Severity.WARNING, text or f"change {number}", "ksmtuned", {"knob": "run"}, "boot-1")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return history_path(tmp_path / "state", "kernel")


@contextmanager
def opened(path: Path, most_bytes: int = 16 * MIB) -> Iterator[HistoryFile]:
    file = HistoryFile(path, most_bytes)
    try:
        yield file
    finally:
        file.close()


def size(path: Path) -> int:
    return sum(one.stat().st_size for one in path.parent.iterdir() if one.name.startswith(path.name))


# -- writing and reading -----------------------------------------------------------------------------------------


def test_what_is_written_is_there_after_it_was_opened_again(path: Path) -> None:
    entries = [
        entry(1),
        entry(2, Kind.TRANSACTION),
        Entry(250.5, Kind.SERVICE, "started", Severity.INFO, "ü", "", {}, "b"),
    ]
    means = [Means(60, 1.5, 2, 3, 4, 0.5, {"0": 7.0, "10": 8.0}), Means(120)]
    with opened(path) as file:
        assert (file.last_seconds(), file.entries(EVERYTHING), file.means(0, 60)) == (None, [], [])
        file.write(entries, means)
    with opened(path) as file:
        assert file.entries(EVERYTHING) == entries
        assert file.means(0, 60) == means
        assert file.last_seconds() == 250.5
        assert file.bytes() == path.stat().st_size
    assert read_copy(path, EVERYTHING) == entries


def test_only_its_owner_may_open_it(path: Path) -> None:
    with opened(path) as file:
        file.write([entry(1)], [])
        assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}
        assert {one.name for one in path.parent.iterdir()} == {path.name, f"{path.name}-wal"}
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_the_order_is_that_of_writing_though_the_calendar_is_set_back(path: Path) -> None:
    with opened(path) as file:
        file.write([entry(1, time=5000.0)], [Means(4980, 1)])
        file.write([entry(2, time=1000.0)], [Means(960, 2)])
        file.write([entry(3, time=1060.0)], [Means(960, 3)])
        assert [one.text for one in file.entries(EVERYTHING)] == ["change 1", "change 2", "change 3"]
        # What is written again counts.
        assert [(one.time_seconds, one.saved_bytes) for one in file.means(0, 60)] == [(960, 3), (4980, 1)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 20)), max_size=30),
    st.none() | st.integers(0, 20),
    st.none() | st.integers(0, 20),
    st.none() | st.frozensets(st.sampled_from(Kind)),
    st.integers(0, 10),
)
def test_a_query_gets_the_latest_that_match(
    tmp_path_factory: pytest.TempPathFactory,
    written: list[tuple[Kind, int]],
    since: int | None,
    until: int | None,
    kinds: frozenset[Kind] | None,
    limit: int,
) -> None:
    query = Query(since, until, kinds, limit)
    entries = [entry(number, kind, time=float(at)) for number, (kind, at) in enumerate(written)]
    with opened(history_path(tmp_path_factory.mktemp("history"), "kernel")) as file:
        file.write(entries, [])
        matching = [one for one in entries if query.matches(one)]
        assert file.entries(query) == (matching[-limit:] if limit else [])


def test_means_are_of_the_length_that_is_asked_for(path: Path) -> None:
    with opened(path) as file:
        file.write([], [Means(60 * minute, minute, None, 10, ksm_pages={"0": minute}) for minute in range(20)])
        assert file.means(0, 600) == [
            Means(0, 4.5, None, 10, None, None, {"0": 4.5}),
            Means(600, 14.5, None, 10, None, None, {"0": 14.5}),
        ]
        assert [one.time_seconds for one in file.means(700, 60)] == list(range(720, 1200, 60))


# -- its bounds --------------------------------------------------------------------------------------------------


def test_what_is_too_old_is_forgotten_and_what_is_older_than_a_day_is_kept_in_long_means(path: Path) -> None:
    minutes = range(0, 4 * DAY_SECONDS, 60)
    now = 4 * DAY_SECONDS
    with opened(path) as file:
        file.write(
            [entry(0, time=float(at)) for at in minutes[::60]], [Means(at, at, 1, 2, 3, 4, {"0": 1}) for at in minutes]
        )
        file.forget(now, 3 * DAY_SECONDS)
        assert min(one.time_seconds for one in file.entries(EVERYTHING)) == DAY_SECONDS
        found = file.means(0, 60)
        old = [one for one in found if one.time_seconds < now - DAY_SECONDS]
        assert len(old) == 2 * DAY_SECONDS // LONG_SECONDS
        assert len(found) - len(old) == DAY_SECONDS // 60
        # The middle of ten minutes.
        assert all(one.saved_bytes == one.time_seconds + 270 for one in old)
        file.forget(now, 3 * DAY_SECONDS)
        assert file.means(0, 60) == found


@pytest.mark.parametrize("most_bytes", [MIB, 2 * MIB])
def test_it_never_becomes_larger_and_decisions_go_first(path: Path, most_bytes: int) -> None:
    text = "x" * 500
    with opened(path, most_bytes) as file:
        file.write([entry(number, text=f"foreign {number} {text}") for number in range(32)], [])
        most = 0
        for step in range(150):
            file.write([entry(step, Kind.POLICY, text) for _ in range(32)], [Means(60 * step, 1, ksm_pages={"0": 1})])
            most = max(most, size(path))
        assert most <= most_bytes
        # It was full, many times over.
        assert most >= most_bytes // 2
        assert len(file.entries(Query(kinds=frozenset({Kind.FOREIGN})))) == 32
        for step in range(150):
            file.write([entry(step, text=f"later {step} {text}") for _ in range(32)], [])
            most = max(most, size(path))
        assert most <= most_bytes
        assert file.entries(EVERYTHING)[-1].text.startswith("later 149 ")
        assert not file.entries(Query(kinds=frozenset({Kind.POLICY})))


def test_a_bound_that_was_made_smaller_is_kept_to(path: Path) -> None:
    with opened(path, 4 * MIB) as file:
        for step in range(200):
            file.write([entry(step, text="x" * 500) for _ in range(32)], [])
    assert size(path) > 2 * MIB
    with opened(path, MIB) as file:
        file.write([entry(1, text="the last")], [])
        assert file.entries(Query(limit=1))[0].text == "the last"
    assert size(path) <= MIB


def test_samples_alone_stay_within_a_small_bound(path: Path) -> None:
    nodes = {str(node): 1.0 for node in range(64)}
    with opened(path, MIB) as file:
        for step in range(0, 3000, 30):
            file.write([], [Means(60 * one, 1, 1, 1, 1, 1, nodes) for one in range(step, step + 30)])
            assert size(path) <= MIB
        assert file.means(0, 60)[-1].time_seconds == 60 * 2999


# -- what happens to it ------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_neither_waits(path: Path) -> None:
    with opened(path) as file:
        with pytest.raises(NotRecorded, match="locked"):
            HistoryFile(path, MIB)
        file.write([entry(1)], [])
        # Who only looks reads a copy.
        assert read_copy(path, EVERYTHING) == [entry(1)]


def damaged(path: Path, kind: str) -> None:
    with opened(path) as file:
        file.write([entry(number) for number in range(500)], [])
    match kind:
        case "empty":
            # As after a crash at its very beginning: it is begun.
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(random.Random(1).randbytes(40000))
        case "text":
            path.write_text("what is this?\n" * 1000)
        case "cut":
            path.write_bytes(path.read_bytes()[:10000])
        case "newer" | "other" | "no table":
            statement = {
                "newer": f"PRAGMA user_version = {VERSION + 1}",
                "other": "PRAGMA application_id = 0",
                "no table": "DROP TABLE events",
            }[kind]
            with closing(sqlite3.connect(path)) as other:
                other.execute(statement)
        case "middle":
            content = bytearray(path.read_bytes())
            content[8192:40000] = random.Random(2).randbytes(40000 - 8192)
            path.write_bytes(content)
        case "folder":
            path.unlink()
            path.mkdir()
        case "link":
            path.unlink()
            path.symlink_to("/etc/passwd")
        case "fifo":
            path.unlink()
            os.mkfifo(path)


DAMAGES = ["garbage", "text", "cut", "newer", "other", "no table", "middle", "folder", "link", "fifo"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_told_and_a_new_one_can_be_begun(path: Path, kind: str) -> None:
    damaged(path, kind)
    with pytest.raises((Unparsable, Unreadable)) as read:
        read_copy(path, EVERYTHING)
    assert str(path) in read.value.why
    if kind in ("folder", "fifo"):
        assert "move it away" in read.value.hint

    def use() -> None:
        with opened(path) as file:
            file.write([entry(number) for number in range(2000)], [])
            file.entries(EVERYTHING)

    with pytest.raises(Unparsable) as caught:
        use()
    assert str(path) in caught.value.why
    assert caught.value.hint
    assert put_aside(path) == f"{path}.damaged"
    with opened(path) as file:
        file.write([entry(1)], [])
        assert file.entries(EVERYTHING) == [entry(1)]


def test_an_empty_file_is_begun(path: Path) -> None:
    damaged(path, "empty")
    with opened(path) as file:
        file.write([entry(1)], [])
    assert read_copy(path, EVERYTHING) == [entry(1)]


@pytest.mark.parametrize("evil", ["\x1b]0;x\x07", "a\nb", "\u202e", b"x", 7, None])
def test_what_cannot_be_shown_is_never_read(path: Path, evil: object) -> None:
    with opened(path) as file:
        file.write([entry(1)], [])
    with closing(sqlite3.connect(path)) as other:
        other.executescript(
            "DROP TABLE events; CREATE TABLE events (id, time, boot, kind, event, severity, text, who, fields)"
        )
        other.execute("INSERT INTO events VALUES (1, 1, 1, 'knob', 'x', 'info', ?, '', '')", (evil,))
        other.commit()
    with pytest.raises(Unparsable, match="damaged"):
        read_copy(path, EVERYTHING)


def test_there_is_none(path: Path) -> None:
    with pytest.raises(Absent) as caught:
        read_copy(path, EVERYTHING)
    assert caught.value.exit_code == ExitCode.LACKING


def test_no_room_for_the_copy(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as file:
        file.write([entry(1)], [])
    # No folder that can be had, as tempfile says it.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(Unreadable, match=r"a copy of .*: ENOENT") as caught:
        read_copy(path, EVERYTHING)
    assert "TMPDIR" in caught.value.hint
    monkeypatch.undo()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(Unreadable, match=r"a copy of .*: EFBIG"):
            read_copy(path, EVERYTHING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_copy(path, EVERYTHING) == [entry(1)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_no_permission(path: Path) -> None:
    with opened(path) as file:
        file.write([entry(1)], [])
    path.parent.chmod(0o755)
    for folder in path.parent.parents:
        if folder.stat().st_uid == 0 and folder != Path("/") and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        with pytest.raises(Unreadable, match="EACCES") as caught:
            read_copy(path, EVERYTHING)
        with pytest.raises(Denied, match="EACCES"):
            HistoryFile(path, MIB)
        with pytest.raises(Denied, match="EACCES"):
            HistoryFile(path.with_name("other"), MIB)
    finally:
        os.seteuid(0)
    assert caught.value.exit_code == ExitCode.DENIED
    assert "root" in caught.value.hint


@contextmanager
def no_space(most_bytes: int) -> Iterator[None]:
    """No file may become longer: SQLite is told EFBIG where a full disk says ENOSPC."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_no_space_loses_nothing_that_was_written_and_ends_when_there_is_some(path: Path) -> None:
    with opened(path) as file:
        file.write([entry(1)], [])
        before = path.with_name(f"{path.name}-wal").stat().st_size
        with no_space(before + 2000):
            for _ in range(3):
                with pytest.raises(NotRecorded, match=r"I/O|full") as caught:
                    file.write([entry(number, text="x" * 500) for number in range(2, 34)], [])
            assert "room" in caught.value.hint
            assert file.entries(EVERYTHING) == [entry(1)]
        file.write([entry(2)], [])
        assert file.entries(EVERYTHING) == [entry(1), entry(2)]
    assert read_copy(path, EVERYTHING) == [entry(1), entry(2)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk(tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False).returncode:
        pytest.skip("needs the permission to mount")
    try:
        path = history_path(disk, "kernel")
        with opened(path) as file:

            def fill() -> None:
                for _ in range(10000):
                    file.write([entry(1, text="x" * 500)], [])

            for _ in range(3):
                with pytest.raises(NotRecorded, match="full"):
                    fill()
            before = file.entries(EVERYTHING)
            assert len(before) > 100
        assert read_copy(path, EVERYTHING) == before
        with pytest.raises(NotRecorded):
            HistoryFile(disk / "another", MIB)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_space_at_the_beginning(path: Path) -> None:
    with no_space(0), pytest.raises(NotRecorded):
        HistoryFile(path, MIB)
    with opened(path) as file:
        file.write([entry(1)], [])


@pytest.mark.parametrize("as_service", [False, True], ids=["the file", "the service's thread"])
def test_after_a_kill_it_is_as_it_was_after_a_write(path: Path, as_service: bool) -> None:
    kill_again_and_again(path, 30, seed=16, as_service=as_service)


def test_a_copy_taken_at_any_moment_can_be_read(path: Path, tmp_path: Path) -> None:
    """As after a loss of power: what one write has added to the log may be there in part."""
    with opened(path) as file:
        for number in range(10):
            file.write([entry(number)], [])
        log = path.with_name(f"{path.name}-wal").read_bytes()
        content = path.read_bytes()
    chance = random.Random(5)
    for cut in [0, len(log), *(chance.randrange(len(log)) for _ in range(40))]:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = history_path(tmp_path / "copy", "kernel")
        copy.parent.mkdir()
        copy.write_bytes(content)
        copy.with_name(f"{copy.name}-wal").write_bytes(log[:cut] + chance.randbytes(chance.randrange(3000)))
        try:
            with opened(copy) as file:
                found = file.entries(EVERYTHING)
        except HostError:
            # Its very first page was in the log only.
            assert cut < len(log)
            continue
        assert found == [entry(number) for number in range(len(found))]
        assert cut < len(log) or len(found) == 10
