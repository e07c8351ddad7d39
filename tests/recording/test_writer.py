# SPDX-License-Identifier: GPL-2.0-or-later
"""Writing recordings: what comes back, what is kept out, and ends that are none."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.errors import Absent, KsmdError, Unwritable, UsageError
from ksmd_ctl.host.fields import FIELDS
from ksmd_ctl.host.knobs import KNOBS, Knob
from ksmd_ctl.host.memory import Process, ProcessId
from ksmd_ctl.host.page_sample import PageLook, ProcessPages, SampledPage
from ksmd_ctl.host.sample import NodeMemory, Sample
from ksmd_ctl.recording.reader import Recording
from ksmd_ctl.recording.writer import Writer
from tests.lint.test_lint import ROOT
from tests.recording.files import read_all
from tests.replay.recordings import Stage, contents

KEY = bytes(range(16))


def test_what_was_recorded_comes_back(made: Path) -> None:
    with Recording(made) as recording:
        samples = list(recording.samples())
        assert [sample.time_seconds for sample in samples] == [0, 0, 1, 2, 3, 3, 3, 3, 3, 4]
        assert samples[-1].number("full_scans") == samples[-1].readings["full_scans"] > 3  # type: ignore[operator]
        assert isinstance(samples[-1].readings["pressure_some_seconds"], Absent)
        assert samples[0].nodes.keys() == {0, 1}
        assert recording.nodes() == (0, 1)
        one, other = recording.processes()
        assert (one.name, one.home, one.began, one.ended) == ("p0", 0, 0.0, None)
        assert (other.pid, other.ended) == (1001, 3.0)
        assert [(event.seconds, event.kind, event.text) for event in recording.events()] == [
            (0.0, "knob", "run: 0 → 1"),
            (3.0, "process", "p1 (pid 1001) ended"),
        ]
        assert len(recording.looks()) == 6
        assert [(look.process, look.pages) for look in recording.process_looks()][:2] == [(1, 60), (2, 60)]


def test_only_what_changed_is_written(made: Path) -> None:
    with Recording(made) as recording:
        rows = list(recording.changes())
    assert [row.look for row in rows[:120]] == [1] * 120
    plain = [row for row in rows[120:] if row.frame == 0]
    assert [(row.process, row.page & 0xFF) for row in plain] == [(1, rows[0].page + 5 & 0xFF)]
    # Others are pages that were merged onto another node's frame.
    assert all(row.content is not None for row in rows[120:])


def test_equal_contents_have_one_number_and_zeroes_have_none_of_these(made: Path) -> None:
    with Recording(made) as recording:
        rows = [row for row in recording.changes() if row.look == 1]
    expected = [contents(number, 60) for number in range(2)]
    found: dict[bytes, set[object]] = {}
    for row in rows:
        page = row.page - min(other.page for other in rows if other.process == row.process)
        found.setdefault(expected[row.process - 1][page], set()).add(row.content)
    assert all(len(numbers) == 1 for numbers in found.values())
    assert found[page_content("0")] == {0}
    assert len({frozenset(numbers) for numbers in found.values()}) == len(found)


def test_no_content_and_no_digest_is_in_the_file(made: Path) -> None:
    data = made.read_bytes()
    assert b"common " not in data
    assert b"own 0" not in data
    with sqlite3.connect(made) as database:
        assert database.execute("SELECT count(*) FROM content WHERE digest IS NOT NULL").fetchone() == (0,)


def test_with_a_key_digests_of_two_recordings_can_be_compared(tmp_path: Path) -> None:
    found = []
    for name, key in (("a", KEY), ("b", KEY), ("c", bytes(16))):
        stage = Stage(tmp_path / name, key=key)
        stage.spawn(contents(1, 50))
        stage.recorder.look()
        with sqlite3.connect(stage.end()) as database:
            found.append({digest for (digest,) in database.execute("SELECT digest FROM content")})
    assert found[0] == found[1]
    assert len(found[0]) > 20
    assert not found[0] & found[2]


def test_an_anonymous_recording_has_no_name(tmp_path: Path) -> None:
    with Writer(tmp_path / "r", 0, anonymous=True) as writer:
        processes = []
        for pid, name, unit in ((4711, "secretd", "secret.service"), (4712, "secretd", ""), (4713, "other", "x.scope")):
            about = Process(ProcessId(pid, 1), name, f"group of {name}", unit, frozenset(), "")
            processes.append(ProcessPages(ProcessId(pid, 1), name, 0.0, 1, 0, None, about, {4096: SampledPage(7, 0)}))
        writer.look(PageLook(0.0, 0.0, 0.0, tuple(processes)), float, lambda _: 0.0)
        assert writer.ended(1.0, ProcessId(4711, 1)) == "program 1 (pid 1)"
    data = (tmp_path / "r").read_bytes()
    for word in (b"secret", b"other", b"x.scope", b"4711"):
        assert word not in data
    with sqlite3.connect(tmp_path / "r") as database:
        assert database.execute("SELECT pid, name, unit, grouped FROM process").fetchall() == [
            (1, "program 1", "unit 1", "group 1"),
            (2, "program 1", "", "group 1"),
            (3, "program 2", "unit 2", "group 2"),
        ]


def test_a_process_that_could_not_be_looked_at_keeps_its_pages_and_one_without_memory_loses_them(
    tmp_path: Path,
) -> None:
    one, other = (ProcessPages(ProcessId(pid, 1), "p", 0.0, 1, 0, None, None, {0: SampledPage(9, 0)}) for pid in (1, 2))
    with Writer(tmp_path / "r", 0) as writer:
        writer.look(PageLook(0.0, 0.0, 0.0, (one, other)), float, lambda _: 0.0)
        writer.look(PageLook(1.0, 1.0, 0.0, (), {1: "denied"}), float, lambda _: 0.0)
    with sqlite3.connect(tmp_path / "r") as database:
        assert database.execute("SELECT process, content FROM page WHERE look = 2").fetchall() == [(2, None)]


def test_every_field_is_a_column_and_survives(tmp_path: Path) -> None:
    words = {"advisor_mode": "none", "ksmd_cpus": "0-3", "ksmd_scheduling": "idle"}
    readings = {
        field.name: words.get(
            field.name, min(KNOBS[Knob(field.name)].maximum, 1 << 62) if field.name in KNOBS else number
        )
        for number, field in enumerate(FIELDS)
    }
    stage = Stage(tmp_path / "r")
    stage.writer.sample(2.5, Sample(99.0, readings, {3: NodeMemory(10, 4)}))
    with Recording(stage.end()) as recording:
        (found,) = recording.samples()
    assert found == Sample(2.5, readings, {3: NodeMemory(10, 4)})


def test_nobody_else_can_read_it_and_it_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r"
    before = os.umask(0)
    try:
        Writer(path, 0).close()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="there is such a file already"):
        Writer(path, 0)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="there is such a file already"):
        Writer(tmp_path / "link", 0)
    with pytest.raises(Unwritable, match="there is no folder"):
        Writer(tmp_path / "no/folder", 0)


_WRITES = """
import sys
from pathlib import Path
from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.host.knobs import Knob
from tests.replay.recordings import Stage
stage = Stage(Path(sys.argv[1]))
pid = stage.spawn([page_content(str(page)) for page in range(300)])
stage.recorder.sample()
stage.writer.commit()
print("begun", flush=True)
for count in range(100000):
    for page in range(300):
        stage.write(pid, page, page_content(f"new {count} {page}"))
    stage.host.advance(11)
    stage.recorder.look()
    stage.recorder.sample()
"""


def test_after_kill_9_it_can_be_read(tmp_path: Path) -> None:
    for count in range(5):
        path = tmp_path / f"{count}"
        command = [sys.executable, "-c", _WRITES, str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            try:
                process.wait(timeout=0.05 + 0.07 * count)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        read_all(path)
        with Recording(path) as recording:
            assert list(recording.samples())


def test_a_recording_that_grows_can_be_read_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with subprocess.Popen([sys.executable, "-c", _WRITES, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        try:
            found = set()
            # Each takes longer than the one before.
            for _ in range(25):
                try:
                    read_all(path)
                    found.add("read")
                except KsmdError as error:
                    found.add(error.why)
        finally:
            process.kill()
    assert "read" in found
    assert found <= {"read", "it is being written just now"}


def test_a_full_disk_is_said_and_what_was_recorded_stays(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = [sys.executable, "-c", _WRITES, str(tmp_path / "r")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert "ksmd_ctl.errors.Unwritable" in done.stderr
    read_all(tmp_path / "r")
