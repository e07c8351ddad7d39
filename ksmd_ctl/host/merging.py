# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of pages with equal contents if they are merged, and what that frees.

A *page* is what would have a frame of its own without KSM: a frame that fork shares is one page, however many map it;
a frame that ksmd merged is as many pages as it has places. Of a content that *n* pages with *m* mappings have, ksmd
leaves ceil(*m* / max_page_sharing) frames if *n* is at least two (mm/ksm.c), and frees the other *n* - ceil(...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ksmd_ctl.host.estimate import (
    Contents,
    Estimate,
    Outcome,
    OwnerFigures,
    PageKind,
    Rules,
    Sets,
    Stability,
    Stage,
)
from ksmd_ctl.host.sampling import Bounds, scored

__all__ = ["estimate", "of_those_left"]


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


def of_those_left(
    mapped: Mapping[tuple[int, bool], int], stable: Stability, there: Sequence[bool]
) -> tuple[Mapping[tuple[int, bool], int], Stability]:
    """Pages and what of them is as it was, without processes that ended: theirs are not freed, and have no records.

    :param mapped: as of `estimate`
    :param there: whether each process is
    """
    gone = {owner: 0.0 for owner, is_there in enumerate(there) if not is_there}
    left = {key: count for key, count in mapped.items() if there[key[0]]}
    return left, replace(stable, owners={**stable.owners, **gone})


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
                freed = self._bounds(parts, sure, self._split_zeroes() + (places if use_zero else zero.freed))
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
                        pages_sharing=min(mapped, max(0, sharing)),
                        zero_pages=gone,
                        split_zero_pages=split,
                        items=max(0, mapped - gone - split),
                        # Of those that ended nothing is mapped any more.
                        freed=Bounds(*(min(mapped, value) for value in freed)),
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
        found = self._unchanged(found)
        for kind, count in self.zeroes:
            if kind.split_frees or self.rules.use_zero_pages:
                for owner in kind.owners:
                    zero[owner] += count * kind.places / len(kind.owners)
        if not self.rules.use_zero_pages:
            self._divide(self._plain_zeroes(), key, 1.0, zero)
        return [one + other * self.stable.zeroes.found for one, other in zip(found, zero, strict=True)]

    def _unchanged(self, parts: Sequence[float]) -> list[float]:
        """Parts without what changed: together as much as is left of all of them.

        What is not known of a process follows from the others and from the whole.
        """
        known, total = self.stable.owners, sum(parts) * self.stable.pages.found
        rest = sum(part for owner, part in enumerate(parts) if owner not in known)
        told = sum(parts[owner] * share for owner, share in known.items())
        others = min(1.0, max(0.0, total - told) / rest) if rest else 0.0
        left = [part * known.get(owner, others) for owner, part in enumerate(parts)]
        if not sum(left) and len(known) == len(parts):
            return left
        if not sum(left):
            return [part * self.stable.pages.found for part in parts]
        return [one * total / sum(left) for one in left]

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
