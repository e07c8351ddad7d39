# SPDX-License-Identifier: GPL-2.0-or-later
"""Where processes may allocate, of fake trees and of this process."""

from __future__ import annotations

import os
from pathlib import Path

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.kernel.placements import read_placements
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from tests.kernel.test_processes import stat
from tests.kernel.trees import write_tree


def status(allowed: str | None) -> str:
    return "Name:\tx\n" + ("" if allowed is None else f"Mems_allowed:\t1\nMems_allowed_list:\t{allowed}\n") + "x:\t1\n"


def tree(root: Path) -> Path:
    return write_tree(
        root,
        {
            "proc/7/stat": stat(7, "qemu"),
            "proc/7/task/7/status": status("0"),
            "proc/7/task/8/status": status("2-3"),
            "proc/9/stat": stat(9, "other", start=600),
            "proc/9/task/9/status": status("1"),
            "sys/devices/system/node/online": "0-3\n",
            "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory\n",
        },
    )


def test_the_nodes_of_all_threads_together(tmp_path: Path) -> None:
    found = read_placements([ProcessId(7, 500), ProcessId(9, 600)], tree(tmp_path))
    assert found.nodes == {ProcessId(7, 500): frozenset({0, 2, 3}), ProcessId(9, 600): frozenset({1})}
    assert found.cpusets
    assert found.denied == ()


def test_who_is_gone_and_who_has_the_pid_now(tmp_path: Path) -> None:
    found = read_placements([ProcessId(8, 1), ProcessId(9, 601)], tree(tmp_path))
    assert found.nodes == {}
    assert found.denied == ()


def test_a_kernel_without_cpusets_confines_nobody(tmp_path: Path) -> None:
    root = tree(tmp_path)
    (root / "proc/7/task/8/status").write_text(status(None))
    found = read_placements([ProcessId(7, 500), ProcessId(9, 600)], root)
    assert found.nodes[ProcessId(7, 500)] == frozenset({0, 1, 2, 3})
    assert found.nodes[ProcessId(9, 600)] == frozenset({1})
    assert not found.cpusets


def test_where_no_cpuset_controller_is_mounted_nobody_can_be_confined(tmp_path: Path) -> None:
    root = tree(tmp_path)
    (root / "sys/fs/cgroup/cgroup.controllers").write_text("cpu io memory\n")
    assert not read_placements([], root).cpusets
    (root / "sys/fs/cgroup/cgroup.controllers").unlink()
    assert not read_placements([], root).cpusets
    # Version 1.
    write_tree(root, {"sys/fs/cgroup/cpuset/cpuset.mems": "0-3\n"})
    assert read_placements([], root).cpusets


def test_this_process() -> None:
    me = ProcessId(os.getpid(), start_time_ticks(os.getpid()))
    found = read_placements([me])
    assert 0 in found.nodes[me]
    assert found.cpu_seconds >= 0
