# SPDX-License-Identifier: GPL-2.0-or-later
"""How many pages to take at once, so that no call takes longer than it may."""

from __future__ import annotations

__all__ = ["BatchSizer"]

# Measured times vary: aim at less than what is allowed.
_SHARE = 0.7
# At most so much larger than the last batch: the next pages may be dearer (huge, remote, contended).
_GROWTH = 2


class BatchSizer:
    """The size of the next batch, from the time that the last one took.

    :ivar size: pages, always between `minimum` and `maximum`
    """

    def __init__(self, latency_seconds: float, *, first: int = 32, minimum: int = 1, maximum: int = 8192) -> None:
        if not (latency_seconds > 0 and 1 <= minimum <= first <= maximum):
            raise ValueError("a latency above 0, and 1 <= minimum <= first <= maximum")
        self._latency = latency_seconds
        self._minimum = minimum
        self._maximum = maximum
        self.size = first

    def measured(self, pages: int, seconds: float) -> None:
        """A batch of so many pages took so long."""
        if pages < 1:
            return
        allowed = self._latency * _SHARE * pages
        # A clock that hardly moved says: as many as one likes.
        fitting = self._maximum if allowed >= self._maximum * seconds else int(allowed / seconds)
        # A short last batch says little about a long one.
        most = max(self.size, pages) * _GROWTH if pages * _GROWTH > self.size else self.size
        self.size = max(self._minimum, min(self._maximum, fitting, most))
