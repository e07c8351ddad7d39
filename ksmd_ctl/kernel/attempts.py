# SPDX-License-Identifier: GPL-2.0-or-later
"""How often ksmd tries to merge two pages, and how often the kernel refuses it.

No counter of KSM tells a page that something holds from one that smart_scan skips: neither merges. The tracepoint
ksm:ksm_merge_with_ksm_page (since 6.4, mm/ksm.c:try_to_merge_with_ksm_page) does: an attempt on a page that has a
reference more than it has mappings, or that was written to meanwhile, ends with an error. It is counted by
perf_event_open(2), of ksmd alone: no buffer, and nothing that outlives the descriptors.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import Final

from ksmd_ctl.errors import Absent, Denied, Unparsable, errno_text
from ksmd_ctl.host.memory import Attempts
from ksmd_ctl.kernel.procfs import find_ksmd
from ksmd_ctl.kernel.syscalls import mount_unattached, perf_event_open

__all__ = ["AttemptCounter"]

_WHAT: Final = "counting what ksmd tries to merge"
_EVENT: Final = "events/ksm/ksm_merge_with_ksm_page/id"
#: Where systemd mounts tracefs, and where debugfs has it.
_FOLDERS: Final = ("sys/kernel/tracing", "sys/kernel/debug/tracing")

# linux/perf_event.h
_PERF_TYPE_TRACEPOINT: Final = 2
_PERF_ATTR_SIZE_VER0: Final = 64
_PERF_EVENT_IOC_SET_FILTER: Final = 0x40082406


class AttemptCounter:
    """Counts from its creation until it is closed.

    :param root: below which procfs and tracefs are found; events are always this machine's
    :raises Absent: this kernel has no such tracepoint, or ksmd is not to be seen here
    :raises Denied: CAP_PERFMON is missing, or the kernel is locked down
    :raises Unparsable: the event's number is none
    """

    def __init__(self, root: Path = Path("/")) -> None:
        event, ksmd = _event(root), find_ksmd(root / "proc")
        self._descriptors: list[int] = []
        try:
            self._descriptors.append(_opened(event, ksmd))
            self._descriptors.append(_opened(event, ksmd, b"err != 0\0"))
        except OSError as error:
            self.close()
            kind = Denied if isinstance(error, PermissionError) else Absent
            raise kind(_WHAT, f"perf_event_open: {errno_text(error.errno or 0)}", errno=error.errno) from error

    def read(self) -> Attempts:
        """What was counted so far.

        :raises Unparsable: the kernel gave something else than two counts
        """
        counts = [os.read(descriptor, 8) for descriptor in self._descriptors]
        if any(len(count) != 8 for count in counts):
            raise Unparsable(_WHAT, "a counter has no value")
        tried, refused = (int.from_bytes(count, sys.byteorder) for count in counts)
        return Attempts(tried, min(refused, tried))

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> AttemptCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _event(root: Path) -> int:
    """The tracepoint's number."""
    for folder in _FOLDERS:
        with contextlib.suppress(OSError):
            return _number((root / folder / _EVENT).read_bytes())
    if root != Path("/"):
        raise Absent(_WHAT, "there is no such tracepoint", path=str(root / _FOLDERS[0] / _EVENT))
    # It is mounted nowhere, or not in this mount namespace.
    try:
        mounted = mount_unattached("tracefs")
        try:
            descriptor = os.open(_EVENT, os.O_RDONLY | os.O_CLOEXEC, dir_fd=mounted)
            with open(descriptor, "rb") as stream:
                return _number(stream.read())
        finally:
            os.close(mounted)
    except OSError as error:
        kind = Denied if isinstance(error, PermissionError) else Absent
        raise kind(_WHAT, f"tracefs: {_EVENT}: {errno_text(error.errno or 0)}", errno=error.errno) from error


def _number(text: bytes) -> int:
    if not text.strip().isdigit():
        raise Unparsable(_WHAT, f"{text[:40]!r} is not the number of an event")
    return int(text)


def _opened(event: int, pid: int, condition: bytes = b"") -> int:
    # struct perf_event_attr: type, size, config; all else 0: it counts at once, in kernel and user mode.
    head = struct.pack("=IIQ", _PERF_TYPE_TRACEPOINT, _PERF_ATTR_SIZE_VER0, event)
    descriptor = perf_event_open(head.ljust(_PERF_ATTR_SIZE_VER0, b"\0"), pid, -1)
    try:
        if condition:
            fcntl.ioctl(descriptor, _PERF_EVENT_IOC_SET_FILTER, condition)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
