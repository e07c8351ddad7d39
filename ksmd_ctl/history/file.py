# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of the history: an SQLite database that one process has open, of a size and an age that are bounded.

Each write is one transaction, which is on disk afterwards (write-ahead log, synchronous=FULL). So a kill or a loss of
power at any moment leaves a file with all that was written before. The process holds SQLite's lock all the time
(locking_mode=EXCLUSIVE), so nobody else delays it; only the file's owner may open it, because whoever may open a file
may lock it. Others read a copy (`ksmd_ctl.history.reading.read_copy`).

SCHEMA is explained in docs/history.md. A change of it gets another VERSION.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Denied, NotRecorded, Unparsable, errno_text
from ksmd_ctl.history.model import Entry, Kind, Means, Query
from ksmd_ctl.history.reading import APPLICATION_ID, VERSION, beside, check, entries, failing, history_error
from ksmd_ctl.statefiles import give_to_owner_of, make_directory

SCHEMA: Final = """
CREATE TABLE boots (boot INTEGER PRIMARY KEY, boot_id TEXT NOT NULL UNIQUE);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, boot INTEGER NOT NULL, kind TEXT NOT NULL, event TEXT NOT NULL,
    severity TEXT NOT NULL, text TEXT NOT NULL, who TEXT NOT NULL, fields TEXT NOT NULL
);
CREATE TABLE samples (
    time INTEGER PRIMARY KEY, seconds INTEGER NOT NULL, saved_bytes REAL, pages_shared REAL, pages_sharing REAL,
    pages_scanned_per_second REAL, ksmd_cpu_ratio REAL
);
CREATE TABLE nodes (time INTEGER, node TEXT, ksm_pages REAL NOT NULL, PRIMARY KEY (time, node)) WITHOUT ROWID;
"""

#: How long a sample of the file is a mean of; those of more than a day ago are means of `LONG_SECONDS`.
SHORT_SECONDS: Final = 60
LONG_SECONDS: Final = 600
DAY_SECONDS: Final = 86400

_PAGE_BYTES: Final = 4096
# In the memory of this process; SQLite would take 2 MiB.
_CACHE_KIB: Final = 128
# So much of the bound is for the tables; the rest is for the log that is written ahead.
_TABLES_SHARE: Final = 0.75
# About what a row of samples or nodes takes.
_SAMPLE_BYTES: Final = 50
# The log goes to the tables when it has so many pages.
_CHECKPOINT_PAGES: Final = 64
_VALUES: Final = ("saved_bytes", "pages_shared", "pages_sharing", "pages_scanned_per_second", "ksmd_cpu_ratio")


