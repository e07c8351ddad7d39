# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the history: takes what is logged, what the policy decides and samples, and writes it in batches.

It never stops the service, nor delays it: what can't be written waits in memory, within bounds, and is tried again; a
thread waits for the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Level, Log, Record
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.history.model import Entry, Kind, Means, Query, Severity, history_path
from ksmd_ctl.history.store import HistoryStore
from ksmd_ctl.history.waiting import Waiting
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.operation import in_thread
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.reports.history import history_document

if TYPE_CHECKING:
    from ksmd_ctl.history.file import HistoryFile

T = TypeVar("T")

#: How often it is written; a loss of power loses no more.
WRITE_SECONDS: Final = 60.0
#: Events that are not the policy's, and so are rare, wait no longer than this.
SOON_SECONDS: Final = 5.0
#: At most so many events are asked for at once.
MOST_EVENTS: Final = 2000

_FORGET_SECONDS: Final = 3600.0
_DAY_SECONDS: Final = 86400
# A policy that is busy decides every few seconds.
_MOST_DECISIONS: Final = 10
_PAGE_EVENTS: Final = 48
_LONGEST_TEXT: Final = 500
_LONGEST_FIELD: Final = 200
_MOST_FIELDS: Final = 12

KIND_OF: Final[Mapping[Event, Kind]] = {
    Event.STARTED: Kind.SERVICE,
    Event.STOPPED: Kind.SERVICE,
    Event.KILLED: Kind.SERVICE,
    Event.REBOOTED: Kind.SERVICE,
    Event.STATE_DAMAGED: Kind.SERVICE,
    Event.NO_EVENTS: Kind.SERVICE,
    Event.NO_HISTORY: Kind.SERVICE,
    Event.RELOADED: Kind.CONFIGURATION,
    Event.RELOAD_FAILED: Kind.CONFIGURATION,
    Event.DRIFT: Kind.FOREIGN,
    Event.CHANGED: Kind.FOREIGN,
    Event.GIVEN_UP: Kind.KNOB,
    Event.PENDING: Kind.KNOB,
    Event.LACKING: Kind.KNOB,
    Event.FAILED: Kind.KNOB,
    Event.HELD: Kind.KNOB,
    Event.RESTORED: Kind.KNOB,
    Event.NOT_RESTORED: Kind.KNOB,
    Event.TRANSACTION: Kind.TRANSACTION,
    Event.TRANSACTION_FAILED: Kind.TRANSACTION,
    Event.SWITCHED: Kind.TRANSACTION,
    Event.SWITCH_FAILED: Kind.TRANSACTION,
    Event.STARTED_AGAIN: Kind.TRANSACTION,
    Event.HEALED: Kind.RECOVERY,
    Event.DOMAIN_NOT_ISOLATED: Kind.DOMAIN,
    Event.DOMAIN_ISOLATED: Kind.DOMAIN,
    Event.DOMAIN_MEASURES: Kind.DOMAIN,
    Event.MERGING_STOPPED: Kind.DOMAIN,
    Event.MERGING_RESUMED: Kind.DOMAIN,
}
_SEVERITY_OF: Final = {Level.ERROR: Severity.ERROR, Level.WARNING: Severity.WARNING, Level.INFO: Severity.INFO}
_DECIDED: Final = "decided"

#: Means of samples, and events: the kinds one after the other, each from the oldest on.
Past = tuple[Sequence[Means], Sequence[Entry]]
_NONE: Final[Past] = (), ()


