# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents that are made of a look at who shares frames with whom (docs/json.md, docs/sharing.md).

Who shares a page with whom depends on contents. So whoever is not root gets counts that are rounded down
(docs/security.md): of a page that somebody made to compare it with others' they tell nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.host.memory import Process, ProcessId
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.host.sharing import MOST_PROCESSES, GroupFigures, Pair, Sharing, figures, folded, pairs
from ksmd_ctl.reports.numa import FORMAT, OTHER, Largest, host_document

# Of a few hundred groups most pairs share something.
_MOST_PAIRS: Final = 1000

#: By what processes are grouped: the name of the group of each.
GROUPINGS: Final[Mapping[str, Callable[[Process], str]]] = {
    "unit": lambda process: process.group or OTHER,
    "process": lambda process: f"{process.name}[{process.id.pid}]",
}


@dataclass(frozen=True, slots=True)
class Grouping:
    """Processes as groups, those with most merged pages first.

    :ivar by: what they are grouped by
    :ivar left_out: processes that are in none, as there are too many
    """

    by: str
    names: tuple[str, ...]
    members: tuple[tuple[ProcessId, ...], ...]
    left_out: int = 0


def grouping(processes: Iterable[Process], by: str, label: Callable[[Process], str] | None = None) -> Grouping:
    """The processes that may share pages, as groups.

    :param by: a key of `GROUPINGS`, or with a label anything else
    :param label: the name of the group of each
    """
    label = label or GROUPINGS[by]
    sharing = [one for one in processes if one.merged_pages or one.ksm_mapped_pages or one.relatives]
    sharing.sort(key=lambda process: (-process.merged_pages, process.id))
    found: dict[str, list[ProcessId]] = {}
    for process in sharing[:MOST_PROCESSES]:
        found.setdefault(label(process), []).append(process.id)
    return Grouping(by, tuple(found), tuple(map(tuple, found.values())), max(0, len(sharing) - MOST_PROCESSES))


@dataclass(frozen=True, slots=True)
class SharingGroup:
    """What a document has of a group (docs/json.md). What could not be counted is null.

    :ivar unread: of its processes, how many were not looked at; what these map is not in the figures
    """

    group: str
    pid: int | None
    processes: int
    unread: int
    merged_bytes: int | None
    shared_bytes: int | None
    saved_alone_bytes: int | None
    saved_bytes: int | None
    leaving_costs_bytes: int | None
    forked_bytes: int | None
    frames: int | None
    own_frames: int | None
    shared_frames: int | None
    shared_frames_low: int | None
    shared_frames_high: int | None
    forked_frames: int | None


@dataclass(frozen=True, slots=True)
class SharingPair:
    """What a document has of a pair of groups (docs/json.md)."""

    groups: tuple[str, str]
    shared_bytes: int
    frames: int
    frames_low: int
    frames_high: int
    forked_frames: int


@dataclass(frozen=True, slots=True)
class _Form:
    """How counts are told: in pages of a size, rounded down to multiples of so many."""

    page: int
    step: int

    def count(self, pages: float) -> int:
        return int(pages + 1e-6) // self.step * self.step

    def size(self, pages: float) -> int:
        return self.count(pages) * self.page

    def group(self, name: str, pid: int | None, processes: int, unread: int, found: GroupFigures) -> SharingGroup:
        if unread and unread == processes:
            return SharingGroup(name, pid, processes, unread, *[None] * 12)
        return SharingGroup(
            group=name,
            pid=pid,
            processes=processes,
            unread=unread,
            merged_bytes=self.size(found.merged_pages),
            shared_bytes=self.size(found.shared_pages),
            saved_alone_bytes=self.size(found.saved_alone_pages),
            saved_bytes=self.size(found.saved_pages),
            leaving_costs_bytes=self.size(found.leaving_costs_pages),
            forked_bytes=self.size(found.forked_pages),
            frames=self.count(found.frames),
            own_frames=self.count(found.own_frames),
            shared_frames=self.count(found.shared_frames),
            shared_frames_low=self.count(found.shared_low),
            shared_frames_high=self.count(found.shared_high),
            forked_frames=self.count(found.forked_frames),
        )

    def pair(self, names: Sequence[str], found: Pair) -> SharingPair:
        one, other = found.groups
        return SharingPair(
            groups=(names[one], names[other]),
            shared_bytes=self.size(found.frames),
            frames=self.count(found.frames),
            frames_low=self.count(found.low),
            frames_high=self.count(found.high),
            forked_frames=self.count(found.forked_frames),
        )


