# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that are known to write /sys/kernel/mm/ksm, found by their names among the processes.

A name proves nothing, and no program has to be on this list: it says who is likely to be behind a knob that keeps
changing, nothing more. libvirtd is not on it: it writes only when somebody asks it to (virsh node-memory-tune).

The knobs take root, so only root's processes are looked at. /proc/PID/cmdline is read under the process's mmap_lock,
and whoever owns a process can hold that for ever (with a FUSE file system in a user namespace of their own); names and
owners take no such lock (fs/proc/array.c). Where a command line is needed nevertheless, a thread reads it, and who asks
gives up after a while.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import KsmdError, ReadError
from ksmd_ctl.host.operation import Operation, Steps, in_thread, outcome
from ksmd_ctl.host.sample import Writer
from ksmd_ctl.kernel.machines import Origin, membership
from ksmd_ctl.kernel.proc_pid import pids
from ksmd_ctl.kernel.pseudofile import PseudoFile, read_text

#: Command lines take microseconds each; whoever has not shown its own by then is left out.
DEADLINE_SECONDS = 2.0
# The first words are enough to tell a program.
_COMMAND_BYTES = 4096


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
_ROOTS = re.compile(r"^Uid:\t0\t0\t", re.MULTILINE)


class WriterFinder:
    """Finds the known writers that run now. One for a host: it remembers whose command line could not be read.

    :ivar stuck: processes whose command line a thread still waits for; to read it again would take one more thread
    """

    def __init__(self, root: Path = Path("/"), deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.root = root
        self.stuck: set[int] = set()
        self._deadline_seconds = deadline_seconds

    def find(self, more: tuple[Writer, ...] = ()) -> Operation[tuple[Writer, ...]]:
        """Look at the name of every process, and at the command line of a few: the writers by pid.

        Root's processes that don't show their command line in time are left out.

        :param more: known already; they come last in the result
        """
        known, doubtful = [], []
        for pid, comm in _roots_processes(self.root):
            program = _BY_COMM.get(comm)
            if program is not None and len(program.file) <= _COMM_LENGTH:
                known.append((pid, program))
            elif pid not in self.stuck:
                doubtful.append((pid, comm))
        if not doubtful:
            return Operation.done(self.writers(known, more))
        return Operation(self._search(known, doubtful, more))

    def _search(
        self, known: list[tuple[int, _Program]], doubtful: list[tuple[int, str]], more: tuple[Writer, ...]
    ) -> Steps[tuple[Writer, ...]]:
        read: list[_Program | None] = []
        over = False

        def work() -> None:
            # The thread may be left behind: a read that waits for an mmap_lock ends when that process does, or this
            # one (mmap_read_lock_killable).
            for pid, comm in doubtful:
                read.append(_by_command(self.root / "proc" / str(pid), comm))
                if over:
                    # Nobody waits any more: this is what kept it.
                    self.stuck.discard(pid)
                    return

        reading = in_thread(work, self._deadline_seconds)
        yield reading
        over = True
        found = tuple(read)
        if isinstance(outcome(reading), KsmdError) and len(found) < len(doubtful):
            self.stuck.add(doubtful[len(found)][0])
        named = [(pid, program) for (pid, _), program in zip(doubtful, found, strict=False) if program is not None]
        return self.writers([*known, *named], more)

    def writers(self, found: list[tuple[int, _Program]], more: tuple[Writer, ...]) -> tuple[Writer, ...]:
        """Those that write as they are configured now, in the order of their pids, and these."""
        writing = [
            Writer(program.file, pid, _units(program, pid, self.root))
            for pid, program in sorted(found, key=lambda item: item[0])
            if not program.profiles or program.profiles & _active_profiles(self.root)
        ]
        return (*writing, *more)


def _roots_processes(root: Path) -> Iterator[tuple[int, str]]:
    """Pid and name of root's processes that may be one of the programs. Nothing that is read here waits."""
    proc = root / "proc"
    try:
        running = pids(proc)
    except OSError:
        return
    own = os.getpid()
    for pid in running:
        process = proc / str(pid)
        try:
            comm = read_text(process / "comm").strip()
            if pid == own or not (comm in _BY_COMM or comm.startswith(_INTERPRETERS)):
                continue
            status = read_text(process / "status")
        except ReadError:
            continue
        # The real user too: what somebody else started with root's rights (sudo) is called what they like.
        if _ROOTS.search(status):
            yield pid, comm


def _units(program: _Program, pid: int, root: Path) -> tuple[str, ...]:
    """The units that the program runs in or that belong to it, as far as this host has them (systemd.unit(5))."""
    try:
        cgroup = read_text(root / "proc" / str(pid) / "cgroup")
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


def _by_command(process: Path, comm: str) -> _Program | None:
    """Which of the programs a process runs by its command line, None for any other, also one that is gone meanwhile."""
    file = PseudoFile(process / "cmdline", _COMMAND_BYTES)
    try:
        words = file.read().decode("utf-8", "replace").split("\0")
    except ReadError:
        return None
    finally:
        file.close()
    program = _BY_COMM.get(comm)
    if program is not None:
        return program if os.path.basename(words[0]) == program.file else None
    # A script that its interpreter was started with: the first word that is no option.
    script = next((word for word in words[1:] if word and not word.startswith("-")), "")
    return _BY_FILE.get(os.path.basename(script))


def _active_profiles(root: Path) -> frozenset[str]:
    """Which profiles tuned applies: /etc/tuned/active_profile, words on a line."""
    try:
        return frozenset(read_text(root / "etc/tuned/active_profile").split())
    except ReadError:
        return frozenset()
