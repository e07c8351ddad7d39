# SPDX-License-Identifier: GPL-2.0-or-later
"""Who shares frames with whom: what was counted, and what it says of groups of processes and of pairs of them.

Frames are counted, no counter of the kernel's. A frame is a KSM page, or one that fork shares: these are kept apart.
What is counted of frames that the same groups map can be added, and can be told for coarser groups, without looking
again: `folded`.

**A sample.** Where not all frames are counted, each is with the same chance, whoever maps it, and independently of any
other (`ksmd_ctl.kernel.sharing`). So of F frames F * share are found, with the variance F * share * (1 - share), and
the interval of F is the score interval (E. B. Wilson, *Probable inference, the law of succession, and statistical
inference*, 1927), which also holds where nothing was found. Figures in pages are of the same sample; their error is
greater where one group maps a frame many times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

from ksmd_ctl.host.memory import KsmDetection

#: Processes that one look takes.
MOST_PROCESSES: Final = 2048
#: Different sets of groups that one look tells of; with more a smaller share of all frames is counted.
MOST_SETS: Final = 8192

# The square of 1.96: 95 %.
_Z2: Final = 3.8415


@dataclass(frozen=True, slots=True)
class SharedBy:
    """Frames that exactly these groups map, as many as were counted: in a sample they stand for more (`Sharing.share`).

    :ivar groups: numbers of the groups, ascending
    :ivar pages: how many pages (mappings) each of them has there
    :ivar parts: what each has of these frames if each frame is divided among all of its mappings
    :ivar single: in how many of these frames each has just one mapping
    :ivar merged: KSM pages; else frames that fork shares
    :ivar unseen: mappings by somebody who is in no group or could not be looked at; frames without any are apart
    """

    groups: tuple[int, ...]
    frames: int
    pages: tuple[int, ...]
    parts: tuple[float, ...]
    single: tuple[int, ...]
    merged: bool = True
    unseen: int = 0

    @property
    def lone(self) -> tuple[int, ...]:
        """For each group: in how many of these frames all others together have just one mapping.

        If the group leaves, nothing is merged there any more. Mappings of somebody unseen are taken for several.
        """
        if len(self.groups) != 2 or self.unseen:
            return (0,) * len(self.groups)
        return self.single[1], self.single[0]


@dataclass(frozen=True, slots=True)
class Sharing:
    """One look at frames of groups of processes. Groups are numbered as they were given.

    :ivar time_seconds: `Host.clock` when it began
    :ivar sets: each set of groups that map a frame together with somebody, or several times
    :ivar alone: for each group, its KSM pages that are mapped once and by it; of no sample where smaps counts KSM pages
    :ivar share: the share of all frames that `sets` is of
    :ivar complete: every frame was counted, of every process that is there
    :ivar cpu_seconds: what it cost, without the start of the process that did it
    :ivar gone: pids of processes that had ended
    :ivar unread: pids of processes that could not be looked at, or for which there was no time; what they map is unseen
    """

    time_seconds: float
    sets: tuple[SharedBy, ...]
    alone: tuple[int, ...]
    share: float
    complete: bool
    detection: KsmDetection
    cpu_seconds: float = 0.0
    gone: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()

    @property
    def pages(self) -> int:
        """Merged pages (mappings) of all groups together."""
        return sum(self.alone) + self.scaled(sum(sum(one.pages) for one in self.sets if one.merged))

    @property
    def saved_pages(self) -> int:
        """What merging saves of these pages: all mappings of each frame but one; somebody unseen is counted, too."""
        return self.scaled(sum(sum(one.pages) + one.unseen - one.frames for one in self.sets if one.merged))

    @property
    def unseen_frames(self) -> int:
        """Merged frames that also somebody maps who is in no group, or could not be looked at."""
        return self.scaled(sum(one.frames for one in self.sets if one.merged and one.unseen))

    def scaled(self, count: float) -> int:
        """What so many of `sets` stand for."""
        return round(count / self.share)


def interval(frames: int, share: float) -> tuple[int, int]:
    """The 95 % interval of a number of frames.

    :param frames: how many were found in the sample
    :param share: of the sample
    """
    if share >= 1:
        return frames, frames
    found, spread = frames / share, _Z2 * (1 - share) / share
    middle, half = found + spread / 2, math.sqrt(spread * found + spread * spread / 4)
    return max(frames, math.floor(middle - half)), math.ceil(middle + half)


# -- counting ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sums:
    frames: int
    unseen: int
    pages: list[int]
    parts: list[float]
    single: list[int]


@dataclass(slots=True)
class SharingTally:
    """Adds up frames by the groups that map them.

    :ivar alone: by group, KSM pages that are mapped once
    """

    alone: dict[int, int] = field(default_factory=dict)
    _sums: dict[tuple[tuple[int, ...], bool, bool], _Sums] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._sums)

    def add(self, mappings: Mapping[int, int], *, unseen: int = 0, merged: bool = True, frames: int = 1) -> None:
        """Add frames that are all mapped alike. Of frames that fork shares, one that is mapped once is none.

        :param mappings: how often each group maps each of them, by its number
        :param unseen: how often anybody else does
        """
        total = sum(mappings.values()) + unseen
        if total == 1:
            if merged:
                for group in mappings:
                    self.alone[group] = self.alone.get(group, 0) + frames
            return
        groups = tuple(sorted(mappings))
        times = [mappings[group] for group in groups]
        self.put(
            SharedBy(
                groups,
                frames,
                tuple([count * frames for count in times]),
                tuple([count * frames / total for count in times]),
                tuple([frames if count == 1 else 0 for count in times]),
                merged,
                unseen * frames,
            )
        )

    def put(self, one: SharedBy) -> None:
        """Add what was added up elsewhere."""
        key = (one.groups, one.merged, one.unseen > 0)
        sums = self._sums.get(key)
        if sums is None:
            self._sums[key] = _Sums(one.frames, one.unseen, list(one.pages), list(one.parts), list(one.single))
            return
        sums.frames += one.frames
        sums.unseen += one.unseen
        for index in range(len(one.groups)):
            sums.pages[index] += one.pages[index]
            sums.parts[index] += one.parts[index]
            sums.single[index] += one.single[index]

    def sets(self) -> tuple[SharedBy, ...]:
        """What there is, by groups."""
        return tuple(
            SharedBy(groups, sums.frames, tuple(sums.pages), tuple(sums.parts), tuple(sums.single), merged, sums.unseen)
            for (groups, merged, _), sums in sorted(self._sums.items())
        )


def folded(sharing: Sharing, labels: Sequence[int], groups: int) -> Sharing:
    """The same by coarser groups, as if these had been counted.

    :param labels: for each group, the number of the coarser one that it belongs to
    :param groups: how many of these there are
    """
    tally = SharingTally()
    for one in sharing.sets:
        members: dict[int, list[int]] = {}
        for index, group in enumerate(one.groups):
            members.setdefault(labels[group], []).append(index)
        found = sorted(members)
        tally.put(
            SharedBy(
                tuple(found),
                one.frames,
                tuple([sum(one.pages[index] for index in members[label]) for label in found]),
                tuple([sum(one.parts[index] for index in members[label]) for label in found]),
                # Of two members each has at least one mapping.
                tuple([one.single[members[label][0]] if len(members[label]) == 1 else 0 for label in found]),
                one.merged,
                one.unseen,
            )
        )
    alone = [0] * groups
    for group, pages in enumerate(sharing.alone):
        alone[labels[group]] += pages
    return Sharing(
        sharing.time_seconds,
        tally.sets(),
        tuple(alone),
        sharing.share,
        sharing.complete,
        sharing.detection,
        sharing.cpu_seconds,
        sharing.gone,
        sharing.unread,
    )


# -- what it says --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """What a look says of one group, estimates where it was a sample.

    :ivar merged_pages: its merged pages (mappings)
    :ivar frames: frames that it maps them to
    :ivar own_frames: those of them that nobody else maps
    :ivar shared_frames: those that others map as well; `shared_low` and `shared_high` are the 95 % interval
    :ivar shared_pages: its pages in these
    :ivar saved_alone_pages: what its pages would save without all others
    :ivar saved_pages: its part of what the host saves, each frame divided among its mappings
    :ivar leaving_costs_pages: frames in which nothing is merged any more if it leaves
    :ivar forked_pages: its pages in frames that fork shares, which are no merged pages
    :ivar forked_frames: those of these frames that others map as well
    """

    merged_pages: int
    frames: int
    own_frames: int
    shared_frames: int
    shared_low: int
    shared_high: int
    shared_pages: int
    saved_alone_pages: int
    saved_pages: float
    leaving_costs_pages: int
    forked_pages: int
    forked_frames: int


def figures(sharing: Sharing) -> tuple[GroupFigures, ...]:
    """What a look says of each group."""
    count = len(sharing.alone)
    pages, own, shared, shared_pages, leaving, forked, forked_frames = ([0] * count for _ in range(7))
    parts = [0.0] * count
    for one in sharing.sets:
        others = len(one.groups) > 1 or one.unseen > 0
        for index, group in enumerate(one.groups):
            if not one.merged:
                forked[group] += one.pages[index]
                forked_frames[group] += one.frames if others else 0
                continue
            pages[group] += one.pages[index]
            parts[group] += one.parts[index]
            leaving[group] += one.lone[index]
            if others:
                shared[group] += one.frames
                shared_pages[group] += one.pages[index]
            else:
                own[group] += one.frames
    scaled = sharing.scaled
    found = []
    for group, alone in enumerate(sharing.alone):
        low, high = interval(shared[group], sharing.share)
        found.append(
            GroupFigures(
                merged_pages=alone + scaled(pages[group]),
                frames=alone + scaled(own[group] + shared[group]),
                own_frames=alone + scaled(own[group]),
                shared_frames=scaled(shared[group]),
                shared_low=low,
                shared_high=high,
                shared_pages=scaled(shared_pages[group]),
                saved_alone_pages=scaled(pages[group] - own[group] - shared[group]),
                saved_pages=(pages[group] - parts[group]) / sharing.share,
                leaving_costs_pages=scaled(leaving[group]),
                forked_pages=scaled(forked[group]),
                forked_frames=scaled(forked_frames[group]),
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Pair:
    """What two groups share, estimates where it was a sample.

    :ivar frames: merged frames that both map; `low` and `high` are the 95 % interval
    :ivar pages: how many pages (mappings) each has in these
    :ivar forked_frames: frames that both map and fork shares
    """

    groups: tuple[int, int]
    frames: int
    low: int
    high: int
    pages: tuple[int, int]
    forked_frames: int


def pairs(sharing: Sharing) -> tuple[Pair, ...]:
    """All pairs of groups that share a frame, those that share most first."""
    found: dict[tuple[int, int], list[int]] = {}
    for one in sharing.sets:
        for (first, group), (second, other) in combinations(enumerate(one.groups), 2):
            sums = found.get((group, other))
            if sums is None:
                sums = found[group, other] = [0, 0, 0, 0]
            if one.merged:
                sums[0] += one.frames
                sums[1] += one.pages[first]
                sums[2] += one.pages[second]
            else:
                sums[3] += one.frames
    return tuple(_pairs(sharing, found.items()))


def _pairs(sharing: Sharing, found: Iterable[tuple[tuple[int, int], Sequence[int]]]) -> list[Pair]:
    scaled = sharing.scaled
    made = [
        Pair(both, scaled(frames), *interval(frames, sharing.share), (scaled(one), scaled(other)), scaled(forked))
        for both, (frames, one, other, forked) in found
    ]
    return sorted(made, key=lambda pair: (-pair.frames, -pair.forked_frames, pair.groups))
