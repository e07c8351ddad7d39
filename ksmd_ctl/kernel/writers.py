# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that are known to write /sys/kernel/mm/ksm, found by their names among the processes.

A name proves nothing, and no program has to be on this list: it says who is likely to be behind a knob that keeps
changing, nothing more. libvirtd is not on it: it writes only when somebody asks it to (virsh node-memory-tune).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import ReadError
from ksmd_ctl.host.sample import Writer
from ksmd_ctl.kernel.identity import pids
from ksmd_ctl.kernel.machines import Origin, membership
from ksmd_ctl.kernel.pseudofile import read_file

__all__ = ["find_writers"]


@dataclass(frozen=True, slots=True)
class _Program:
    """A known writer.

    :ivar file: the program's file name, of which /proc/PID/comm shows the first 15 characters
    :ivar units: what its packages call the systemd units that write
    :ivar profiles: for tuned: with one of these as its active profile it writes, else it does not
    """

    file: str
    units: tuple[str, ...] = ()
    profiles: frozenset[str] = frozenset()


_PROGRAMS = (
    # Debian's and Red Hat's; Proxmox's ksm-control-daemon is a variant of it under the same name, without ksm.service,
    # which writes run when it is started and stopped.
    _Program("ksmtuned", ("ksmtuned.service", "ksm.service")),
    # oVirt's Memory Overcommitment Manager, and the part of vdsm that writes for it when it is not root.
    _Program("momd", ("momd.service", "mom-vdsm.service")),
    _Program("supervdsmd"),
    # KubeVirt (ksmConfiguration) and Harvester (its Ksmtuned resource).
    _Program("virt-handler"),
    _Program("harvester-node-manager"),
    # Kata Containers, and Clear Containers before it.
    _Program("kata-ksm-throttler", ("kata-ksm-throttler.service",)),
    _Program("vc-ksm-throttler", ("vc-ksm-throttler.service",)),
    # These profiles write run when they are applied.
    _Program("tuned", profiles=frozenset({"realtime-virtual-host", "cpu-partitioning"})),
)

_UNIT_FOLDERS = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)

_COMM_LENGTH = 15
_BY_COMM = {program.file[:_COMM_LENGTH]: program for program in _PROGRAMS}
_BY_FILE = {program.file: program for program in _PROGRAMS}
_INTERPRETERS = ("python", "bash", "sh", "dash", "perl")


def find_writers(root: Path = Path("/")) -> tuple[Writer, ...]:
    """The known writers that run now, by pid. Looks at the name of every process."""
    proc = root / "proc"
    try:
        running = pids(proc)
    except OSError:
        return ()
    own = os.getpid()
    found = []
    for pid in running:
        program = None if pid == own else _program(proc / str(pid))
        if program is not None and (not program.profiles or program.profiles & _active_profiles(root)):
            found.append(Writer(program.file, pid, _units(program, pid, root)))
    return tuple(found)


def _units(program: _Program, pid: int, root: Path) -> tuple[str, ...]:
    """The units that the program runs in or that belong to it, as far as this host has them (systemd.unit(5))."""
    try:
        cgroup = read_file(root / "proc" / str(pid) / "cgroup").decode("utf-8", "replace")
        own = membership(Origin(cgroup, [], "")).unit
    except ReadError:
        own = ""
    there = tuple(unit for unit in program.units if any((root / folder / unit).exists() for folder in _UNIT_FOLDERS))
    if not own:
        return there
    # In a session or a container no unit starts it again, and none ends it.
    if not own.endswith(".service") or own.startswith("user@"):
        return ()
    return tuple(dict.fromkeys((own, *there)))


def _program(process: Path) -> _Program | None:
    """Which of the programs a process runs, None for any other, also one that is gone meanwhile."""
    try:
        comm = read_file(process / "comm").decode("utf-8", "replace").strip()
        program = _BY_COMM.get(comm)
        if program is not None and len(program.file) <= _COMM_LENGTH:
            return program
        if program is None and not comm.startswith(_INTERPRETERS):
            return None
        words = read_file(process / "cmdline").decode("utf-8", "replace").split("\0")
    except ReadError:
        return None
    if program is not None:
        return program if os.path.basename(words[0]) == program.file else None
    # A script that its interpreter was started with: the first word that is no option.
    script = next((word for word in words[1:] if word and not word.startswith("-")), "")
    return _BY_FILE.get(os.path.basename(script))


def _active_profiles(root: Path) -> frozenset[str]:
    """Which profiles tuned applies: /etc/tuned/active_profile, words on a line."""
    try:
        return frozenset(read_file(root / "etc/tuned/active_profile").decode("utf-8", "replace").split())
    except ReadError:
        return frozenset()
