# SPDX-License-Identifier: GPL-2.0-or-later
"""Cpusets that confine the processes of a lab to nodes: a cgroup of version 2 for each set of nodes.

The cgroups have a name of their own and are removed at the end. What a run that was killed left is empty, because its
processes end with it, and is removed by the next. Source: Documentation/admin-guide/cgroup-v2.rst, "Cpuset".
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

from ksmd_ctl.errors import HostError, ReadError, errno_text
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.kernel.pseudofile import read_text

#: The cgroup that all others are below.
GROUP = "ksmd-ctl-verify"

# From 6.19 on a cgroup may be called populated for a moment after its last process has ended.
_WAIT_SECONDS = 2.0


class Cpusets:
    """The cgroups of one lab.

    :param root: where the file system begins
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._top = _mounted(root)
        self._switched_on = False

    def lacks(self) -> str:
        """Why there are no cpusets here; empty where there are."""
        if self._top is None:
            return "needs cpusets, and cgroup version 2 is not mounted"
        if "cpuset" not in read_text(self._top / "cgroup.controllers").split():
            return f"needs cpusets, and cgroup version 2 at {self._top} does not have them (version 1 may)"
        return ""

    def confine(self, pid: int, nodes: frozenset[int]) -> None:
        """Allow a process, and what it forks from now on, memory of these nodes only.

        :raises HostError: it can't be done, with the path
        """
        assert self._top is not None
        group = self._top / GROUP
        child = group / ranges_text(nodes)
        try:
            self._switched_on |= _switch_on(self._top)
            group.mkdir(exist_ok=True)
            _switch_on(group)
            child.mkdir(exist_ok=True)
            (child / "cpuset.mems").write_text(child.name)
            (child / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            what = f"confining process {pid} to the nodes {child.name}"
            raise HostError(what, errno_text(error.errno or 0), path=str(error.filename), errno=error.errno) from error
        found = read_text(child / "cpuset.mems.effective").strip()
        if found != child.name:
            raise HostError(f"confining process {pid} to the nodes {child.name}", f"it has {found}", path=str(child))

    def close(self) -> None:
        """Remove the cgroups, whose processes have ended. What somebody else uses by now stays."""
        group = self._top / GROUP if self._top else None
        if group is None or not group.is_dir():
            return
        for path in (*(path for path in group.iterdir() if path.is_dir()), group):
            _remove(path)
        if self._switched_on:
            _write(group.parent / "cgroup.subtree_control", "-cpuset")


def _mounted(root: Path) -> Path | None:
    try:
        mounts = [line.split(" ") for line in read_text(root / "proc/self/mounts").splitlines()]
    except ReadError:
        return None
    return next((root / words[1].lstrip("/") for words in mounts if words[2] == "cgroup2"), None)


# Whether it was off before.
def _switch_on(group: Path) -> bool:
    control = group / "cgroup.subtree_control"
    if "cpuset" in read_text(control).split():
        return False
    control.write_text("+cpuset")
    return True


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError:
        # Somebody has cpusets below it meanwhile.
        pass


def _remove(path: Path) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            path.rmdir()
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
        return
