# SPDX-License-Identifier: GPL-2.0-or-later
"""What is said in words: how things are, as `systemctl status` shows it, and what is new about a knob."""

from __future__ import annotations

from ksmd_ctl.config.model import Config
from ksmd_ctl.control.document import doubted
from ksmd_ctl.control.policies.figures import size
from ksmd_ctl.control.reconcile import GIVEN_UP, WRITING, Decision, KnobRecord, KnobState, found_value
from ksmd_ctl.control.saving import CURRENT, Counters, merged_pages, saving
from ksmd_ctl.daemon.journal import Event
from ksmd_ctl.host.sample import HostIdentity, Sample
from ksmd_ctl.knobs import RUN_OFFLINE, Knob

__all__ = ["said", "sentence"]

_RUNS = {0: "stopped", 1: "merging", 2: "un-merged and stopped"}


def sentence(
    identity: HostIdentity,
    config: Config,
    sample: Sample,
    decision: Decision,
    counters: Counters = CURRENT,
    *,
    reload_failed: bool = False,
) -> str:
    """What is going on: ``merging: 1.9 GiB saved, 3 knobs held, 0 drifted``."""
    run, raw = found_value(sample, Knob.RUN), sample.knob(Knob.RUN)
    parts = [_RUNS.get(run, f"run is {run}") if isinstance(run, int) else "run can't be read"]
    if isinstance(raw, int) and raw & RUN_OFFLINE:
        parts.append("memory going offline")
    if identity.simulated:
        parts.append("simulated")
    facts = [_saved(identity, sample, counters)]
    if not config.policy.writes:
        facts.append("observing only")
    else:
        held = decision.count(KnobState.HELD)
        facts.append(f"{held} knob{'' if held == 1 else 's'} held")
        facts.append(f"{decision.count(KnobState.DRIFTED)} drifted")
        for state in (KnobState.PENDING, KnobState.FAILED, KnobState.LACKING):
            count = decision.count(state)
            if count:
                facts.append(f"{count} {state}")
    if reload_failed:
        facts.append("the new configuration is wrong and the old one stays")
    return f"{', '.join(parts)}: {', '.join(facts)}"


def _saved(identity: HostIdentity, sample: Sample, counters: Counters) -> str:
    found = saving(sample, identity.page_size_bytes)
    if found is None or counters.stale:
        return "saving not known"
    if merged_pages(sample) == 0 and not found.zero_bytes:
        return "nothing merged yet" if sample.knob(Knob.RUN) == 1 else "nothing merged"
    if found.saved_bytes < 0:
        return f"costs {size(-found.saved_bytes)} more than it saves"
    return doubted(f"{size(found.saved_bytes)} saved", counters.text)


def said(before: KnobRecord | None, record: KnobRecord) -> tuple[Event | None, str]:
    """What the log says of a knob whose state is another one now; nothing of a write that has just begun."""
    match record.state:
        case KnobState.PENDING if record.reason != WRITING:
            return Event.PENDING, record.reason
        case KnobState.LACKING:
            return Event.LACKING, record.reason
        case KnobState.FAILED:
            return Event.FAILED, record.reason
        case KnobState.DRIFTED if record.reason == GIVEN_UP:
            return Event.GIVEN_UP, record.reason
        case KnobState.HELD if before is not None and before.reason not in ("", WRITING):
            return Event.HELD, f"is {record.found} again, as wanted"
        case _:
            return None, ""
