# SPDX-License-Identifier: GPL-2.0-or-later
"""The threads of a process, and one that can be traced. Source: proc(5), /proc/PID/task/TID/status."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, HostError, NoSuchProcess, Refused
from ksmd_ctl.kernel.proc_pid import process_file_error, read_process_file, read_stat

_TRIES: Final = 50
_PAUSE_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Thread:
    """A thread: its state as proc(5) has it, and how seccomp filters it (0: not)."""

    tid: int
    state: str
    tracer: int
    seccomp: int


def threads(pid: int, root: Path = Path("/")) -> Iterator[Thread]:
    """The threads of a process, the first one first.

    :raises NoSuchProcess, Denied, ReadError: it can't be looked at
    """
    tasks = root / "proc" / str(pid) / "task"
    try:
        tids = sorted(map(int, os.listdir(tasks)), key=lambda tid: (tid != pid, tid))
    except OSError as error:
        raise process_file_error(pid, tasks, error) from error
    for tid in tids:
        with suppress(NoSuchProcess, Absent):
            found = _status(pid, tid, root)
            yield Thread(tid, found["State"][:1], int(found["TracerPid"]), int(found.get("Seccomp", "0")))


def choose(pid: int, what: str, root: Path = Path("/")) -> Thread:
    """The thread that is to make calls: all share the memory. One without a filter, if there is any.

    :param what: what it is for, for errors
    :raises NoSuchProcess: it has exited
    :raises Refused: somebody traces it, or each thread waits where no signal reaches it
    """
    for _ in range(_TRIES):
        best, states = _best(pid, root, what)
        if best is not None:
            return best
        if states <= {"Z", "X"}:
            raise NoSuchProcess(f"process {pid}", "it has exited")
        # Most wait for a moment only.
        time.sleep(_PAUSE_SECONDS)
    why = "each of its threads waits in the kernel where no signal reaches it (state D)"
    raise Refused(what, why, hint="try again later")


def signal_waits(thread: Thread, pid: int, root: Path = Path("/")) -> bool:
    """Whether a signal is about to be delivered to a thread.

    :raises NoSuchProcess: it is gone
    """
    found = _status(pid, thread.tid, root)
    own, shared, blocked = (int(found[name], 16) for name in ("SigPnd", "ShdPnd", "SigBlk"))
    return bool((own | shared) & ~blocked)


def _status(pid: int, tid: int, root: Path) -> dict[str, str]:
    status = read_process_file(pid, f"task/{tid}/status", root)
    return dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)


def _best(pid: int, root: Path, what: str) -> tuple[Thread | None, set[str]]:
    """The best thread, and the states of those that can't be it."""
    best: Thread | None = None
    states = set()
    # A process may have thousands of threads.
    for thread in threads(pid, root):
        if thread.tracer and thread.state not in "ZX":
            try:
                who = f"{read_stat(thread.tracer, root)[0]} (pid {thread.tracer})"
            except HostError:
                who = f"process {thread.tracer}"
            raise Refused(what, f"{who} traces it", hint="end that debugger or tracer, or have it detach")
        if thread.state in "DZXIP":
            states.add(thread.state)
        elif best is None or thread.seccomp < best.seccomp:
            best = thread
        if best and not best.seccomp:
            break
    return best, states
