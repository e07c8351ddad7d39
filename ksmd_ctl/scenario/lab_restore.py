# SPDX-License-Identifier: GPL-2.0-or-later
"""What a lab found before it changed anything, on disk, so that the next start can put it back if this one can't.

The file belongs to one boot: after another, the knobs have the kernel's defaults or what somebody set since.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.codec import decode, dump, encode, load
from ksmd_ctl.errors import Absent, NoSuchProcess, ReadError, Refused, Rejected, Unparsable
from ksmd_ctl.host.knobs import RUN_OFFLINE, SYSFS_KNOBS, Knob, KnobValue
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.proc_pid import read_stat, running_pids, start_time_ticks
from ksmd_ctl.kernel.procfs import find_ksmd
from ksmd_ctl.kernel.pseudofile import read_file as read_pseudo_file
from ksmd_ctl.scenario.cpusets import Cpusets
from ksmd_ctl.statefiles import make_directory, read_file, replace_file

#: Where the file lies: lost at a reboot, as it may be, and only there. Not below /run/ksmd-ctl, which the service's
#: user owns and which goes when the service stops.
DIRECTORY = Path("/run")
FILE = "ksmd-ctl-verify.json"

_FORMAT = 1
_MOST_BYTES = 1 << 16

# The advisor overwrites pages_to_scan when it is switched; with run ksmd begins, so it comes last.
_LAST = (Knob.PAGES_TO_SCAN, Knob.RUN)


@dataclass(frozen=True, slots=True)
class Before:
    """What a lab changes, as it was.

    :ivar ksmd: ksmd's pid
    :ivar cpus: where ksmd may run
    """

    knobs: Mapping[Knob, KnobValue]
    ksmd: int
    cpus: frozenset[int]

    @classmethod
    def look(cls, ksm: KsmFs, root: Path = Path("/")) -> Before:
        """As it is now.

        :raises Absent: this kernel has no KSM, or ksmd is not to be seen from here
        """
        knobs = read_knobs(ksm)
        ksmd = find_ksmd(root / "proc")
        return cls(knobs, ksmd, frozenset(os.sched_getaffinity(ksmd)))

    def restore(self, ksm: KsmFs, *, unmerge: bool = True) -> None:
        """Put it back.

        :param unmerge: un-merge everything first, without which the kernel may refuse some knobs
        :raises HostError: the kernel refused a knob; the others are as they were
        """
        try:
            os.sched_setaffinity(self.ksmd, self.cpus)
        except OSError:
            # A CPU has gone offline meanwhile: then nobody can have it as it was.
            pass
        # run=2 does nothing where it reads 2 already, hence the 0.
        for value in (0, 2, 0) if unmerge else (0,):
            ksm.store(Knob.RUN, value)
        refused: Rejected | None = None
        for knob in sorted(self.knobs, key=lambda knob: _LAST.index(knob) + 1 if knob in _LAST else 0):
            if knob is Knob.PAGES_TO_SCAN and self.knobs.get(Knob.ADVISOR_MODE, "none") != "none":
                # The advisor's to set: the kernel refuses it to others.
                continue
            try:
                ksm.store(knob, self.knobs[knob])
            except Rejected as error:
                refused = error
        if refused is not None:
            raise refused


def read_knobs(ksm: KsmFs) -> dict[Knob, KnobValue]:
    """All knobs that this kernel has.

    :raises Absent: it has no KSM
    """
    found: dict[Knob, KnobValue] = {}
    for knob in SYSFS_KNOBS:
        try:
            value = ksm.read(knob)
        except Absent:
            continue
        found[knob] = value & ~RUN_OFFLINE if knob is Knob.RUN and isinstance(value, int) else value
    if not found:
        raise Absent("reading the knobs", "this kernel has no KSM", hint="boot a kernel with CONFIG_KSM=y")
    return found


@dataclass(frozen=True, slots=True)
class _Record(Before):
    """The file: what was found, and which process changes it."""

    format: int
    boot_id: str
    pid: int
    start_time_ticks: int


class Recovery:
    """The file, for the time that knobs aren't as they were found."""

    def __init__(self, root: Path = Path("/"), directory: Path = DIRECTORY) -> None:
        self._path = directory / FILE
        self._root = root
        self._boot_id = read_pseudo_file(root / "proc/sys/kernel/random/boot_id").decode().strip()

    def pending(self) -> Before | None:
        """What a run that ended without putting things back found; None where there is none.

        :raises Refused: a run is under way
        :raises ReadError: the file can't be read, or is of no known form
        """
        what = "looking for a run that was cut short"
        try:
            data = read_file(self._path, what, _MOST_BYTES)
            if data is None:
                return None
            record = decode(_Record, load(data))
            if record.format != _FORMAT:
                raise ValueError(f"format {record.format}")
        except ValueError as error:
            raise Unparsable(
                what,
                f"{self._path} is of no known form: {error}",
                hint=f"look at the knobs yourself, then remove {self._path}",
                path=str(self._path),
            ) from error
        if record.boot_id != self._boot_id:
            return None
        if self._runs(record.pid, record.start_time_ticks):
            raise Refused("taking KSM", f"process {record.pid} is running scenarios here", hint="wait for its end")
        return record

    def _runs(self, pid: int, started: int) -> bool:
        try:
            # A zombie has ended, whoever forgets to wait for it.
            return start_time_ticks(pid, self._root) == started and read_stat(pid, self._root)[1][0] != b"Z"
        except NoSuchProcess:
            return False

    def begin(self, before: Before) -> None:
        """Write down what was found, so that it is on disk before anything changes."""
        own = os.getpid()
        found = (before.knobs, before.ksmd, before.cpus)
        record = _Record(*found, _FORMAT, self._boot_id, own, start_time_ticks(own, self._root))
        make_directory(self._path.parent)
        replace_file(self._path, dump(encode(record)))
        # A service that can't put it back has to see all the same that there is something to be put back.
        self._path.chmod(0o644)

    def end(self) -> None:
        """All is as it was."""
        self._path.unlink(missing_ok=True)


