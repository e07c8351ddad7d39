# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether ksmd walks address space in which nothing is mapped, told by what its full scans cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.control.doctor.finding import Code, Figure, Finding, Severity
from ksmd_ctl.control.doctor.look import PROCESSES, Look, Patient, source_of

__all__ = ["Walk", "holes_walked", "walk"]

#: So much of ksmd's time for a page that it keeps a record of is not explained by comparing it: the dearest that was
#: measured is 7 us (findings F18).
_PAGE_SECONDS: Final = 6e-5
_LEAST_SCAN_SECONDS: Final = 0.1
#: Less empty address space costs nothing that one could notice.
_LEAST_HOLE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Walk:
    """What a full scan costs beside mappings that are mostly empty.

    :ivar seconds: ksmd's time for a full scan, at least
    :ivar empty: whether walking empty address space is what it goes for
    :ivar patients: whose that is, the one with most of it first
    """

    seconds: float
    empty: bool
    patients: tuple[Patient, ...]


def hole_bytes(one: Patient) -> int:
    """Mergeable address space of a process in which nothing is."""
    return max(0, one.walked_bytes - one.resident_bytes - one.swapped_bytes)


def walk(look: Look) -> Walk | None:
    """What a full scan costs; None where nobody has such mappings, or that was not to be seen."""
    sparse = sorted(
        (one for one in look.patients if hole_bytes(one) >= _LEAST_HOLE_BYTES), key=hole_bytes, reverse=True
    )
    used, scans = look.delta("ksmd_cpu_seconds"), look.delta("full_scans")
    if not sparse or not look.merging or used is None or scans is None:
        return None
    # One that has not ended yet has cost that much at least.
    seconds = used / max(1, scans)
    empty = seconds >= max(_LEAST_SCAN_SECONDS, _PAGE_SECONDS * look.mergeable_pages)
    return Walk(seconds, empty, tuple(sparse)) if scans or empty else None


def holes_walked(look: Look) -> Iterator[Finding]:
    """Kernels that look at every page of a mapping, there or not (mm/ksm.c:scan_get_next_rmap_item, findings F11)."""
    found = walk(look)
    if found is None or not found.empty:
        return
    yield Finding(
        Code.HOLES_WALKED,
        Severity.COSTS,
        "ksmd walks empty address space in each full scan: this kernel looks at every page of a mapping, present or "
        "not",
        (
            Figure("ksmd's time for a full scan, at least", found.seconds, source_of("ksmd_cpu_seconds"), "seconds"),
            Figure("pages to scan", look.mergeable_pages, PROCESSES, "pages"),
            *(
                Figure(f"{one}: empty mergeable address space", hole_bytes(one), PROCESSES, "bytes")
                for one in found.patients[:3]
            ),
        ),
        "A smaller pages_to_scan does not help: the walk is done within one batch, and a write of run waits for it. "
        "Have the program mark only the memory that it uses, leave it out of merging, or use a kernel that skips "
        'empty address space. policy = "adaptive" lets ksmd rest after each walk, so that it keeps to its share.',
        "ksmd-ctl processes",
    )
