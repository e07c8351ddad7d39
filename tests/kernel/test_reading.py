# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.errors import Absent, Denied, Unreadable
from ksmd_ctl.host.memory import KsmDetection, ProcessId
from ksmd_ctl.host.operation import Move, Unshare, UnsharePart, finish
from ksmd_ctl.kernel.detection import PageReader, probe
from ksmd_ctl.kernel.proc_pid import read_process_bytes, start_time_ticks
from ksmd_ctl.kernel.processes import Surveyor
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.reading import TIMED_OUT, killable_reads, read_part, read_whole, reading_seconds
from ksmd_ctl.kernel.topology import read_frame_map, read_topology
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.privileged.requests import MoveMemory, PlanMove, TakeInventory, TakeSurvey, UnsharePages
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.stuck import stuck_process
from tests.kernel.trees import write_tree


def test_a_child_reads_what_this_process_would(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3 << 20))
    with killable_reads():
        assert read_whole(file, 1 << 30) == file.read_bytes()
        assert len(read_whole(file, 1000)) == 1001
        assert read_part(file, 5, 10) == file.read_bytes()[5:15]
        assert read_part(file, 4 << 20, 10) == b""
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                read_part(tmp_path / "none", 0, 1)
        file.write_bytes(b"other")
        assert read_whole(file, 100) == b"other"
        assert len(mappings(os.getpid())) > 5
        assert reading_seconds() >= 0


def test_a_page_of_ones_own_is_looked_at_without_a_child_that_would_share_it() -> None:
    """Where a page is exclusive is what tells which detection of merged pages is to be believed (6.12)."""
    try:
        before = probe()
    except (Absent, Denied) as error:
        pytest.skip(str(error))
    with killable_reads():
        assert probe() == before


def test_a_process_that_keeps_its_readers_waiting_is_skipped_and_named(tmp_path: Path) -> None:
    topology, frames = read_topology(numa=False), read_frame_map()
    with (
        stuck_process(tmp_path, "stuck-one", uid=65534) as stuck,
        spawn("test-reading") as process,
        PageReader(KsmDetection.KPAGEFLAGS) as reader,
        killable_reads(timeout_seconds=0.2),
    ):
        start = process.map(3)
        process.advise(start, 3, mergeable=True)
        process.store(start, [b"x" * PAGE_SIZE] * 3)
        for name in ("cmdline", "smaps"):
            with pytest.raises(Unreadable) as waited:
                read_process_bytes(stuck, name)
            assert waited.value.errno == TIMED_OUT
        surveyor = Surveyor(topology, frames, reader)
        found = surveyor.all()
        assert process.id in [one.id for one in found]
        assert [(one.pid, one.name) for one in surveyor.skipped] == [(stuck, "stuck-one")]
        assert "keeps its readers waiting" in surveyor.skipped[0].why


def test_a_survey_leaves_it_out(tmp_path: Path) -> None:
    with stuck_process(tmp_path, "stuck-one", uid=65534) as stuck, spawn("test-reading") as process:
        start = process.map(3)
        process.advise(start, 3, mergeable=True)
        process.store(start, [b"x" * PAGE_SIZE] * 3)
        survey = finish(open_kernel_host().start(TakeSurvey(1.0), 60))
    assert process.id in [one.id for one in survey.processes]
    assert stuck in [one.pid for one in survey.skipped]


def test_an_inventory_names_it(tmp_path: Path) -> None:
    with stuck_process(tmp_path, "stuck-one", uid=65534) as stuck, spawn("test-reading") as process:
        start = process.map(3)
        process.advise(start, 3, mergeable=True)
        process.store(start, [b"x" * PAGE_SIZE] * 3)
        found = finish(open_kernel_host().start(TakeInventory(16 << 20), 60))
    assert process.id in [memory.process for memory in found.memories]
    assert [(one.pid, one.name) for one in found.skipped if "keeps its readers waiting" in one.why] == [
        (stuck, "stuck-one")
    ]


@pytest.mark.parametrize("kind", [PlanMove, MoveMemory])
def test_nobody_waits_for_it_who_moves_its_memory(tmp_path: Path, kind: type[PlanMove] | type[MoveMemory]) -> None:
    with stuck_process(tmp_path, "stuck-one", uid=65534) as stuck:
        move = Move(ProcessId(stuck, start_time_ticks(stuck)), to=0)
        with pytest.raises(Unreadable, match="keeps its readers waiting"):
            finish(open_kernel_host().start(kind(move), 60))


def test_nobody_waits_for_it_who_un_merges_others(tmp_path: Path) -> None:
    with stuck_process(tmp_path, "stuck-one", uid=65534) as stuck, spawn("test-reading") as process:
        start = process.map(3)
        process.advise(start, 3, mergeable=True)
        process.store(start, [b"x" * PAGE_SIZE] * 3)
        ids = ProcessId(stuck, start_time_ticks(stuck)), process.id
        parts = tuple(UnsharePart(one, ((start, start + 3 * PAGE_SIZE),), None, 3) for one in ids)
        result = finish(open_kernel_host().start(UnsharePages(Unshare(parts)), 60))
    waited, done = result.parts
    assert ["keeps its readers waiting" in cause for cause in waited.left] == [True]
    assert (done.ended, done.left) == (False, {})


def test_a_file_is_read_through_one_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each opening prints a file of /proc anew, and where it has grown meanwhile its end is somebody else's.
    file, opened = tmp_path / "file", os.open

    def growing(*arguments: Any, **more: Any) -> int:
        with file.open("ab") as stream:
            stream.write(b"line\n")
        return opened(*arguments, **more)

    monkeypatch.setattr(os, "open", growing)
    assert read_whole(file, 1000) == b"line\n"


@pytest.mark.parametrize("name", ["status", "cgroup", "ksm_stat"])
def test_files_that_are_much_too_long_are_refused(tmp_path: Path, name: str) -> None:
    root = write_tree(tmp_path, {f"proc/7/{name}": "x" * (1 << 20)})
    with pytest.raises(Unreadable, match="longer than 256 KiB") as refused:
        read_process_bytes(7, name, root)
    assert refused.value.errno == errno.EFBIG


def test_of_a_command_line_without_end_the_beginning_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "proc/7"
    folder.mkdir(parents=True)
    # As an argument area that was set to memory nobody ever touched (PR_SET_MM_MAP).
    with open(folder / "cmdline", "wb") as file:
        file.truncate(3 << 30)
    assert len(read_process_bytes(7, "cmdline", tmp_path)) == 64 << 10
