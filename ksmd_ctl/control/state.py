# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal of the knobs, on disk before each write: what each was in this boot, and what it was given.

So a crash, a kill or an upgrade doesn't lose what there is to restore. It belongs to one boot: a new one starts with
the kernel's own values, and an old journal says nothing about it.

Two values of a knob can be put back. What it was before the service was started is what a stop puts back; a restart,
an upgrade and a crash are no stop, so that it stays the same until one. What it was before ksmd-ctl first changed it in
this boot, be it the service or ``ksmd-ctl set``, is what ``ksmd-ctl daemon --restore`` puts back.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from ksmd_ctl.codec import JSON, decode, dump, encode
from ksmd_ctl.control.files import MALFORMED, parse_json, put_aside, read_file, replace_file
from ksmd_ctl.control.lock import make_directory
from ksmd_ctl.errors import Denied, HostError, NotRecorded, errno_text
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.knobs import Knob, KnobValue, parse_wanted

__all__ = ["Entry", "Journal", "ServiceRun"]

_FORMAT = 1
# Far more than all knobs take.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One knob.

    :ivar at_first: its value before it was first changed in this boot
    :ivar set: the value that it was given last, None for none yet
    :ivar at_start: its value before the service was started; None where a stop has nothing to put back, because the
        service has not had to do with the knob, or a person has set it since
    """

    at_first: KnobValue
    set: KnobValue | None = None
    at_start: KnobValue | None = None


@dataclass(frozen=True, slots=True)
class ServiceRun:
    """A service that changes knobs, from its start to the stop that puts them back.

    :ivar started_seconds: when it was started, by `Host.clock`
    :ivar config: the configuration file that was named, empty for the default one
    :ivar unit: the systemd unit that it is, empty for none
    """

    pid: int
    started_seconds: float
    config: str = ""
    unit: str = ""


class Journal:
    """The journal of one host.

    :ivar entries: never changed in place, so a reader may keep it
    :ivar service: the service that changed knobs and has not put them back, as far as the file knows
    :ivar damaged: where a file is now that could not be understood, empty for none

    :param run: the service that this is, None for a command
    :param keep: leave a file that can't be understood where it is: for those who only look
    :raises Unreadable: the file is there and can't be read
    """

    def __init__(
        self, directory: Path, identity: HostIdentity, run: ServiceRun | None = None, *, keep: bool = False
    ) -> None:
        # The simulated host has its own: it must not wipe out what is known of the kernel.
        self.path = directory / f"found-{identity.kind}.json"
        self.boot_id = identity.boot_id
        self.entries: Mapping[Knob, Entry] = {}
        self.service: ServiceRun | None = None
        self.damaged = ""
        self._run = run
        self._unsaved = False
        try:
            text = read_file(self.path, "reading the knobs as found at first", _MOST_BYTES)
            if text is not None:
                self.entries, self.service = _parse(text, self.boot_id)
        except MALFORMED:
            self.damaged = str(self.path) if keep else put_aside(self.path)

    def note(self, found: Mapping[Knob, KnobValue], values: Mapping[Knob, KnobValue]) -> None:
        """Note for the service what knobs are at now, as far as it isn't known yet, and what some will be given.

        What was found is kept in memory even where it can't be written: later it may be something else.

        :raises NotRecorded, Denied: it can't be written
        """
        new = {
            knob: Entry(value, None, value)
            if (entry := self.entries.get(knob)) is None
            else replace(entry, at_start=value)
            for knob, value in found.items()
            if knob not in self.entries or self.entries[knob].at_start is None
        }
        if self._run is not None and found and self.service != self._run:
            self.service = self._run
            self._unsaved = True
        self._note(new, values)

    def note_change(
        self, found: Mapping[Knob, KnobValue], values: Mapping[Knob, KnobValue], own: Set[Knob] = frozenset()
    ) -> None:
        """Note for a person's change what knobs are at now, and what they will be given.

        :param own: knobs that the person names and that no configuration holds: a stop leaves these as they are now
        :raises NotRecorded, Denied: it can't be written
        """
        new = {knob: Entry(value) for knob, value in found.items() if knob not in self.entries}
        taken = {
            knob: replace(entry, at_start=None)
            for knob, entry in self.entries.items()
            if knob in own and entry.at_start is not None
        }
        self._note({**new, **taken}, values)

    def _note(self, new: Mapping[Knob, Entry], values: Mapping[Knob, KnobValue]) -> None:
        if new:
            self.entries = {**self.entries, **new}
            self._unsaved = True
        given = {
            knob: replace(self.entries[knob], set=value)
            for knob, value in values.items()
            if self.entries[knob].set != value
        }
        if given or self._unsaved:
            self._save({**self.entries, **given}, self.service, NotRecorded)

    def settle(self, values: Mapping[Knob, KnobValue], *, ended: bool = False) -> None:
        """Note that a stop has nothing more to put back of some knobs; the file goes with the last one.

        :param values: what they are at now; one that is as it was at first is forgotten
        :param ended: the service has ended, and so has what it had to put back
        :raises HostError: it can't be written
        """
        entries = {
            knob: replace(entry, at_start=None, set=values[knob]) if knob in values else entry
            for knob, entry in self.entries.items()
            if knob not in values or values[knob] != entry.at_first
        }
        self._save(entries, None if ended else self.service)

    def _save(
        self, entries: Mapping[Knob, Entry], service: ServiceRun | None, failure: type[HostError] = HostError
    ) -> None:
        document = _Document(_FORMAT, self.boot_id, entries, service)
        try:
            if entries:
                make_directory(self.path.parent)
                replace_file(self.path, dump(encode(document)))
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            what, why = "keeping the knobs as found at first", f"{self.path}: {errno_text(error.errno or 0)}"
            hint = (
                "make room there, or set another [service] state_directory; nothing is written to the kernel before "
                "that is on disk"
            )
            kind = Denied if isinstance(error, PermissionError) else failure
            raise kind(what, why, hint=hint, path=str(self.path), errno=error.errno) from error
        self.entries, self.service = entries, service if entries else None
        self._unsaved = False


@dataclass(frozen=True, slots=True)
class _Document:
    """The file."""

    format: int
    boot_id: str
    knobs: Mapping[Knob, Entry]
    service: ServiceRun | None = None


def _parse(text: bytes, boot_id: str) -> tuple[Mapping[Knob, Entry], ServiceRun | None]:
    """The entries and the service, none if they belong to another boot.

    :raises ValueError: it is of another form, or has a value that a knob can't have
    """
    document = decode(_Document, _with_start(parse_json(text)), "the file")
    if document.format != _FORMAT:
        raise ValueError(f"format {document.format} is unknown")
    if document.boot_id != boot_id:
        return {}, None
    return {knob: _checked(knob, entry) for knob, entry in document.knobs.items()}, document.service


def _with_start(document: JSON) -> JSON:
    """An older file has one value for both."""
    knobs = document.get("knobs") if isinstance(document, dict) else None
    for entry in knobs.values() if isinstance(knobs, dict) else ():
        if isinstance(entry, dict):
            entry.setdefault("at_start", entry.get("at_first"))
    return document


def _checked(knob: Knob, entry: Entry) -> Entry:
    # Whoever can write this file must not be able to have anything else written than a knob can be.
    return Entry(
        parse_wanted(knob, entry.at_first),
        None if entry.set is None else parse_wanted(knob, entry.set),
        None if entry.at_start is None else parse_wanted(knob, entry.at_start),
    )
