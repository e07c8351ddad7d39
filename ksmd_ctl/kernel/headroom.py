# SPDX-License-Identifier: GPL-2.0-or-later
"""How much more memory may be used on a node, on the host and in memory cgroups, and what the OOM killer has done.

Pages that get a frame of their own are charged to the process's memory cgroup, also where somebody else made them
(findings F8, F10: a tenant was OOM-killed on a host with 24 GB to spare). Sources: proc(5),
Documentation/admin-guide/cgroup-v2.rst (memory.events), cgroup-v1/memory.rst, mm/memcontrol-v1.c
(``mem_cgroup_oom_control_read``), mm/oom_kill.c (``__oom_kill_process`` counts in vmstat and in the victim's cgroup).
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from ksmd_ctl.errors import Absent, NoSuchProcess, ReadError, Unparsable
from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.memory import Losses, ProcessId
from ksmd_ctl.kernel.machines import cgroup_paths
from ksmd_ctl.kernel.proc_pid import START_TIME, printable, read_process_bytes, read_stat
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, read_file, read_text
from ksmd_ctl.kernel.topology import meminfo_bytes, read_meminfo

# What version 1 shows for "no limit": LONG_MAX cut to whole pages, whatever the page size.
_UNLIMITED = 1 << 62
_RESERVE_BYTES = 4 << 20
_RESERVE_SHARE = 32
_LONGEST_PATH = 1000
_PRESSURE_SECONDS = 0.5
_PRESSURE_PAUSE_SECONDS = 0.25
#: So long a change waits for memory pressure to pass before it gives up.
MAXIMUM_PAUSE_SECONDS: Final = 60.0
STOPPED: Final = "it was asked to stop"
# To read what is free takes as long as to move a hundred pages.
_HEADROOM_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """A memory cgroup that has a limit.

    :ivar path: as /proc/PID/cgroup has it
    :ivar limit_bytes: the lesser of memory.high and memory.max, or memory.limit_in_bytes
    :ivar folder: where its files are
    """

    path: str
    limit_bytes: int
    used_bytes: int
    folder: Path = field(default=Path(), compare=False)

    @property
    def room_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)

    @property
    def reserve_bytes(self) -> int:
        """What stays free for its own next pages: a tenant brought right up to its limit is killed at the first."""
        return max(_RESERVE_BYTES, self.limit_bytes // _RESERVE_SHARE)

    @property
    def spare_bytes(self) -> int:
        """What may be given away."""
        return max(0, self.room_bytes - self.reserve_bytes)


@dataclass(frozen=True, slots=True)
class Room:
    """What is free somewhere.

    :ivar where: as a phrase, as in "on node 1"
    :ivar reserve: what has to stay free there beside it, as a phrase
    """

    where: str
    free_bytes: int
    reserve: str

    @property
    def full_text(self) -> str:
        return f"no memory {self.where} above {self.reserve}"


def node_available_bytes(node: int, root: Path = Path("/")) -> int:
    """What can be had on a node: free memory, and page cache that nobody used lately and that is written back.

    On a host that runs for a while free memory alone is little: the page cache has the rest, and gives way. A kernel
    without CONFIG_NUMA has one node and no folder for it.

    :raises Absent: there is no such node
    """
    nodes = root / "sys/devices/system/node"
    if node == 0 and not nodes.is_dir():
        return host_available_bytes(root)
    path = nodes / f"node{node}/meminfo"
    (free,) = meminfo_bytes(path, "MemFree")
    found = read_meminfo(path)
    cache = found.get("Inactive(file)", 0) - found.get("Dirty", 0) - found.get("Writeback", 0)
    return free + max(0, cache)


def host_available_bytes(root: Path = Path("/")) -> int:
    """MemAvailable: what can be had without swapping, by the kernel's own estimate."""
    return meminfo_bytes(root / "proc/meminfo", "MemAvailable")[0]


def cgroup_limits(pid: int, root: Path = Path("/")) -> tuple[CgroupLimit, ...]:
    """The memory cgroups above a process that have a limit, innermost first.

    :raises NoSuchProcess, Denied: as `ksmd_ctl.kernel.proc_pid.read_process_file`
    """
    try:
        # Names of folders, whatever bytes they have.
        paths = cgroup_paths(os.fsdecode(read_process_bytes(pid, "cgroup", root)))
    except Absent:
        return ()
    names: tuple[str, ...]
    if "memory" in paths:
        mount, names, used = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"
    elif "" in paths:
        mount, names, used = root / "sys/fs/cgroup", ("memory.high", "memory.max"), "memory.current"
    else:
        return ()
    return tuple(_limits(mount, paths.get("memory", paths.get("", "/")), names, used))


def _limits(mount: Path, path: str, names: tuple[str, ...], used: str) -> Iterator[CgroupLimit]:
    if ".." in PurePosixPath(path).parts:
        # Outside of our cgroup namespace: nothing of it is to be seen here.
        return
    inside = PurePosixPath(path).relative_to("/")
    for part in (inside, *inside.parents):
        folder = mount / part
        limits = [value for name in names if (value := _number(folder / name)) is not None]
        usage = _number(folder / used)
        if limits and usage is not None:
            shown = printable(f"/{part}", _LONGEST_PATH) if str(part) != "." else "/"
            yield CgroupLimit(shown, min(limits), usage, folder)


