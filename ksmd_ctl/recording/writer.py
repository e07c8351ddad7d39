# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes a recording (`ksmd_ctl.recording.schema`): samples, events, and what changes from look to look."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final

from ksmd_ctl.codec import encode
from ksmd_ctl.errors import ReadError, Unwritable, UsageError, errno_text
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.memory import Process, ProcessId, Topology
from ksmd_ctl.host.page_sample import ZERO_FRAME, PageLook, ProcessCounts, ProcessPages, SampledPage
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.recording.schema import APPLICATION_ID, SAMPLE, TABLES, TABLES_BY_NAME, VERSION, ZEROES

# Who reads it meanwhile is waited for.
_BUSY_SECONDS: Final = 300.0
_SAMPLED = tuple(column.name for column in SAMPLE.columns[1:])


class Writer:
    """A recording that is being made. What was committed survives whatever ends this process.

    Times are seconds since the recording began.

    :param zeroes: the number of a page of zeroes
    :param keyed: numbers of contents are digests with a key of the user's own, and are stored
    :param anonymous: names and pids are replaced by numbers
    """

    def __init__(self, path: Path, zeroes: int, *, keyed: bool = False, anonymous: bool = False) -> None:
        """
        :raises UsageError: there is such a file already
        :raises Unwritable: it can't be made
        """
        self._path = path
        self._keyed = keyed
        self._anonymous = anonymous
        self._processes: dict[ProcessId, int] = {}
        self._contents = {zeroes: ZEROES}
        self._introduced = 0
        self._families = {0: 0}
        self._gone: set[ProcessId] = set()
        self._names: dict[tuple[str, str], str] = {}
        self._domain_of: Callable[[Process], str] | None = None
        # By process: what the last look saw, by address: content and node.
        self._seen: dict[int, dict[int, tuple[int, int]]] = {}
        # By process: when its counters were written last and seen last, and what they were; and of those that no look
        # has seen yet, all of that.
        self._counts: dict[int, tuple[float, float, ProcessCounts]] = {}
        self._early: dict[ProcessId, list[tuple[float, ProcessCounts]]] = {}
        self._looks = 0
        self._committed = False
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError as error:
            why = "there is such a file already"
            raise UsageError(f"recording to {path}", why, hint="name another one: it is not overwritten") from error
        except OSError as error:
            raise Unwritable.of(f"recording to {path}", path, error) from error
        self._database = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
        try:
            self._begin(zeroes)
        except Unwritable:
            self._abandon()
            raise

    def _begin(self, zeroes: int) -> None:
        with self._writing():
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("BEGIN")
            self._database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._database.execute(f"PRAGMA user_version = {VERSION}")
            for table in TABLES:
                self._database.execute(table.sql)
        self._add("content", [(ZEROES, zeroes.to_bytes(8, "big") if self._keyed else None)])

    def _abandon(self) -> None:
        """Leave what was committed; a file in which nothing is is removed, so that it is in nobody's way."""
        self._database.close()
        if not self._committed:
            self._path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            full = isinstance(error, sqlite3.OperationalError) and "full" in str(error)
            why = errno_text(errno.ENOSPC) if full else str(error)
            kept = "what was recorded until some seconds before can be read"
            hint = kept if self._committed else Unwritable.FULL if full else "name a file on another disk"
            raise Unwritable(f"recording to {self._path}", why, hint=hint) from error

    def _add(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        with self._writing():
            self._database.executemany(TABLES_BY_NAME[table].insert, rows)

    def facts(self, facts: Mapping[str, object]) -> None:
        """Say what holds for the whole recording."""
        self._add("fact", [(name, json.dumps(encode(value))) for name, value in facts.items()])

    def topology(self, topology: Topology) -> None:
        """The nodes of the host."""
        self._add(
            "node",
            [
                (node.number, ranges_text(node.cpus), node.memory_bytes, json.dumps(encode(node.distances)))
                for node in topology.nodes
            ],
        )

    def domains(self, domains: Mapping[str, Iterable[int]], domain_of: Callable[[Process], str]) -> None:
        """The trust domains that are configured.

        :param domains: the nodes that are a domain's alone, by its name
        :param domain_of: the domain of a process
        """
        self._domain_of = domain_of
        rows = [(self._shown("domain", name), ranges_text(nodes)) for name, nodes in domains.items()]
        self._add("domain", rows)

    def sample(self, seconds: float, sample: Sample) -> None:
        """A sample of the host."""
        readings = (sample.readings.get(name) for name in _SAMPLED)
        self._add("sample", [(seconds, *(None if isinstance(one, ReadError) else one for one in readings))])
        nodes = [(seconds, node, memory.total_bytes, memory.free_bytes) for node, memory in sample.nodes.items()]
        self._add("node_sample", nodes)

    def event(self, seconds: float, kind: str, text: str, *, service: bool = False) -> None:
        """Something that happened.

        :param service: a service told it
        """
        self._add("event", [(seconds, kind, text, int(service))])

    def counts(self, seconds: float, counts: Mapping[ProcessId, ProcessCounts]) -> None:
        """Counters of processes; of one that no look has seen yet they are kept until then."""
        rows: list[tuple[object, ...]] = []
        for process, count in counts.items():
            number = self._processes.get(process)
            if number is None:
                early = self._early.setdefault(process, [])
                if len(early) > 1 and early[-1][1] == early[-2][1] == count:
                    early.pop()
                early.append((seconds, count))
                continue
            written, at, before = self._counts.get(number, (0.0, 0.0, ProcessCounts(-1)))
            if before == count:
                self._counts[number] = written, seconds, count
                continue
            if written < at:
                # Until then they had not changed.
                rows.append((at, number, *before))
            rows.append((seconds, number, *count))
            self._counts[number] = seconds, seconds, count
        self._add("process_sample", rows)

    def ended(self, seconds: float, process: ProcessId) -> str:
        """A process is gone; how it is called in the recording."""
        number = self._processes.pop(process)
        self._gone.add(process)
        self._seen.pop(number, None)
        with self._writing():
            self._database.execute("UPDATE process SET ended = ? WHERE process = ?", (seconds, number))
            row = self._database.execute("SELECT name, pid FROM process WHERE process = ?", (number,)).fetchone()
        return f"{row[0]} (pid {row[1]})"

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """Those that run, as far as it is known."""
        return tuple(self._processes)

    # -- looks -----------------------------------------------------------------------------------------------

    def look(
        self,
        look: PageLook,
        seconds: Callable[[float], float],
        started: Callable[[ProcessId], float],
    ) -> None:
        """What a look found, as differences from the look before.

        :param seconds: of a time on the host's clock
        :param started: when a process was
        """
        self._looks += 1
        self._add(
            "look",
            [
                (
                    self._looks,
                    seconds(look.began),
                    seconds(look.ended),
                    look.cpu_seconds,
                    len(look.unread),
                    *(look.equal or (None, None)),
                )
            ],
        )
        for one in look.processes:
            if one.process in self._gone:
                continue  # It has ended while the look went on.
            if one.process not in self._processes:
                self._introduce(one, started(one.process), one.about)
            number = self._processes[one.process]
            self._add("process_look", [(self._looks, number, seconds(one.seconds), one.pages, one.merging_pages)])
            self._add("page", self._changes(number, one.sampled))
        self._early.clear()
        # What has lost all of its mergeable memory, or could not be looked at this time.
        there = {one.process for one in look.processes}
        for process, number in self._processes.items():
            if process not in there and process.pid not in look.unread:
                self._add("page", self._changes(number, {}))

    def _introduce(self, one: ProcessPages, started: float, process: Process | None) -> None:
        self._introduced += 1
        number = self._processes[one.process] = self._introduced
        name, unit, group, home = one.name, "", one.name, None
        domain = None
        if process is not None:
            unit, group, home = process.unit, process.group, process.home
            if self._domain_of is not None:
                domain = self._shown("domain", self._domain_of(process))
        name, unit, group = self._shown("program", name), self._shown("unit", unit), self._shown("group", group)
        family = self._families.setdefault(one.family, len(self._families))
        pid = number if self._anonymous else one.process.pid
        self._add("process", [(number, pid, name, unit, group, family, home, started, None, domain)])
        self._add("process_sample", [(at, number, *count) for at, count in self._early.get(one.process, ())])

    def _shown(self, kind: str, name: str) -> str:
        if not name or not self._anonymous:
            return name
        if (kind, name) not in self._names:
            known = sum(1 for other, _ in self._names if other == kind)
            self._names[kind, name] = f"{kind} {known + 1}"
        return self._names[kind, name]

    def _changes(self, process: int, sampled: Mapping[int, SampledPage]) -> list[tuple[object, ...]]:
        before = self._seen.get(process, {})
        now = {}
        for address, page in sampled.items():
            content, node = self._content(page.number), page.node
            if page.frame == ZERO_FRAME:
                # Where no page of zeroes was seen, none may ever have been: what is only read maps the zero page, too.
                if (known := before.get(address)) is None or known[0] != ZEROES:
                    continue
                node = known[1]
            now[address] = content, node
        rows: list[tuple[object, ...]] = [
            (self._looks, process, address >> 12, content, node, sampled[address].frame)
            for address, (content, node) in now.items()
            if before.get(address) != (content, node)
        ]
        rows += [
            (self._looks, process, address >> 12, None, node, 0)
            for address, (_, node) in before.items()
            if address not in now
        ]
        self._seen[process] = now
        return rows

    def _content(self, number: int) -> int:
        found = self._contents.get(number)
        if found is None:
            found = self._contents[number] = len(self._contents)
            self._add("content", [(found, number.to_bytes(8, "big") if self._keyed else None)])
        return found

    # -- the end ---------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Have all that was said on disk."""
        with self._writing():
            self._database.execute("COMMIT")
            self._committed = True
            self._database.execute("BEGIN")

    def close(self) -> None:
        """Have it on disk, and end."""
        try:
            with self._writing():
                self._database.execute("COMMIT")
        finally:
            self._database.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Unwritable) or (error is not None and not self._committed):
            self._abandon()
        else:
            self.close()
