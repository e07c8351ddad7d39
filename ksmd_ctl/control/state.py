# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal: what each knob was at first in this boot, and what the service gave it, on disk before the write.

So a crash, a kill or an upgrade doesn't lose what there is to restore. It belongs to one boot: a new one starts with
the kernel's own values, and an old journal says nothing about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.control.files import MALFORMED, parse_json, put_aside, read_file, replace_file
from ksmd_ctl.control.lock import make_directory
from ksmd_ctl.errors import Denied, HostError, errno_text
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.knobs import Knob, KnobValue, parse_wanted

__all__ = ["Entry", "Journal"]

_FORMAT = 1
# Far more than all knobs take.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One knob.

    :ivar at_first: its value before the service first had to do with it in this boot
    :ivar set: the value that the service gave it last, None for none yet
    """

    at_first: KnobValue
    set: KnobValue | None = None


class Journal:
    """The journal of one host.

    :ivar entries: never changed in place, so a reader may keep it
    :ivar damaged: where a file is now that could not be understood, empty for none

    :raises Unreadable: the file is there and can't be read
    """

    def __init__(self, directory: Path, identity: HostIdentity) -> None:
        # The simulated host has its own: it must not wipe out what is known of the kernel.
        self.path = directory / f"found-{identity.kind}.json"
        self.boot_id = identity.boot_id
        self.entries: Mapping[Knob, Entry] = {}
        self.damaged = ""
        self._unsaved = False
        try:
            text = read_file(self.path, "reading the knobs as found at first", _MOST_BYTES)
            if text is not None:
                self.entries = _parse(text, self.boot_id)
        except MALFORMED:
            self.damaged = put_aside(self.path)

    def note(self, found: Mapping[Knob, KnobValue], values: Mapping[Knob, KnobValue]) -> None:
        """Note what knobs are at now, for those that aren't known yet, and what some of them will be given.

        What was found is kept in memory even where it can't be written: later it may be something else.

        :raises HostError: it can't be written
        """
        new = {knob: Entry(value) for knob, value in found.items() if knob not in self.entries}
        if new:
            self.entries = {**self.entries, **new}
            self._unsaved = True
        given = {
            knob: Entry(self.entries[knob].at_first, value)
            for knob, value in values.items()
            if self.entries[knob].set != value
        }
        if given or self._unsaved:
            self._save({**self.entries, **given})

    def forget(self, knobs: Iterable[Knob]) -> None:
        """Drop knobs that are done with; the file goes with the last one.

        :raises HostError: it can't be written
        """
        gone = frozenset(knobs)
        self._save({knob: entry for knob, entry in self.entries.items() if knob not in gone})

    def _save(self, entries: Mapping[Knob, Entry]) -> None:
        document = {
            "format": _FORMAT,
            "boot_id": self.boot_id,
            "knobs": {knob.value: {"at_first": entry.at_first, "set": entry.set} for knob, entry in entries.items()},
        }
        try:
            if entries:
                make_directory(self.path.parent)
                replace_file(self.path, json.dumps(document, indent=1).encode())
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            what, why = "keeping the knobs as found at first", f"{self.path}: {errno_text(error.errno or 0)}"
            hint = "nothing is written to the kernel before that is on disk"
            kind = Denied if isinstance(error, PermissionError) else HostError
            raise kind(what, why, hint=hint, path=str(self.path), errno=error.errno) from error
        self.entries = entries
        self._unsaved = False


def _parse(text: bytes, boot_id: str) -> dict[Knob, Entry]:
    """The entries, none if they belong to another boot.

    :raises ValueError: or another error of a wrong form
    """
    document = parse_json(text)
    if document["format"] != _FORMAT:
        raise ValueError(f"format {document['format']!r} is unknown")
    if document["boot_id"] != boot_id:
        return {}
    entries = {}
    for name, entry in document["knobs"].items():
        knob = Knob(name)
        # Whoever can write this file must not be able to have anything else written than a knob can be.
        given = entry["set"]
        entries[knob] = Entry(
            parse_wanted(knob, entry["at_first"]), None if given is None else parse_wanted(knob, given)
        )
    return entries
