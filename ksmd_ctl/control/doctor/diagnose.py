# SPDX-License-Identifier: GPL-2.0-or-later
"""All diagnoses in order, and the document of what they found (docs/json.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ksmd_ctl.control.doctor import died, holes, lost, memory, others, risk, switched, worth
from ksmd_ctl.control.doctor.finding import Finding, Severity
from ksmd_ctl.control.doctor.look import Look
from ksmd_ctl.control.document import part

__all__ = ["DIAGNOSES", "FORMAT", "diagnose", "document"]

FORMAT: Final = 1

Diagnosis = Callable[[Look], Iterator[Finding]]

#: Of those that are as bad, what comes first here is told first.
DIAGNOSES: Final[tuple[Diagnosis, ...]] = (
    switched.switched_off,
    switched.memory_offline,
    switched.nothing_scanned,
    memory.nothing_mergeable,
    switched.advisor_crawl,
    switched.long_sleep,
    switched.slow_scan,
    died.service_died,
    risk.transaction_left,
    risk.transaction_runs,
    risk.knob_failed,
    lost.smart_scan,
    lost.twins,
    lost.held_pages,
    lost.sharing_limit,
    lost.swap_copies,
    memory.guests_out_of_reach,
    risk.knob_pending,
    risk.config_refused,
    others.writers,
    risk.no_room,
    risk.remote_pages,
    worth.costs_more,
    worth.losing_processes,
    holes.holes_walked,
    worth.dear_scanning,
    worth.huge_pages_split,
    lost.khugepaged,
    memory.swapped,
    memory.file_pages,
    memory.many_mappings,
    risk.sparse_mapping,
    risk.left_behind,
    others.service_blind,
    worth.forked,
    worth.zero_pages,
    worth.split_zeroes,
    others.unseen,
    others.kpageflags,
)

#: What a change of knobs that was begun does for its time: nothing of its own where there is one.
OF_A_CHANGE: Final[frozenset[Diagnosis]] = frozenset(
    {switched.switched_off, switched.nothing_scanned, switched.long_sleep, switched.slow_scan, risk.left_behind}
)


def diagnose(look: Look) -> tuple[Finding, ...]:
    """What is the matter, the worst first."""
    found = list(switched.absent(look))
    if not found:
        asked = [diagnosis for diagnosis in DIAGNOSES if not (look.begun and diagnosis in OF_A_CHANGE)]
        found = [finding for diagnosis in asked for finding in diagnosis(look)]
    return tuple(sorted(found, key=lambda finding: finding.severity.rank))


def document(look: Look, findings: tuple[Finding, ...], note: str = "") -> dict[str, object]:
    """The JSON document: what was looked at, and what was found.

    :param note: where the report is from, empty where it is from the service
    """
    likeness, saved = look.likeness, worth.saved_range(look)
    return {
        "format": FORMAT,
        "host": dict(part(look.after, "host")),
        "healthy": all(finding.severity is Severity.NOTE for finding in findings),
        "looked": {
            "seconds": look.seconds,
            "service": look.service,
            "note": note,
            "run": look.run,
            "merged_pages": look.merged_pages,
            "saved_bytes": None if saved is None else {"from": saved[0], "to": saved[1]},
            "stale_text": look.stale_text,
            "processes": None if look.processes is None else sum(one.mergeable for one in look.patients),
            "mergeable_bytes": look.mergeable_pages * look.page,
            "contents": None
            if likeness is None
            else {
                "mergeable_pages": likeness.mergeable_pages,
                "frames": likeness.frames,
                "apart": likeness.apart,
                "complete": likeness.complete,
                "cpu_seconds": likeness.cpu_seconds,
            },
            "unmerged_bytes": lost.duplicates(look) * look.page,
            "unknown": [{"what": one.what, "why": one.why, "hint": one.hint} for one in look.unknown],
        },
        "findings": [_finding(finding) for finding in findings],
    }


def _finding(finding: Finding) -> Mapping[str, object]:
    return {
        "code": finding.code.value,
        "severity": finding.severity.value,
        "title": finding.title,
        "evidence": [
            {"name": one.name, "value": one.value, "unit": one.unit, "source": one.source} for one in finding.evidence
        ],
        "advice": finding.advice,
        "command": finding.command,
    }
