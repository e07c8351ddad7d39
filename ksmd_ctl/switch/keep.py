# SPDX-License-Identifier: GPL-2.0-or-later
"""Who was switched on or off, by whom, and whether it has started again since (docs/switching.md).

A record is on disk before a process is switched, and says afterwards that it was. What was switched off is known by its
machine's or its unit's name from then on, also after a reboot: neither changes from one start to the next.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ksmd_ctl.host.memory import Process, ProcessClass, ProcessId
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.statefiles import JournalFile

#: Of more, the oldest are forgotten.
_MOST_RECORDS: Final = 512
_MOST_CHARACTERS: Final = 400


@dataclass(frozen=True, slots=True)
class Switched:
    """A process that was switched.

    :ivar group: the stable name that figures are kept under, `unit` its systemd unit; empty where they aren't known
    :ivar machine: the group is a virtual machine's name
    :ivar how: the call, or the property that was set; empty until that is over
    :ivar by: who asked for it
    :ivar at_seconds: when, by `Host.clock`; None where that was before this boot
    :ivar done: it is over; else it was interrupted, or is under way
    :ivar ended: the process has ended since
    """

    process: ProcessId
    name: str
    group: str
    unit: str
    machine: bool
    on: bool
    how: str
    by: str
    at_seconds: float | None
    done: bool = False
    ended: bool = False

    @property
    def lasting(self) -> str:
        """What it will be known by when it starts again, for people, too; empty where nothing lasts."""
        if self.machine and self.group:
            return f"virtual machine {self.group}"
        # A scope is of one start, and what runs below a user's manager is what its user calls it.
        if self.unit.endswith(".service") and not self.unit.startswith("user@"):
            return f"{self.name} of {self.unit}"
        return ""

    def is_now(self, process: Process) -> bool:
        """Whether a process is this one after another start."""
        if self.machine:
            return bool(self.lasting) and process.machine and process.group == self.group
        return bool(self.lasting) and (process.unit, process.name) == (self.unit, self.name)

    def with_process(self, process: Process | None) -> Switched:
        """The same, named as the list of processes does."""
        if process is None:
            return self
        return replace(self, name=process.name, group=process.group, unit=process.unit, machine=process.machine)


@dataclass(frozen=True, slots=True)
class _Document:
    boot_id: str
    records: tuple[Switched, ...]


class SwitchJournal:
    """The records of one host, the latest last. The service and commands write it, one at a time.

    :param keep: leave a damaged file where it is: for those who only look
    :ivar records: never changed in place
    :ivar damaged: where a file is now that could not be understood, empty for none

    :raises Unreadable: the file is there and can't be read
    """

    def __init__(self, directory: Path, identity: HostIdentity, *, keep: bool = False) -> None:
        self.path = directory / f"switched-{identity.kind}.json"
        self._file = JournalFile(self.path, _Document, "what was switched on or off")
        self._boot_id = identity.boot_id
        self._keep = keep
        self.damaged = ""
        self.records: tuple[Switched, ...] = ()
        self._version: tuple[int, int] | None = None
        self.read()

    def _found(self) -> tuple[int, int] | None:
        """What tells the file from another one in its place; None for none."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def changed(self) -> bool:
        """Whether somebody else has written the file since it was read."""
        return self._found() != self._version

    def read(self) -> None:
        """Read the file again: somebody else may have written it."""
        self._version = self._found()
        found = self._file.read(_checked, keep=self._keep)
        self.damaged = self._file.damaged
        if found is None:
            self.records = ()
        elif found.boot_id == self._boot_id:
            self.records = found.records
        else:
            # Pids are of one boot.
            self.records = tuple(replace(one, ended=True, at_seconds=None) for one in found.records if _lasts(one))

    def note(self, record: Switched) -> None:
        """Add a record, in place of what is recorded of the same process or of what it was before it started again.

        :raises Denied, NotRecorded: it can't be written
        """
        self.read()
        same = record.lasting
        others = [
            one
            for one in self.records
            if one.process != record.process and not (one.ended and same and one.lasting == same)
        ]
        self._save([*others, record])

    def put_back(self, records: tuple[Switched, ...]) -> None:
        """Have the records that there were: nothing came of what was noted since.

        :raises Denied, NotRecorded: it can't be written
        """
        self._save(list(records))

    def ended(self, gone: Collection[ProcessId]) -> None:
        """Processes have ended: of these only what was switched off and can start again is kept.

        :raises Denied, NotRecorded: it can't be written
        """
        if not gone:
            return
        self.read()
        self._save(list(self.as_ended(gone)))

    def as_ended(self, gone: Collection[ProcessId]) -> tuple[Switched, ...]:
        """The records as they are once processes have ended: what can't start again is left out."""
        marked = (replace(one, ended=True) if one.process in gone else one for one in self.records)
        return tuple(one for one in marked if not one.ended or _lasts(one))

    def _save(self, records: list[Switched]) -> None:
        kept = tuple(records[-_MOST_RECORDS:])
        self._file.write(_Document(self._boot_id, kept) if kept else None)
        self._version = self._found()
        self.records = kept

    def running(self) -> tuple[ProcessId, ...]:
        """The processes that are not known to have ended."""
        return tuple(one.process for one in self.records if not one.ended)


def _lasts(record: Switched) -> bool:
    return bool(record.done and not record.on and record.lasting)


def _checked(document: _Document) -> _Document:
    """
    :raises ValueError: it has a text that is too long, or can't be shown
    """
    # Root reads it in a directory that the service's user owns.
    for one in document.records:
        for text in (one.name, one.group, one.unit, one.how, one.by):
            if len(text) > _MOST_CHARACTERS or not text.isprintable():
                raise ValueError("a record has a text that is no name")
    return document


def short(text: str) -> str:
    """A text that a record may have."""
    shown = "".join(one if one.isprintable() else " " for one in text)
    return shown if len(shown) <= _MOST_CHARACTERS else f"{shown[: _MOST_CHARACTERS - 3]}..."


def started_again(records: Collection[Switched], processes: Iterable[Process]) -> list[tuple[Switched, Process]]:
    """Processes that are mergeable and are what was switched off before it ended, each with its record."""
    listed, known = tuple(processes), {one.process for one in records}
    found: dict[ProcessId, tuple[Switched, Process]] = {}
    for record in records:
        if record.on or not record.ended:
            continue
        for process in listed:
            mergeable = ProcessClass.MERGEABLE in process.classes
            if mergeable and process.id not in known and record.is_now(process):
                found[process.id] = record, process
    return list(found.values())


def records_document(
    records: Collection[Switched], now: float, processes: Iterable[Process] = ()
) -> list[dict[str, object]]:
    """As JSON (docs/json.md), the latest first.

    :param processes: what is known to run
    """
    again = {record.process: process.id.pid for record, process in started_again(records, processes)}
    return [
        {
            "pid": one.process.pid,
            "start_time_ticks": one.process.start_time_ticks,
            "name": one.name,
            "group": one.group,
            "unit": one.unit,
            "on": one.on,
            "how": one.how,
            "by": one.by,
            "age_seconds": None if one.at_seconds is None else max(0.0, now - one.at_seconds),
            "done": one.done,
            "ended": one.ended,
            "again": {"pid": again[one.process]} if one.process in again else None,
        }
        for one in reversed(tuple(records))
    ]
