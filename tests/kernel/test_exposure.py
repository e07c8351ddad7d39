# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path

from ksmd_ctl.host.memory import Census, Exposure, KsmWitness, Process, ProcessId
from ksmd_ctl.kernel.exposure import exposures
from tests.kernel.test_home import TOPOLOGY
from tests.kernel.trees import meminfo, write_tree

CGROUPS = "sys/fs/cgroup"


def process(pid: int, merging: int | None, home: int | None, zero: int | None = None) -> Process:
    return Process(ProcessId(pid, 1), "x", "x", "", frozenset(), "", merging, zero, home=home)


def test_what_would_go_over_and_by_how_much(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4000 kB\n",
            **{
                f"sys/devices/system/node/node{number}/meminfo": meminfo(number, 9000, free)
                for number, free in ((0, 800), (1, 1000), (2, 2000))
            },
            "proc/7/cgroup": "0::/a/b\n",
            "proc/8/cgroup": "0::/a\n",
            f"{CGROUPS}/a/memory.max": str(3000 * 1024),
            f"{CGROUPS}/a/memory.current": str(1000 * 1024),
            f"{CGROUPS}/a/b/memory.max": str(1000 * 1024),
            f"{CGROUPS}/a/b/memory.current": str(900 * 1024),
        },
    )
    census = Census(0.0, {0: 50, 1: 100}, {}, {}, complete=True, witness=KsmWitness.KPAGEFLAGS, cpu_seconds=0)
    found = exposures(
        # 1200 KiB at home on node 0; 400 and 80 of zeroes anywhere; nothing; one that is gone meanwhile.
        [process(7, 300, 0), process(8, 100, None, 20), process(9, None, 1), process(10, 10, 2)],
        TOPOLOGY,
        census,
        floor_bytes=100 * 1024,
        root=root,
    )
    kib = {item.where: (item.growth_bytes // 1024, item.free_bytes // 1024, item.over_bytes // 1024) for item in found}
    assert kib == {
        "/a/b": (1200, 100, 1100),
        "node 0": (1200 + 480 - 200, 700, 780),
        "/a": (1680, 2000, 0),
        "node 1": (480 - 400, 900, 0),
        "node 2": (480 + 40, 1900, 0),
        "host": (1200 + 480 + 40 - 600, 3900, 0),
    }
    assert [item.where for item in found[:2]] == ["/a/b", "node 0"]


def test_pages_without_a_home_go_to_the_writers_node(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable: 4000 kB\n",
            **{f"sys/devices/system/node/node{number}/meminfo": meminfo(number, 9000, 10) for number in range(3)},
            "proc/8/cgroup": "0::/\n",
        },
    )
    found = exposures([process(8, 10, None)], TOPOLOGY, None, writer_node=1, root=root)
    assert found[0] == Exposure("node 1", 40 * 1024, 10 * 1024)
    assert {item.where: item.growth_bytes for item in found[1:]} == {"host": 40 * 1024, "node 0": 0, "node 2": 0}
