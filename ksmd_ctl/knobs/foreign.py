# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of knobs by others than the service, kept for a day in a file of their own.

The file belongs to one boot, as the journal of the knobs does, so the list survives a restart of the service. It is
bounded: changes of a knob that are alike are one entry with a number, and a knob has so many entries at most, so
that one that is changed all the time pushes no other out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.knobs import Knob, KnobValue, parse_wanted
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.statefiles import JournalFile

#: How long a change is kept.
DAY_SECONDS: Final = 86400.0
#: How many entries a knob has.
MOST_OF_A_KNOB: Final = 8
# Whoever changes a knob all the time must not have the disk written all the time: of each knob so many new entries are
# saved at once within this time, and all else waits for it.
_SAVE_SECONDS: Final = 30.0
_AT_ONCE: Final = 4
_MOST_WRITERS: Final = 8
_LONGEST_NAME: Final = 100


@dataclass(frozen=True, slots=True)
class ForeignChange:
    """A change that the service did not make, or several that are alike.

    :ivar before, after: the values
    :ivar held: the service held the knob, so the change was drift
    :ivar writers: programs that are known to write the knob and ran then
    :ivar who: the process that did it, the last time; empty where that isn't known
    :ivar first_seconds, last_seconds: when it was noticed first and last, by `Host.clock`
    :ivar times: how often
    """

    knob: Knob
    before: KnobValue
    after: KnobValue
    held: bool
    writers: tuple[str, ...]
    first_seconds: float
    last_seconds: float
    times: int = 1
    who: str = ""

    def same_as(self, other: ForeignChange) -> bool:
        """Whether it is the same change another time."""
        mine, others = ((one.knob, one.before, one.after, one.held, one.writers) for one in (self, other))
        return mine == others


class ForeignChanges:
    """The list of one host.

    :ivar entries: the one that was noticed last comes last
    :ivar damaged: where a file is now that could not be understood, empty for none

    :param keep: leave a file that can't be understood where it is: for those who only look
    :raises Unreadable: the file is there and can't be read
    """

    def __init__(self, directory: Path, identity: HostIdentity, *, keep: bool = False) -> None:
        self.boot_id = identity.boot_id
        self._unsaved = False
        self._save_at = 0.0
        # When new entries of a knob were saved at once.
        self._saved_at: dict[Knob, tuple[float, ...]] = {}
        self.path = directory / f"foreign-{identity.kind}.json"
        self._file = JournalFile(self.path, _Document, "what others changed")
        self.entries: tuple[ForeignChange, ...] = self._file.read(self._checked, keep=keep) or ()
        self.damaged = self._file.damaged

    def add(self, changes: Iterable[ForeignChange], now: float) -> None:
        """Take in changes of this moment, and forget what is older than a day.

        A new entry is on disk afterwards, so that a service that is killed loses none; that an old one happened again
        may be saved later.
        """
        urgent = False
        for change in changes:
            repeated = any(entry.same_as(change) for entry in self.entries)
            urgent = (not repeated and self._at_once(change.knob, now)) or urgent
            self.entries = _added(self.entries, change)
            self._unsaved = True
        if self.entries and self.entries[0].last_seconds < now - DAY_SECONDS:
            self.entries = tuple(entry for entry in self.entries if entry.last_seconds >= now - DAY_SECONDS)
            self._unsaved = True
        if urgent or (self._unsaved and now >= self._save_at):
            self.save(now)

    def _at_once(self, knob: Knob, now: float) -> bool:
        """Whether a new entry of a knob is saved at once; it is counted then."""
        lately = tuple(at for at in self._saved_at.get(knob, ()) if now - _SAVE_SECONDS < at <= now)
        self._saved_at[knob] = (*lately, now) if len(lately) < _AT_ONCE else lately
        return len(lately) < _AT_ONCE

    def save(self, now: float) -> None:
        """Write what is not on disk yet. Not worth a failure where that can't be: it is tried again."""
        if not self._unsaved:
            return
        self._save_at = now + _SAVE_SECONDS
        try:
            self._file.write(_Document(self.boot_id, self.entries))
        except KsmdError:
            return
        self._unsaved = False

    def _checked(self, document: _Document) -> tuple[ForeignChange, ...]:
        """The entries, none if they belong to another boot.

        :raises ValueError: it has a value that a knob can't have
        """
        if document.boot_id != self.boot_id:
            return ()
        entries = [_checked(entry) for entry in document.changes[: MOST_OF_A_KNOB * len(Knob)]]
        return tuple(sorted(entries, key=lambda entry: entry.last_seconds))


def _added(entries: Sequence[ForeignChange], change: ForeignChange) -> tuple[ForeignChange, ...]:
    kept = list(entries)
    for number, entry in enumerate(kept):
        if entry.same_as(change):
            del kept[number]
            change = replace(change, first_seconds=entry.first_seconds, times=entry.times + change.times)
            break
    of_knob = [entry for entry in kept if entry.knob is change.knob]
    if len(of_knob) >= MOST_OF_A_KNOB:
        kept.remove(of_knob[0])
    return (*kept, change)


def foreign_section(entries: Sequence[ForeignChange], now: float) -> list[dict[str, object]]:
    """What a report has of them (docs/json.md): those of the last day, the latest first."""
    return [
        {
            "knob": entry.knob.value,
            "from": entry.before,
            "to": entry.after,
            "held": entry.held,
            "writers": list(entry.writers),
            "who": entry.who,
            "times": entry.times,
            "age_seconds": max(0.0, now - entry.last_seconds),
            "first_age_seconds": max(0.0, now - entry.first_seconds),
        }
        for entry in reversed(entries)
        if entry.last_seconds >= now - DAY_SECONDS
    ]


@dataclass(frozen=True, slots=True)
class _Document:
    """The file."""

    boot_id: str
    changes: tuple[ForeignChange, ...]


def _checked(entry: ForeignChange) -> ForeignChange:
    writers = tuple(name[:_LONGEST_NAME] for name in entry.writers[:_MOST_WRITERS])
    who = entry.who[:_LONGEST_NAME]
    if not all(name.isprintable() for name in (*writers, who)):
        raise ValueError("a name can't be shown")
    before, after = (parse_wanted(entry.knob, value) for value in (entry.before, entry.after))
    return replace(entry, before=before, after=after, writers=writers, who=who)
