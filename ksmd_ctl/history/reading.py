# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads events from the database of a history, and says what SQLite says in the words of this package."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ksmd_ctl.errors import Absent, Denied, HostError, NotRecorded, Unparsable, Unreadable, errno_text
from ksmd_ctl.history.model import Entry, Kind, Query, Severity
from ksmd_ctl.regularfile import read_regular
from ksmd_ctl.statefiles import MALFORMED

if TYPE_CHECKING:
    import sqlite3

#: As PRAGMA application_id: what file(1) knows the file by. "ksmH"
APPLICATION_ID: Final = 0x6B736D48
#: As PRAGMA user_version.
VERSION: Final = 1

# No file that a configuration allows is larger.
_MOST_BYTES: Final = 1 << 30
# Names of SQLite's result codes (sqlite.org/rescode.html).
_DAMAGED: Final = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


def read_copy(path: Path, query: Query) -> list[Entry]:
    """The events that were asked for, oldest first, of a file that no process has open.

    It is copied, so that nothing is written beside it, and nobody is kept from opening it.

    :raises Absent: there is none
    :raises Unreadable: it can't be read
    :raises Unparsable: it is damaged, no history, or of a newer version
    """
    import sqlite3
    import tempfile

    with contextlib.ExitStack() as stack:
        data = {suffix: found for suffix in ("", "-wal") if (found := _read(path, suffix)) is not None}
        try:
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ksmd-ctl-"))) / "history"
            for suffix, content in data.items():
                beside(copy, suffix).write_bytes(content)
        except OSError as error:
            why = f"a copy of {path} for it: {errno_text(error.errno or 0)}"
            hint = "make room in /tmp, or name another folder with TMPDIR"
            raise Unreadable("reading the history", why, hint=hint, errno=error.errno) from error
        with failing("reading", path), contextlib.closing(sqlite3.connect(copy)) as db:
            check(db, path)
            # Whoever wrote the file is not trusted with what SQL of its own would do.
            db.execute("PRAGMA trusted_schema = OFF")
            return entries(db, path, query)


def _read(path: Path, suffix: str) -> bytes | None:
    """The file, or one beside it; None where there is none beside it.

    :raises Absent, Unreadable: as `read_copy`
    """
    try:
        return read_regular(beside(path, suffix), _MOST_BYTES)
    except FileNotFoundError as error:
        if suffix:
            return None
        raise Absent("reading the history", f"{path}: there is none", path=str(path)) from error
    except OSError as error:
        hint = "run as root, or ask the service: systemctl start ksmd-ctl"
        why = f"{path}: {errno_text(error.errno or 0)}"
        raise Unreadable("reading the history", why, hint=hint, path=str(path)) from error
    except ValueError as error:
        raise history_error(Unparsable, "reading", path, f"it {error}") from error


def beside(path: Path, suffix: str) -> Path:
    """A file beside it, as SQLite names those."""
    return path.with_name(f"{path.name}{suffix}")


def check(db: sqlite3.Connection, path: Path) -> None:
    """See that it is a history of this version.

    :raises Unparsable: it is no history, or of a newer version
    """
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise history_error(Unparsable, "reading", path, "it is not a history of ksmd-ctl")
    if (version := db.execute("PRAGMA user_version").fetchone()[0]) != VERSION:
        raise history_error(Unparsable, "reading", path, f"its version is {version}, and this ksmd-ctl knows {VERSION}")


def entries(db: sqlite3.Connection, path: Path, query: Query) -> list[Entry]:
    """The events that were asked for, oldest first.

    :raises Unparsable: one has what can't be in an event
    """
    conditions: list[tuple[str, Iterable[Any]]] = [("1", ())]
    if query.since_seconds is not None:
        conditions.append(("time >= ?", (query.since_seconds,)))
    if query.until_seconds is not None:
        conditions.append(("time < ?", (query.until_seconds,)))
    if query.kinds is not None:
        kinds = sorted(query.kinds)
        conditions.append((f"kind IN ({', '.join('?' * len(kinds))})", kinds))
    rows = db.execute(
        "SELECT time, kind, event, severity, text, who, fields, boot_id FROM events JOIN boots USING (boot) "
        f"WHERE {' AND '.join(condition for condition, _ in conditions)} ORDER BY id DESC LIMIT ?",
        (*(value for _, values in conditions for value in values), query.limit),
    ).fetchall()
    try:
        return [_entry(*row) for row in reversed(rows)]
    except MALFORMED as error:
        raise history_error(Unparsable, "reading", path, f"it is damaged: {error}") from error


def _entry(time: float, kind: str, event: str, severity: str, text: str, who: str, fields: str, boot_id: str) -> Entry:
    """
    :raises ValueError, TypeError: it is none, or has a text that can't be shown on a line
    """
    facts = {name: str(value) for name, value in json.loads(fields or "{}").items()}
    # A number, a BLOB or NULL would be no text here.
    if not "".join((event, text, who, boot_id, *facts, *facts.values())).isprintable():
        raise ValueError("it has a text that can't be shown")
    return Entry(float(time), Kind(kind), event, Severity(severity), text, who, facts, boot_id)


@contextmanager
def failing(doing: str, path: Path) -> Iterator[None]:
    """Errors of SQLite as ours."""
    import sqlite3

    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        # Tables that are not there, or values of another type, are damage as well.
        damaged = name.startswith(_DAMAGED) or name == "SQLITE_ERROR" or isinstance(error, sqlite3.DataError)
        kind = Unparsable if damaged else NotRecorded
        raise history_error(kind, doing, path, f"{error}{f' ({name})' if name else ''}") from error


def history_error(kind: type[HostError], doing: str, path: Path, why: str) -> HostError:
    """An error of a file of a history, with a hint."""
    hints = {
        NotRecorded: "make room there, or set another [service] state_directory; the service works without it",
        Denied: "run as root, or set another [service] state_directory",
        Unparsable: "move it away; the service begins a new one",
    }
    return kind(f"{doing} the history", f"{path}: {why}", hint=hints[kind], path=str(path))
