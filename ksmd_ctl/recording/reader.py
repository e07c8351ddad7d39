# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads a recording (`ksmd_ctl.recording.schema`). It may be anybody's file: nothing in it is taken for granted."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

from ksmd_ctl.errors import Absent, KsmdError, Unparsable, Unreadable, UsageError, errno_text
from ksmd_ctl.host.cpus import parse_nodes
from ksmd_ctl.host.fields import FIELDS_BY_NAME
from ksmd_ctl.host.knobs import KNOBS, RUN_OFFLINE, Knob
from ksmd_ctl.host.page_sample import MOST_ONE_IN
from ksmd_ctl.host.sample import NodeMemory, Reading, Sample
from ksmd_ctl.recording.schema import APPLICATION_ID, SAMPLE, TABLES, VERSION

_HEADER: Final = b"SQLite format 3\0"
_HEADER_BYTES: Final = 100
# A thousand years.
_MOST_SECONDS: Final = 3.2e10
# More than any host counts.
_MOST_COUNT: Final = 1 << 60
_MOST_NODES: Final = 1 << 10
# Pages of the kernel's architectures.
_LEAST_PAGE, _MOST_PAGE = 1 << 12, 1 << 18
_HINT: Final = "ksmd-ctl record makes one"


class RecordedProcess(NamedTuple):
    """A row of the table process; `domain` is None where none are configured, or it isn't recorded."""

    process: int
    pid: int
    name: str
    unit: str
    group: str
    family: int
    home: int | None
    began: float
    ended: float | None
    domain: str | None


class ProcessSample(NamedTuple):
    """A row of the table process_sample; `rmap_items` is None where it is not recorded."""

    seconds: float
    process: int
    resident_pages: int
    rmap_items: int | None


class RecordedLook(NamedTuple):
    """A row of the table look."""

    look: int
    began: float
    ended: float
    cpu_seconds: float
    unread: int
    equal_pages: int | None
    equal_contents: int | None


class ProcessLook(NamedTuple):
    """A row of the table process_look."""

    look: int
    process: int
    seconds: float
    pages: int
    merging_pages: int | None


class PageChange(NamedTuple):
    """A row of the table page; `content` is None where the page has left the sample."""

    look: int
    process: int
    page: int
    content: int | None
    node: int
    frame: int


