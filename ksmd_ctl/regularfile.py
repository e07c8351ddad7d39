# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a regular file within limits, so that whoever can put something in its place can't hold the reader up."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

# Linux, Documentation/admin-guide/devices.txt. Always empty: a link to it is how a file is masked (systemd.unit(5)).
_DEV_NULL: Final = os.makedev(1, 3)

_READ_BYTES: Final = 64 * 1024


def read_regular(path: Path, most_bytes: int, *, follow: bool = False) -> bytes:
    """The content of a file.

    Nothing in its place is waited for: neither a FIFO, nor a device, nor whoever holds a lease on it (open(2)).

    :param follow: a symbolic link may stand there; otherwise it is refused
    :raises ValueError: it is not a regular file, or longer than `most_bytes`; the text says which
    :raises OSError: it can't be opened or read
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise ValueError("is a symbolic link") from error
        if error.errno == errno.ENXIO:
            raise ValueError("is not a regular file") from error
        raise
    try:
        found = os.fstat(descriptor)
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == _DEV_NULL:
            return b""
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is not a regular file")
        content = bytearray()
        # Not by st_size: it may grow meanwhile.
        while part := os.read(descriptor, min(_READ_BYTES, most_bytes + 1 - len(content))):
            content += part
    finally:
        os.close(descriptor)
    if len(content) > most_bytes:
        raise ValueError(f"is longer than {most_bytes} bytes")
    return bytes(content)