class HistoryFile:
    """The open file. Several threads may use it one after the other.

    :param most_bytes: how large it may become, with what SQLite keeps beside it
    :raises Unparsable: it is damaged, no history, or of a newer version
    :raises NotRecorded: the disk is full or fails, or somebody else has it open
    :raises Denied: no permission
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        # Not imported before: it takes memory.
        import sqlite3

        self.path = path
        self._most_pages = max(8, int(most_bytes * _TABLES_SHARE) // _PAGE_BYTES)
        self._boots: dict[str, int] = {}
        _make(path)
        with self._failing("opening"):
            # Transactions are begun here. Nobody is waited for.
            self._db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            with self._failing("opening"):
                self._set_up()
        except BaseException:
            self._db.close()
            raise

    def _set_up(self) -> None:
        for pragma in (
            f"page_size = {_PAGE_BYTES}",
            "auto_vacuum = INCREMENTAL",
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = FULL",
            f"cache_size = -{_CACHE_KIB}",
            f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
            f"journal_size_limit = {_CHECKPOINT_PAGES * _PAGE_BYTES}",
            "temp_store = MEMORY",
            # What is forgotten is not to be found in the file either.
            "secure_delete = FAST",
        ):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        if self._number("PRAGMA application_id") == 0 and self._number("SELECT count(*) FROM sqlite_master") == 0:
            with self._transaction():
                for statement in SCHEMA.split(";")[:-1]:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
        check(self._db, self.path)
        self._db.execute(f"PRAGMA max_page_count = {self._most_pages}")

    def close(self) -> None:
        """Close it; the log that was written ahead goes to the tables, and its file is gone afterwards."""
        with self._failing("closing"):
            self._db.close()

    # -- writing -------------------------------------------------------------------------------------------

    def write(self, entries: Sequence[Entry], means: Sequence[Means]) -> None:
        """Add events and samples, as one transaction; what is oldest goes where there is no room.

        :raises Unparsable: the file is damaged
        :raises NotRecorded: the disk is full or fails
        """
        with self._failing("writing"):
            self._make_room()
            with self._transaction():
                for entry in entries:
                    self._db.execute(
                        "INSERT INTO events (time, boot, kind, event, severity, text, who, fields) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            entry.time_seconds,
                            self._boot(entry.boot_id),
                            entry.kind.value,
                            entry.event,
                            entry.severity.value,
                            entry.text,
                            entry.who,
                            json.dumps(dict(entry.fields), ensure_ascii=False) if entry.fields else "",
                        ),
                    )
                for mean in means:
                    self._add(mean, SHORT_SECONDS)

    def _add(self, mean: Means, seconds: int) -> None:
        values = (mean.time_seconds, seconds, *(getattr(mean, name) for name in _VALUES))
        self._db.execute("INSERT OR REPLACE INTO samples VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self._db.execute("DELETE FROM nodes WHERE time = ?", (mean.time_seconds,))
        for node, pages in mean.ksm_pages.items():
            self._db.execute("INSERT INTO nodes VALUES (?, ?, ?)", (mean.time_seconds, node, pages))

    def _boot(self, boot_id: str) -> int:
        if boot_id not in self._boots:
            self._db.execute("INSERT OR IGNORE INTO boots (boot_id) VALUES (?)", (boot_id,))
            self._boots[boot_id] = self._number("SELECT boot FROM boots WHERE boot_id = ?", boot_id)
        return self._boots[boot_id]

    def forget(self, now_seconds: float, keep_seconds: float) -> None:
        """Remove what is older than that, and keep only long means of samples of more than a day ago.

        :raises Unparsable: the file is damaged
        :raises NotRecorded: the disk is full or fails
        """
        with self._failing("writing"), self._transaction():
            oldest = now_seconds - keep_seconds
            for table in ("events", "samples", "nodes"):
                self._db.execute(f"DELETE FROM {table} WHERE time < ?", (oldest,))
            self._db.execute("DELETE FROM boots WHERE boot NOT IN (SELECT DISTINCT boot FROM events)")
            self._boots.clear()
            until = int(now_seconds - DAY_SECONDS) // LONG_SECONDS * LONG_SECONDS
            if self._number("SELECT count(*) FROM samples WHERE time < ? AND seconds < ?", until, LONG_SECONDS):
                long = self._means(0, until, LONG_SECONDS)
                for table in ("samples", "nodes"):
                    self._db.execute(f"DELETE FROM {table} WHERE time < ?", (until,))
                for mean in long:
                    self._add(mean, LONG_SECONDS)

    def _make_room(self) -> None:
        """Remove what is oldest while the tables fill nine tenths of their bound.

        Of events decisions of the policy go first, then those of the kind that has most: what happens often pushes out
        nothing that happens rarely.
        """
        while self._used_pages() > self._most_pages * 0.9:
            events, samples, nodes = (
                self._number(f"SELECT count(*) FROM {table}") for table in ("events", "samples", "nodes")
            )
            with self._transaction():
                if samples and (not events or (samples + nodes) * _SAMPLE_BYTES > self._most_pages * _PAGE_BYTES / 2):
                    until = self._number(f"SELECT time FROM samples ORDER BY time LIMIT 1 OFFSET {samples // 10}")
                    for table in ("samples", "nodes"):
                        self._db.execute(f"DELETE FROM {table} WHERE time <= ?", (until,))
                elif events:
                    most = "SELECT kind FROM events GROUP BY kind ORDER BY kind = ? DESC, count(*) DESC LIMIT 1"
                    oldest = f"SELECT id FROM events WHERE kind = ({most}) ORDER BY id LIMIT {events // 10 + 1}"
                    self._db.execute(f"DELETE FROM events WHERE id IN ({oldest})", (Kind.POLICY.value,))
                else:
                    break
        if self._number("PRAGMA page_count") > self._most_pages:
            # It has a row without columns for each page, after the first of which execute() stops.
            self._db.executescript("PRAGMA incremental_vacuum")
            self._db.execute(f"PRAGMA max_page_count = {self._most_pages}")

    def _used_pages(self) -> int:
        return self._number("PRAGMA page_count") - self._number("PRAGMA freelist_count")

    # -- reading -------------------------------------------------------------------------------------------

    def entries(self, query: Query) -> list[Entry]:
        """The events that were asked for, oldest first.

        :raises Unparsable: the file is damaged
        :raises NotRecorded: the disk fails
        """
        with self._failing("reading"):
            return entries(self._db, self.path, query)

    def means(self, since_seconds: float, step_seconds: int) -> list[Means]:
        """Means of that length of the samples since then, oldest first.

        :raises Unparsable: the file is damaged
        :raises NotRecorded: the disk fails
        """
        with self._failing("reading"):
            return self._means(since_seconds, 1 << 62, step_seconds)

    def last_seconds(self) -> float | None:
        """When the latest event or sample was, None where there is none.

        :raises Unparsable: the file is damaged
        :raises NotRecorded: the disk fails
        """
        with self._failing("reading"):
            event = self._db.execute("SELECT time FROM events ORDER BY id DESC LIMIT 1").fetchone()
            sample = self._db.execute("SELECT time FROM samples ORDER BY time DESC LIMIT 1").fetchone()
        return max((float(row[0]) for row in (event, sample) if row is not None), default=None)

    def bytes(self) -> int:
        """How much room the tables take on the disk.

        :raises NotRecorded: the disk fails
        """
        with self._failing("reading"):
            return self._number("PRAGMA page_count") * _PAGE_BYTES

    def _means(self, since_seconds: float, until_seconds: float, step_seconds: int) -> list[Means]:
        at = f"time / {step_seconds} * {step_seconds}"
        where = "WHERE time >= ? AND time < ? GROUP BY 1"
        bounds = (since_seconds, until_seconds)
        nodes: dict[int, dict[str, float]] = {}
        rows = self._db.execute(f"SELECT {at}, node, avg(ksm_pages) FROM nodes {where}, 2", bounds)
        for time_seconds, node, pages in rows:
            nodes.setdefault(time_seconds, {})[node] = pages
        # A mean of means that are of as many samples each, but for gaps.
        means = ", ".join(f"avg({name})" for name in _VALUES)
        rows = self._db.execute(f"SELECT {at}, {means} FROM samples {where} ORDER BY 1", bounds)
        return [
            Means(at, **dict(zip(_VALUES, values, strict=True)), ksm_pages=nodes.get(at, {})) for at, *values in rows
        ]

    # -- SQLite --------------------------------------------------------------------------------------------

    def _number(self, statement: str, *values: object) -> int:
        return int(self._db.execute(statement, values).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # The boots that it added are gone.
            self._boots.clear()
            # An error of the disk may have ended it already.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _failing(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return failing(doing, self.path)


def put_aside(path: Path) -> str:
    """Move a file that can't be understood out of the way, if that is possible; where it is now."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(beside(path, suffix), beside(aside, suffix))
    except OSError:
        return str(path)
    return str(aside)


def _make(path: Path) -> None:
    """See that there is a file that only its owner may open.

    :raises NotRecorded: it can't be made
    :raises Denied: no permission
    :raises Unparsable: something else is in its place
    """
    make_directory(path.parent)
    # Nothing in its place is waited for.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags, 0o600)
    except PermissionError as error:
        raise history_error(Denied, "opening", path, errno_text(error.errno or 0)) from error
    except OSError as error:
        kind = Unparsable if path.is_symlink() or path.is_dir() else NotRecorded
        raise history_error(kind, "opening", path, errno_text(error.errno or 0)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise history_error(Unparsable, "opening", path, "it is not a regular file")
        os.fchmod(descriptor, 0o600)
        give_to_owner_of(path.parent, descriptor)
    except OSError as error:
        raise history_error(NotRecorded, "opening", path, errno_text(error.errno or 0)) from error
    finally:
        os.close(descriptor)
