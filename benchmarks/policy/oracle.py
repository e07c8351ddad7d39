# SPDX-License-Identifier: GPL-2.0-or-later
"""What could be saved at best: all pages of all tenants grouped by content.

The rules are the kernel's: a KSM page takes at most max_page_sharing mappings (mm/ksm.c, ``ksm_max_page_sharing``),
so a content that n pages hold takes ceil(n / limit) frames. The runs have merge_across_nodes = 1, where it doesn't
matter which node a page is on; and use_zero_pages = 0, where zero pages are pages like any other.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.policy.script import Event, Kind, Script

__all__ = ["Hold", "replay", "saving"]

MAX_PAGE_SHARING = 256


def saving(counts: Mapping[int, int] | Iterable[int], limit: int = MAX_PAGE_SHARING) -> int:
    """Frames saved, from how many pages hold each content."""
    numbers = counts.values() if isinstance(counts, Mapping) else counts
    return sum(number - -(-number // limit) for number in numbers)


class Hold:
    """What each tenant holds, by content."""

    def __init__(self, traces: Sequence[array[int]]) -> None:
        self._traces = traces
        self._counts: Counter[int] = Counter()
        self.tenants: dict[int, array[int]] = {}

    @property
    def pages(self) -> int:
        return sum(map(len, self.tenants.values()))

    def apply(self, event: Event) -> None:
        """Let it happen."""
        if event.kind is Kind.ARRIVE:
            assert event.trace is not None
            self.tenants[event.tenant] = array("I", self._traces[event.trace])
            self._counts.update(self._traces[event.trace])
        elif event.kind is Kind.LEAVE:
            self._counts.subtract(self.tenants.pop(event.tenant))
        else:
            pages = self.tenants[event.tenant]
            for place, content in zip(event.places, event.contents, strict=True):
                self._counts[pages[place]] -= 1
                self._counts[content] += 1
                pages[place] = content

    def saving(self) -> int:
        """Frames that could be saved now."""
        return saving(self._counts)


def replay(script: Script, traces: Sequence[array[int]]) -> list[tuple[int, int]]:
    """After each event: pages that the tenants hold, and frames that could be saved."""
    hold = Hold(traces)
    found = []
    for event in script.events:
        hold.apply(event)
        found.append((hold.pages, hold.saving()))
    return found
