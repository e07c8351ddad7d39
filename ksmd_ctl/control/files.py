# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that outlive a process: read whole, replaced whole, and put aside where nobody can understand them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Final

from ksmd_ctl.codec import JSON, load
from ksmd_ctl.control.lock import give_to_owner_of
from ksmd_ctl.errors import Unreadable, errno_text
from ksmd_ctl.regularfile import read_regular

__all__ = ["MALFORMED", "aside", "became_of", "parse_json", "put_aside", "read_file", "replace_file"]

#: What taking a document of a wrong form apart raises.
MALFORMED: Final = (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError)


def read_file(path: Path, what: str, most_bytes: int) -> bytes | None:
    """The content, None where there is no such file.

    The service's user owns the directory, and root reads there at a stop: nothing in the file's place is waited for.

    :param what: what is being done, for people
    :raises Unreadable: there is one, and it can't be read
    :raises ValueError: it is not a regular file, or longer than `most_bytes`
    """
    try:
        return read_regular(path, most_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        cause = f"{path}: {errno_text(error.errno or 0)}"
        raise Unreadable(what, cause, path=str(path), errno=error.errno) from error


def parse_json(content: bytes) -> JSON:
    """The value of a JSON document that can be given on to others as it is.

    :raises ValueError: it is none, or it holds a number that is not finite, or text that is not Unicode
    """
    found = load(content)
    # Python reads 1e400 and lone surrogates, and nobody can write them.
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    return found


def aside(path: Path) -> str:
    """Where a file is put that nobody can understand."""
    return f"{path}.damaged"


def put_aside(path: Path) -> str:
    """Move a file that nobody can understand out of the way, if that is possible; where it is now."""
    try:
        os.replace(path, aside(path))
    except OSError:
        return str(path)
    return aside(path)


def became_of(path: Path, damaged: str) -> str:
    """What became of a file that nobody can understand, as a phrase.

    :param damaged: where it is now
    """
    return f"stays at {path}" if damaged == str(path) else f"was put aside as {damaged}"


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
