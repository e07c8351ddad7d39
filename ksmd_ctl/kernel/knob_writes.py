# SPDX-License-Identifier: GPL-2.0-or-later
"""Who writes the knobs: fanotify(7) tells which process has opened a file of sysfs, and which has written to it.

A process that has ended has no name any more, and one as ``tee`` or ``sh -c`` ends soon after it has written. So its
name is read when it opens the file. Where even that is too late, its pid is all that is left of it.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, HostError, errno_text
from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob
from ksmd_ctl.kernel.machines import systemd_path, unit_of
from ksmd_ctl.kernel.proc_pid import printable, read_process_file

# FAN_MODIFY and FAN_OPEN (linux/fanotify.h).
_MODIFY: Final = 0x2
_OPEN: Final = 0x20
# struct fanotify_event_metadata (linux/fanotify.h): event_len, vers, reserved, metadata_len, mask, fd, pid.
_EVENT: Final = struct.Struct("=IBBHQii")
_READ_BYTES: Final = 4096
# (uid_t)-1: nobody has logged in for it.
_NOBODY: Final = "4294967295"
_FOLDER: Final = "sys/kernel/mm/ksm"
# Processes that have opened a file lately.
_MOST_NAMES: Final = 64
# For so long a pid is not another process's.
_SAME_SECONDS: Final = 1.0

# Its mask, a descriptor of the file, and the process.
Event = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class KnobWrite:
    """A write that has taken place.

    :ivar who: the process, for people
    """

    knob: Knob
    pid: int
    who: str


def open_writes(root: Path = Path("/")) -> int:
    """A descriptor that is readable when somebody has opened or written to a knob (`WriteReader`).

    :raises Denied: no CAP_SYS_ADMIN
    :raises Absent: this kernel has no fanotify, or no KSM
    """
    # Only here: ctypes takes memory, and who reads the events needs none of it.
    from ksmd_ctl.kernel import syscalls

    folder = root / _FOLDER
    try:
        descriptor = syscalls.fanotify_init(syscalls.FAN_CLOEXEC | syscalls.FAN_NONBLOCK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mask = _OPEN | _MODIFY | syscalls.FAN_EVENT_ON_CHILD
            syscalls.fanotify_mark(descriptor, syscalls.FAN_MARK_ADD, mask, os.fsencode(folder))
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        kind: type[HostError] = Denied if isinstance(error, PermissionError) else Absent
        why = f"{folder}: {errno_text(error.errno or 0)}"
        raise kind("watching who writes the knobs", why, path=str(folder), errno=error.errno) from error
    return descriptor


class WriteReader:
    """Reads who writes.

    :param descriptor: from `open_writes`
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # When they were looked at, by time.monotonic(), and what was found.
        self._names: dict[int, tuple[float, str]] = {}

    def read(self) -> Iterator[KnobWrite]:
        """The writes since the last call, the earliest first.

        :raises HostError: the kernel gives no more events
        """
        while True:
            try:
                data = os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                why = errno_text(error.errno or 0)
                raise HostError("reading who wrote the knobs", why, errno=error.errno) from error
            if not data:
                return
            yield from self._writes(_events(data))

    def _writes(self, events: Sequence[Event]) -> Iterator[KnobWrite]:
        now = time.monotonic()
        # Before anything else: they may end.
        for event in events:
            self._look(event, now)
        for mask, file, pid in events:
            # Where events were lost there is no file.
            if file < 0:
                continue
            try:
                name = os.path.basename(os.readlink(f"/proc/self/fd/{file}")) if mask & _MODIFY else ""
            finally:
                os.close(file)
            if name in SYSFS_KNOBS:
                who = self._names[pid][1] if pid in self._names else f"a process that has ended (pid {pid})"
                yield KnobWrite(Knob(name), pid, who)

    def _look(self, event: Event, now: float) -> None:
        mask, _, pid = event
        known = self._names.get(pid)
        # Whoever reads all of the files opens them one after the other.
        if known is not None and (now - known[0] < _SAME_SECONDS or not mask & _OPEN):
            return
        # The pid may have been another's before.
        self._names.pop(pid, None)
        if found := _who(pid):
            self._names[pid] = now, found
            if len(self._names) > _MOST_NAMES:
                del self._names[next(iter(self._names))]


def _events(data: bytes) -> list[Event]:
    at, found = 0, []
    while at + _EVENT.size <= len(data):
        length, _, _, _, mask, file, pid = _EVENT.unpack_from(data, at)
        at += max(length, _EVENT.size)
        found.append((mask, file, pid))
    return found


def _who(pid: int) -> str:
    """The process, and who has logged in for it, as with sudo, or else its unit; empty where it has ended."""
    try:
        name = printable(read_process_file(pid, "comm").rstrip("\n"))
    except HostError:
        return ""
    more = ""
    # Kernels without audit have no loginuid.
    with suppress(HostError):
        login = read_process_file(pid, "loginuid").strip()
        more = "" if login in ("", _NOBODY) else f", login uid {login}"
    if not more:
        with suppress(HostError):
            unit = unit_of(systemd_path(read_process_file(pid, "cgroup")))
            more = f", {printable(unit)}" if unit else ""
    return f"{name} (pid {pid}{more})"