class HistoryKeeper:
    """The history of one host, as the running service keeps it.

    :param directory: where its file is
    :param config: gives the current configuration
    :ivar calendar: gives the time in Unix seconds
    """

    def __init__(
        self,
        directory: Path,
        identity: HostIdentity,
        tasks: Tasks,
        config: Callable[[], Config],
        log: Log,
        calendar: Callable[[], float] = time.time,
    ) -> None:
        self.path = history_path(directory, identity.kind)
        self._boot_id = identity.boot_id
        self._tasks = tasks
        self._config = config
        self._log = log
        self.calendar = calendar
        self._store = HistoryStore(self.path, lambda: config().history_max_bytes)
        self._waiting = Waiting()
        # Who writes or reads; afterwards is known which of the above were in the file.
        self._turn = asyncio.Lock()
        self._writing: asyncio.Task[None] | None = None
        # Those of the present minute.
        self._samples: list[Means] = []
        self._decisions = 0
        self._soon = False
        self._write_at = self._forget_at = 0.0
        self._errors = 0
        self._error = ""
        self._bytes = 0
        self._begun = False
        self._followers: list[Callable[[Entry], None]] = []
        log.listen(self.hear)

    # -- what happens --------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """Open the file, and note how the service before this one ended."""
        self._begun = True
        if not self._keeps():
            return
        self._write_at = now + WRITE_SECONDS
        try:
            past, seen = self._store.use(
                lambda file: (file.entries(Query(kinds=frozenset({Kind.SERVICE}), limit=50)), file.last_seconds())
            )
        except KsmdError as error:
            self._failed(error)
            return
        finally:
            self._tell_what_was_put_aside()
        # `daemon --restore` may have said how it ended.
        ends = [event.name.lower() for event in (Event.STARTED, Event.STOPPED, Event.KILLED, Event.REBOOTED)]
        last = next((entry for entry in reversed(past) if entry.event in ends), None)
        if last is None:
            return
        booted = last.boot_id != self._boot_id
        if last.event == ends[0]:
            since = "; the host was booted again since" if booted else ""
            said = _calendar_text(last.time_seconds if seen is None else seen)
            text = f"the service that ran before ended without a stop, after {said}{since}"
            self._log.event(Event.KILLED, text, booted=booted)
        elif booted:
            said = _calendar_text(last.time_seconds)
            self._log.event(Event.REBOOTED, f"the host was booted again since the service was stopped ({said})")

    def decided(self, text: str, phase: str, knobs: Mapping[Knob, KnobValue]) -> None:
        """Note a decision of the policy."""
        self._decisions += 1
        if self._decisions <= _MOST_DECISIONS:
            fields = {"phase": phase, **{knob.value: str(value) for knob, value in knobs.items()}}
            self._add(Entry(self.calendar(), Kind.POLICY, _DECIDED, Severity.INFO, text, "", fields))

    def add(self, sample: Means) -> None:
        """Take figures of this moment, whatever time they have."""
        now = self.calendar()
        minute = int(now // WRITE_SECONDS * WRITE_SECONDS)
        if self._samples and self._samples[0].time_seconds != minute:
            self._waiting.means.append(_mean(self._samples))
            self._samples = []
        self._samples.append(replace(sample, time_seconds=minute))

    def tick(self, now: float) -> None:
        """Write what waits, if it is time.

        :param now: the host's clock
        """
        if self._soon:
            self._soon = False
            self._write_at = min(self._write_at, now + SOON_SECONDS)
        if self._begun and now >= self._write_at and (self._writing is None or self._writing.done()):
            self._write_at = now + WRITE_SECONDS
            self.write(now)

    def write(self, now: float) -> asyncio.Task[None]:
        """Begin to write what waits."""
        self._writing = self._tasks.start(self._write(now))
        return self._writing

    async def _write(self, now: float) -> None:
        async with self._turn:
            if (work := self._work(now)) is None:
                return
            nothing: int | None = None
            try:
                written = await self._use(work, nothing)
            finally:
                self._waiting.take_off()
            if written is not None:
                self._bytes, self._error = written, ""

    def _work(self, now: float) -> Callable[[HistoryFile], int] | None:
        """What a thread is to do with the file, which returns its size; None for nothing."""
        if (more := self._decisions - _MOST_DECISIONS) > 0:
            text = f"{more} more decisions within a minute"
            self._add(Entry(self.calendar(), Kind.POLICY, _DECIDED, Severity.INFO, text))
        self._decisions = 0
        if not self._keeps():
            self._waiting.clear()
            self._close()
            return None
        batches, forget_at = self._waiting.batches(), self._forget_at
        calendar, keep = self.calendar(), self._config().history_days * _DAY_SECONDS
        if now >= forget_at:
            self._forget_at = now + _FORGET_SECONDS

        def work(file: HistoryFile) -> int:
            for batch in batches:
                file.write(*batch)
                self._waiting.written(batch)
            if now >= forget_at:
                file.forget(calendar, keep)
            return file.bytes()

        return work

    def close(self) -> None:
        """The service ends: write all that waits, and close the file."""
        if self._begun:
            if self._samples:
                self._waiting.means.append(_mean(self._samples))
                self._samples = []
            # A thread may still write.
            self._store.wait()
            self._waiting.take_off()
            try:
                if (work := self._work(0.0)) is not None:
                    self._store.use(work)
            except KsmdError as error:
                self._failed(error)
            self._close()
            self._begun = False

    def _keeps(self) -> bool:
        return self._config().history_days > 0

    def hear(self, record: Record) -> None:
        """Take an event that was logged."""
        who = record.fields.get("who", "") or record.fields.get("writers", "")
        fields = {name: value for name, value in record.fields.items() if name not in ("who", "writers")}
        severity = _SEVERITY_OF[record.level]
        kind = KIND_OF[record.event]
        self._add(Entry(self.calendar(), kind, record.event.name.lower(), severity, record.text, who, fields))

    def _add(self, entry: Entry) -> None:
        fields = {
            _cut(name, _LONGEST_FIELD): _cut(value, _LONGEST_FIELD)
            for name, value in list(entry.fields.items())[:_MOST_FIELDS]
        }
        who, text = _cut(entry.who, _LONGEST_FIELD), _cut(entry.text, _LONGEST_TEXT)
        entry = replace(entry, text=text, who=who, fields=fields, boot_id=self._boot_id)
        self._waiting.add(entry)
        # Where it can't be written now, that is tried once a minute.
        if entry.kind is not Kind.POLICY and not self._error:
            self._soon = True
        for follower in tuple(self._followers):
            follower(entry)

    # -- the file ------------------------------------------------------------------------------------------

    def _tell_what_was_put_aside(self) -> None:
        while self._store.put_aside:
            self._log.event(Event.NO_HISTORY, self._store.put_aside.pop(0), path=self.path)

    def _failed(self, error: KsmdError) -> None:
        """Say so once; count it each time."""
        self._errors += 1
        said, self._error = self._error, error.why
        if said != error.why:
            self._log.event(Event.NO_HISTORY, f"{error}; the service tries again each minute", path=self.path)

    def _close(self) -> None:
        try:
            self._store.close()
        except KsmdError as error:
            self._errors += 1
            self._error = error.why

    # -- who asks ------------------------------------------------------------------------------------------

    async def document(self, query: Query, then: Callable[[], None] = lambda: None) -> dict[str, object]:
        """The latest events that match (docs/json.md), also what is not written yet.

        :param then: called when all that comes from now on is not in it
        """
        async with self._turn:
            nothing: list[Entry] = []
            kept = await self._read(lambda file: file.entries(query), nothing)
            then()
            waiting = [entry for entry in self._waiting.entries if query.matches(entry)]
            return history_document([*kept, *waiting], query.limit)

    async def past(self, seconds: float, step_seconds: int) -> Past:
        """Means of that length of that time's samples, and as many of its latest events as a page shows."""
        since = self.calendar() - seconds
        async with self._turn:
            return self._with_what_waits(await self._read(lambda file: _look(file, since, step_seconds), _NONE), since)

    def past_at_start(self, seconds: float, step_seconds: int) -> Past:
        """The same, where nothing has to go on meanwhile."""
        since, kept = self.calendar() - seconds, _NONE
        if self._keeps():
            try:
                kept = self._store.use(lambda file: _look(file, since, step_seconds))
            except KsmdError as error:
                self._failed(error)
        return self._with_what_waits(kept, since)

    def _with_what_waits(self, kept: Past, since: float) -> Past:
        means = [mean for mean in self._waiting.means if mean.time_seconds >= since]
        return [*kept[0], *means], [
            *kept[1],
            *(entry for entry in self._waiting.entries if entry.time_seconds >= since),
        ]

    async def _read(self, look: Callable[[HistoryFile], T], otherwise: T) -> T:
        return await self._use(look, otherwise) if self._keeps() else otherwise

    async def _use(self, work: Callable[[HistoryFile], T], otherwise: T) -> T:
        """What a thread gets of the file; where that fails, which is told, `otherwise`."""
        found = await self._tasks.outcome(in_thread(lambda: self._store.use(work)))
        self._tell_what_was_put_aside()
        if isinstance(found, KsmdError):
            self._failed(found)
            return otherwise
        return found

    def follow(self, follower: Callable[[Entry], None]) -> None:
        """Call a function with each event from now on."""
        self._followers.append(follower)

    def unfollow(self, follower: Callable[[Entry], None]) -> None:
        """Call it no more."""
        if follower in self._followers:
            self._followers.remove(follower)

    def section(self) -> dict[str, object] | None:
        """What stands in the report about it (docs/json.md); None where none is kept."""
        if not self._keeps():
            return None
        waiting = len(self._waiting.entries)
        return {"bytes": self._bytes, "waiting": waiting, "errors": self._errors, "error": self._error}


def _look(file: HistoryFile, since_seconds: float, step_seconds: int) -> Past:
    policy = frozenset({Kind.POLICY})
    queries = (Query(since_seconds, None, kinds, _PAGE_EVENTS) for kinds in (frozenset(Kind) - policy, policy))
    return file.means(since_seconds, step_seconds), [entry for query in queries for entry in file.entries(query)]


def _mean(samples: Iterable[Means]) -> Means:
    samples = tuple(samples)
    latest = samples[-1]
    return Means(
        latest.time_seconds,
        _average(one.saved_bytes for one in samples),
        _average(one.pages_shared for one in samples),
        _average(one.pages_sharing for one in samples),
        _average(one.pages_scanned_per_second for one in samples),
        _average(one.ksmd_cpu_ratio for one in samples),
        latest.ksm_pages,
    )


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cut(text: str, most: int) -> str:
    """A text that is valid Unicode, on one line and not too long."""
    text = text.encode(errors="backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _calendar_text(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
