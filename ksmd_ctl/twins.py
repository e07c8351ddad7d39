# SPDX-License-Identifier: GPL-2.0-or-later
"""Which KSM pages with one content are more than max_page_sharing explains, and what un-merging frees them.

A content that n pages have needs n / max_page_sharing KSM pages, rounded up. There are more of them

- where a KSM page was moved to a node on which its content had one (docs/findings.md: F1),
- where pages of several full ones went away: dups of a chain are never joined (mm/ksm.c, since 4.13).

A KSM page can be given up where the others with its content have room for all who map it: once they are un-merged,
ksmd merges each of them onto one of the others. It is never worth it to empty a page in part, and least work to begin
with the page that fewest map. What fork shares may be above the limit; such a page has no room, and none is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ksmd_ctl.host.memory import ProcessId, TwinPart

__all__ = ["TwinFrame", "Verdict", "judge", "parts_of"]


@dataclass(frozen=True, slots=True)
class TwinFrame:
    """A KSM page, as far as it matters here.

    :ivar frame: its number
    :ivar mapped: how many mappings it has
    :ivar stuck: why not all of these can be un-merged, or not where it would help; empty where they can
    :ivar doubtful: un-merging may turn out not to help
    """

    frame: int
    mapped: int
    stuck: str = ""
    doubtful: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the contents say.

    :ivar unrealised: frames that would come free if all that can be one were one
    :ivar left: of these, those that un-merging can't free, by the cause in words
    :ivar chosen: frames to un-merge, those first that fewest map
    :ivar pages: how many mappings the chosen ones have
    """

    unrealised: int
    left: Mapping[str, int]
    chosen: tuple[int, ...]
    pages: int


def judge(groups: Iterable[Sequence[TwinFrame]], limit: int, most_pages: int) -> Verdict:
    """
    :param groups: KSM pages that ksmd would make one if they were not merged yet: of one content, and on one node
        where it doesn't merge across nodes
    :param limit: max_page_sharing
    :param most_pages: mappings that the chosen ones may have
    """
    unrealised = 0
    left: Counter[str] = Counter()
    candidates: list[TwinFrame] = []
    for group in groups:
        room = sum(max(0, limit - item.mapped) for item in group)
        surplus = _surplus(group, room, limit)
        if not surplus:
            continue
        unrealised += len(surplus)
        free = _surplus([item for item in group if not item.stuck], room, limit)
        candidates += free
        stuck = sorted((item for item in group if item.stuck), key=lambda item: item.mapped)
        left.update(item.stuck for item in stuck[: len(surplus) - len(free)])
    candidates.sort(key=lambda item: (item.doubtful, item.mapped, item.frame))
    chosen, pages = [], 0
    for item in candidates:
        if pages + item.mapped > most_pages:
            break
        pages += item.mapped
        chosen.append(item.frame)
    return Verdict(unrealised, dict(sorted(left.items())), tuple(chosen), pages)


def _surplus(frames: Sequence[TwinFrame], room: int, limit: int) -> list[TwinFrame]:
    """Which of these can be given up, with so much room in the whole group: those that fewest map."""
    found, pages = [], 0
    for item in sorted(frames, key=lambda item: (item.mapped, item.doubtful, item.frame)):
        room -= max(0, limit - item.mapped)
        pages += item.mapped
        if pages > room:
            break
        found.append(item)
    return found


def parts_of(mappings: Iterable[tuple[ProcessId, int, int]], page_size: int) -> tuple[TwinPart, ...]:
    """Pages, each given by process, node and address, as what is to be un-merged of each process onto each node."""
    ranges: dict[tuple[ProcessId, int], list[tuple[int, int]]] = {}
    for process, node, address in sorted(mappings):
        there = ranges.setdefault((process, node), [])
        if there and there[-1][1] == address:
            there[-1] = (there[-1][0], address + page_size)
        else:
            there.append((address, address + page_size))
    return tuple(TwinPart(process, node, tuple(found)) for (process, node), found in ranges.items())
