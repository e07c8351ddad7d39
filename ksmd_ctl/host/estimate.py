# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging would save, told from contents: what goes in, and what comes out (docs/estimate.md).

`ksmd_ctl.host.merging` makes the one of the other; figures of a sample, and their intervals, are those of
`ksmd_ctl.host.sampling`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ksmd_ctl.host.sampling import EXACTLY_ALL, Bounds, sampled, spread_of_count

__all__ = [
    "Contents",
    "Estimate",
    "Outcome",
    "OwnerFigures",
    "PageKind",
    "PageSet",
    "Rules",
    "SampledPages",
    "Sets",
    "Stability",
    "Stage",
    "narrowed",
]


@dataclass(frozen=True, slots=True)
class PageKind:
    """Pages that are alike in all but their content.

    :ivar node: where the frame lies
    :ivar owners: the number of the process of each mapping of the frame, ascending
    :ivar places: how many pages it would be without KSM
    :ivar marked: somebody has marked it mergeable
    :ivar split_frees: a page of zeroes in a huge page, on a kernel where a split frees it
    """

    node: int
    owners: tuple[int, ...]
    places: int = 1
    marked: bool = True
    split_frees: bool = False


#: The number of a kind of pages, and how many pages of it have a content; of all kinds that do.
PageSet = tuple[tuple[int, int], ...]
Sets = Mapping[PageSet, int]


@dataclass(slots=True)
class Contents:
    """Contents, by the pages that have them.

    :ivar kinds: the kinds of pages, each a number by its place here
    :ivar sets: the pages of a content, and how many contents have just such pages; contents that one page has need not
        be here
    :ivar share: the chance with which a content is in `sets`
    :ivar sure: as `sets`, of contents that were taken whatever their hash
    :ivar zeroes: pages of zeroes by the number of their kind: all of them
    """

    kinds: Sequence[PageKind]
    sets: Sets
    share: float = 1.0
    sure: Sets = field(default_factory=dict)
    zeroes: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the kernel does, and what the knobs say now.

    :ivar nodes: how many nodes have memory
    """

    max_page_sharing: int
    merge_across_nodes: bool = True
    use_zero_pages: bool = False
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class Stability:
    """What of the pages that would be freed stays as it is between two looks.

    :ivar pages: their share; of pages of zeroes it is `zeroes`
    :ivar owners: the same of a process, where enough pages of it were looked at twice
    """

    pages: Bounds = EXACTLY_ALL
    zeroes: Bounds = EXACTLY_ALL
    owners: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is reached under a setting of the knobs; counts are pages.

    :ivar pages_shared: KSM pages, and `pages_sharing` further mappings of them, as the kernel's counters call them; a
        sample does not tell how many KSM pages there will be: None
    :ivar zero_pages: pages of zeroes that ksmd replaces by the zero page, and `split_zero_pages` those that splits of
        huge pages free
    :ivar items: pages that ksmd keeps a record of
    :ivar freed: frames that are freed, those of zeroes among them
    """

    merge_across_nodes: bool
    use_zero_pages: bool
    pages_shared: int | None
    pages_sharing: int
    zero_pages: int
    split_zero_pages: int
    items: int
    freed: Bounds


@dataclass(frozen=True, slots=True)
class OwnerFigures:
    """What of it is a process's part, under the knobs as they are now; counts are pages.

    :ivar pages: that are marked mergeable, and `more_pages` those that are not
    :ivar freed: of the marked ones: a content's freed pages are divided among all that have it
    :ivar freed_with_more: the same if all were marked
    :ivar items: marked pages that ksmd keeps a record of, and `items_with_more` all
    """

    pages: int
    more_pages: int
    freed: float
    freed_with_more: float
    items: int
    items_with_more: int


class Stage(StrEnum):
    """How far it is: a figure of a sample of pages; of what was read so far; of everything; and looked at twice."""

    SAMPLE = "sample"
    READING = "reading"
    READ = "read"
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What merging would save.

    :ivar read_share: the share of all pages that was read
    :ivar content_share: the share of contents that it is of, where everything was read
    :ivar pages: pages (mappings) that are marked mergeable, and `more_pages` those that are not
    :ivar merged_pages: of the pages that would be freed, those that KSM has freed already
    :ivar outcomes: under each setting of the two knobs; `outcomes_with_more`: if all were marked, empty where not asked
    :ivar owners: each process's part, as they were numbered; empty as long as not everything was read
    :ivar domains: by name, pages that would be freed if only pages of this domain were merged with one another
    :ivar stable: what of it stays as it is between two looks
    """

    stage: Stage
    read_share: float
    content_share: float
    pages: int
    more_pages: int
    outcomes: tuple[Outcome, ...]
    outcomes_with_more: tuple[Outcome, ...] = ()
    merged_pages: int = 0
    owners: tuple[OwnerFigures, ...] = ()
    domains: Mapping[str, Bounds] | None = None
    stable: Stability | None = None


@dataclass(slots=True)
class SampledPages:
    """Pages that were drawn, each with the same chance.

    :ivar contents: how often each content other than zeroes was seen, and `on_nodes` the same on each node
    :ivar zeroes: pages of zeroes that were seen: those that a split frees (True), and others
    """

    contents: Counter[int] = field(default_factory=Counter)
    on_nodes: Counter[tuple[int, int]] = field(default_factory=Counter)
    zeroes: Counter[bool] = field(default_factory=Counter)

    def add(self, number: int, node: int) -> None:
        """A page, by the number of its content."""
        self.contents[number] += 1
        self.on_nodes[number, node] += 1

    def outcomes(self, share: float, mapped: int, rules: Rules) -> tuple[Outcome, ...]:
        """What is reached under each setting of the two knobs.

        :param share: the chance with which a page was drawn
        :param mapped: all mappings
        """
        found = []
        limit, spread = rules.max_page_sharing, spread_of_count(self.zeroes.total(), share)
        plain, split = self.zeroes[False] / share, self.zeroes[True] / share
        for across, seen in ((True, self.contents), (False, self.on_nodes)):
            bounds = sampled(Counter(seen.values()), share, limit)
            for use_zero in (False, True):
                zeroes = plain + split - (0.0 if use_zero else plain / limit)
                freed = Bounds(
                    min(mapped, bounds.found + zeroes),
                    min(mapped, max(0.0, bounds.low + zeroes - spread)),
                    min(mapped, bounds.high + zeroes + spread),
                )
                gone = round(split + (plain if use_zero else 0.0))
                found.append(
                    Outcome(
                        merge_across_nodes=across,
                        use_zero_pages=use_zero,
                        pages_shared=None,
                        pages_sharing=max(0, round(freed.found) - gone),
                        zero_pages=gone - round(split),
                        split_zero_pages=round(split),
                        items=max(0, mapped - gone),
                        freed=freed,
                    )
                )
        return tuple(found)


def narrowed(outcomes: Iterable[Outcome], freed: Bounds) -> tuple[Outcome, ...]:
    """Outcomes of a sample, with bounds of what is freed across nodes that follow from what was read meanwhile."""
    found = []
    for one in outcomes:
        high = min(one.freed.high, max(freed.high, freed.found))
        low = min(high, max(one.freed.low, freed.low if one.merge_across_nodes else 0.0))
        found.append(replace(one, freed=Bounds(min(max(one.freed.found, low), high), low, high)))
    return tuple(found)
