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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ksmd_ctl.codec import JSON
from ksmd_ctl.config.model import AtStop, OnDrift
from ksmd_ctl.errors import HostError, NotRecorded
from ksmd_ctl.host.knobs import KNOBS, RUN_OFFLINE, Knob, KnobValue, parse_wanted
from ksmd_ctl.host.sample import HostIdentity, Sample
from ksmd_ctl.knobs.reconcile import OFFLINE, Write, found_value, lacks, ordered
from ksmd_ctl.statefiles import JournalFile


@dataclass(frozen=True, slots=True)
class SavedKnob:
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


class SavedKnobs:
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
        self._file = JournalFile(self.path, _Document, "the knobs as found at first")
        self.boot_id = identity.boot_id
        self.entries: Mapping[Knob, SavedKnob] = {}
        self.service: ServiceRun | None = None
        self._run = run
        self._unsaved = False
        found = self._file.read(_checked, keep=keep, upgrade=_with_start)
        self.damaged = self._file.damaged
        if found is not None and found.boot_id == self.boot_id:
            self.entries, self.service = found.knobs, found.service

    def note(self, found: Mapping[Knob, KnobValue], values: Mapping[Knob, KnobValue]) -> None:
        """Note for the service what knobs are at now, as far as it isn't known yet, and what some will be given.

        What was found is kept in memory even where it can't be written: later it may be something else.

        :raises NotRecorded, Denied: it can't be written
        """
        new = {
            knob: SavedKnob(value, None, value)
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
        new = {knob: SavedKnob(value) for knob, value in found.items() if knob not in self.entries}
        taken = {
            knob: replace(entry, at_start=None)
            for knob, entry in self.entries.items()
            if knob in own and entry.at_start is not None
        }
        self._note({**new, **taken}, values)

    def _note(self, new: Mapping[Knob, SavedKnob], values: Mapping[Knob, KnobValue]) -> None:
        if new:
            self.entries = {**self.entries, **new}
            self._unsaved = True
        given = {
            knob: replace(self.entries[knob], set=value)
            for knob, value in values.items()
            if self.entries[knob].set != value
        }
        if given or self._unsaved:
            self._save({**self.entries, **given}, self.service)

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
        try:
            self._save(entries, None if ended else self.service)
        except NotRecorded as error:
            # Nothing was refused for it: the knobs are as they were.
            raise HostError(error.what, error.why, hint=error.hint, path=error.path, errno=error.errno) from error

    def _save(self, entries: Mapping[Knob, SavedKnob], service: ServiceRun | None) -> None:
        self._file.write(_Document(self.boot_id, entries, service) if entries else None)
        self.entries, self.service = entries, service if entries else None
        self._unsaved = False


@dataclass(frozen=True, slots=True)
class _Document:
    """The file."""

    boot_id: str
    knobs: Mapping[Knob, SavedKnob]
    service: ServiceRun | None = None


def _with_start(document: JSON) -> JSON:
    """An older file has one value for both."""
    knobs = document.get("knobs") if isinstance(document, dict) else None
    for entry in knobs.values() if isinstance(knobs, dict) else ():
        if isinstance(entry, dict):
            entry.setdefault("at_start", entry.get("at_first"))
    return document


def _checked(document: _Document) -> _Document:
    """
    :raises ValueError: it has a value that a knob can't have
    """
    # Whoever can write this file must not be able to have anything else written than a knob can be.
    for knob, entry in document.knobs.items():
        for value in (entry.at_first, entry.set, entry.at_start):
            if value is not None:
                parse_wanted(knob, value)
    return document


#: A service that was last seen so long ago may be about to be started again by systemd (RestartSec=).
RESTART_SECONDS: Final = 30.0


def left_section(journal: SavedKnobs, sample: Sample, seen_age_seconds: float | None) -> dict[str, object] | None:
    """What a report has of it (docs/json.md); None where no service has left anything changed.

    Whether a service runs its caller knows.

    :param sample: of now
    :param seen_age_seconds: how long ago the service was there for certain, None where that isn't known
    """
    service = journal.service
    if service is None:
        return None
    knobs = {
        knob.value: {"found": found_value(sample, knob), "at_start": entry.at_start, "at_first": entry.at_first}
        for knob, entry in journal.entries.items()
        if _is_left(knob, entry, journal.entries, sample)
    }
    if not knobs:
        return None
    started = max(0.0, sample.time_seconds - service.started_seconds)
    # Another file tells this one, and it may be older.
    seen = None if seen_age_seconds is None else min(started, max(0.0, seen_age_seconds))
    return {
        "pid": service.pid,
        "config": service.config,
        "started_age_seconds": started,
        "seen_age_seconds": seen,
        "may_be_restarted": bool(service.unit) and (started if seen is None else seen) < RESTART_SECONDS,
        "knobs": knobs,
    }


def _is_left(knob: Knob, entry: SavedKnob, entries: Mapping[Knob, SavedKnob], sample: Sample) -> bool:
    if entry.at_start is None or found_value(sample, knob) == entry.at_start:
        return False
    mode = entries.get(Knob.ADVISOR_MODE)
    # While the kernel's advisor is on it sets pages_to_scan, and nobody left that.
    return knob is not Knob.PAGES_TO_SCAN or (mode and mode.at_start) != "scan-time"


NEEDS_UNMERGE = "putting it back needs un-merging: a transaction"
UNMERGED = "it was 2 (un-merged and stopped), which only un-merging everything brings back; 0 stops as well"
TAKEN_OVER = 'somebody else has changed it since, and on_drift = "observe" leaves that alone'


@dataclass(frozen=True, slots=True)
class StopPlan:
    """What to write, and which knobs stay as they are although they were different before.

    :ivar left: why each stays
    :ivar before: what each knob of the plan was, that is, what is put back
    :ivar found: what each was found at
    :ivar settled: what knobs will be at of which nothing is to be put back after this, if their write succeeds
    """

    writes: tuple[Write, ...] = ()
    left: Mapping[Knob, str] = field(default_factory=dict)
    before: Mapping[Knob, KnobValue] = field(default_factory=dict)
    found: Mapping[Knob, KnobValue] = field(default_factory=dict)
    settled: Mapping[Knob, KnobValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stopped:
    """What a stop did.

    :ivar left: the knobs that are not as they were before, and why
    """

    written: tuple[Write, ...]
    left: Mapping[Knob, str]


def plan_stop(
    at_stop: AtStop, on_drift: OnDrift, entries: Mapping[Knob, SavedKnob], sample: Sample, *, first: bool = False
) -> StopPlan:
    """The plan for the knobs in the journal.

    :param first: put back what knobs were at first in this boot, not what they were before the service was started
    """
    before = {
        knob: value
        for knob, entry in entries.items()
        if (value := entry.at_first if first else entry.at_start) is not None
    }
    found = {knob: value for knob in before if (value := found_value(sample, knob)) is not None}
    if at_stop is AtStop.LEAVE:
        return StopPlan(before=before, found=found, settled=found)
    if at_stop is AtStop.STOP_SCANNING:
        merging = found_value(sample, Knob.RUN) == 1
        if not merging:
            return StopPlan(before=before, found=found, settled=found)
        return StopPlan(
            (Write(Knob.RUN, 0),), before=before, found={**found, Knob.RUN: 1}, settled={**found, Knob.RUN: 0}
        )
    return _restoring(on_drift, entries, before, found, sample)


def _restoring(
    on_drift: OnDrift,
    entries: Mapping[Knob, SavedKnob],
    before: Mapping[Knob, KnobValue],
    found: Mapping[Knob, KnobValue],
    sample: Sample,
) -> StopPlan:
    writes: list[Write] = []
    left: dict[Knob, str] = {}
    settled: dict[Knob, KnobValue] = {}
    advised = before.get(Knob.ADVISOR_MODE, sample.knob(Knob.ADVISOR_MODE)) == "scan-time"
    for knob, value in before.items():
        now = found.get(knob)
        if now is None:
            left[knob] = lacks(knob) if knob not in sample.readings else "it can't be read"
        elif now == value or (knob is Knob.PAGES_TO_SCAN and advised):
            # The kernel's advisor had set pages_to_scan; nobody wanted that value.
            settled[knob] = value
        elif on_drift is OnDrift.OBSERVE and _taken_over(knob, now, value, entries):
            left[knob] = TAKEN_OVER
            settled[knob] = now
        elif reason := _waits(knob, sample):
            left[knob] = reason
        elif knob is Knob.RUN and value == 2:
            left[knob] = UNMERGED
            settled[knob] = 0
            if now == 1:
                writes.append(Write(knob, 0))
        else:
            settled[knob] = value
            writes.append(Write(knob, value))
    pages = settled.get(Knob.PAGES_TO_SCAN)
    if Write(Knob.ADVISOR_MODE, "none") in writes and pages is not None and pages == found[Knob.PAGES_TO_SCAN]:
        # Switching the advisor off sets pages_to_scan to 100, whatever it is now.
        writes.append(Write(Knob.PAGES_TO_SCAN, pages))
    return StopPlan(ordered(writes), left, before, found, settled)


def _taken_over(knob: Knob, found: KnobValue, before: KnobValue, entries: Mapping[Knob, SavedKnob]) -> bool:
    """Whether somebody else has changed a knob since it was given its last value."""
    if knob is Knob.PAGES_TO_SCAN and Knob.ADVISOR_MODE in entries:
        # The kernel's advisor may have changed it.
        return False
    given = entries[knob].set
    return found != (before if given is None else given)


def _waits(knob: Knob, sample: Sample) -> str:
    """Why a knob can't be put back now; empty if it can."""
    run, spec = sample.knob(Knob.RUN), KNOBS[knob]
    if spec.blocks and isinstance(run, int) and run & RUN_OFFLINE:
        return OFFLINE
    if spec.needs_unmerge and (sample.number("pages_shared") or 0) > 0:
        return NEEDS_UNMERGE
    return ""
