# SPDX-License-Identifier: GPL-2.0-or-later
"""What a service left changed that ended without a stop, as after a kill: told by the journal of the knobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ksmd_ctl.control.reconcile import found_value
from ksmd_ctl.control.state import Entry, Journal
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs import Knob

__all__ = ["RESTART_SECONDS", "left_section"]

#: A service that was last seen so long ago may be about to be started again by systemd (RestartSec=).
RESTART_SECONDS: Final = 30.0


def left_section(journal: Journal, sample: Sample, seen_age_seconds: float | None) -> dict[str, object] | None:
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


def _is_left(knob: Knob, entry: Entry, entries: Mapping[Knob, Entry], sample: Sample) -> bool:
    if entry.at_start is None or found_value(sample, knob) == entry.at_start:
        return False
    mode = entries.get(Knob.ADVISOR_MODE)
    # While the kernel's advisor is on it sets pages_to_scan, and nobody left that.
    return knob is not Knob.PAGES_TO_SCAN or (mode and mode.at_start) != "scan-time"
