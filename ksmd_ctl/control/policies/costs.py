# SPDX-License-Identifier: GPL-2.0-or-later
"""What full scans cost by the number of pages that ksmd knows, as far as `adaptive` has measured it.

smart_scan skips most pages of a peek, so that this is not what a page of pages_to_scan costs, which
`ksmd_ctl.control.policies.pace` measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.control.policies.change import grown, tracked_pages
from ksmd_ctl.control.policies.debts import PRIORS, Debts
from ksmd_ctl.control.policies.pace import LOOK, PEEK
from ksmd_ctl.host.sample import Sample

__all__ = ["Costs"]

# Before anything was measured.
_FIRST: Final = {PEEK: 1.5e-6, LOOK: 3e-6}
_PEEKS_EXPECTED: Final = 1.5
# A page never costs more than that; what a full scan takes beyond it is no page's.
_DEAREST: Final = 5e-5
# What took less of ksmd's time can't be told from noise.
_LEAST_CPU_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of ksmd's time for a page that it knows in a full scan, peeking and looking.

    :ivar walk: seconds of a full scan that go for no page: some kernels walk empty address space (findings F11)
    """

    page: Mapping[str, float] = field(default_factory=lambda: _FIRST)
    walk: float = 0.0

    def scanned(self, mode: str, before: Sample, sample: Sample) -> Costs:
        """Full scans have ended between two samples."""
        tracked, scans = tracked_pages(sample), grown(before, sample, "full_scans")
        used = grown(before, sample, "ksmd_cpu_seconds")
        if not tracked or not scans or used is None or used < _LEAST_CPU_SECONDS:
            return self
        scan = used / scans
        if scan > tracked * _DEAREST:
            return replace(self, walk=scan - tracked * self.page[mode])
        walk = min(self.walk, scan)
        cost = max((scan - walk) / tracked, 1e-7)
        return replace(self, page={**self.page, mode: (self.page[mode] + cost) / 2}, walk=walk)

    def scan(self, mode: str, sample: Sample) -> float:
        """Seconds of ksmd's time that a full scan takes now."""
        return (tracked_pages(sample) or 0) * self.page[mode] + self.walk

    def burst(self, debts: Debts, sample: Sample) -> float:
        """Seconds of ksmd's time that a burst would take now."""
        owed = debts.pages
        pages = (tracked_pages(sample) or 0) + max(0.0, owed[0] * debts.yields[0] - owed[1])
        # A look follows only where the peek found what it was done for.
        found = min(1.0, debts.yields[debts.main()] / PRIORS[debts.main()])
        walks = self.walk * (_PEEKS_EXPECTED + found)
        return pages * (_PEEKS_EXPECTED * self.page[PEEK] + found * self.page[LOOK]) + walks
