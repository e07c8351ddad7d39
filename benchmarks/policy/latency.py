# SPDX-License-Identifier: GPL-2.0-or-later
"""How long requests of the neighbours took: percentiles, and all of them as a histogram. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Latency", "summarise"]

# Upper bounds of buckets in microseconds, about eight for each doubling, up to an hour.
_BOUNDS = sorted({math.ceil(2 ** (number / 8)) for number in range(8 * 32)})


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies in microseconds, from when a request came by the timetable until it was served.

    :ivar p50, p99: so many percent of the requests took at most that long
    :ivar histogram: upper bounds, each with the number of requests that took at most that long, and longer than the
        bound before
    """

    requests: int
    p50: float
    p99: float
    worst: float
    histogram: Sequence[Sequence[int]]


def summarise(nanoseconds: Sequence[int]) -> Latency:
    """The figures of these latencies; at least one.

    :raises ValueError: there is none
    """
    if not nanoseconds:
        raise ValueError("no latency was measured")
    ordered = sorted(nanoseconds)
    histogram = sorted(Counter(_BOUNDS[bisect_left(_BOUNDS, value / 1000)] for value in ordered).items())
    p50, p99 = (ordered[math.ceil(len(ordered) * share) - 1] / 1000 for share in (0.5, 0.99))
    return Latency(len(ordered), p50, p99, ordered[-1] / 1000, histogram)
