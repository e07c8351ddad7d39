# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that outlive a process: read whole, replaced whole, and put aside where nobody can understand them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from ksmd_ctl.control.lock import give_to_owner_of
from ksmd_ctl.errors import Unreadable, errno_text

__all__ = ["MALFORMED", "aside", "put_aside", "read_file", "replace_file"]

#: What taking a document of a wrong form apart raises.
MALFORMED: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def read_file(path: Path, what: str) -> bytes | None:
    """The content, None where there is no such file.

    :param what: what is being done, for people
    :raises Unreadable: there is one, and it can't be read
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        cause = f"{path}: {errno_text(error.errno or 0)}"
        raise Unreadable(what, cause, path=str(path), errno=error.errno) from error


def aside(path: Path) -> str:
    """Where a file is put that nobody can understand."""
    return f"{path}.damaged"


def put_aside(path: Path) -> str:
    """Move a file that nobody can understand out of the way, if that is possible; where to."""
    with contextlib.suppress(OSError):
        os.replace(path, aside(path))
    return aside(path)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file as a whole; it is on disk afterwards, or as it was."""
    temporary = path.with_name(f"{path.name}.new")
    # What a crash left behind. O_EXCL: a link that somebody put there is not followed.
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with open(descriptor, "wb") as stream:
            give_to_owner_of(path.parent, descriptor)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
