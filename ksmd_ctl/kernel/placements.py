# SPDX-License-Identifier: GPL-2.0-or-later
"""On which nodes processes may allocate: Mems_allowed of each thread (cpuset_task_status_allowed of the kernel).

A memory policy says where a process prefers to allocate, and it may change that itself. Its cpuset it may not change.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, NoSuchProcess, ReadError
from ksmd_ctl.host.memory import Placements, ProcessId
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.pseudofile import parse_list, read_text

_ALLOWED: Final = re.compile(r"^Mems_allowed_list:\t([\d,-]*)$", re.MULTILINE | re.ASCII)
_ONLINE: Final = "sys/devices/system/node/online"
_CGROUPS: Final = "sys/fs/cgroup"


def read_placements(processes: Sequence[ProcessId], root: Path = Path("/")) -> Placements:
    """Where these may allocate. Without cpusets that is every node."""
    began = time.thread_time()
    found: dict[ProcessId, frozenset[int]] = {}
    denied = []
    cpusets = _has_cpusets(root)
    for process in processes:
        try:
            allowed = _allowed(process.pid, root)
            if start_time_ticks(process.pid, root) != process.start_time_ticks:
                # Its pid belongs to another one now.
                continue
        except (NoSuchProcess, Absent):
            continue
        except ReadError:
            denied.append(process.pid)
            continue
        if allowed is None:
            cpusets, allowed = False, _every_node(root)
        found[process] = allowed
    return Placements(found, cpusets, tuple(denied), time.thread_time() - began)


def _allowed(pid: int, root: Path) -> frozenset[int] | None:
    """The nodes of all threads of a process together; None on a kernel without cpusets.

    :raises NoSuchProcess, ReadError: it can't be looked at
    """
    folder = root / "proc" / str(pid) / "task"
    try:
        threads = os.listdir(folder)
    except FileNotFoundError as error:
        raise NoSuchProcess(f"process {pid}", "it is gone", path=str(folder), errno=error.errno) from error
    except OSError as error:
        raise ReadError("reading threads", str(error.strerror), path=str(folder), errno=error.errno) from error
    found: set[int] = set()
    for thread in threads:
        # One that has ended allocates nothing.
        with suppress(Absent):
            match = _ALLOWED.search(read_text(folder / thread / "status"))
            if match is None:
                return None
            found |= parse_list(match[1])
    return frozenset(found)


def _has_cpusets(root: Path) -> bool:
    """Whether processes can be confined: cgroup v2 has the controller for them, or version 1 is mounted."""
    with suppress(ReadError):
        if "cpuset" in read_text(root / _CGROUPS / "cgroup.controllers").split():
            return True
    return (root / _CGROUPS / "cpuset/cpuset.mems").exists()


def _every_node(root: Path) -> frozenset[int]:
    try:
        return parse_list(read_text(root / _ONLINE))
    except ReadError:
        # A kernel without NUMA.
        return frozenset({0})
