# SPDX-License-Identifier: GPL-2.0-or-later
"""What a kernel counts of KSM for one process.

Sources: /proc/PID/ksm_stat (6.1, more lines since 6.4, 6.6 and 6.14), /proc/PID/ksm_merging_pages (5.19), smaps. Mind
that up to 6.17, save in stable kernels that have it fixed, a forked child begins with a copy of its parent's counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ksmd_ctl.errors import Absent, Unparsable
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel.proc_pid import merging_pages_of, read_process_file
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class KsmCounts:
    """What this kernel tells of one process; None where it doesn't."""

    rmap_items: int | None = None
    zero_pages: int | None = None
    merging_pages: int | None = None
    profit_bytes: int | None = None
    merge_any: bool | None = None
    mergeable: bool | None = None


def parse_ksm_stat(text: str) -> KsmCounts:
    """The text of /proc/PID/ksm_stat; lines that are not known are left out."""
    numbers = {match[1]: int(match[2]) for match in re.finditer(r"^(\w+) (-?\d+)$", text, re.MULTILINE | re.ASCII)}
    words = {match[1]: match[2] == "yes" for match in re.finditer(r"^(\w+): (yes|no)$", text, re.MULTILINE | re.ASCII)}
    return KsmCounts(
        rmap_items=numbers.get("ksm_rmap_items"),
        zero_pages=numbers.get("ksm_zero_pages"),
        merging_pages=numbers.get("ksm_merging_pages"),
        profit_bytes=numbers.get("ksm_process_profit"),
        merge_any=words.get("ksm_merge_any"),
        mergeable=words.get("ksm_mergeable"),
    )


def read_counts(pid: int, root: Path = Path("/")) -> KsmCounts:
    """A process's counts, from whichever files this kernel has.

    :raises NoSuchProcess, Denied: it can't be looked at
    """
    try:
        counts = parse_ksm_stat(read_process_file(pid, "ksm_stat", root))
    except Absent:
        counts = KsmCounts()
    if counts.merging_pages is None:
        try:
            return replace(counts, merging_pages=merging_pages_of(pid, root))
        except (Absent, Unparsable):
            pass
    return counts


def ksm_mapped_pages(ranges: Sequence[Range]) -> int | None:
    found = [item.ksm_pages for item in ranges if item.ksm_pages is not None]
    return sum(found) if found else None


def sharing_bytes(ranges: Sequence[Range], merging_pages: int | None) -> int | None:
    """Of each KSM page what its other mappings bear: what is resident less the proportional share.

    Other pages may be shared as well, by fork or as a file's: so at most what its KSM pages hold.

    :param merging_pages: how many there are, where smaps does not tell of each mapping (before 6.7)
    """
    total, uncounted = 0, 0
    for item in ranges:
        if not (item.mergeable or item.ksm_pages) or item.ksm_pages == 0:
            continue
        if item.pss_bytes is None:
            return None
        shared = max(0, item.resident_pages * PAGE_SIZE - item.pss_bytes)
        if item.ksm_pages is None:
            uncounted += shared
        else:
            total += min(shared, item.ksm_pages * PAGE_SIZE)
    if uncounted and merging_pages is None:
        return None
    return total + min(uncounted, (merging_pages or 0) * PAGE_SIZE)