def _groups(form: _Form, groups: Grouping, sharing: Sharing) -> list[SharingGroup]:
    """All groups, the one that shares most first."""
    pids = [members[0].pid if groups.by == "process" else None for members in groups.members]
    unread = set(sharing.unread)
    late = [sum(process.pid in unread for process in members) for members in groups.members]
    found = map(form.group, groups.names, pids, map(len, groups.members), late, figures(sharing))
    return sorted(found, key=lambda one: (-(one.shared_bytes or 0), -(one.merged_bytes or 0), one.group))


def _pairs(form: _Form, names: Sequence[str], sharing: Sharing) -> list[SharingPair]:
    """All pairs that share anything that may be told, those that share most first."""
    found = [form.pair(names, pair) for pair in pairs(sharing)]
    told = [pair for pair in found if pair.frames or pair.forked_frames]
    return sorted(told, key=lambda pair: (-pair.frames, -pair.forked_frames, pair.groups))


def _facts(form: _Form, groups: Grouping, sharing: Sharing, now: float) -> dict[str, object]:
    return {
        "age_seconds": max(0.0, now - sharing.time_seconds),
        "cpu_seconds": sharing.cpu_seconds,
        "complete": sharing.complete and not groups.left_out,
        "share": sharing.share,
        "detection": sharing.detection.value,
        "merged_bytes": form.size(sharing.pages),
        "saved_bytes": form.size(sharing.saved_pages),
        "unseen_frames": form.count(sharing.unseen_frames),
        "unread": list(sharing.unread),
        "gone": list(sharing.gone),
        "left_out": groups.left_out,
    }


def sharing_document(
    identity: HostIdentity, groups: Grouping, sharing: Sharing, now: float, *, round_pages: int = 1
) -> dict[str, object]:
    """Who shares how much with whom.

    :param round_pages: counts are rounded down to multiples of this
    """
    form = _Form(identity.page_size_bytes, round_pages)
    found = _pairs(form, groups.names, sharing)
    return {
        "format": FORMAT,
        "host": host_document(identity),
        "by": groups.by,
        "look": _facts(form, groups, sharing, now),
        "groups": [encode_fields(one) for one in _groups(form, groups, sharing)],
        "pairs": [encode_fields(one) for one in found[:_MOST_PAIRS]],
        "pairs_left_out": max(0, len(found) - _MOST_PAIRS),
    }


# Pairs that a report names.
_REPORTED_PAIRS: Final = 10
#: What a report has where no look has succeeded.
NO_LOOK: Final[Mapping[str, object]] = {
    "cpu_seconds": None,
    "complete": None,
    "share": None,
    "detection": None,
    "merged_bytes": None,
    "saved_bytes": None,
    "unseen_frames": None,
    "unread": [],
    "gone": [],
    "left_out": 0,
    "groups": [],
    "other": None,
    "pairs": [],
}


def sharing_section(
    groups: Grouping, sharing: Sharing, largest: Largest, page_size_bytes: int, round_pages: int
) -> dict[str, object]:
    """What a report has of it, without what changes by itself: the groups that share most, and all others as one.

    Groups that share nothing are named, too, if there is room: who is not named may not have been looked at.
    """
    shared = {name: one.shared_pages for name, one in zip(groups.names, figures(sharing), strict=True)}
    named = largest.names({name: pages for name, pages in shared.items() if name != OTHER})
    number = {name: index for index, name in enumerate(named)}
    labels = [number.get(name, len(named)) for name in groups.names]
    members: list[list[ProcessId]] = [[] for _ in range(len(named) + 1)]
    for label, processes in zip(labels, groups.members, strict=True):
        members[label] += processes
    fewer = Grouping(groups.by, (*named, OTHER), tuple(map(tuple, members)), groups.left_out)
    told, form = folded(sharing, labels, len(named) + 1), _Form(page_size_bytes, round_pages)
    found = {one.group: encode_fields(one) for one in _groups(form, fewer, told)}
    other = found.pop(OTHER)
    facts = _facts(form, fewer, told, 0.0)
    del facts["age_seconds"]
    return {
        **facts,
        "groups": list(found.values()),
        "other": other,
        "pairs": [encode_fields(one) for one in _pairs(form, fewer.names, told)[:_REPORTED_PAIRS]],
    }
