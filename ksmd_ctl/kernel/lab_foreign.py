# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has memory registered with KSM: any mapping with VM_MERGEABLE, seen or not yet seen by ksmd."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import ReadError
from ksmd_ctl.kernel.identity import pids
from ksmd_ctl.kernel.pseudofile import read_file

__all__ = ["User", "find_users"]


@dataclass(frozen=True, slots=True)
class User:
    """A process with mergeable memory."""

    pid: int
    name: str


def find_users(root: Path = Path("/")) -> tuple[User, ...]:
    """The processes with mergeable memory, by pid. Reads every process's smaps: for once, not for each tick."""
    found = []
    for pid in pids(root / "proc"):
        folder = root / "proc" / str(pid)
        try:
            if _mergeable(folder / "smaps"):
                found.append(User(pid, read_file(folder / "comm").decode(errors="replace").strip()))
        except (ReadError, OSError):
            # Gone meanwhile, or a kernel thread, which has no memory of its own.
            continue
    return tuple(found)


def _mergeable(smaps: Path) -> bool:
    # Line by line: the smaps of a process with many mappings is long.
    with open(smaps, "rb") as lines:
        return any(line.startswith(b"VmFlags:") and b" mg" in line for line in lines)
