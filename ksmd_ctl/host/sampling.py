# SPDX-License-Identifier: GPL-2.0-or-later
"""How much merging frees, told from a sample of contents or of pages, and how sure that is.

**Contents are sampled** by a hash of the content: each is taken with all of its pages or not at all (C. A. Waldspurger
et al., *Efficient MRC Construction with SHARDS*, FAST 2015). So the sum over those that were taken, divided by the
share, is unbiased, and its variance follows from the sample. The interval is the score interval, in which a content
weighs as much as it frees: `scored`. Where all contents were taken it is exact.

**Pages are sampled** where a figure is wanted at once. How many contents were not seen can't be told from a sample of
pages alone, only bounds (M. Charikar et al., *Towards estimation error guarantees for distinct values*, PODS 2000). Let
f_j be the number of contents that were seen j times, each page with a chance q, and r = (1 - q) / q. A content with k
pages adds (1 - q)^k to the expected number of unseen ones, and C(k, j) q^j (1 - q)^(k - j) to that of f_j. So the
partial sums of r f_1 - r^2 f_2 + r^3 f_3 - ... are bounds of the number of unseen ones, from above and from below in
turn (Bonferroni's inequalities for 1 = k - C(k, 2) + C(k, 3) - ...). `sampled` takes the closest of the first three,
each with its own error, and for the figure itself the geometric mean of what both leave, as GEE does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

__all__ = ["EXACTLY_ALL", "Bounds", "Remaining", "ratio", "remaining", "sampled", "scored", "spread_of_count"]

# The square of 1.96: 95 %.
_Z2: Final = 3.8415
# For each of four one-sided bounds of which the closest is taken: 5 % together.
_Z_OF_FOUR: Final = 2.24


class Bounds(NamedTuple):
    """A figure and its 95 % interval."""

    found: float
    low: float
    high: float

    def plus(self, exact: float) -> Bounds:
        """With what is known exactly."""
        return Bounds(self.found + exact, self.low + exact, self.high + exact)

    def times(self, other: Bounds) -> Bounds:
        """Of two that are not below 0."""
        return Bounds(self.found * other.found, self.low * other.low, self.high * other.high)


#: A share: all of it, and that is known.
EXACTLY_ALL: Final = Bounds(1.0, 1.0, 1.0)


def scored(total: float, square: float, share: float) -> Bounds:
    """A sum over all contents, of the sum over those that were taken.

    :param total: the sum over these, of a value of each that is not below 0
    :param square: the sum of the squares of the values
    :param share: the chance with which each content was taken
    """
    if share >= 1:
        return Bounds(total, total, total)
    weight = max(1.0, square / total) if total > 0 else 1.0
    found, spread = total / share, _Z2 * weight * (1 - share) / share
    middle, half = found + spread / 2, math.sqrt(spread * max(0.0, found) + spread * spread / 4)
    return Bounds(found, max(total, middle - half), middle + half)


def ratio(part: float, count: float, whole: float = math.inf) -> Bounds:
    """A share, of what was found in a sample: Wilson's score interval.

    :param part: so many of `count` that were looked at
    :param whole: how many there are: of all of them it is exact
    """
    found = part / count
    middle = (found + _Z2 / (2 * count)) / (1 + _Z2 / count)
    half = math.sqrt(_Z2 * (found * (1 - found) / count + _Z2 / (4 * count * count))) / (1 + _Z2 / count)
    unseen = math.sqrt(max(0.0, 1 - count / whole))
    low, high = min(found, max(0.0, middle - half)), max(found, min(1.0, middle + half))
    return Bounds(found, found - (found - low) * unseen, found + (high - found) * unseen)


class Remaining(NamedTuple):
    """A content of which pages were looked at again.

    :ivar freed: pages that it frees, and `left` so many of these if those that changed are left out
    :ivar sampled: how many of its pages were looked at; 0 where all were
    """

    freed: float
    left: float
    sampled: int


def remaining(contents: Sequence[Remaining], taken: float) -> Bounds:
    """What share of what is freed is left: the ratio of both sums, and the error of a ratio of a sample's sums.

    :param taken: the share of all contents that these are
    """
    whole, left = sum(one.freed for one in contents), sum(one.left for one in contents)
    if whole <= 0:
        return EXACTLY_ALL
    found = left / whole
    among = sum((one.left - found * one.freed) ** 2 for one in contents) * max(0.0, 1 - taken)
    # With one page that changed and one that stayed among those that were looked at: none found is not none there.
    within = sum(
        one.freed**2
        * (share := (one.left / one.freed * one.sampled + 1) / (one.sampled + 2))
        * (1 - share)
        / one.sampled
        for one in contents
        if one.sampled and one.freed
    )
    half = math.sqrt(_Z2 * (among + within)) / whole
    # Where nothing changed, of so many contents.
    least = ratio(round(found * len(contents)), len(contents)) if taken < 1 else Bounds(found, found, found)
    return Bounds(found, max(0.0, min(found - half, least.low)), min(1.0, max(found + half, least.high)))


def sampled(seen: Mapping[int, int], share: float, limit: int) -> Bounds:
    """How many pages would be freed, of a sample of pages.

    :param seen: how many contents were seen how often
    :param share: the chance q with which each page was taken, more than 0
    :param limit: max_page_sharing
    """
    rest = (1 - share) / share
    # What a content that was seen once, twice or three times adds to each bound; one seen more often is not unseen.
    ones = (0.0, 2 / share - 1, 3 / share - 1)
    twos = (0.0, ones[1] + rest**2, ones[2])
    threes = (0.0, twos[1], ones[2] - rest**3)
    many = sum(count * (times / share - 1) for times, count in seen.items() if times > 3)
    variance = sum(count * times * (1 - share) / share**2 for times, count in seen.items() if times > 3)

    def bound(each: Sequence[float], sign: int) -> float:
        value = many + sum(seen.get(times, 0) * one for times, one in enumerate(each, 1))
        # Two more of each: that none was found doesn't say that there is none.
        spread = variance + sum((seen.get(times, 0) + 2) * one * one for times, one in enumerate(each, 1))
        return value + sign * _Z_OF_FOUR * math.sqrt(spread * min(1.0, rest + share))

    more = sum(count * (math.ceil(times / share / limit) - 1) for times, count in seen.items())
    pages = sum(times * count for times, count in seen.items()) / share
    if share >= 1:
        exact = sum(count * (times - math.ceil(times / limit)) for times, count in seen.items() if times > 1)
        return Bounds(exact, exact, exact)
    certain = sum(count * (times - 1) for times, count in seen.items())
    low = max(certain, bound(ones, -1), bound(threes, -1)) - more
    high = min(pages + _Z_OF_FOUR * math.sqrt(pages / share), bound(twos, 1)) - more
    low = max(0.0, low)
    high = max(low, high)
    # As GEE does between its bounds: by the same factor above one and below the other.
    return Bounds(math.sqrt(max(low, min(1.0, high)) * high), low, high)


def spread_of_count(count: int, share: float) -> float:
    """How far off a number of pages may be that was found in a sample of pages."""
    return math.sqrt(_Z2 * (count + 1) * (1 - share)) / share


def _spread(share: float) -> float:
    return share * (1 - share)
