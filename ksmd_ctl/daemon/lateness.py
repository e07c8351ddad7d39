# SPDX-License-Identifier: GPL-2.0-or-later
"""How late ticks come: something else kept the loop, or the machine had no CPU for it."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

__all__ = ["BOUNDS_SECONDS", "Lateness"]

#: On time, late enough to be seen in a figure, late enough to matter for a knob.
BOUNDS_SECONDS: Final = (0.005, 0.05, 0.5)


class Lateness:
    """A histogram of it, since the service's start."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)

    def add(self, seconds: float) -> None:
        """A tick came so much after its time."""
        self._seconds += seconds
        self._counts[bisect_left(BOUNDS_SECONDS, seconds)] += 1

    def document(self) -> dict[str, object]:
        """As it stands in the report (docs/json.md): how many came within each bound."""
        within, so_far = {}, 0
        for bound, count in zip(BOUNDS_SECONDS, self._counts, strict=False):
            so_far += count
            within[str(bound)] = so_far
        return {"ticks": sum(self._counts), "seconds": self._seconds, "within": within}
