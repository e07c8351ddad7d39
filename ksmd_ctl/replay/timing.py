# SPDX-License-Identifier: GPL-2.0-or-later
"""When pages of a recording changed, as far as looks tell. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

from ksmd_ctl.host.page_sample import EqualPages
from ksmd_ctl.recording.reader import PageChange, RecordedLook, Recording
from ksmd_ctl.recording.schema import ZEROES
from ksmd_ctl.replay.rewritten import REWRITTEN, rewritten

# What may have happened at any time between two looks is spread over that time in so many parts.
_PARTS: Final = 8
# Times are rounded up to these parts of a second.
_A_SECOND: Final = 20

#: Changes of pages by the process.
Changes = Mapping[int, Sequence[PageChange]]


class PageHistory(NamedTuple):
    """The pages of a recording.

    :ivar places: by process: of each page that is ever in the sample, which of them it is by its address
    :ivar changes: by time; contents of pages that are written all the time are `REWRITTEN`
    :ivar shares: by time: for how many pages one of the sample stands
    :ivar sampling_error: the standard error that the sample brings to pages_sharing, as a share of the whole; None
        where it has no equal pages
    """

    places: Mapping[int, Mapping[int, int]]
    changes: Mapping[float, Changes]
    shares: Sequence[tuple[float, Shares]]
    sampling_error: float | None


class Shares(NamedTuple):
    """For how many pages one of the sample stands.

    :ivar pages: of all pages, `shared` of KSM pages, and `sharing` of those that are merged into others
    :ivar processes: of the pages of each process
    """

    pages: float
    shared: float
    sharing: float
    processes: Mapping[int, float] = {}


@dataclass(slots=True)
class _Growth:
    """When the memory of a process grew: the times of samples, and how many pages had come by then."""

    times: list[float]
    pages: list[int]
    resident: int

    def add(self, seconds: float, resident: int) -> None:
        self.times.append(seconds)
        self.pages.append((self.pages[-1] if self.pages else 0) + max(0, resident - self.resident))
        self.resident = resident

    def at(self, since: float, until: float, part: float) -> float:
        """By when a part of what came between two times had come; where nothing is known to have, at equal steps."""
        first, last = bisect_right(self.times, since) - 1, bisect_right(self.times, until) - 1
        before = self.pages[first] if first >= 0 else 0
        grown = (self.pages[last] if last >= 0 else 0) - before
        if grown <= 0:
            return since + (until - since) * part
        index = bisect_left(self.pages, before + part * grown, max(first, 0), last)
        step = self.pages[index] - (self.pages[index - 1] if index else 0)
        begins = max(since, self.times[index - 1] if index else since)
        done = 1 - (self.pages[index] - before - part * grown) / step if step else 1.0
        return begins + (min(until, self.times[index]) - begins) * done


class _Copies:
    """How many pages of the sample have each content.

    :ivar equal: of those that several have
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.equal = EqualPages(0, 0)
        # Of each content, how many pages merging can free: summed, and squared and summed.
        self._freed = self._squares = 0

    def move(self, content: int, step: int) -> None:
        """A page has come or gone."""
        before = self._counts[content]
        self._counts[content] = now = before + step
        more = (now if now > 1 else 0) - (before if before > 1 else 0)
        self.equal = EqualPages(self.equal.pages + more, self.equal.contents + (now > 1) - (before > 1))
        freed = max(0, now - 1), max(0, before - 1)
        self._freed += freed[0] - freed[1]
        # Of pages of zeroes each is in the sample or not by itself, of other contents all are or none is.
        self._squares += freed[0] - freed[1] if content == ZEROES else freed[0] ** 2 - freed[1] ** 2

    @property
    def independent(self) -> float:
        """As many pages that merging can free would have this error if each were in the sample by itself.

        That is Kish's effective size of a sample of clusters ("Survey Sampling", 1965).
        """
        return self._freed**2 / self._squares if self._squares else 0.0


