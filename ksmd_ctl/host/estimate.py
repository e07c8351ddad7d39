# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging would save, told from contents: the figures, and how sure they are (docs/estimate.md).

A *page* is what would have a frame of its own without KSM: a frame that fork shares is one page, however many map it;
a frame that ksmd merged is as many pages as it has places. Of a content that *n* pages with *m* mappings have, ksmd
leaves ceil(*m* / max_page_sharing) frames if *n* is at least two (mm/ksm.c), and frees the other *n* - ceil(...).

Figures of a sample, and their intervals, are those of `ksmd_ctl.host.sampling`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ksmd_ctl.host.sampling import EXACTLY_ALL, Bounds, sampled, scored, spread_of_count

__all__ = [
    "Contents",
    "Estimate",
    "Outcome",
    "OwnerFigures",
    "PageKind",
    "PageSet",
    "Rules",
    "SampledPages",
    "Stability",
    "Stage",
    "estimate",
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
class _Sum:
    """What becomes of contents."""

    shared: int = 0
    freed: int = 0
    sharing: int = 0
    square: int = 0

    def add(self, cell: _Cell, limit: int, count: int) -> int:
        """Add contents that these pages have; the pages that each frees."""
        pages = sum([kind.places * number for kind, number in cell])
        if pages < 2:
            return 0
        mappings = sum([len(kind.owners) * number for kind, number in cell])
        full, rest = divmod(mappings, limit)
        freed = pages - full - bool(rest)
        # With all others' places taken, a last one has nobody to be merged with: its frame is no KSM page.
        shared = full + (rest > 1)
        self.shared += count * shared
        self.sharing += count * (mappings - shared - (rest == 1))
        self.freed += count * freed
        self.square += count * freed * freed
        return freed


#: Pages that may be merged with one another: kinds, and how many of each.
_Cell = Sequence[tuple[PageKind, int]]


def _cells(pages: _Cell, key: Callable[[PageKind], object]) -> Iterable[_Cell]:
    """The pages of a content by what they may be merged with."""
    found: dict[object, list[tuple[PageKind, int]]] = {}
    for one in pages:
        found.setdefault(key(one[0]), []).append(one)
    return found.values()


def estimate(
    contents: Contents,
    mapped: Mapping[tuple[int, bool], int],
    rules: Rules,
    owners: int,
    *,
    more: bool = False,
    domain_of: Sequence[str] | None = None,
    stable: Stability | None = None,
) -> Estimate:
    """What merging would save, where everything was read.

    :param mapped: pages (mappings) by the number of their process, and whether they are marked mergeable
    :param owners: how many processes there are
    :param more: pages that nobody has marked are told of as well
    :param domain_of: the domain of each process
    """
    marked = _Telling(contents, rules, stable or Stability(), only_marked=True)
    everything = _Telling(contents, rules, stable or Stability(), only_marked=False) if more else None
    pages = {flag: [mapped.get((owner, flag), 0) for owner in range(owners)] for flag in (True, False)}
    freed = marked.parts(owners)
    freed_all = everything.parts(owners) if everything else freed
    items = marked.items_less(owners)
    items_all = everything.items_less(owners) if everything else items
    total, total_more = sum(pages[True]), sum(pages[False])
    return Estimate(
        stage=Stage.READ if stable is None else Stage.FINAL,
        read_share=1.0,
        content_share=contents.share,
        pages=total,
        more_pages=total_more,
        outcomes=marked.outcomes(total),
        outcomes_with_more=everything.outcomes(total + total_more) if everything else (),
        merged_pages=marked.merged(),
        owners=tuple(
            OwnerFigures(
                pages=pages[True][owner],
                more_pages=pages[False][owner],
                freed=freed[owner],
                freed_with_more=freed_all[owner],
                items=max(0, pages[True][owner] - items[owner]),
                items_with_more=max(0, pages[True][owner] + pages[False][owner] - items_all[owner]),
            )
            for owner in range(owners)
        ),
        domains=None if domain_of is None else marked.domains(domain_of),
        stable=stable,
    )


class _Telling:
    """The figures of contents, of all pages or of those that are marked."""

    def __init__(self, contents: Contents, rules: Rules, stable: Stability, *, only_marked: bool) -> None:
        self.rules = rules
        self.stable = stable
        self.share = contents.share
        chosen = [kind.marked or not only_marked for kind in contents.kinds]
        self._chosen = chosen
        self.kinds = contents.kinds
        self.sets = self._of(contents.sets)
        self.sure = self._of(contents.sure)
        self.zeroes = [(contents.kinds[kind], count) for kind, count in contents.zeroes.items() if chosen[kind]]

    def _of(self, sets: Sets) -> list[tuple[_Cell, int]]:
        kinds, chosen = self.kinds, self._chosen
        if all(chosen):
            return [([(kinds[kind], number) for kind, number in one], count) for one, count in sets.items()]
        found = (
            ([(kinds[kind], number) for kind, number in one if chosen[kind]], count) for one, count in sets.items()
        )
        return [(one, count) for one, count in found if one]

    def _sum(self, sets: Iterable[tuple[_Cell, int]], key: Callable[[PageKind], object] | None) -> _Sum:
        found, limit = _Sum(), self.rules.max_page_sharing
        for pages, count in sets:
            for cell in (pages,) if key is None else _cells(pages, key):
                found.add(cell, limit, count)
        return found

    def _plain_zeroes(self) -> list[tuple[_Cell, int]]:
        """Pages of zeroes that no split frees, as a content like any other."""
        return [([one for one in self.zeroes if not one[0].split_frees], 1)]

    def _split_zeroes(self) -> int:
        return sum(count * kind.places for kind, count in self.zeroes if kind.split_frees)

    def outcomes(self, mapped: int) -> tuple[Outcome, ...]:
        """Under each setting of the two knobs.

        :param mapped: all mappings
        """
        found = []
        for across in (True, False):
            key = None if across or self.rules.nodes == 1 else _node
            parts, sure, zero = (
                self._sum(self.sets, key),
                self._sum(self.sure, key),
                self._sum(self._plain_zeroes(), key),
            )
            scale = self.stable.pages.found
            split = round(self._split_zeroes() * self.stable.zeroes.found)
            for use_zero in (False, True):
                replaced = sum(count * len(kind.owners) for kind, count in self.zeroes if not kind.split_frees)
                places = sum(count * kind.places for kind, count in self.zeroes if not kind.split_frees)
                gone = round(replaced * self.stable.zeroes.found) if use_zero else 0
                shared = round((parts.shared / self.share + sure.shared) * scale)
                sharing = round((parts.sharing / self.share + sure.sharing) * scale)
                if not use_zero:
                    shared += zero.shared
                    sharing += round((zero.shared + zero.sharing) * self.stable.zeroes.found) - zero.shared
                found.append(
                    Outcome(
                        merge_across_nodes=across,
                        use_zero_pages=use_zero,
                        pages_shared=shared,
                        pages_sharing=max(0, sharing),
                        zero_pages=gone,
                        split_zero_pages=split,
                        items=max(0, mapped - gone - split),
                        freed=self._bounds(parts, sure, self._split_zeroes() + (places if use_zero else zero.freed)),
                    )
                )
        return tuple(found)

    def merged(self) -> int:
        """Pages that KSM has freed already."""
        sets = ((self.sets, self.share), (self.sure, 1.0), ([(self.zeroes, 1)], 1.0))
        return round(
            sum(
                count * sum((kind.places - 1) * number for kind, number in pages) / share
                for some, share in sets
                for pages, count in some
            )
        )

    def parts(self, owners: int) -> list[float]:
        """Each process's part of what is freed under the knobs as they are now."""
        found, zero = [0.0] * owners, [0.0] * owners
        key = None if self.rules.merge_across_nodes or self.rules.nodes == 1 else _node
        for sets, share in ((self.sets, self.share), (self.sure, 1.0)):
            self._divide(sets, key, 1 / share, found)
        for owner, part in enumerate(found):
            found[owner] = part * self.stable.owners.get(owner, self.stable.pages.found)
        for kind, count in self.zeroes:
            if kind.split_frees or self.rules.use_zero_pages:
                for owner in kind.owners:
                    zero[owner] += count * kind.places / len(kind.owners)
        if not self.rules.use_zero_pages:
            self._divide(self._plain_zeroes(), key, 1.0, zero)
        return [one + other * self.stable.zeroes.found for one, other in zip(found, zero, strict=True)]

    def _divide(
        self,
        sets: Iterable[tuple[_Cell, int]],
        key: Callable[[PageKind], object] | None,
        scale: float,
        found: list[float],
    ) -> None:
        limit = self.rules.max_page_sharing
        for pages, count in sets:
            for cell in (pages,) if key is None else _cells(pages, key):
                if freed := _Sum().add(cell, limit, 1):
                    each = count * scale * freed / sum([kind.places * number for kind, number in cell])
                    for kind, number in cell:
                        for owner in kind.owners:
                            found[owner] += each * number * kind.places / len(kind.owners)

    def items_less(self, owners: int) -> list[int]:
        """Pages of each process that ksmd keeps no record of, as they are freed for good."""
        found = [0.0] * owners
        for kind, count in self.zeroes:
            if kind.split_frees or self.rules.use_zero_pages:
                for owner in kind.owners:
                    found[owner] += count
        return [round(one * self.stable.zeroes.found) for one in found]

    def domains(self, domain_of: Sequence[str]) -> dict[str, Bounds]:
        """By domain, what would be freed if it were alone; zero pages as the knobs are now."""
        names = sorted(set(domain_of))
        across = self.rules.merge_across_nodes or self.rules.nodes == 1
        limit = self.rules.max_page_sharing

        def key(kind: PageKind) -> tuple[str, int]:
            return domain_of[kind.owners[0]], 0 if across else kind.node

        sums = {name: (_Sum(), _Sum(), _Sum()) for name in names}
        plain = [] if self.rules.use_zero_pages else self._plain_zeroes()
        for number, sets in enumerate((self.sets, self.sure, plain)):
            for pages, count in sets:
                for cell in _cells(pages, key):
                    sums[domain_of[cell[0][0].owners[0]]][number].add(cell, limit, count)
        zeroes = dict.fromkeys(names, 0)
        for kind, count in self.zeroes:
            if kind.split_frees or self.rules.use_zero_pages:
                zeroes[domain_of[kind.owners[0]]] += count * kind.places
        return {
            name: self._bounds(parts, sure, zero.freed + zeroes[name]) for name, (parts, sure, zero) in sums.items()
        }

    def _bounds(self, parts: _Sum, sure: _Sum, zeroes: int) -> Bounds:
        """What is freed of sampled contents, of others, and of zeroes."""
        found = scored(parts.freed, parts.square, self.share).plus(sure.freed).times(self.stable.pages)
        more = Bounds(zeroes, zeroes, zeroes).times(self.stable.zeroes)
        return Bounds(found.found + more.found, found.low + more.low, found.high + more.high)


def _node(kind: PageKind) -> int:
    return kind.node


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
