# SPDX-License-Identifier: GPL-2.0-or-later
"""What the OOM killer has done and who is gone, by files as the kernel has them, and by real processes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.identity import start_time_ticks
from ksmd_ctl.kernel.losses import read_losses


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_kills_of_the_host_and_of_memory_cgroups(tmp_path: Path) -> None:
    write(tmp_path / "proc/vmstat", "nr_free_pages 5\noom_kill 3\nballoon_inflate 0\n")
    cgroups = tmp_path / "sys/fs/cgroup"
    write(cgroups / "a/b/memory.events", "low 0\nhigh 1\nmax 2\noom 5\noom_kill 4\noom_group_kill 0\n")
    write(cgroups / "memory/c/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    write(cgroups / "memory/old/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")
    write(tmp_path / "sys/fs/outside/memory.events", "oom_kill 9\n")
    asked = ("/a/b", "/c", "/old", "/gone", "/../outside", "relative")
    assert read_losses((), asked, tmp_path).oom_kills == {"host": 3, "/a/b": 4, "/c": 2}


def test_a_kernel_that_counts_no_kills(tmp_path: Path) -> None:
    write(tmp_path / "proc/vmstat", "nr_free_pages 5\n")
    assert read_losses((), ("/a",), tmp_path).oom_kills == {}


def stat(
    folder: Path, pid: int, state: str = "S", flags: int = 0x400000, threads: int = 1, start: int = 70, pending: int = 0
) -> ProcessId:
    fields = ["0"] * 50
    fields[0], fields[6], fields[17], fields[19], fields[28] = state, str(flags), str(threads), str(start), str(pending)
    write(folder / f"proc/{pid}/stat", f"{pid} (a) b) {' '.join(fields)}\n")
    return ProcessId(pid, 70)


def test_who_is_gone(tmp_path: Path) -> None:
    there = [
        stat(tmp_path, 1),
        stat(tmp_path, 2, pending=1 << 14),
        # Its first thread has ended, and others go on.
        stat(tmp_path, 3, "Z", 0x400004, threads=4),
    ]
    gone = [
        ProcessId(4, 70),
        stat(tmp_path, 5, start=71),
        stat(tmp_path, 6, "Z", 0x400004),
        stat(tmp_path, 7, "R", 0x400004),
        stat(tmp_path, 8, "D", threads=4, pending=1 << 8),
    ]
    assert read_losses([*there, *gone], (), tmp_path).gone == tuple(gone)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_a_process_that_was_killed_is_gone_before_anybody_has_waited_for_it(sleeper: subprocess.Popen[bytes]) -> None:
    me = ProcessId(os.getpid(), start_time_ticks(os.getpid()))
    other = ProcessId(sleeper.pid, start_time_ticks(sleeper.pid))
    assert read_losses([me, other], ()).gone == ()
    os.kill(sleeper.pid, 9)
    until = time.monotonic() + 30
    while not (gone := read_losses([me, other], ()).gone) and time.monotonic() < until:
        time.sleep(0.01)
    assert gone == (other,)