def repair(root: Path = Path("/"), directory: Path = DIRECTORY, wait_seconds: float = 10.0) -> bool:
    """Put back what a run that was cut short left behind; whether there was one.

    Where others have mergeable memory by now nothing is un-merged: that could take more memory than there is for it.

    :param wait_seconds: how long processes of that run may take to end; they do so by themselves
    :raises Refused: that run is still under way
    :raises HostError: not everything can be put back; what can be is, and the next time the rest is tried again
    """
    recovery = Recovery(root, directory)
    before = recovery.pending()
    if before is not None:
        deadline = time.monotonic() + wait_seconds
        while (others := bool(find_users(root))) and time.monotonic() < deadline:
            time.sleep(0.05)
        with closing(KsmFs(root)) as ksm:
            before.restore(ksm, unmerge=not others)
    Cpusets(root).close()
    recovery.end()
    return before is not None


@dataclass(frozen=True, slots=True)
class User:
    """A process with memory registered with KSM: any mapping with VM_MERGEABLE."""

    pid: int
    name: str


def find_users(root: Path = Path("/")) -> tuple[User, ...]:
    """The processes with mergeable memory, by pid. Reads every process's smaps: for once, not for each tick."""
    found = []
    for pid in running_pids(root):
        try:
            if _mergeable(root / "proc" / str(pid) / "smaps"):
                found.append(User(pid, read_stat(pid, root)[0]))
        except (NoSuchProcess, ReadError, OSError):
            # Gone meanwhile, or a kernel thread, which has no memory of its own.
            continue
    return tuple(found)


def _mergeable(smaps: Path) -> bool:
    # Line by line: the smaps of a process with many mappings is long.
    with open(smaps, "rb") as lines:
        return any(line.startswith(b"VmFlags:") and b" mg" in line for line in lines)
