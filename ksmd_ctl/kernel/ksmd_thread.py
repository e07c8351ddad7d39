# SPDX-License-Identifier: GPL-2.0-or-later
"""How the kernel thread ksmd is scheduled, and its CPU time.

Sources: proc(5) (stat, status), Documentation/scheduler/sched-stats.rst (schedstat), sched(7), kernel/sched/syscalls.c
(``sched_setaffinity``: EINVAL for a thread with PF_NO_SETAFFINITY, and where no CPU of the list can be used; CPUs that
don't exist are dropped without a word).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, HostError, ReadError, Rejected, Unparsable, errno_text
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.cpus import parse_cpus
from ksmd_ctl.host.knobs import KSMD_KNOBS, Knob, KnobValue, parse_wanted
from ksmd_ctl.host.sample import Reading
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.procfs import find_ksmd
from ksmd_ctl.kernel.pseudofile import Closing, PseudoFile, error_for, parse_list, read_text

#: What ksmd's stat, schedstat and status are read for.
FIELDS: Final = ("ksmd_cpu_seconds", "ksmd_wait_seconds", *KSMD_KNOBS)

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_CLASSES: Final = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}
_NAMES: Final = {number: name for name, number in _CLASSES.items()}
_PF_NO_SETAFFINITY: Final = 0x04000000
_CPUS_LABEL: Final = b"\nCpus_allowed_list:\t"

# Places in /proc/PID/stat after the name: proc(5) counts from 1, and `state` is its field 3.
_FLAGS, _UTIME, _STIME, _NICE, _POLICY = (field - 3 for field in (9, 14, 15, 19, 41))


def parse_ksmd_stat(data: bytes) -> dict[str, int | float | str]:
    """CPU time, class and nice value in ksmd's stat; without the class where it is another one than can be set.

    :raises ValueError: it is not the stat of ksmd
    """
    # The name is in brackets and may hold anything; ksmd's is known, so no other can be taken for it.
    _, bracket, rest = data.partition(b" (ksmd) ")
    words = rest.split()
    try:
        if not bracket or not (words[_UTIME].isdigit() and words[_STIME].isdigit()):
            raise IndexError
        found: dict[str, int | float | str] = {
            "ksmd_cpu_seconds": (int(words[_UTIME]) + int(words[_STIME])) / _TICKS_PER_SECOND,
            Knob.KSMD_NICE: int(words[_NICE]),
        }
        policy = int(words[_POLICY])
    except (IndexError, ValueError) as error:
        raise ValueError(f"{data[:40].decode('ascii', 'backslashreplace')!r} is not the stat of ksmd") from error
    if policy in _NAMES:
        found[Knob.KSMD_SCHEDULING] = _NAMES[policy]
    return found


class KsmdThread(Closing):
    """The kernel thread ksmd of one host, its files open.

    :param root: below which procfs and sysfs are found; only this machine's ksmd, below ``/``, can be changed
    :param apply: makes the system call
    """

    def __init__(self, root: Path = Path("/"), apply: Callable[[int, Knob, KnobValue], None] | None = None) -> None:
        self._root = root
        self._apply = _apply if apply is None and root == Path("/") else apply
        self._files: tuple[PseudoFile, PseudoFile, PseudoFile] | None = None
        self._sought = False

    def close(self) -> None:
        """Give the descriptors back."""
        for file in self._files or ():
            file.close()
        self._files, self._sought = None, False

    def sample(self, into: dict[str, Reading]) -> None:
        """Read all of `FIELDS`; what can't be had gets its error."""
        found: dict[str, Reading] = {}
        error: ReadError | None = None
        try:
            stat, status, schedstat = self._opened()
            found.update(parse_ksmd_stat(stat.read()))
            found["ksmd_wait_seconds"] = _waited(schedstat)
            found.setdefault(Knob.KSMD_SCHEDULING, _other_class(stat.path))
            found[Knob.KSMD_CPUS] = _allowed_cpus(status)
        except ReadError as lacking:
            error = lacking
        except ValueError as wrong:
            error = Unparsable("reading ksmd's stat", str(wrong), path=self._files[0].path if self._files else "")
            # Looked for once more: this pid is somebody else's now.
            self.close()
        for name in FIELDS:
            into[name] = found[name] if error is None or name in found else error_for(name, error)

    def _opened(self) -> tuple[PseudoFile, PseudoFile, PseudoFile]:
        # A descriptor onto /proc/PID stays with its process; ksmd never ends, but if it did, its pid's
        # new owner would not be read: opening again finds a name that isn't ksmd's.
        if self._files is None:
            if self._sought:
                raise Absent("looking for ksmd", "ksmd is not to be seen here", path=str(self._root / "proc"))
            self._sought = True
            folder = self._root / "proc" / str(find_ksmd(self._root / "proc"))
            self._files = PseudoFile(folder / "stat"), PseudoFile(folder / "status"), PseudoFile(folder / "schedstat")
        return self._files

    def read(self, knob: Knob) -> KnobValue:
        """One of ksmd's knobs, read now.

        :raises ReadError: it can't be had
        """
        found: dict[str, Reading] = {}
        self._sought = False
        self.sample(found)
        value = found[knob]
        if isinstance(value, ReadError):
            raise value
        assert not isinstance(value, float)
        return value

    def write(self, knob: Knob, value: KnobValue) -> KnobValue:
        """Schedule ksmd otherwise: skipped where it is so already, read back afterwards.

        :returns: the value read back
        :raises Absent: ksmd is not to be seen here, or none of these CPUs exists
        :raises Denied, Rejected: the kernel didn't take it, or reads otherwise afterwards
        :raises ReadError: it can't be read
        """
        what = f"setting {knob} to {value}"
        # Found again each time: it must be no other process.
        pid = find_ksmd(self._root / "proc")
        found = self.read(knob)
        try:
            value = parse_wanted(knob, value)
        except ValueError as error:
            raise Rejected(what, str(error), value=value, errno=errno.EINVAL) from error
        if found == value:
            return found
        if knob is Knob.KSMD_CPUS:
            self._need_cpus(what, str(value))
        if self._apply is None:
            raise Denied(what, f"{self._root} is not this machine's root", value=value)
        try:
            self._apply(pid, knob, value)
        except OSError as error:
            raise self._refusal(what, pid, knob, value, error) from error
        found = self.read(knob)
        if found != value:
            hint = "something else sets it too, or a cpuset leaves these CPUs out"
            raise Rejected(what, f"it reads {found} afterwards", hint=hint, value=value)
        return found

    def _need_cpus(self, what: str, value: str) -> None:
        """
        :raises Rejected: some of these CPUs don't exist
        """
        possible = parse_list(read_text(self._root / "sys/devices/system/cpu/possible"))
        missing = parse_cpus(value) - possible
        if missing:
            why = f"this host has no CPU {ranges_text(missing)}: it can have {ranges_text(possible)}"
            raise Rejected(what, why, value=value, errno=errno.EINVAL)

    def _refusal(self, what: str, pid: int, knob: Knob, value: KnobValue, error: OSError) -> HostError:
        number = error.errno or 0
        why, hint = errno_text(number), ""
        kind: type[HostError] = Rejected
        if number in (errno.EPERM, errno.EACCES):
            kind, hint = Denied, "it takes root and CAP_SYS_NICE: run as root, or through the service"
        elif number == errno.EINVAL and knob is Knob.KSMD_CPUS:
            fixed = int(read_text(self._root / f"proc/{pid}/stat").rpartition(")")[2].split()[_FLAGS])
            why = (
                "the kernel lets nobody choose the CPUs of this thread (PF_NO_SETAFFINITY)"
                if fixed & _PF_NO_SETAFFINITY
                else "none of these CPUs can be used: they are offline, or a cpuset leaves them out"
            )
            why += f", {errno_text(number)}"
        return kind(what, why, hint=hint, value=value, errno=number)