def _number(path: Path) -> int | None:
    # None for no limit, and for a file that isn't there: the root has none, nor has a cgroup that just went away.
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) >= _UNLIMITED:
        return None
    return int(text)


def memory_stalled_seconds(root: Path = Path("/")) -> float:
    """For how long since boot some task had to wait for memory (kernel/sched/psi.c); 0 where that is not told."""
    try:
        match = re.search(r"^some .* total=(\d+)$", read_text(root / "proc/pressure/memory"), re.MULTILINE | re.ASCII)
    except ReadError:
        # Built without CONFIG_PSI, or off (psi=0): reading fails with EOPNOTSUPP then.
        return 0.0
    return int(match[1]) / 1e6 if match else 0.0


class MemoryPressure:
    """Waits while tasks wait for memory.

    :ivar share: of the time since the reading before, how long they waited
    """

    def __init__(
        self,
        most: float,
        root: Path,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        :param most: the share of time that is no reason to wait; 1 for never waiting
        """
        self.share = 0.0
        self._most = most
        self._root = root
        self._clock = clock
        self._sleep = sleep
        # When it was last read for how long tasks had waited, and for how long they had.
        self._stalled: tuple[float, float] | None = None

    def wait(self, stop: Callable[[], bool]) -> str:
        """Wait until it has fallen; why not to go on, empty where one may."""
        waited = 0.0
        while not stop():
            self._read()
            if self.share <= self._most:
                return ""
            if waited >= MAXIMUM_PAUSE_SECONDS:
                return f"tasks wait for memory, for {MAXIMUM_PAUSE_SECONDS:g} s"
            self._sleep(_PRESSURE_PAUSE_SECONDS)
            waited += _PRESSURE_PAUSE_SECONDS
        return STOPPED

    def _read(self) -> None:
        if self._most >= 1:
            return
        now = self._clock()
        if self._stalled is not None and now - self._stalled[0] < _PRESSURE_SECONDS:
            return
        before, self._stalled = self._stalled, (now, memory_stalled_seconds(self._root))
        if before is not None:
            self.share = (self._stalled[1] - before[1]) / (now - before[0])


def rooms(pid: int, nodes: frozenset[int], floor_bytes: int, root: Path = Path("/"), *, grows: bool) -> list[Room]:
    """What is free wherever new pages of a process count, less the floor on nodes and host and a reserve in cgroups.

    :param nodes: the nodes that the pages may go to, any of them
    :param grows: the process will have more pages than before; a move gives back what it takes, on the host
    """
    found = []
    floor = f"the floor of {bytes_text(floor_bytes)}"
    if nodes:
        free = sum(node_available_bytes(node, root) for node in nodes)
        names = ", ".join(map(str, sorted(nodes)))
        found.append(Room(f"on node {names}", max(0, free - floor_bytes), floor))
    if grows:
        found.append(Room("on the host", max(0, host_available_bytes(root) - floor_bytes), floor))
        for limit in cgroup_limits(pid, root):
            reserve = f"its reserve of {bytes_text(limit.reserve_bytes)}"
            found.append(Room(f"in the memory cgroup {limit.path}", limit.spare_bytes, reserve))
    return found


class Headroom:
    """For how many more pages of a process there is room; what was read holds for a moment, or until it is used up.

    :ivar full: why there is room for no page; empty until then
    """

    def __init__(
        self,
        pid: int,
        floor_bytes: int,
        root: Path,
        *,
        grows: bool,
        share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        :param grows: as of `rooms`
        :param share: of what is free, so much may be used up before it is read again
        """
        self.full = ""
        self._pid = pid
        self._floor_bytes = floor_bytes
        self._root = root
        self._grows = grows
        self._share = share
        self._clock = clock
        # Pages that may be taken, and when that was read, by node.
        self._left: dict[int | None, tuple[int, float]] = {}

    def take(self, pages: int, node: int | None) -> int:
        """For how many of so many pages there is room on a node, or anywhere; 0 where `full` says why."""
        if self.full:
            return 0
        now = self._clock()
        left, read = self._left.get(node, (0, -math.inf))
        if left < pages or now - read > _HEADROOM_SECONDS:
            nodes = frozenset() if node is None else frozenset({node})
            room = tightest(rooms(self._pid, nodes, self._floor_bytes, self._root, grows=self._grows))
            free = room.free_bytes // PAGE_SIZE
            if not free:
                self.full = room.full_text
                return 0
            pages = min(pages, free)
            left, read = max(pages, int(free * self._share)), now
        self._left[node] = left - pages, read
        return pages


def tightest(found: list[Room]) -> Room:
    """The place with the least room."""
    return min(found, key=lambda room: room.free_bytes)


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
