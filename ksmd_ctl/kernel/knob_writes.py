# SPDX-License-Identifier: GPL-2.0-or-later
"""Who writes the knobs: fanotify(7) tells which process has written to a file of sysfs.

A process that has ended by then has no name any more, as with ``tee`` or ``sh -c``; its pid is all that is left of it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, HostError, errno_text
from ksmd_ctl.host.knobs import SYSFS_KNOBS, Knob
from ksmd_ctl.kernel.proc_pid import printable, read_process_file, read_stat

# struct fanotify_event_metadata (linux/fanotify.h): event_len, vers, reserved, metadata_len, mask, fd, pid.
_EVENT: Final = struct.Struct("=IBBHQii")
_READ_BYTES: Final = 4096
# (uid_t)-1: nobody has logged in for it.
_NOBODY: Final = "4294967295"
_FOLDER: Final = "sys/kernel/mm/ksm"


@dataclass(frozen=True, slots=True)
class KnobWrite:
    """A write that has taken place.

    :ivar who: the process, for people
    """

    knob: Knob
    pid: int
    who: str


def open_writes(root: Path = Path("/")) -> int:
    """A descriptor that is readable when somebody has written to a knob (`read_writes`).

    :raises Denied: no CAP_SYS_ADMIN
    :raises Absent: this kernel has no fanotify, or no KSM
    """
    # Only here: ctypes takes memory, and who reads the events needs none of it.
    from ksmd_ctl.kernel import syscalls

    folder = root / _FOLDER
    try:
        descriptor = syscalls.fanotify_init(syscalls.FAN_CLOEXEC | syscalls.FAN_NONBLOCK, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mask = syscalls.FAN_MODIFY | syscalls.FAN_EVENT_ON_CHILD
            syscalls.fanotify_mark(descriptor, syscalls.FAN_MARK_ADD, mask, os.fsencode(folder))
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        kind: type[HostError] = Denied if isinstance(error, PermissionError) else Absent
        why = f"{folder}: {errno_text(error.errno or 0)}"
        raise kind("watching who writes the knobs", why, path=str(folder), errno=error.errno) from error
    return descriptor


def read_writes(descriptor: int) -> Iterator[KnobWrite]:
    """The writes since the last call, the earliest first.

    :raises HostError: the kernel gives no more events
    """
    while True:
        try:
            events = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise HostError("reading who wrote the knobs", errno_text(error.errno or 0), errno=error.errno) from error
        if not events:
            return
        yield from _writes(events)


def _writes(events: bytes) -> Iterator[KnobWrite]:
    at = 0
    while at + _EVENT.size <= len(events):
        length, _, _, _, _, file, pid = _EVENT.unpack_from(events, at)
        at += max(length, _EVENT.size)
        # Where events were lost there is no file.
        if file < 0:
            continue
        try:
            name = os.path.basename(os.readlink(f"/proc/self/fd/{file}"))
        finally:
            os.close(file)
        if name in SYSFS_KNOBS:
            yield KnobWrite(Knob(name), pid, _who(pid))


def _who(pid: int) -> str:
    """The process, and who has logged in for it, as with sudo: only root may write the knobs."""
    try:
        name = printable(read_stat(pid)[0])
    except HostError:
        return f"a process that has ended (pid {pid})"
    login = ""
    # Kernels without audit have none.
    with suppress(HostError):
        login = read_process_file(pid, "loginuid").strip()
    return f"{name} (pid {pid}{'' if login in ('', _NOBODY) else f', login uid {login}'})"