def read_pages(recording: Recording) -> PageHistory:
    """The pages of a recording.

    :raises Unparsable: it is damaged
    """
    began = {one.process: one.began for one in recording.processes()}
    ended = {one.process: one.ended for one in recording.processes() if one.ended is not None}
    looks = {one.look: one for one in recording.looks()}
    times = _times(recording, began, looks)
    passing = rewritten(recording)
    growth: dict[int, _Growth] = {}
    for counts in recording.counts():
        process, pages = counts.process, counts.resident_pages
        if process not in growth:
            # What a process that is older than the recording has at first did not come just then.
            growth[process] = _Growth([], [], pages if began.get(process, 0.0) <= 0 else 0)
        growth[process].add(counts.seconds, pages)
    there: dict[int, set[int]] = {}
    ever: dict[int, set[int]] = {}
    changes: dict[float, dict[int, list[PageChange]]] = {}
    sampled: dict[int, Mapping[int, int]] = {}
    # Of the sample: what content each page has, and how many pages each content.
    held: dict[tuple[int, int], int] = {}
    copies = _Copies()
    equal: dict[int, EqualPages] = {}
    independent = 0.0
    members: dict[int, list[int]] = {}
    for look, process in times:
        members.setdefault(look, []).append(process)
    for (look, process), rows in groupby(recording.changes(), key=lambda row: (row.look, row.process)):
        here, known = there.setdefault(process, set()), ever.setdefault(process, set())
        since, until = times.get((look, process), (looks[look].ended,) * 2)
        found = sorted(rows, key=lambda row: row.page)
        new = {
            row.page: place
            for place, row in enumerate(row for row in found if row.page not in here and row.content is not None)
        }
        for row in found:
            if row.page in new:
                part = (new[row.page] + 0.5) / len(new)
                at = growth[process].at(since, until, part) if process in growth else since + (until - since) * part
                here.add(row.page)
            else:
                at = since + (until - since) * ((row.page * 0x9E3779B1 >> 12) % _PARTS + 1) / _PARTS
                if row.content is None:
                    here.discard(row.page)
            known.add(row.page)
            if (was := held.pop((process, row.page), None)) is not None:
                copies.move(was, -1)
            if row.content is not None:
                held[process, row.page] = row.content
                copies.move(row.content, 1)
            at = min(until, math.ceil(at * _A_SECOND) / _A_SECOND)
            shown = row._replace(content=REWRITTEN) if (look, process, row.page) in passing else row
            changes.setdefault(at, {}).setdefault(process, []).append(shown)
        if look not in equal:
            for gone in [one for one in there if ended.get(one, math.inf) <= looks[look].began]:
                for page in there.pop(gone):
                    copies.move(held.pop((gone, page)), -1)
        equal[look], independent = copies.equal, max(independent, copies.independent)
        sampled[look] = {one: len(there.get(one, ())) for one in members.get(look, ())}
    places = {number: {page: place for place, page in enumerate(sorted(found))} for number, found in ever.items()}
    shares = _shares(recording, looks, sampled, equal)
    counted = all(one.equal_pages is not None for one in looks.values())
    return PageHistory(places, changes, shares, _sampling_error(recording.facts.one_in, independent, counted=counted))


def _sampling_error(one_in: int, independent: float, *, counted: bool) -> float | None:
    """The standard error of what is calculated from the sample.

    :param counted: all equal pages were counted at each look, so that only a part of them has an error: the part that
        is merged at a time, half of them at worst
    """
    if one_in == 1:
        return 0.0
    error = math.sqrt((1 - 1 / one_in) / independent) if independent else None
    return error / 2 if error is not None and counted else error


def _times(
    recording: Recording, began: Mapping[int, float], looks: Mapping[int, RecordedLook]
) -> Mapping[tuple[int, int], tuple[float, float]]:
    """By look and process, between which times what the look found had happened."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    last: dict[int, float] = {}
    for one in recording.process_looks():
        before = looks.get(one.look - 1)
        since = last.get(one.process, max(0.0, began.get(one.process, 0.0), before.began if before else 0.0))
        first = before is None and began.get(one.process, 0.0) <= 0
        found[one.look, one.process] = (0.0, 0.0) if first else (min(since, one.seconds), one.seconds)
        last[one.process] = one.seconds
    return found


def _shares(
    recording: Recording,
    looks: Mapping[int, RecordedLook],
    sampled: Mapping[int, Mapping[int, int]],
    equal: Mapping[int, EqualPages],
) -> Sequence[tuple[float, Shares]]:
    """For how many pages one stands: about as many as the sampling says, and counted where that can be.

    That corrects the chance by which more or less than their part of all pages came into the sample, as SHARDS-adj
    does (Waldspurger et al. 2015), and the same for pages of which there are equal ones.
    """
    one_in = recording.facts.one_in
    pages: dict[int, dict[int, int]] = {}
    for one in recording.process_looks():
        pages.setdefault(one.look, {})[one.process] = one.pages
    found = []
    kept: Mapping[int, int] = {}
    here = EqualPages(0, 0)
    for number, look in sorted(looks.items()):
        kept, all_pages = sampled.get(number, kept), pages.get(number, {})

        def share(of: int, among: int) -> float:
            return min(max(of / among if among and one_in > 1 else one_in, one_in / 2), one_in * 2.0)

        each = {one: share(all_pages[one], count) for one, count in kept.items() if count and one in all_pages}
        shared = sharing = mean = share(sum(all_pages.values()), sum(kept.values()))
        here = equal.get(number, here)
        if look.equal_pages is not None and look.equal_contents is not None and here.contents:
            shared = share(look.equal_contents, here.contents)
            sharing = share(look.equal_pages - look.equal_contents, here.pages - here.contents)
        found.append((0.0 if number == 1 else look.ended, Shares(mean, shared, sharing, each)))
    return found
