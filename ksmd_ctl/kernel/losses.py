# SPDX-License-Identifier: GPL-2.0-or-later
"""What the OOM killer has done, and which processes are gone.

Sources: mm/oom_kill.c (``__oom_kill_process`` counts in vmstat and in the victim's memory cgroup), proc(5),
Documentation/admin-guide/cgroup-v2.rst (memory.events), mm/memcontrol-v1.c (``mem_cgroup_oom_control_read``).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from ksmd_ctl.errors import NoSuchProcess, ReadError, Unparsable
from ksmd_ctl.host.memory import Losses, ProcessId
from ksmd_ctl.kernel.identity import START_TIME, read_stat
from ksmd_ctl.kernel.pseudofile import read_file

__all__ = ["read_losses"]

_OOM_KILL: Final = re.compile(rb"^oom_kill (\d+)$", re.MULTILINE)
# Of /proc/PID/stat, counted from after the name in brackets (fields 3, 9, 20 and 31 of proc(5)).
_STATE, _FLAGS, _THREADS, _PENDING = 0, 9 - 3, 20 - 3, 31 - 3
# include/linux/sched.h
_PF_EXITING: Final = 0x4
_KILL: Final = 1 << (signal.SIGKILL - 1)


def read_losses(processes: Iterable[ProcessId], cgroups: Iterable[str], root: Path = Path("/")) -> Losses:
    """What the OOM killer has done since boot, and which of these processes are gone.

    :param cgroups: paths of memory cgroups, as /proc/PID/cgroup has them; one that is not there is left out
    """
    files = [("host", root / "proc/vmstat"), *((path, file) for path in cgroups for file in _files(path, root))]
    kills = {where: count for where, file in files if (count := _count(file)) is not None}
    return Losses(kills, tuple(process for process in processes if _gone(process, root)))


def _files(path: str, root: Path) -> Iterator[Path]:
    inside = PurePosixPath(path)
    if not inside.is_absolute() or ".." in inside.parts:
        return
    mount = root / "sys/fs/cgroup"
    yield mount / inside.relative_to("/") / "memory.events"
    yield mount / "memory" / inside.relative_to("/") / "memory.oom_control"


def _count(file: Path) -> int | None:
    try:
        found = _OOM_KILL.search(read_file(file))
    except ReadError:
        return None
    return int(found[1]) if found else None


def _gone(process: ProcessId, root: Path) -> bool:
    try:
        fields = read_stat(process.pid, root)[1]
        if int(fields[START_TIME]) != process.start_time_ticks:
            return True
        # One that was killed takes a moment to end, and a zombie has no memory.
        ending = fields[_STATE] in (b"Z", b"X") or bool(int(fields[_FLAGS]) & _PF_EXITING)
        killed = bool(int(fields[_PENDING]) & _KILL)
    except NoSuchProcess:
        return True
    except (Unparsable, ValueError, IndexError):
        return False
    # The first thread may have ended long before the others.
    return killed or (ending and int(fields[_THREADS]) <= 1)