class RecordedEvent(NamedTuple):
    """A row of the table event."""

    seconds: float
    kind: str
    text: str
    service: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds for the whole recording (`ksmd_ctl.recording.schema.FACTS`).

    :ivar seconds: None where it did not come to its end
    :ivar domains: the mode of the configured trust domains; None without any
    """

    program: str
    kind: str
    release: str
    profile: str
    page_size_bytes: int
    begun: float
    seconds: float | None
    one_in: int
    keyed: bool
    anonymous: bool
    numa: bool
    service: Mapping[str, object] | None
    domains: str | None = None


class Recording:
    """A recording, open for reading."""

    def __init__(self, path: Path) -> None:
        """
        :raises UsageError: it is no recording, or one of a later format
        :raises Unreadable: it may not be read
        :raises Unparsable: it is damaged or cut off
        """
        self._path = path
        self._what = f"reading {path}"
        self._journal = Path(f"{path}-journal")
        self._known: dict[str, set[int]] = {"process": set(), "look": set(), "content": set()}
        self._check_file()
        # Not immutable: it may still be written. What an unclean end left half done, SQLite has to take back.
        mode = "rw" if self._journal.exists() and os.access(path, os.W_OK) else "ro"
        self._database = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
        try:
            with self._reading():
                self._check_format()
            self.facts = self._facts()
        except BaseException:
            self._database.close()
            raise

    def _check_file(self) -> None:
        try:
            if not stat.S_ISREG(self._path.stat().st_mode):
                raise UsageError(self._what, "it is not a regular file", hint=_HINT)
            with open(self._path, "rb") as file:
                header = file.read(_HEADER_BYTES)
        except FileNotFoundError as error:
            raise UsageError(self._what, "there is no such file", hint=_HINT) from error
        except OSError as error:
            kind = Unreadable if error.errno in (errno.EACCES, errno.EPERM) else UsageError
            hint = "whoever recorded it can read it; recordings are made with mode 0600"
            raise kind(self._what, errno_text(error.errno or 0), hint=hint) from error
        if not header:
            raise UsageError(self._what, "it is empty", hint=_HINT)
        if not header.startswith(_HEADER):
            raise UsageError(self._what, "it is no recording", hint=_HINT)
        if len(header) < _HEADER_BYTES:
            raise self._damaged(f"it is cut off: {len(header)} bytes are there")
        # By the file itself: another program may hold a lock on it as long as it runs.
        if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
            raise UsageError(self._what, "it is an SQLite file and no recording", hint=_HINT)
        page = int.from_bytes(header[16:18], "big")
        pages = int.from_bytes(header[28:32], "big")
        whole = pages * (65536 if page == 1 else page)
        # What is being written just now grows after it says so, or before this has seen its size.
        if (size := self._path.stat().st_size) < whole and not self._journal.exists():
            raise self._damaged(f"it is cut off: {size} of {whole} bytes are there")

    def _damaged(self, why: str) -> Unparsable:
        return Unparsable(self._what, why, hint="copy it again from where it was recorded", path=str(self._path))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise self._damaged("it is damaged: a text is no UTF-8") from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise KsmdError(self._what, "it is being written just now", hint="try again") from error
            why = str(error)
            if why.startswith("Could not decode to UTF-8"):
                # It ends with that text.
                why = "a text is no UTF-8"
            raise self._damaged(f"it is damaged: {why if why.isprintable() else ascii(why)[1:-1]}") from error

    def _check_format(self) -> None:
        ask = self._database.execute
        ask("PRAGMA trusted_schema = OFF")
        ask("PRAGMA query_only = ON")
        (version,) = ask("PRAGMA user_version").fetchone()
        if version < 1:
            raise self._damaged("it is damaged: it does not say which format it has")
        if version > VERSION:
            why = f"it has format {version}, and this ksmd-ctl reads formats up to {VERSION}"
            raise UsageError(self._what, why, hint="use the version of ksmd-ctl that recorded it, or a later one")
        # No view that is called like a table: it could do anything.
        there = {name for (name,) in ask("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if missing := [table.name for table in TABLES if table.name not in there and not table.added]:
            raise self._damaged(f"it has no table {missing[0]}")
        self._columns = {table.name: {row[1] for row in ask(f"PRAGMA table_info({table.name})")} for table in TABLES}

    def _rows(
        self, statement: str, *kinds: type | tuple[type, ...], signed: int | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """The rows of a statement, whose columns have to be of these types.

        :param signed: the one column whose numbers may be below 0
        """
        with self._reading():
            for row in self._database.execute(statement):
                for column, (value, kind) in enumerate(zip(row, kinds, strict=False)):
                    wrong = not isinstance(value, kind)
                    if not wrong and isinstance(value, int | float):
                        most = _MOST_SECONDS if isinstance(value, float) else _MOST_COUNT
                        wrong = not (-most if column == signed else 0) <= value < most
                    if wrong:
                        raise self._damaged(f"it is damaged: {str(value)[:40]!r} is of a wrong type or out of range")
                    # Who recorded it wrote none such, and they would act on a terminal.
                    if isinstance(value, str) and not value.isprintable():
                        raise self._damaged(f"it is damaged: {value[:40]!r} has characters that cannot be shown")
                yield row

    def _facts(self) -> Facts:
        found: dict[str, object] = {}
        for name, value in self._rows("SELECT name, value FROM fact", str, str):
            try:
                found[str(name)] = json.loads(str(value))
            except (ValueError, RecursionError) as error:
                raise self._damaged(f"it is damaged: the fact {str(name)[:40]} is no JSON") from error

        # Recordings of this format may lack it.
        found.setdefault("domains", None)

        def fact(name: str, *kinds: type) -> Any:
            if not isinstance(value := found.get(name), kinds):
                raise self._damaged(f"it is damaged: it has no fact {name}")
            return value

        facts = Facts(
            program=fact("program", str),
            kind=fact("kind", str),
            release=fact("release", str),
            profile=fact("profile", str),
            page_size_bytes=fact("page_size_bytes", int),
            begun=fact("begun", int, float),
            seconds=fact("seconds", int, float, type(None)),
            one_in=fact("one_in", int),
            keyed=fact("keyed", bool),
            anonymous=fact("anonymous", bool),
            numa=fact("numa", bool),
            service=fact("service", dict, type(None)),
            domains=fact("domains", str, type(None)),
        )
        page = facts.page_size_bytes
        ranges = (
            1 <= facts.one_in <= MOST_ONE_IN,
            _LEAST_PAGE <= page <= _MOST_PAGE and page & (page - 1) == 0,
            abs(facts.begun) < _MOST_SECONDS,
        )
        if not (all(ranges) and 0 <= (facts.seconds or 0.0) < _MOST_SECONDS):
            raise self._damaged("it is damaged: a fact is out of its range")
        said = [facts.program, facts.kind, facts.release, facts.profile, facts.domains or ""]
        said += map(str, (facts.service or {}).values())
        if not "".join(said).isprintable():
            raise self._damaged("it is damaged: a fact has characters that cannot be shown")
        return facts

    # -- what it holds ---------------------------------------------------------------------------------------

    def samples(self) -> Iterator[Sample]:
        """The samples, by their times; fields that this recording lacks are `Absent`."""
        names = [column.name for column in SAMPLE.columns[1:] if column.name in self._columns["sample"]]
        lacking: dict[str, Reading] = {
            column.name: Absent(f"reading {column.name}", "this recording does not have it")
            for column in SAMPLE.columns[1:]
        }
        memory: dict[float, dict[int, NodeMemory]] = {}
        statement = "SELECT seconds, node, total_bytes, free_bytes FROM node_sample"
        for seconds, node, total, free in self._rows(statement, float, int, int, int):
            memory.setdefault(seconds, {})[node] = NodeMemory(total, free)
        chosen = ", ".join(f'"{name}"' for name in names)
        for row in self._rows(f"SELECT seconds, {chosen} FROM sample ORDER BY seconds, rowid", float):
            readings = dict(lacking)
            for name, value in zip(names, row[1:], strict=True):
                if value is None:
                    continue
                if not _possible(name, value) or not str(value).isprintable():
                    raise self._damaged(f"it is damaged: {name} is {str(value)[:40]!r}")
                readings[name] = value
            yield Sample(row[0], readings, memory.get(row[0], {}))

    def nodes(self) -> tuple[int, ...]:
        """The numbers of the nodes that were online, and of others that have pages."""
        statement = "SELECT node FROM node UNION SELECT node FROM page ORDER BY 1"
        found = [node for (node,) in self._rows(statement, int)]
        if found and not 0 <= found[0] <= found[-1] < _MOST_NODES:
            raise self._damaged(f"it is damaged: there is no node {found[-1]}")
        return tuple(found)

    def processes(self) -> tuple[RecordedProcess, ...]:
        """All processes with mergeable memory, in the order in which they were found."""
        domain = "domain" if "domain" in self._columns["process"] else "NULL"
        text = (
            f'SELECT process, pid, name, unit, "grouped", family, home, began, ended, {domain} FROM process ORDER BY 1'
        )
        optional = (int, type(None)), float, (float, type(None)), (str, type(None))
        # What ran before the recording began at a time below 0.
        rows = self._rows(text, int, int, str, str, str, int, *optional, signed=7)
        return tuple(RecordedProcess(*row) for row in rows)

    def domains(self) -> Mapping[str, frozenset[int]]:
        """The configured trust domains in the order of their names: the nodes that are a domain's alone."""
        if not self._columns["domain"]:
            return {}
        found = {}
        for name, nodes in self._rows("SELECT domain, nodes FROM domain ORDER BY domain", str, str):
            try:
                found[name] = parse_nodes(nodes) if nodes else frozenset[int]()
            except ValueError as error:
                raise self._damaged(f"it is damaged: {nodes[:40]!r} are no nodes") from error
            if any(node >= _MOST_NODES for node in found[name]):
                raise self._damaged(f"it is damaged: there is no node {max(found[name])}")
        return found

    def counts(self) -> Iterator[ProcessSample]:
        """Counters of processes."""
        there = self._columns["process_sample"]
        seen = "rmap_items" if "rmap_items" in there else "NULL"
        statement = f"SELECT seconds, process, resident_pages, {seen} FROM process_sample ORDER BY seconds, rowid"
        for row in self._rows(statement, float, int, int, (int, type(None))):
            found = ProcessSample(*row)
            self._check_known(found.process)
            yield found

    def looks(self) -> tuple[RecordedLook, ...]:
        """All looks, by their times."""
        equal = "equal_pages, equal_contents" if "equal_pages" in self._columns["look"] else "NULL, NULL"
        statement = f"SELECT look, began, ended, cpu_seconds, unread, {equal} FROM look ORDER BY look"
        optional = (int, type(None))
        rows = self._rows(statement, int, float, float, float, int, optional, optional)
        return tuple(RecordedLook(*row) for row in rows)

    def process_looks(self) -> tuple[ProcessLook, ...]:
        """What looks found of processes, by their times."""
        statement = "SELECT look, process, seconds, pages, merging_pages FROM process_look ORDER BY look, rowid"
        rows = self._rows(statement, int, int, float, int, (int, type(None)))
        found = tuple(ProcessLook(*row) for row in rows)
        for one in found:
            self._check_known(one.process, one.look)
        return found

    def changes(self) -> Iterator[PageChange]:
        """What changed from look to look."""
        statement = "SELECT look, process, page, content, node, frame FROM page ORDER BY look, rowid"
        for row in self._rows(statement, int, int, int, (int, type(None)), int, int, signed=5):
            found = PageChange(*row)
            # The zero page's is 0 and has no row; NULL is none.
            self._check_known(found.process, found.look, found.content or None)
            yield found

    def events(self) -> tuple[RecordedEvent, ...]:
        """What happened, by its time."""
        told = "service" if "service" in self._columns["event"] else "0"
        statement = f"SELECT seconds, kind, text, {told} FROM event ORDER BY seconds, rowid"
        # The service's clock may have been set back.
        rows = self._rows(statement, float, str, str, int, signed=0)
        return tuple(RecordedEvent(seconds, kind, text, bool(service)) for seconds, kind, text, service in rows)

    def _check_known(self, process: int, look: int | None = None, content: int | None = None) -> None:
        """
        :raises Unparsable: the recording has no such process, look or content
        """
        for table, number in (("process", process), ("look", look), ("content", content)):
            if number is None or number in self._known[table]:
                continue
            # What is being written may have grown since it was asked.
            self._known[table] = {one for (one,) in self._rows(f"SELECT {table} FROM {table}", int)}
            if number not in self._known[table]:
                raise self._damaged(f"it is damaged: there is no {table} {number}")

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _possible(name: str, value: object) -> bool:
    """Whether a field of a sample can read so."""
    if name in KNOBS and (spec := KNOBS[Knob(name)]).words:
        return isinstance(value, str)
    if not isinstance(value, int | float):
        return False
    if name == Knob.RUN:
        return value in (0, 1, 2, RUN_OFFLINE, RUN_OFFLINE + 1, RUN_OFFLINE + 2)
    if name in KNOBS:
        return spec.minimum <= value <= spec.maximum
    return (-_MOST_COUNT if FIELDS_BY_NAME[name].signed else 0) <= value < _MOST_COUNT
