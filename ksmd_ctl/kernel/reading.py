# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of /proc/PID: never more of one than a limit, and read by a process that can be killed.

smaps, numa_maps, pagemap, cmdline and (since 6.14) ksm_stat are read under the process's mmap_lock, and whoever owns a
process can hold that for ever. A reader that waits for it is in uninterruptible sleep but for SIGKILL
(mmap_read_lock_killable). So within `killable_reads` a child reads for this process: where it sleeps for too long it is
killed, that file is an error, and a new child reads the next one.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

from ksmd_ctl.errors import Unreadable

#: The errno of the error for a file that could not be read in time.
TIMED_OUT: Final = errno.ETIMEDOUT

# How long one that sleeps may sleep: the first time, and at least; it is halved each time that was not enough, so that
# a thousand such processes cost little more than ten.
_TIMEOUT_SECONDS: Final = 3.0
_LEAST_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 0.02
_KILL_SECONDS: Final = 0.5
_CHUNK: Final = 1 << 20
_REQUEST = struct.Struct("<qq")
_REPLY = struct.Struct("<q")

# The one in use, if any: what is read is read far from where it is known how.
_readers: list[_Reader] = []


@contextmanager
def killable_reads(timeout_seconds: float = _TIMEOUT_SECONDS) -> Iterator[None]:
    """From here on a child reads; for a process with one thread, which nothing else may use meanwhile."""
    reader = _Reader(timeout_seconds)
    _readers.append(reader)
    try:
        yield
    finally:
        _readers.remove(reader)
        reader.end()


def active() -> bool:
    """Whether a child reads."""
    return bool(_readers)


def reading_seconds() -> float:
    """CPU time of the children that have read until now."""
    return sum(reader.ticks() for reader in _readers) / os.sysconf("SC_CLK_TCK")


def read_whole(path: Path, most: int) -> bytes:
    """A file from its beginning; of one that is longer than `most` bytes, so much and one more.

    :raises OSError: it can't be read
    :raises Unreadable: not in time; its errno is `TIMED_OUT`
    """
    if not _readers:
        return read_part(path, 0, most + 1)
    found = []
    length = 0
    while length <= most:
        # The child keeps the file open, so a part follows on the one before even if the file has changed meanwhile.
        data = read_part(path, length, min(_CHUNK, most + 1 - length))
        found.append(data)
        length += len(data)
        if len(data) < _CHUNK:
            break
    return b"".join(found)


def read_part(path: Path, offset: int, size: int) -> bytes:
    """What a file has at an offset; nothing at its end.

    :raises OSError, Unreadable: as `read_whole`
    """
    if _readers:
        return _readers[-1].read(path, offset, size)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _filled(descriptor, offset, size)
    finally:
        os.close(descriptor)


def _filled(descriptor: int, offset: int, size: int) -> bytes:
    # seq_file gives a page at a time.
    found = bytearray()
    while len(found) < size and (more := os.pread(descriptor, min(_CHUNK, size - len(found)), offset + len(found))):
        found += more
    return bytes(found)


class _Reader:
    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._pid = 0
        self._socket: socket.socket | None = None
        self._ended_ticks = 0

    def ticks(self) -> int:
        return self._ended_ticks + (_state(self._pid)[1] if self._socket is not None else 0)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        connection = self._socket or self._start()
        connection.sendall(_REQUEST.pack(offset, size) + os.fsencode(path).ljust(_PATH, b"\0"))
        reply = self._receive(connection, path)
        (length,) = _REPLY.unpack_from(reply)
        if length < 0:
            raise OSError(-length, os.strerror(-length))
        return bytes(memoryview(reply)[_REPLY.size :])

    def _receive(self, connection: socket.socket, path: Path) -> bytearray:
        found = bytearray()
        size = _REPLY.size
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        cpu, since = -1, time.monotonic()
        while len(found) < size:
            if poller.poll(_LOOK_SECONDS * 1000):
                data = connection.recv(_CHUNK)
                if not data:
                    self.end()
                    raise OSError(errno.EIO, "the process that reads has ended")
                found += data
                if len(found) >= _REPLY.size:
                    size = _REPLY.size + max(0, _REPLY.unpack_from(found)[0])
                continue
            # Only where it takes long: many reads are of a few pages, and to look costs more than to read these.
            now, (state, ticks) = time.monotonic(), _state(self._pid)
            if state == "R" or ticks != cpu:
                # It works: to walk the page tables of a large process takes a while.
                cpu, since = ticks, now
            elif now - since > self._timeout:
                self._timeout = max(_LEAST_SECONDS, self._timeout / 2)
                self.end()
                raise Unreadable(
                    f"reading {path}",
                    "the process keeps its readers waiting (its memory map is locked)",
                    path=str(path),
                    errno=TIMED_OUT,
                )
        return found

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _serve(theirs, parent)
        theirs.close()
        self._socket = ours
        return ours

    def end(self) -> None:
        """Kill the child, and wait for it unless it can't be killed either."""
        if self._socket is None:
            return
        self._ended_ticks = self.ticks()
        self._socket.close()
        self._socket = None
        os.kill(self._pid, signal.SIGKILL)
        until = time.monotonic() + _KILL_SECONDS
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0 and time.monotonic() < until:
            time.sleep(0.001)


_PATH: Final = 4096


def _state(pid: int) -> tuple[str, int]:
    """A child's state, and its CPU time in ticks."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        fields = stat.read().rpartition(b") ")[2].split()
    return fields[0].decode("ascii"), int(fields[11]) + int(fields[12])


def _serve(connection: socket.socket, parent: int) -> NoReturn:
    try:
        # Here and not above: only who forks such a child pays for ctypes.
        from ksmd_ctl.kernel import syscalls

        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        known, descriptor = b"", -1
        while os.getppid() == parent and (request := connection.recv(_REQUEST.size + _PATH, socket.MSG_WAITALL)):
            offset, size = _REQUEST.unpack_from(request)
            path = request[_REQUEST.size :].rstrip(b"\0")
            try:
                if path != known:
                    if descriptor >= 0:
                        os.close(descriptor)
                    known, descriptor = b"", -1
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    known = path
                data = _filled(descriptor, offset, size)
            except OSError as error:
                connection.sendall(_REPLY.pack(-(error.errno or errno.EIO)))
                continue
            connection.sendall(_REPLY.pack(len(data)) + data)
    finally:
        os._exit(0)
