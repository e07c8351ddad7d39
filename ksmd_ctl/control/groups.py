# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures per virtual machine or unit: a fixed number of the largest by name, all others together.

A name that is shown is a time series of its own, so the names are few, and one that is shown stays until another is
clearly larger: two of about the same size don't take turns. What all figures add up to is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.host.memory import PAGE_ITEM_BYTES, Process

__all__ = ["KEPT", "OTHER", "Group", "Largest", "grouped", "largest_by", "process_saved_bytes"]

#: How many groups have figures of their own.
KEPT: Final = 20
#: What all the rest is called; a group that has this very name is counted in it.
OTHER: Final = "other"
# How much larger one that is not shown must be to take the place of one that is.
_AHEAD: Final = 1.25


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that belong together.

    :ivar merging_pages: mappings that were merged
    :ivar saved_bytes: what merging saves, less ksmd's metadata; None where it isn't known of all
    :ivar remote_pages: merged pages that lie on another node than where they belong; None where it isn't known of all
    :ivar related: how many of its processes look like forks, for which saved_bytes says too much
    """

    name: str
    processes: int = 0
    merging_pages: int = 0
    saved_bytes: int | None = 0
    remote_pages: int | None = 0
    related: int = 0

    def plus(self, other: Group) -> Group:
        """Both together, under this one's name."""
        return Group(
            self.name,
            self.processes + other.processes,
            self.merging_pages + other.merging_pages,
            _sum(self.saved_bytes, other.saved_bytes),
            _sum(self.remote_pages, other.remote_pages),
            self.related + other.related,
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def process_saved_bytes(process: Process, page_size_bytes: int) -> int | None:
    """What merging saves for a process: the kernel's ksm_process_profit, else by its formula; None before 6.1."""
    if process.profit_bytes is not None:
        return process.profit_bytes
    if process.rmap_items is None:
        return None
    pages = process.merged_pages + (process.zero_pages or 0)
    return pages * page_size_bytes - process.rmap_items * PAGE_ITEM_BYTES


def grouped(processes: Iterable[Process], page_size_bytes: int) -> dict[str, Group]:
    """The groups of processes, by name."""
    found: dict[str, Group] = {}
    for process in processes:
        name = process.group or OTHER
        one = Group(
            name,
            1,
            process.merged_pages,
            process_saved_bytes(process, page_size_bytes),
            process.remote_pages,
            1 if process.relatives else 0,
        )
        found[name] = found.get(name, Group(name)).plus(one)
    return found


def largest_by(groups: Iterable[Group]) -> Callable[[Group], int]:
    """How large groups are: what they save (docs/saving.md); by merged pages where that isn't known of all."""
    if all(group.saved_bytes is not None for group in groups):
        return lambda group: group.saved_bytes or 0
    return lambda group: group.merging_pages


class Largest:
    """Chooses the groups that are shown by name.

    :param kept: how many at most
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._shown: frozenset[str] = frozenset()

    def choose(self, groups: Mapping[str, Group]) -> tuple[tuple[Group, ...], Group]:
        """Those that are shown, the one that saves most first, and all others as one."""

        size = largest_by(groups.values())

        def weight(group: Group) -> tuple[float, str]:
            amount = size(group)
            ahead = _AHEAD if group.name in self._shown and amount > 0 else 1.0
            # The name decides between equals, so that the same groups give the same choice.
            return -amount * ahead, group.name

        known = [group for group in groups.values() if (group.merging_pages or size(group) > 0) and group.name != OTHER]
        chosen = sorted(sorted(known, key=weight)[: self._kept], key=lambda group: (-size(group), group.name))
        self._shown = frozenset(group.name for group in chosen)
        rest = Group(OTHER)
        for group in groups.values():
            if group.name not in self._shown:
                rest = rest.plus(group)
        return tuple(chosen), rest
