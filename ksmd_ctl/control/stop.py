# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to the knobs at a stop, out of the journal and a sample. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ksmd_ctl.config.model import AtStop, OnDrift
from ksmd_ctl.control.reconcile import LACKS, OFFLINE, Write, found_value, ordered
from ksmd_ctl.control.state import Entry
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import KNOBS, RUN_OFFLINE, Knob, KnobValue

__all__ = ["StopPlan", "Stopped", "plan_stop"]

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
    at_stop: AtStop, on_drift: OnDrift, entries: Mapping[Knob, Entry], sample: Sample, *, first: bool = False
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
    entries: Mapping[Knob, Entry],
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
            left[knob] = LACKS if knob not in sample.readings else "it can't be read"
        elif now == value or (knob is Knob.PAGES_TO_SCAN and advised):
            # What pages_to_scan was while the kernel's advisor set it is nobody's will.
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


def _taken_over(knob: Knob, found: KnobValue, before: KnobValue, entries: Mapping[Knob, Entry]) -> bool:
    """Whether somebody else has changed a knob since it was given its last value."""
    if knob is Knob.PAGES_TO_SCAN and Knob.ADVISOR_MODE in entries:
        # What the kernel's advisor did to it is nobody's will.
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
