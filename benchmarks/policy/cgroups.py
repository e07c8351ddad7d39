# SPDX-License-Identifier: GPL-2.0-or-later
"""Cgroups of our own: what a tree of processes used, whoever of them is still alive, and a way to end all of it.

Source: Documentation/admin-guide/cgroup-v1/{memory,cpuacct}.rst, cgroup-v2.rst. In version 1 a group lies below our
own, in version 2 below the root: a group with processes may have no groups there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.policy.pages import PAGE

__all__ = ["Group"]

_NAME = "ksmd-ctl-bench-policy"


@dataclass(frozen=True, slots=True)
class Group:
    """One cgroup."""

    path: Path

    @classmethod
    def make(cls, controller: str, name: str) -> Group:
        """One that has this controller.

        :raises LookupError: no hierarchy has it
        """
        path = _parent(controller) / f"{_NAME}-{name}"
        path.mkdir(exist_ok=True)
        return cls(path)

    def inside(self, command: Sequence[str | Path], name: str = "") -> list[str]:
        """The command that runs `command` in it from its first page on, as if it were called `name`.

        Start it in a session of its own, as services and virtual machines are: the scheduler divides CPU time by
        session first (sched(7), autogroup).
        """
        words = list(map(str, command))
        return ["bash", "-c", 'echo 0 > "$0" && exec -a "$1" "${@:2}"',
                str(self.path / "cgroup.procs"), name or words[0], *words]  # fmt: skip

    def cpu_seconds(self) -> float:
        """What all that ever were in it used; of a group with cpuacct."""
        try:
            return int((self.path / "cpuacct.usage").read_text()) / 1e9
        except FileNotFoundError:
            return self._numbers("cpu.stat")["usage_usec"] / 1e6

    def frames(self) -> int:
        """Anonymous memory that is charged to it, each frame once; of a group with memory."""
        numbers = self._numbers("memory.stat")
        return numbers["rss" if "rss" in numbers else "anon"] // PAGE

    def empty(self) -> None:
        """End every process in it."""
        deadline = time.monotonic() + 30
        while pids := (self.path / "cgroup.procs").read_text().split():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes in {self.path} don't end: {' '.join(pids)}")
            for pid in map(int, pids):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)

    def remove(self) -> None:
        """End every process in it, and it."""
        if self.path.is_dir():
            self.empty()
            self.path.rmdir()

    def _numbers(self, file: str) -> dict[str, int]:
        lines = (line.split() for line in (self.path / file).read_text().splitlines())
        return {name: int(value) for name, value in lines}


def _parent(controller: str) -> Path:
    own = {
        part: path
        for _, parts, path in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
        for part in parts.split(",")
    }
    unified: Path | None = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split()[:3]
        place = Path(fields.split()[4])
        if kind == "cgroup" and controller in options.split(","):
            return place / own[controller].lstrip("/")
        if kind == "cgroup2":
            unified = place
    # cpu.stat is there without any controller.
    wanted = {"cpuacct": None, "memory": "memory"}[controller]
    if unified is None or (wanted and wanted not in (unified / "cgroup.subtree_control").read_text().split()):
        raise LookupError(f"no cgroup hierarchy here has the controller {controller}")
    return unified
