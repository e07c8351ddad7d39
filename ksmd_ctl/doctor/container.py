# SPDX-License-Identifier: GPL-2.0-or-later
"""What the container lacks that ksmd-ctl is in (docs/container.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ksmd_ctl.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.doctor.snapshot import Snapshot
from ksmd_ctl.host.container import Hidden

_FINDINGS: Final = {
    Hidden.PROCESSES: (
        Code.PROCESSES_HIDDEN,
        "The processes of this host can't be seen from this container",
        "Neither ksmd's CPU time nor units, nodes and domains can be told, and nothing can be moved or un-merged.",
    ),
    Hidden.KNOBS: (
        Code.KNOBS_READ_ONLY,
        "The knobs can't be written from this container",
        "A container's /sys is read-only, at times also a privileged one's, so KSM's folder is mounted by itself.",
    ),
    Hidden.LIMITS: (
        Code.LIMITS_HIDDEN,
        "The memory limits of this host's cgroups can't be read from this container",
        "Un-merging can then exceed a tenant's limit.",
    ),
}


def container(seen: Snapshot) -> Iterator[Finding]:
    """What of the host is hidden, and that there is no systemd, which is no fault."""
    if seen.container is None:
        return
    for what, error in seen.container.hidden.items():
        # The service's own container has the knobs read-only: its broker writes them, and what fails is told of knobs.
        if what is Hidden.KNOBS and seen.service:
            continue
        code, title, advice = _FINDINGS[what]
        blocks = what is Hidden.KNOBS and not seen.merging
        yield Finding.of(
            code,
            Severity.BLOCKS if blocks else Severity.COSTS,
            title,
            f"{advice} {error.hint[:1].upper()}{error.hint[1:]}.",
            Figure("why", error.why, error.path or "this container"),
        )
    if not seen.container.systemd:
        yield Finding.of(
            Code.NO_SYSTEMD,
            Severity.NOTE,
            "There is no systemd in this container, and that is in order",
            "A liveness probe stands in for the watchdog, and stderr for the journal. What writes units belongs on the "
            "host itself: `ksmd-ctl merge --persist` and `ksmd-ctl domains assign`.",
        )
