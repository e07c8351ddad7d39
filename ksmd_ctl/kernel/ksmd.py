# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel thread ksmd: stepped by single batches, and its attempts to merge counted.

Source of the stepping: mm/ksm.c, ``ksm_scan_thread``. Between batches ksmd sleeps in one of two places: in the *loop*
(``ksm_iter_wait``, for sleep_millisecs; a write of another value wakes it, since 5.0), or, where after a batch it
has nothing to do (run isn't 1, or no mm is registered), *idle* (``ksm_thread_wait``; writing run=1 wakes it, and so
does the first mm that registers). Each wake leads to at most one batch, if sleep_millisecs is long.

What tells that a batch is over are ksmd's state and its voluntary context switches in /proc/PID/status, on every
kernel: woken, it is runnable; within a batch it sleeps uninterruptibly if at all (mutexes, page locks, draining);
so once it has switched away voluntarily and sleeps interruptibly, it is back in one of the two places.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import struct
import sys
import time
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, Refused, TimedOut, Unparsable, errno_text
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import Attempts
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.procfs import find_ksmd, labelled_number
from ksmd_ctl.kernel.pseudofile import Closing, PseudoFile
from ksmd_ctl.kernel.syscalls import mount_unattached, perf_event_open

# Two values to write in turn: only a different one wakes ksmd.
_SLEEPS = (3_600_000, 3_600_001)

# A batch of a scenario takes milliseconds; a machine that needs so long has another problem.
_DEADLINE_SECONDS = 60.0

_SPINS = 20
_NAP_SECONDS = 0.0002


class Ksmd:
    """The kernel thread, stopped from here on but for the batches that are asked for.

    :param pid: ksmd's
    :raises Denied: no permission to write the knobs
    """

    def __init__(self, ksm: KsmFs, pid: int, root: Path = Path("/")) -> None:
        self._ksm = ksm
        self._status = PseudoFile(root / "proc" / str(pid) / "status")
        self._toggle = 0
        # Whether it sleeps in the loop, where run=1 alone does not wake it.
        self._looping = False
        ksm.store(Knob.RUN, 0)
        self._to_idle()

    def close(self) -> None:
        """Give the descriptor back."""
        self._status.close()

    def batch(self, pages: int, *, registered: bool) -> None:
        """Exactly one batch; none where no mm is registered, as ksmd does it.

        :param registered: an mm certainly stays registered through it; where that is not certain, ksmd is sent
            to its idle place afterwards
        :raises TimedOut: ksmd did not come back
        :raises Refused: somebody else has written what it is stepped with
        """
        before = self._wait("sleep")
        self._alone()
        self._ksm.store(Knob.PAGES_TO_SCAN, pages)
        self._ksm.store(Knob.RUN, 1)
        if self._looping:
            self._wake_loop()
        self._wait("come back from a batch", before)
        # Takes ksmd's mutex, so what it wrote before is seen after this.
        self._ksm.store(Knob.RUN, 0)
        self._looping = True
        if not registered:
            self._to_idle()

    def _alone(self) -> None:
        found = self._ksm.read(Knob.RUN), self._ksm.read(Knob.SLEEP_MILLISECS)
        if found != (0, _SLEEPS[self._toggle]):
            raise Refused(
                "stepping ksmd",
                f"somebody else wrote run or sleep_millisecs, which read {found[0]} and {found[1]}",
                hint="`ksmd-ctl status` shows who may have; stop that",
            )

    def _wake_loop(self) -> None:
        self._toggle = 1 - self._toggle
        self._ksm.store(Knob.SLEEP_MILLISECS, _SLEEPS[self._toggle])

    def _to_idle(self) -> None:
        # With run=0, who is woken in the loop goes idle, and who is idle already is not woken. Woken, it is
        # runnable before the write returns (try_to_wake_up), so once it sleeps it is idle.
        self._wait("sleep")
        self._wake_loop()
        self._wait("sleep")
        self._looping = False

    def _wait(self, what: str, before: int | None = None) -> int:
        """Wait until it sleeps, and has switched away since `before`; its voluntary context switches."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        for turn in itertools.count():
            sleeping, switches = self._look()
            if sleeping and switches != before:
                return switches
            if time.monotonic() > deadline:
                break
            if turn < _SPINS:
                os.sched_yield()
            else:
                time.sleep(_NAP_SECONDS)
        raise TimedOut("waiting for ksmd", f"it did not {what} within {_DEADLINE_SECONDS:g} s")

    def _look(self) -> tuple[bool, int]:
        data = self._status.read()
        switches = labelled_number(data, b"voluntary_ctxt_switches:\t")
        at = data.find(b"\nState:\t")
        if switches is None or at < 0:
            raise Unparsable(self._status.path, "no State or voluntary_ctxt_switches", path=self._status.path)
        return data[at + 8 : at + 9] == b"S", switches


# -- attempts to merge ---------------------------------------------------------------------------------------

# No counter of KSM tells a page that something holds from one that smart_scan skips: neither merges. The tracepoint
# ksm:ksm_merge_with_ksm_page (since 6.4, mm/ksm.c:try_to_merge_with_ksm_page) does: an attempt on a page that has a
# reference more than it has mappings, or that was written to meanwhile, ends with an error. It is counted by
# perf_event_open(2), of ksmd alone: no buffer, and nothing that outlives the descriptors.
_WHAT: Final = "counting what ksmd tries to merge"
_EVENT: Final = "events/ksm/ksm_merge_with_ksm_page/id"
#: Where systemd mounts tracefs, and where debugfs has it.
_FOLDERS: Final = ("sys/kernel/tracing", "sys/kernel/debug/tracing")

# linux/perf_event.h
_PERF_TYPE_TRACEPOINT: Final = 2
_PERF_ATTR_SIZE_VER0: Final = 64
_PERF_EVENT_IOC_SET_FILTER: Final = 0x40082406


class AttemptCounter(Closing):
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
