# SPDX-License-Identifier: GPL-2.0-or-later
"""All checks in order, and what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from ksmd_ctl.doctor import container, domains, lost, memory, others, risk, switched, units, virt_handler, worth
from ksmd_ctl.doctor.finding import Contents, Diagnosis, Finding, Looked, Severity
from ksmd_ctl.doctor.snapshot import Snapshot
from ksmd_ctl.reports.document import part

FORMAT: Final = 1

Check = Callable[[Snapshot], Iterator[Finding]]

#: Of findings that are as bad, what comes first here is told first.
CHECKS: Final[tuple[Check, ...]] = (
    container.container,
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
    lost.slow_splits,
    lost.swap_copies,
    units.memory_ksm,
    memory.guests_out_of_reach,
    risk.knob_pending,
    risk.config_refused,
    risk.ksmd_refused,
    others.writers,
    virt_handler.virt_handler,
    risk.no_room,
    domains.domains_share,
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
    memory.long_rmap_walks,
    risk.sparse_mapping,
    risk.left_behind,
    others.service_blind,
    worth.forked,
    worth.zero_pages,
    worth.split_zeroes,
    others.unseen,
    others.kpageflags,
)

#: These find what a change of knobs brings about while it lasts, so they are left out then.
OF_A_CHANGE: Final[frozenset[Check]] = frozenset(
    {switched.switched_off, switched.nothing_scanned, switched.long_sleep, switched.slow_scan, risk.left_behind}
)


def diagnose(seen: Snapshot, note: str = "") -> Diagnosis:
    """What was looked at, and what is the matter, the worst first.

    :param note: where the report is from, empty where it is from the service
    """
    found = list(switched.absent(seen))
    if not found:
        checks = [check for check in CHECKS if not (seen.begun and check in OF_A_CHANGE)]
        found = [finding for check in checks for finding in check(seen)]
    findings = tuple(sorted(found, key=lambda finding: finding.severity.rank))
    duplicates, saved = seen.duplicates, worth.saved_range(seen)
    looked = Looked(
        seconds=seen.seconds,
        service=seen.service,
        note=note,
        run=seen.run,
        merged_pages=seen.merged_pages,
        saved_bytes=None if saved is None else {"from": saved[0], "to": saved[1]},
        split_zero_bytes=None if seen.listed is None else seen.split_zero_bytes,
        stale_text=seen.stale_text,
        processes=None if seen.listed is None else sum(one.mergeable for one in seen.processes),
        mergeable_bytes=seen.mergeable_pages * seen.page,
        contents=None
        if duplicates is None
        else Contents(
            mergeable_pages=duplicates.mergeable_pages,
            frames=duplicates.frames,
            apart=duplicates.pages,
            complete=duplicates.complete,
            cpu_seconds=duplicates.cpu_seconds,
        ),
        unmerged_bytes=lost.unmerged_pages(seen) * seen.page,
        unknown=seen.unknown,
    )
    healthy = all(finding.severity is Severity.NOTE for finding in findings)
    return Diagnosis(FORMAT, part(seen.after, "host"), healthy, looked, findings)
