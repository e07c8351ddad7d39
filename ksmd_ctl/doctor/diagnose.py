# SPDX-License-Identifier: GPL-2.0-or-later
"""All diagnoses in order, and the document of what they found (docs/json.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from ksmd_ctl.doctor import lost, memory, others, risk, switched, worth
from ksmd_ctl.doctor.finding import Finding, Severity
from ksmd_ctl.doctor.snapshot import Snapshot
from ksmd_ctl.reports.document import part

FORMAT: Final = 1

Diagnosis = Callable[[Snapshot], Iterator[Finding]]

#: Of those that are as bad, what comes first here is told first.
DIAGNOSES: Final[tuple[Diagnosis, ...]] = (
    switched.switched_off,
    switched.memory_offline,
    switched.nothing_scanned,
    memory.nothing_mergeable,
    switched.advisor_crawl,
    switched.long_sleep,
    switched.slow_scan,
    risk.service_died,
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
    worth.holes_walked,
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


def diagnose(seen: Snapshot) -> tuple[Finding, ...]:
    """What is the matter, the worst first."""
    found = list(switched.absent(seen))
    if not found:
        asked = [diagnosis for diagnosis in DIAGNOSES if not (seen.begun and diagnosis in OF_A_CHANGE)]
        found = [finding for diagnosis in asked for finding in diagnosis(seen)]
    return tuple(sorted(found, key=lambda finding: finding.severity.rank))


def document(seen: Snapshot, findings: tuple[Finding, ...], note: str = "") -> dict[str, object]:
    """The JSON document: what was looked at, and what was found.

    :param note: where the report is from, empty where it is from the service
    """
    duplicates, saved = seen.duplicates, worth.saved_range(seen)
    return {
        "format": FORMAT,
        "host": dict(part(seen.after, "host")),
        "healthy": all(finding.severity is Severity.NOTE for finding in findings),
        "looked": {
            "seconds": seen.seconds,
            "service": seen.service,
            "note": note,
            "run": seen.run,
            "merged_pages": seen.merged_pages,
            "saved_bytes": None if saved is None else {"from": saved[0], "to": saved[1]},
            "stale_text": seen.stale_text,
            "processes": None if seen.listed is None else sum(one.mergeable for one in seen.processes),
            "mergeable_bytes": seen.mergeable_pages * seen.page,
            "contents": None
            if duplicates is None
            else {
                "mergeable_pages": duplicates.mergeable_pages,
                "frames": duplicates.frames,
                "apart": duplicates.pages,
                "complete": duplicates.complete,
                "cpu_seconds": duplicates.cpu_seconds,
            },
            "unmerged_bytes": lost.unmerged_pages(seen) * seen.page,
            "unknown": [{"what": one.what, "why": one.why, "hint": one.hint} for one in seen.unknown],
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
