# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of the live view: how they went, and those of units in an order. They are of reports (docs/json.md)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ksmd_ctl.reports.document import number, part, parts, text
from ksmd_ctl.reports.numa import OTHER

#: Points that are kept of a figure; more than a terminal has columns.
_POINTS: Final = 400
_STEP_SECONDS: Final = 5.0


def saved(report: Mapping[str, object]) -> int | float | None:
    """What is saved, in frames where that is known, in bytes; None where it isn't."""
    derived = part(report, "derived")
    frames = number(derived, "saved_frames_bytes")
    return number(derived, "saved_bytes") if frames is None else frames


class Trends:
    """The saving, the scan rate and ksmd's share of a CPU so far; a point each 5 s, the last one of now.

    :ivar saved: bytes
    :ivar speed: pages a second
    :ivar cpu: of one CPU, 1 for all of it
    """

    def __init__(self) -> None:
        self.saved: deque[float | None] = deque(maxlen=_POINTS)
        self.speed: deque[float | None] = deque(maxlen=_POINTS)
        self.cpu: deque[float | None] = deque(maxlen=_POINTS)
        self._step = -1

    def add(self, report: Mapping[str, object] | None, now: float) -> None:
        """Another report, None for a time of which nothing is known."""
        step, derived = int(now / _STEP_SECONDS), part(report or {}, "derived")
        values = (
            (self.saved, None if report is None else saved(report)),
            (self.speed, number(derived, "pages_scanned_per_second")),
            (self.cpu, number(derived, "ksmd_cpu_ratio")),
        )
        for points, value in values:
            if points and step == self._step:
                points.pop()
            points.append(value)
        self._step = step


class Sort(StrEnum):
    """By what units are sorted, the largest first."""

    SAVING = "saving"
    COST = "cost"
    SHARING = "sharing"


@dataclass(frozen=True, slots=True)
class Unit:
    """A virtual machine or unit; None for what isn't known.

    :ivar saved_bytes: its part of what the host saves, else what un-merging it would take
    :ivar merged_bytes: its merged pages
    :ivar away_bytes: those on another node than where they belong
    :ivar prevented: huge pages that merging prevents
    :ivar shared_bytes: its merged pages in frames that others map, too
    :ivar with_whom: who shares most with it; empty where nobody is known to
    """

    name: str
    saved_bytes: float | None
    merged_bytes: float | None
    away_bytes: float | None
    prevented: float | None
    shared_bytes: float | None
    with_whom: str = ""

    def rank(self, sort: Sort) -> tuple[float, ...]:
        """What it is sorted by; the largest comes first. Cost: huge pages, then what is away from home."""
        by_saving = self.saved_bytes or 0.0, self.merged_bytes or 0.0
        match sort:
            case Sort.SAVING:
                return by_saving
            case Sort.COST:
                return self.prevented or 0.0, self.away_bytes or 0.0, *by_saving
            case Sort.SHARING:
                return self.shared_bytes or 0.0, *by_saving


def units(report: Mapping[str, object], sort: Sort) -> list[Unit]:
    """The units of a report in order, all others as one at the end.

    A report names those that save most, and those that share most; of one that is not among both not all is known.
    """
    numa, sharing = part(report, "numa"), part(report, "sharing")
    page = number(part(report, "host"), "page_size_bytes") or 0
    saving = {text(one, "group"): one for one in parts(numa, "groups")}
    shared = {text(one, "group"): one for one in parts(sharing, "groups")}
    parted = all(number(one, "share_bytes") is not None for one in saving.values())
    partners: dict[str, str] = {}
    for pair in parts(sharing, "pairs"):
        names = pair.get("groups")
        if isinstance(names, list) and len(names) == 2:
            first, second = map(str, names)
            partners.setdefault(first, second)
            partners.setdefault(second, first)

    def unit(name: str, saves: Mapping[str, object], shares: Mapping[str, object]) -> Unit:
        merging, remote = number(saves, "merging_pages"), number(saves, "remote_pages")
        return Unit(
            name=name,
            saved_bytes=number(saves, "share_bytes" if parted else "saved_bytes"),
            merged_bytes=number(shares, "merged_bytes") if merging is None else merging * page,
            away_bytes=None if remote is None else remote * page,
            prevented=number(saves, "split_blocks"),
            # Who is not named shares less than the others, or came after the look.
            shared_bytes=number(shares, "shared_bytes"),
            with_whom=partners.get(name, ""),
        )

    sharers = [name for name in shared if number(shared[name], "shared_bytes")]
    names = dict.fromkeys([*saving, *sharers])
    found = [unit(name, saving.get(name, {}), shared.get(name, {})) for name in names if name != OTHER]
    found.sort(key=lambda one: (*(-rank for rank in one.rank(sort)), one.name))
    other = part(numa, "other")
    rest = unit(OTHER, other, part(sharing, "other") if shared.keys() == saving.keys() else {})
    figures = rest.saved_bytes, rest.merged_bytes, rest.away_bytes, rest.prevented, rest.shared_bytes
    if number(other, "processes") and (rest.merged_bytes is None or any(figures)):
        found.append(rest)
    return found
