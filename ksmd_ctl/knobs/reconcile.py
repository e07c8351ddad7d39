# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares found knob values with wanted ones, and decides what to write. Pure: no clock, no host, no state."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from ksmd_ctl.config.model import OnDrift, Want
from ksmd_ctl.errors import Absent, CheckFailed, KsmdError, ReadError, Rejected
from ksmd_ctl.host.knobs import KNOBS, KSMD_KNOBS, RUN_OFFLINE, Knob, KnobValue
from ksmd_ctl.host.sample import Sample


@dataclass(frozen=True, slots=True)
class Desired:
    """The knobs to hold, and what to do when somebody else changes one. Knobs that aren't named are left alone."""

    knobs: Mapping[Knob, Want] = field(default_factory=dict)
    on_drift: OnDrift = OnDrift.ENFORCE


#: How often a knob that somebody else keeps changing is put back within `WINDOW_SECONDS`.
MAX_CORRECTIONS: Final = 10
WINDOW_SECONDS: Final = 600.0
# How long the n-th correction of a window waits after the one before. The first three come at once, so that a
# change by hand is put right within two ticks; then a fight gets slower.
_BACK_OFF_SECONDS: Final = (0.0, 0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_RETRY_LIMIT_SECONDS: Final = 300.0

# What is written first. Switching the advisor's mode overwrites pages_to_scan (mm/ksm.c, set_advisor_defaults), and
# advisor_min_pages_to_scan counts only at that moment. `run` has no place here: `ordered` puts it first or last.
_ORDER: Final = {
    knob: place
    for place, knob in enumerate(
        (
            Knob.MERGE_ACROSS_NODES,
            Knob.MAX_PAGE_SHARING,
            Knob.USE_ZERO_PAGES,
            Knob.SMART_SCAN,
            Knob.STABLE_NODE_CHAINS_PRUNE_MILLISECS,
            Knob.ADVISOR_MAX_CPU,
            Knob.ADVISOR_MIN_PAGES_TO_SCAN,
            Knob.ADVISOR_MAX_PAGES_TO_SCAN,
            Knob.ADVISOR_TARGET_SCAN_TIME,
            Knob.ADVISOR_MODE,
            Knob.PAGES_TO_SCAN,
            # A change wakes ksmd, which scans that many pages.
            Knob.SLEEP_MILLISECS,
            Knob.KSMD_CPUS,
            Knob.KSMD_SCHEDULING,
            Knob.KSMD_NICE,
        )
    )
}

LACKS: Final = "this kernel does not have it"
UNSEEN: Final = "ksmd is not to be seen here"
OFFLINE: Final = "waiting for memory offlining to finish"
MERGED: Final = "the kernel refuses it while pages are merged (EBUSY): needs a transaction (`ksmd-ctl set`)"
ADVISED: Final = 'the kernel\'s advisor sets it (advisor_mode is "scan-time")'
WRITING: Final = "is being written"
BY_OTHERS: Final = "changed by somebody else, "
CORRECTING: Final = f"{BY_OTHERS}is being put back"
OBSERVED: Final = f'{BY_OTHERS}left alone (on_drift = "observe")'
GIVEN_UP: Final = "put back 10 times in 10 minutes and changed again, left alone until the next reload"


class KnobState(StrEnum):
    """The state of a knob.

    - HELD: it is as wanted
    - DRIFTED: somebody else changed it
    - PENDING: it is not as wanted yet; the reason says what it waits for
    - LACKING: it is wanted, and this kernel lacks it
    - FAILED: it can't be read or written
    - UNMANAGED: nothing is wanted of it
    """

    HELD = "held"
    DRIFTED = "drifted"
    PENDING = "pending"
    LACKING = "lacking"
    FAILED = "failed"
    UNMANAGED = "unmanaged"


@dataclass(frozen=True, slots=True)
class KnobRecord:
    """What is known of one knob, and earlier decisions about it.

    :ivar found: its value at the last sample, None where it can't be had
    :ivar drift_total: changes away from the wanted value that the service did not make
    :ivar expected: the value it should have if nobody else touches it, None before it was first read
    :ivar drifted: it was changed by somebody else and hasn't been as wanted since
    :ivar corrections: when it was put back, within the last `WINDOW_SECONDS`
    :ivar given_up: it is not put back any more
    :ivar failures: writes that failed in a row
    :ivar retry_at: no write before this time
    :ivar error: why the last write failed
    """

    wanted: Want | None = None
    found: KnobValue | None = None
    state: KnobState = KnobState.UNMANAGED
    reason: str = ""
    drift_total: int = 0
    expected: KnobValue | None = None
    drifted: bool = False
    corrections: tuple[float, ...] = ()
    given_up: bool = False
    failures: int = 0
    retry_at: float = 0
    error: KsmdError | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """A value to be written."""

    knob: Knob
    value: KnobValue


@dataclass(frozen=True, slots=True)
class WriteResult:
    """A write and its result: the value that was read back, or the error."""

    write: Write
    result: KnobValue | KsmdError


@dataclass(frozen=True, slots=True)
class Drift:
    """A change that the service did not make.

    :ivar held: the service held the knob
    """

    knob: Knob
    expected: KnobValue
    found: KnobValue
    held: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """What a tick decides.

    :ivar records: every knob, wanted or not; the memory for the next decision
    :ivar writes: what to write, in this order
    :ivar adopt: what wanted knobs were found at, for whoever keeps what was there at first
    :ivar drifts: changes of held knobs by others since the last sample
    :ivar others: changes by others of knobs that are not wanted
    :ivar changed: knobs whose state or reason has changed
    """

    desired: Desired = field(default_factory=Desired)
    records: Mapping[Knob, KnobRecord] = field(default_factory=dict)
    writes: tuple[Write, ...] = ()
    adopt: Mapping[Knob, KnobValue] = field(default_factory=dict)
    drifts: tuple[Drift, ...] = ()
    others: tuple[Drift, ...] = ()
    changed: tuple[Knob, ...] = ()

    def count(self, state: KnobState) -> int:
        return sum(1 for record in self.records.values() if record.state is state)


def lacks(knob: Knob) -> str:
    """Why there is no such knob here."""
    return UNSEEN if knob in KSMD_KNOBS else LACKS


def found_value(sample: Sample, knob: Knob) -> KnobValue | None:
    """A knob's value in a sample, `run` without the bit that says memory is going offline."""
    value = sample.knob(knob)
    if knob is Knob.RUN and isinstance(value, int):
        return value & ~RUN_OFFLINE
    return value


def ordered(writes: list[Write]) -> tuple[Write, ...]:
    """Writes in an order that works: stop first, begin to merge last."""

    def place(write: Write) -> int:
        if write.knob is Knob.RUN:
            return len(_ORDER) if write.value == 1 else -1
        return _ORDER[write.knob]

    return tuple(sorted(writes, key=place))


def forgiven(decision: Decision) -> Decision:
    """The decision with back-off and error state reset, so that what was given up is held again. For a reload."""
    records = {
        knob: replace(record, given_up=False, corrections=(), failures=0, retry_at=0, error=None)
        for knob, record in decision.records.items()
    }
    return replace(decision, records=records, writes=(), drifts=(), others=(), changed=())


def reconcile(
    desired: Desired,
    sample: Sample,
    before: Decision,
    outcomes: tuple[WriteResult, ...] = (),
    in_flight: Set[Knob] = frozenset(),
    *,
    ours: bool = False,
) -> Decision:
    """Decide about every knob.

    :param before: the decision of the last tick
    :param outcomes: writes that have finished since then, and before the sample was taken
    :param in_flight: knobs that are being written at this moment
    :param ours: a transaction of the service may have changed any knob since the last sample
    """
    if not outcomes and not in_flight and _nothing_new(desired, sample, before):
        news = before.writes or before.changed or before.drifts or before.others
        return Decision(before.desired, before.records) if news else before
    return _Reconciliation(desired, sample, before, outcomes, in_flight, ours).decide()


def _nothing_new(desired: Desired, sample: Sample, before: Decision) -> bool:
    """True where a decision can't come out differently: the usual tick, so it has to be cheap."""
    if before.desired is not desired or not before.records:
        return False
    readings = sample.readings
    for knob, record in before.records.items():
        if record.state is not KnobState.HELD and record.state is not KnobState.UNMANAGED:
            return False
        reading = readings.get(knob)
        if reading != record.found and not (record.found is None and isinstance(reading, ReadError | None)):
            return False
    return True


class _Reconciliation:
    def __init__(
        self,
        desired: Desired,
        sample: Sample,
        before: Decision,
        outcomes: tuple[WriteResult, ...],
        in_flight: Set[Knob],
        ours: bool,
    ) -> None:
        self.desired = desired
        self.ours = ours
        self.sample = sample
        self.now = sample.time_seconds
        self.before = before
        self.outcomes = {outcome.write.knob: outcome for outcome in outcomes}
        self.in_flight = in_flight
        run = sample.knob(Knob.RUN)
        self.offline = isinstance(run, int) and bool(run & RUN_OFFLINE)
        self.writes: list[Write] = []
        self.drifts: list[Drift] = []
        self.others: list[Drift] = []
        advisor = before.records.get(Knob.ADVISOR_MODE)
        # While the advisor is on, and when its mode is switched, the kernel moves pages_to_scan.
        self.advised = sample.knob(Knob.ADVISOR_MODE) == "scan-time"
        self.advisor_moved = (
            self.advised
            or Knob.ADVISOR_MODE in self.outcomes
            or Knob.ADVISOR_MODE in in_flight
            or (advisor is not None and advisor.found == "scan-time")
        )

    def decide(self) -> Decision:
        records = {}
        changed = []
        # advisor_mode comes first, because what can be done about pages_to_scan depends on it.
        for knob in (Knob.ADVISOR_MODE, *(knob for knob in Knob if knob is not Knob.ADVISOR_MODE)):
            before = self.before.records.get(knob)
            record = self.one(knob, before or KnobRecord())
            records[knob] = record
            if before is None:
                if record.wanted is not None:
                    changed.append(knob)
            elif (record.state, record.reason) != (before.state, before.reason):
                changed.append(knob)
        return Decision(
            self.desired,
            {knob: records[knob] for knob in Knob},
            ordered(self.writes),
            self.adoption(records),
            tuple(self.drifts),
            tuple(self.others),
            tuple(changed),
        )

    def adoption(self, records: Mapping[Knob, KnobRecord]) -> dict[Knob, KnobValue]:
        adopt = {
            knob: record.found
            for knob, record in records.items()
            if record.wanted is not None and record.found is not None
        }
        pages = records[Knob.PAGES_TO_SCAN].found
        if Knob.ADVISOR_MODE in adopt and pages is not None:
            adopt[Knob.PAGES_TO_SCAN] = pages
        return adopt

    def one(self, knob: Knob, record: KnobRecord) -> KnobRecord:
        want = self.desired.knobs.get(knob)
        found = found_value(self.sample, knob)
        reading = self.sample.readings.get(knob)
        absent = reading is None or isinstance(reading, Absent)
        if want is None:
            self.look_for_others(knob, record, found)
            return KnobRecord(found=found, reason=lacks(knob) if absent else "", drift_total=record.drift_total)
        if record.wanted is None:
            record = KnobRecord(wanted=want, drift_total=record.drift_total)
        elif record.wanted.value != want.value:
            # The expected value and the corrections stay: another wanted value is no drift, and forgives none.
            record = replace(record, drifted=False, failures=0, retry_at=0, error=None)
        record = replace(record, wanted=want, found=found)
        if found is None:
            if absent:
                return replace(record, state=KnobState.LACKING, reason=lacks(knob))
            return replace(record, state=KnobState.FAILED, reason=f"can't be read: {_why(reading)}")
        if want.unknown:
            return replace(record, state=KnobState.FAILED, reason=want.unknown, expected=found, drifted=False)
        record = self.learn(knob, record)
        if knob in self.in_flight and found != want.value:
            return record if record.failures else replace(record, state=KnobState.PENDING, reason=WRITING)
        if found == want.value:
            return replace(
                record,
                state=KnobState.HELD,
                reason="",
                expected=found,
                drifted=False,
                failures=0,
                retry_at=0,
                error=None,
            )
        if record.expected is not None and found != record.expected and not self.kernel_moved(knob):
            self.drifts.append(Drift(knob, record.expected, found))
            record = replace(record, drifted=True, drift_total=record.drift_total + 1)
        return self.departed(knob, want, replace(record, expected=found))

    def look_for_others(self, knob: Knob, record: KnobRecord, found: KnobValue | None) -> None:
        """Find changes by others of a knob that is not wanted."""
        if record.found is None or found is None or found == record.found or self.kernel_moved(knob):
            return
        if not (self.ours or knob in self.in_flight or knob in self.outcomes):
            self.others.append(Drift(knob, record.found, found, held=False))

    def learn(self, knob: Knob, record: KnobRecord) -> KnobRecord:
        """The record after the result of a write."""
        outcome = self.outcomes.get(knob)
        if outcome is None:
            return record
        error = outcome.result
        if not isinstance(error, KsmdError):
            if knob is Knob.RUN and isinstance(error, int):
                error &= ~RUN_OFFLINE
            if error == outcome.write.value:
                return replace(record, expected=error, failures=0, retry_at=0, error=None)
            # Otherwise it would be written again at each tick.
            record = replace(record, expected=error)
            error = CheckFailed(f"writing {knob}", f"{outcome.write.value} reads back as {error}")
        failures = record.failures + 1
        wait = min(_RETRY_LIMIT_SECONDS, 2.0 ** min(failures - 1, 20))
        return replace(record, failures=failures, retry_at=self.now + wait, error=error)

    def kernel_moved(self, knob: Knob) -> bool:
        return knob is Knob.PAGES_TO_SCAN and self.advisor_moved

    def departed(self, knob: Knob, want: Want, record: KnobRecord) -> KnobRecord:
        """What to do about a knob that is not as wanted."""
        if record.drifted:
            record = replace(
                record, corrections=tuple(time for time in record.corrections if time > self.now - WINDOW_SECONDS)
            )
            if self.desired.on_drift is OnDrift.OBSERVE:
                return replace(record, state=KnobState.DRIFTED, reason=OBSERVED)
            if record.given_up or len(record.corrections) >= MAX_CORRECTIONS:
                return replace(record, state=KnobState.DRIFTED, reason=GIVEN_UP, given_up=True)
        waits = self.waits_for(knob)
        if waits:
            return replace(record, state=KnobState.PENDING, reason=waits)
        if record.error is not None:
            busy = isinstance(record.error, Rejected) and record.error.errno == errno.EBUSY
            record = replace(
                record,
                state=KnobState.PENDING if busy else KnobState.FAILED,
                reason=MERGED if busy else f"can't be written: {record.error.why}",
            )
        elif record.drifted:
            record = replace(record, state=KnobState.DRIFTED, reason=CORRECTING)
        else:
            record = replace(record, state=KnobState.PENDING, reason=WRITING)
        if self.now < record.retry_at:
            return record
        if record.drifted:
            if record.corrections and self.now < record.corrections[-1] + _BACK_OFF_SECONDS[len(record.corrections)]:
                return record
            record = replace(record, corrections=(*record.corrections, self.now))
        self.writes.append(Write(knob, want.value))
        return record

    def waits_for(self, knob: Knob) -> str:
        """What a write of this knob has to wait for, empty for nothing."""
        spec = KNOBS[knob]
        if self.offline and spec.blocks:
            return OFFLINE
        # mm/ksm.c checks the count first, under the mutex that ksmd holds for a whole batch: not worth a try.
        if spec.needs_unmerge and (self.sample.number("pages_shared") or 0) > 0:
            return MERGED
        if (
            knob is Knob.PAGES_TO_SCAN
            and self.advised
            and not any(write.knob is Knob.ADVISOR_MODE for write in self.writes)
        ):
            return ADVISED
        return ""


def _why(reading: object) -> str:
    return reading.why if isinstance(reading, ReadError) else f"{reading!r} is no value of a knob"
