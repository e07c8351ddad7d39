# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to the knobs at a stop, out of the journal and a sample. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ksmd_ctl.config.model import AtStop, OnDrift
from ksmd_ctl.control.reconcile import ADVISED, LACKS, OFFLINE, Write, found_value, ordered
from ksmd_ctl.control.state import Entry
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import KNOBS, RUN_OFFLINE, Knob

__all__ = ["StopPlan", "plan_stop"]

NEEDS_UNMERGE = "putting it back needs un-merging: a transaction"
UNMERGED = "it was 2 (un-merged and stopped), which only un-merging everything brings back; 0 stops as well"
TAKEN_OVER = 'somebody else has changed it since, and on_drift = "observe" leaves that alone'


@dataclass(frozen=True, slots=True)
class StopPlan:
    """What to write, and which knobs stay as they are although they were different at first.

    :ivar left: why each stays
    :ivar done: knobs that are as at first already
    """

    writes: tuple[Write, ...]
    left: Mapping[Knob, str]
    done: frozenset[Knob]


def plan_stop(at_stop: AtStop, on_drift: OnDrift, entries: Mapping[Knob, Entry], sample: Sample) -> StopPlan:
    """The plan for the knobs in the journal."""
    if at_stop is AtStop.LEAVE:
        return StopPlan((), {}, frozenset(entries))
    if at_stop is AtStop.STOP_SCANNING:
        merging = found_value(sample, Knob.RUN) == 1
        if merging:
            return StopPlan((Write(Knob.RUN, 0),), {}, frozenset(entries) - {Knob.RUN})
        return StopPlan((), {}, frozenset(entries))
    writes: list[Write] = []
    left: dict[Knob, str] = {}
    done: set[Knob] = set()
    for knob, entry in entries.items():
        found, value = found_value(sample, knob), entry.at_first
        if found == value:
            done.add(knob)
        elif reason := _stays(knob, on_drift, entries, sample):
            left[knob] = reason
        elif knob is Knob.RUN and value == 2:
            left[knob] = UNMERGED
            if found == 1:
                writes.append(Write(knob, 0))
        else:
            writes.append(Write(knob, value))
    mode = next((write for write in writes if write.knob is Knob.ADVISOR_MODE), None)
    if mode is not None and mode.value == "none" and Knob.PAGES_TO_SCAN in done:
        # Switching the advisor off sets pages_to_scan to 100, whatever it is now.
        done.discard(Knob.PAGES_TO_SCAN)
        writes.append(Write(Knob.PAGES_TO_SCAN, entries[Knob.PAGES_TO_SCAN].at_first))
    return StopPlan(ordered(writes), left, frozenset(done))


def _stays(knob: Knob, on_drift: OnDrift, entries: Mapping[Knob, Entry], sample: Sample) -> str:
    """Why a knob that is not as at first can't, or mustn't, be put back; empty if it can."""
    entry, found, spec = entries[knob], found_value(sample, knob), KNOBS[knob]
    if found is None:
        return LACKS if knob not in sample.readings else "it can't be read"
    advisor = entries.get(Knob.ADVISOR_MODE)
    if knob is Knob.PAGES_TO_SCAN:
        mode = advisor.at_first if advisor is not None else sample.knob(Knob.ADVISOR_MODE)
        if mode == "scan-time":
            return ADVISED
    # What the kernel's advisor did to pages_to_scan is nobody's will.
    by_kernel = knob is Knob.PAGES_TO_SCAN and advisor is not None
    expected = entry.at_first if entry.set is None else entry.set
    if on_drift is OnDrift.OBSERVE and found != expected and not by_kernel:
        return TAKEN_OVER
    run = sample.knob(Knob.RUN)
    if spec.blocks and isinstance(run, int) and run & RUN_OFFLINE:
        return OFFLINE
    if spec.needs_unmerge and (sample.number("pages_shared") or 0) > 0:
        return NEEDS_UNMERGE
    return ""
