# SPDX-License-Identifier: GPL-2.0-or-later
"""Files of sysfs and procfs that are read again and again, through one descriptor.

Opening costs six times as much as reading: 3.0 us against 0.5 us for a knob. Every read at offset 0 makes the
kernel print the file anew (fs/kernfs/file.c, fs/seq_file.c: ``seq_read_iter`` starts over at position 0), and a
descriptor onto /proc/PID stays with its process: a pid that is reused can't be mistaken for it.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Final, Self, TypeVar

from ksmd_ctl.errors import Absent, ReadError, Unreadable, errno_text

#: Bytes of a page of this machine.
PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")

E = TypeVar("E", bound=ReadError)

# O_NONBLOCK: whatever lies there in place of the file, a pipe for one, nobody waits for it.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK

# seq_file hands out at most a buffer at a time, a page to begin with; /proc/vmstat is longer on big hosts.
_CHUNK = 16384
_MAXIMUM = 16 << 20

# What a read says after the object went away under an open descriptor: kernfs says ENODEV, /proc/PID ESRCH.
_GONE = frozenset({errno.ENODEV, errno.ESTALE, errno.ESRCH, errno.ENOENT})
# EOPNOTSUPP is what /proc/pressure says after booting with psi=0.
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESRCH, errno.ENXIO, errno.EOPNOTSUPP})
_PRIVILEGE = frozenset({errno.EACCES, errno.EPERM})


class Closing:
    """What is closed at the end of a `with` block."""

    def close(self) -> None:
        """Give the descriptors back. May be called twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_error(path: str, error: OSError, what: str = "") -> ReadError:
    """The error for a file that could not be opened or read: `Absent` or `Unreadable`."""
    number = error.errno or 0
    what = what or f"reading {path}"
    if number in _MISSING:
        return Absent(what, "this kernel or host does not have it", path=path, errno=number)
    hint = "run as root, or let the service's unit see it" if number in _PRIVILEGE else ""
    return Unreadable(what, errno_text(number), hint=hint, path=path, errno=number)


def error_for(name: str, error: ReadError) -> ReadError:
    """A field's own copy of its file's error: raising one object twice makes its traceback grow."""
    return type(error)(f"reading {name}", error.why, hint=error.hint, path=error.path, errno=error.errno)


def without_frames(error: E) -> E:
    """An error to be kept in a sample: its traceback's frames would keep the sample, and more, in a cycle."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def parse_list(text: str) -> frozenset[int]:
    """The numbers in a list as of CPUs or nodes (``0-3,8``); empty text is the empty list. See lib/bitmap.c (%*pbl).

    :raises ValueError: it is not such a list
    """
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        if not match:
            raise ValueError(f"{part[:40]!r} is not a number or a range")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first or last - first > 1 << 20:
            raise ValueError(f"{part[:40]!r} is not a range")
        found.update(range(first, last + 1))
    return frozenset(found)


def read_file(path: Path) -> bytes:
    """A file that is read once.

    :raises Absent, Unreadable: it can't be had
    """
    file = PseudoFile(path)
    try:
        return file.read_all()
    finally:
        file.close()


def read_text(path: Path) -> str:
    """As `read_file`; what is not UTF-8 is replaced."""
    return read_file(path).decode("utf-8", "replace")


class PseudoFile:
    """A file that stays open from its first successful read on.

    A file that is missing is looked for again at each read; one that went away is opened again once.

    :param chunk_bytes: what one read asks for. Python makes room for all of it before the kernel is asked, so a file
        that is read each second and holds one number should say so
    """

    __slots__ = ("_chunk_bytes", "_fd", "path")

    def __init__(self, path: Path, chunk_bytes: int = _CHUNK) -> None:
        self.path = str(path)
        self._chunk_bytes = chunk_bytes
        self._fd = -1

    def read(self) -> bytes:
        """What it holds now, for files that the kernel prints in one go.

        :raises Absent, Unreadable: it can't be had
        """
        try:
            if self._fd >= 0:
                try:
                    return os.pread(self._fd, self._chunk_bytes, 0)
                except OSError as error:
                    self.close()
                    if error.errno not in _GONE:
                        raise
            self._fd = os.open(self.path, _FLAGS)
            return os.pread(self._fd, self._chunk_bytes, 0)
        except OSError as error:
            self.close()
            raise read_error(self.path, error) from error

    def read_all(self) -> bytes:
        """What it holds now, for files that may be longer than one buffer of the kernel.

        :raises Absent, Unreadable: it can't be had
        """
        data = more = self.read()
        try:
            while more and len(data) < _MAXIMUM:
                more = os.pread(self._fd, self._chunk_bytes, len(data))
                data += more
        except OSError as error:
            self.close()
            raise read_error(self.path, error) from error
        return data

    def close(self) -> None:
        """Give the descriptor back; a later read opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