def knob_files(knob: Knob, root: Path = Path("/")) -> KsmFs | KsmdThread:
    """What reads and writes a knob."""
    return KsmdThread(root) if knob in KSMD_KNOBS else KsmFs(root)


def _waited(schedstat: PseudoFile) -> Reading:
    """Seconds on a run queue without a CPU: the second field, in nanoseconds."""
    try:
        data = schedstat.read()
    except ReadError as error:
        return error_for("ksmd_wait_seconds", error)
    words = data.split()
    if len(words) < 2 or not words[1].isdigit():
        return Unparsable("reading ksmd_wait_seconds", f"{data[:40]!r} is not a schedstat", path=schedstat.path)
    return int(words[1]) / 1e9


def _allowed_cpus(status: PseudoFile) -> Reading:
    data = status.read()
    at = data.find(_CPUS_LABEL)
    if at < 0:
        return Absent(f"reading {Knob.KSMD_CPUS}", "this kernel does not show it", path=status.path)
    at += len(_CPUS_LABEL)
    text = data[at : data.find(b"\n", at)].decode("ascii", "replace")
    try:
        return ranges_text(parse_list(text))
    except ValueError as error:
        return Unparsable(f"reading {Knob.KSMD_CPUS}", str(error), path=status.path)


def _other_class(path: str) -> Unparsable:
    why = "ksmd runs in a real-time or deadline class, which is left as it is"
    return Unparsable(f"reading {Knob.KSMD_SCHEDULING}", why, hint="chrt --other --pid 0 PID sets it back", path=path)


def _apply(pid: int, knob: Knob, value: KnobValue) -> None:
    if knob is Knob.KSMD_CPUS:
        os.sched_setaffinity(pid, parse_cpus(value))
    elif knob is Knob.KSMD_SCHEDULING:
        os.sched_setscheduler(pid, _CLASSES[str(value)], os.sched_param(0))
    else:
        os.setpriority(os.PRIO_PROCESS, pid, int(value))
