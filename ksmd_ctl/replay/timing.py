# SPDX-License-Identifier: GPL-2.0-or-later
"""When pages of a recording changed, as far as looks tell. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

from ksmd_ctl.errors import Unparsable
from ksmd_ctl.recording.reader import PageChange, RecordedLook, Recording

# What may have happened at any time between two looks is spread over that time in so many parts.
_PARTS: Final = 8
# Times are rounded up to these parts of a second.
_A_SECOND: Final = 20

#: Changes of pages by the process.
Changes = Mapping[int, Sequence[PageChange]]


class PageHistory(NamedTuple):
    """The pages of a recording.

    :ivar places: by process: of each page that is ever in the sample, which of them it is by its address
    :ivar changes: by time
    :ivar shares: by time: for how many pages one of the sample stands
    """

    places: Mapping[int, Mapping[int, int]]
    changes: Mapping[float, Changes]
    shares: Sequence[tuple[float, float]]


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


def read_pages(recording: Recording) -> PageHistory:
    """The pages of a recording.

    :raises Unparsable: it is damaged
    """
    began = {one.process: one.began for one in recording.processes()}
    looks = {one.look: one for one in recording.looks()}
    times = _times(recording, began, looks)
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
    sampled: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for look, process in times:
        members.setdefault(look, []).append(process)
    for (look, process), rows in groupby(recording.changes(), key=lambda row: (row.look, row.process)):
        if process not in began or look not in looks:
            why = f"it is damaged: there is no process {process} or no look {look}"
            raise Unparsable("reading the recording", why, hint="copy it again from where it was recorded")
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
            at = min(until, math.ceil(at * _A_SECOND) / _A_SECOND)
            changes.setdefault(at, {}).setdefault(process, []).append(row)
        sampled[look] = sum(len(there.get(one, ())) for one in members.get(look, ()))
    places = {number: {page: place for place, page in enumerate(sorted(found))} for number, found in ever.items()}
    return PageHistory(places, changes, _shares(recording, looks, sampled))


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
    recording: Recording, looks: Mapping[int, RecordedLook], sampled: Mapping[int, int]
) -> Sequence[tuple[float, float]]:
    """For how many pages one stands: about as many as the sampling says, and counted where that can be.

    That corrects the chance by which more or less than their part of all pages came into the sample, as SHARDS-adj
    does (Waldspurger et al. 2015).
    """
    one_in = recording.facts.one_in
    pages: dict[int, int] = {}
    for one in recording.process_looks():
        pages[one.look] = pages.get(one.look, 0) + one.pages
    found = []
    count = 0
    for number, look in sorted(looks.items()):
        count = sampled.get(number, count)
        share = pages.get(number, 0) / count if count and one_in > 1 else one_in
        found.append((0.0 if number == 1 else look.ended, min(max(share, one_in / 2), one_in * 2.0)))
    return found
