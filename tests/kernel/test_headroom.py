# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.headroom import (
    CgroupLimit,
    Room,
    cgroup_limits,
    node_available_bytes,
    read_losses,
    rooms,
    tightest,
)
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from tests.kernel.trees import write_tree

V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
MEMINFO = (
    "Node 1 MemTotal: 9000 kB\nNode 1 MemFree: {free} kB\nNode 1 Inactive(file): 500 kB\nNode 1 Dirty: {dirty} kB\n"
)


def test_version_2_counts_every_level_and_the_lesser_of_high_and_max(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/7/cgroup": "0::/a.slice/b.service/payload\n",
            f"{V2}/a.slice/memory.max": "1000\n",
            f"{V2}/a.slice/memory.high": "900\n",
            f"{V2}/a.slice/memory.current": "950\n",
            f"{V2}/a.slice/b.service/memory.max": "max\n",
            f"{V2}/a.slice/b.service/memory.high": "max\n",
            f"{V2}/a.slice/b.service/memory.current": "700\n",
            f"{V2}/a.slice/b.service/payload/memory.max": "800\n",
            f"{V2}/a.slice/b.service/payload/memory.high": "max\n",
            f"{V2}/a.slice/b.service/payload/memory.current": "600\n",
        },
    )
    found = cgroup_limits(7, root)
    assert found == (CgroupLimit("/a.slice/b.service/payload", 800, 600), CgroupLimit("/a.slice", 900, 950))
    assert [limit.room_bytes for limit in found] == [200, 0]


def test_a_reserve_is_left_in_a_cgroup() -> None:
    assert CgroupLimit("/a", 320 << 20, 300 << 20).spare_bytes == 10 << 20
    assert CgroupLimit("/a", 10 << 20, 1 << 20).spare_bytes == 5 << 20
    assert CgroupLimit("/a", 10 << 20, 8 << 20).spare_bytes == 0


def test_version_1_has_one_limit_and_a_number_for_none(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/7/cgroup": "9:memory:/t/x\n1:name=systemd:/y\n0::/z\n",
            f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{V1}/memory.usage_in_bytes": "5\n",
            f"{V1}/t/memory.limit_in_bytes": "100\n",
            f"{V1}/t/memory.usage_in_bytes": "30\n",
        },
    )
    assert cgroup_limits(7, root) == (CgroupLimit("/t", 100, 30),)


@pytest.mark.parametrize("text", ["0::/\n", "0::/../../other\n", "1:name=systemd:/x\n", ""])
def test_no_limits(tmp_path: Path, text: str) -> None:
    assert cgroup_limits(7, write_tree(tmp_path, {"proc/7/cgroup": text})) == ()


def test_the_least_room_decides(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "sys/devices/system/node/node1/meminfo": MEMINFO.format(free=1000, dirty=100),
            "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2000 kB\n",
            "proc/7/cgroup": "0::/a\n",
            f"{V2}/a/memory.max": str(320 << 20),
            f"{V2}/a/memory.current": str((310 << 20) - (1 << 19)),
        },
    )
    assert node_available_bytes(1, root) == 1400 * 1024
    moving = rooms(7, frozenset({1}), 400 * 1024, root, grows=False)
    floor = "the floor of 400.0 KiB"
    assert moving == [Room("on node 1", 1000 * 1024, floor)]
    growing = rooms(7, frozenset({1}), 400 * 1024, root, grows=True)
    assert growing == [
        Room("on node 1", 1000 * 1024, floor),
        Room("on the host", 1600 * 1024, floor),
        Room("in the memory cgroup /a", 1 << 19, "its reserve of 10.0 MiB"),
    ]
    assert tightest(growing).where == "in the memory cgroup /a"
    assert tightest(rooms(7, frozenset({1}), 1 << 30, root, grows=True)) == Room("on node 1", 0, "the floor of 1.0 GiB")


def test_dirty_page_cache_is_not_available(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"sys/devices/system/node/node1/meminfo": MEMINFO.format(free=10, dirty=800)})
    assert node_available_bytes(1, root) == 10 * 1024
    with pytest.raises(Absent):
        node_available_bytes(2, root)


def test_a_kernel_without_numa_has_one_node_and_no_folder_for_it(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2000 kB\n"})
    assert node_available_bytes(0, root) == 2000 * 1024
    with pytest.raises(Absent):
        node_available_bytes(1, root)


def test_this_machine() -> None:
    assert tightest(rooms(1, frozenset({0}), 0, grows=True)).free_bytes > 0


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
