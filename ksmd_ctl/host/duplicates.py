# SPDX-License-Identifier: GPL-2.0-or-later
"""Equal contents that are not one page: what is found of them, and which KSM pages un-merging frees.

A content that n mappings have needs n / max_page_sharing KSM pages, rounded up. There are more of them

- where a KSM page was moved to a node on which its content had one (docs/findings.md: F1),
- where mappings of several full ones went away: the dups of a chain are never joined (mm/ksm.c, since 4.13).

A KSM page can be freed where the others with its content have room for all its mappings: once these are un-merged,
ksmd merges each of them with one of the others. Un-merging a part of a page frees nothing, and the page with the
fewest mappings costs least. What fork shares may exceed the limit; such a page has no room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ksmd_ctl.host.memory import KsmDetection, ProcessId
from ksmd_ctl.host.operation import UnsharePart

POLICY = "its mapping's own policy takes what is un-merged to another node"

#: max_page_sharing of kernels that have none (before 4.13).
NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class MergeRules:
    """How many pages of one content ksmd keeps: one a node unless across nodes, and one for so many mappings."""

    merge_across_nodes: bool
    max_page_sharing: int


@dataclass(frozen=True, slots=True)
class DuplicatePages:
    """How much mergeable memory has the same content and is not one frame, found by comparing contents.

    :ivar mergeable_pages: pages of mergeable memory that are present, counted once a mapping
    :ivar frames: frames that were compared; one with many mappings counts once
    :ivar pages: frames of a content and node beyond those that max_page_sharing requires. Where not all were
        compared there are more in truth
    :ivar complete: every frame was compared
    :ivar unread: processes that are left out because they could not be read
    :ivar related_places: of processes that are forks of one another: at how many places they map merged frames, where
        one address is one place for all of them, as fork makes it; a lower bound where not all were compared
    """

    mergeable_pages: int
    frames: int
    pages: int
    complete: bool
    cpu_seconds: float
    related_places: int = 0
    unread: int = 0


@dataclass(frozen=True, slots=True)
class DuplicateKsmPages:
    """KSM pages with one content that max_page_sharing does not explain: ksmd never merges them with one another.

    With merge_across_nodes = 0 only pages on one node are compared.

    :ivar time_seconds: `Host.clock` when it began
    :ivar frames: KSM pages whose contents were compared
    :ivar reclaimable: how many of these would come free if all duplicates were one
    :ivar left: of the reclaimable, those that un-merging can't free, by the cause in words
    :ivar parts: what to un-merge for some of the others: all mappings of a page, pages with the fewest first
    :ivar part_pages: how many mappings that are
    :ivar part_frames: how many frames come free once they are merged again
    :ivar complete: every KSM page was compared; else the figures are lower bounds
    :ivar cpu_seconds: what it cost, without the start of the process that did it
    """

    time_seconds: float
    frames: int
    reclaimable: int
    left: Mapping[str, int]
    parts: tuple[UnsharePart, ...]
    part_pages: int
    part_frames: int
    complete: bool
    detection: KsmDetection
    cpu_seconds: float


@dataclass(slots=True)
class KsmPage:
    """A KSM page, as far as it matters here.

    :ivar mapped: how many mappings it has
    :ivar stuck: why not all of these can be un-merged, or not where it would help; empty where they can
    :ivar doubtful: un-merging may turn out not to help
    """

    frame: int
    node: int
    mapped: int
    stuck: str = ""
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class Reclaimable:
    """Which KSM pages can be freed.

    :ivar pages: frames that would come free if all that can be one were one
    :ivar left: of these, those that un-merging can't free, by the cause in words
    :ivar chosen: frames to un-merge, those with the fewest mappings first
    :ivar chosen_mappings: how many mappings these have
    """

    pages: int
    left: Mapping[str, int]
    chosen: tuple[int, ...]
    chosen_mappings: int


def reclaimable(groups: Iterable[Sequence[KsmPage]], max_page_sharing: int, most_mappings: int) -> Reclaimable:
    """
    :param groups: KSM pages that ksmd would make one if they were not merged yet
    :param most_mappings: mappings that the chosen ones may have
    """
    found = 0
    left: Counter[str] = Counter()
    candidates: list[KsmPage] = []
    for group in groups:
        room = sum(max(0, max_page_sharing - page.mapped) for page in group)
        surplus = _surplus(group, room, max_page_sharing)
        if not surplus:
            continue
        found += len(surplus)
        free = _surplus([page for page in group if not page.stuck], room, max_page_sharing)
        candidates += free
        stuck = sorted((page for page in group if page.stuck), key=lambda page: page.mapped)
        left.update(page.stuck for page in stuck[: len(surplus) - len(free)])
    candidates.sort(key=lambda page: (page.doubtful, page.mapped, page.frame))
    chosen, mappings = [], 0
    for page in candidates:
        if mappings + page.mapped > most_mappings:
            break
        mappings += page.mapped
        chosen.append(page.frame)
    return Reclaimable(found, dict(sorted(left.items())), tuple(chosen), mappings)


def _surplus(pages: Sequence[KsmPage], room: int, max_page_sharing: int) -> list[KsmPage]:
    """Which of these can be freed, with so much room in the whole group: those with the fewest mappings."""
    found, mappings = [], 0
    for page in sorted(pages, key=lambda page: (page.mapped, page.doubtful, page.frame)):
        room -= max(0, max_page_sharing - page.mapped)
        mappings += page.mapped
        if mappings > room:
            break
        found.append(page)
    return found


def unshare_parts(mappings: Iterable[tuple[ProcessId, int, int]], page_size: int) -> tuple[UnsharePart, ...]:
    """Pages, each given by process, node and address, as what is to be un-merged of each process onto each node."""
    ranges: dict[tuple[ProcessId, int], list[tuple[int, int]]] = {}
    for process, node, address in sorted(mappings):
        there = ranges.setdefault((process, node), [])
        if there and there[-1][1] == address:
            there[-1] = (there[-1][0], address + page_size)
        else:
            there.append((address, address + page_size))
    return tuple(UnsharePart(process, tuple(found), node) for (process, node), found in ranges.items())


def duplicate_ksm_pages(
    pages: Iterable[tuple[int | bytes, KsmPage]],
    mappings: Iterable[tuple[int, ProcessId, int]],
    rules: MergeRules,
    most_mappings: int,
    *,
    page_size: int,
    time_seconds: float,
    detection: KsmDetection,
    complete: bool = True,
    cpu_seconds: float = 0.0,
) -> DuplicateKsmPages:
    """What KSM pages and their contents come to.

    :param pages: each KSM page that was compared, behind its content or a number that stands for it
    :param mappings: frame, process and address of each mapping
    :param most_mappings: mappings that `DuplicateKsmPages.parts` may have
    """

    def key(item: tuple[int | bytes, KsmPage]) -> Any:
        content, page = item
        return content if rules.merge_across_nodes else (content, page.node)

    # Sorted, for a dictionary of groups that mostly have one page takes more memory than the pages do.
    ordered = sorted(pages, key=key)
    groups = ([page for _, page in group] for _, group in groupby(ordered, key=key))
    found = reclaimable(groups, rules.max_page_sharing, most_mappings)
    chosen = set(found.chosen)
    nodes = {page.frame: page.node for _, page in ordered if page.frame in chosen}
    parts = ((process, nodes[frame], address) for frame, process, address in mappings if frame in chosen)
    return DuplicateKsmPages(
        time_seconds=time_seconds,
        frames=len(ordered),
        reclaimable=found.pages,
        left=found.left,
        parts=unshare_parts(parts, page_size),
        part_pages=found.chosen_mappings,
        part_frames=len(chosen),
        complete=complete,
        detection=detection,
        cpu_seconds=cpu_seconds,
    )
