# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of which the number of their content was kept, by a threshold of that number (`ksmd_ctl.host.sampling`).

A host may have millions of pages: of those that are mapped once nothing is kept but the number, and for a few where
they are. Of a frame that several map it is kept who they are, and where it lies in forks of one another, which is one
place for all of them.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress, count
from typing import Final, NamedTuple

from ksmd_ctl.host.estimate import Contents, PageKind, PageSet
from ksmd_ctl.kernel.content_numbers import LEAST_SHARE, ZERO, ContentSample, threshold_of
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

#: Pages of one content that are looked at again.
AGAIN_OF_ONE: Final = 64

# Zeroes are only taken out at once where one page in so many is one: to take them out takes longer than to pass them.
_MANY_ZEROES: Final = 2
# Of so many pages with one content, among the first that are kept.
_MANY_PAGES: Final = 64

# Of so many more contents than are wanted, those with the least numbers are.
_SOME_MORE: Final = 1.2


class Row(NamedTuple):
    """A page that can be looked at again."""

    number: int
    owner: int
    address: int


class Column(NamedTuple):
    """Pages of a kind: the numbers of their contents, and where they are."""

    kind: int
    numbers: Sequence[int]
    addresses: Sequence[int]


@dataclass(slots=True)
class SharedFrame:
    """A frame that is mapped more than once.

    :ivar owners: the number of the process of each mapping that was seen
    :ivar places: where forks map it: their family and the address
    :ivar others: how many others map it: for each it is a page of its own
    """

    number: int
    node: int
    row: Row
    split_frees: bool = False
    marked: bool = False
    owners: list[int] = field(default_factory=list)
    places: set[tuple[int, int]] = field(default_factory=set)
    others: int = 0

    def add(self, owner: int, family: int, address: int, marked: bool) -> None:
        """Another mapping; a family of 0 is none."""
        self.owners.append(owner)
        self.marked = self.marked or marked
        if family:
            self.places.add((family, address))
        else:
            self.others += 1

    @property
    def pages(self) -> int:
        """How many pages it would be without KSM."""
        return len(self.places) + self.others

    def kind(self) -> PageKind:
        return PageKind(self.node, tuple(sorted(self.owners)), self.pages, self.marked, self.split_frees)


@dataclass(slots=True)
class KeptPages:
    """The pages, until there are more than `most`: then contents are given up.

    :ivar most: about how many
    :ivar pages: about how many there will be
    :ivar sample: is told which contents are kept
    :ivar sure: contents of which all pages are counted whatever their number is; the zero page's is among them
    :ivar share: the share of contents that is kept
    :ivar shared: by frame, those that are mapped more than once and whose content is kept
    :ivar given_up: other frames that are mapped more than once and were read
    """

    most: int
    pages: int = 0
    sample: ContentSample | None = None
    sure: Set[int] = frozenset({ZERO})
    share: float = 1.0
    kinds: list[PageKind] = field(default_factory=list)
    shared: dict[int, SharedFrame] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)
    _kind_numbers: dict[PageKind, int] = field(default_factory=dict)
    # As they were read, as long as all are kept; and others.
    _whole: list[Column] = field(default_factory=list)
    _columns: dict[int, tuple[list[int], array[int]]] = field(default_factory=dict)
    _rows: int = 0
    _sure: Counter[tuple[int, int]] = field(default_factory=Counter)
    _shared_mappings: int = 0

    def __len__(self) -> int:
        return self._rows + self._shared_mappings

    @property
    def threshold(self) -> int:
        """Numbers below it are kept."""
        return threshold_of(self.share)

    def kind(self, kind: PageKind) -> int:
        """The number of a kind of pages."""
        number = self._kind_numbers.get(kind)
        if number is None:
            number = self._kind_numbers[kind] = len(self.kinds)
            self.kinds.append(kind)
        return number

    def keeps(self, number: int) -> bool:
        return number < self.threshold or number in self.sure

    def add(self, kind: int, address: int, numbers: Sequence[int], zeroes: int) -> None:
        """Pages that lie at an address one after the other, are mapped once each, and are of one kind.

        :param zeroes: how many of them are zeroes, which are counted apart (`count`)
        """
        if zeroes == len(numbers):
            return
        if self.share == 1 and zeroes * _MANY_ZEROES < len(numbers):
            places = range(address, address + len(numbers) * PAGE_SIZE, PAGE_SIZE)
            self._whole.append(Column(kind, numbers, places))
            self._rows += len(numbers) - zeroes
        else:
            if len(self.sure) > 1:
                for number, count in Counter(filter(self.sure.__contains__, numbers)).items():
                    if number != ZERO:
                        self.count(number, kind, count)
            self._keep(kind, numbers, range(address, address + len(numbers) * PAGE_SIZE, PAGE_SIZE))
        if self._rows + self._shared_mappings > self.most:
            self._fit()

    def _keep(self, kind: int, numbers: Sequence[int], addresses: Sequence[int]) -> None:
        """Keep those of which the content is kept."""
        into, places = self._columns.setdefault(kind, ([], array("Q")))
        sure, threshold = self.sure, self.threshold
        low = [index for index, number in enumerate(numbers) if number < threshold]
        low = [index for index in low if numbers[index] not in sure]
        into.extend([numbers[index] for index in low])
        places.extend([addresses[index] for index in low])
        self._rows += len(low)

    def all(self) -> Iterator[Column]:
        """Pages that are mapped once and whose content is kept."""
        yield from self._whole
        for kind, (numbers, addresses) in self._columns.items():
            yield Column(kind, numbers, addresses)

    def count(self, number: int, kind: int, count: int) -> None:
        """So many pages with a content that is `sure`."""
        self._sure[number, kind] += count

    def add_shared(self, frame: int, number: int, node: int, row: Row, *, split_frees: bool) -> SharedFrame | None:
        """A frame that is mapped more than once, and was read; None where its content is not kept."""
        if not self.keeps(number):
            self.given_up.add(frame)
            return None
        return self.shared.setdefault(frame, SharedFrame(number, node, row, split_frees))

    def mapped(self) -> None:
        """Another mapping of a shared frame was noted."""
        self._shared_mappings += 1
        if self._rows + self._shared_mappings > self.most:
            self._fit()

    def _fit(self) -> None:
        while len(self) > self.most and self.share > LEAST_SHARE:
            if self.share == 1:
                self._take_for_sure()
                # At once what will be left: then less of the contents is hashed.
                halvings = max(1, (self.pages // self.most).bit_length() - 1)
                self.share = max(LEAST_SHARE, 0.5**halvings)
            else:
                self.share /= 2
            if self.sample is not None:
                self.sample.take(self.share, self.sure)
            before = list(self.all())
            self._whole, self._columns, self._rows = [], {}, 0
            for column in before:
                self._keep(*column)
            gone = [frame for frame, found in self.shared.items() if not self.keeps(found.number)]
            self.given_up.update(gone)
            for frame in gone:
                del self.shared[frame]
            self._shared_mappings = sum(len(found.owners) for found in self.shared.values())

    def _take_for_sure(self) -> None:
        """Count what many pages have apart: whether one of these is kept is not to decide on the figure.

        Only while everything is kept: so it doesn't depend on their numbers which contents these are.
        """
        times = self._times(self.share)
        many = {number for number, count in times.items() if count >= _MANY_PAGES} - self.sure
        self.sure = self.sure | many
        for kind, numbers, _ in self.all():
            for number, pages in Counter(filter(many.__contains__, numbers)).items():
                self.count(number, kind, pages)

    def sure_pages(self) -> int:
        """How many pages have a content that is `sure`."""
        return self._sure.total() + sum(one.pages for one in self.shared.values() if one.number in self.sure)

    def zero_pages(self) -> int:
        """How many pages of zeroes were found that are mapped once."""
        return sum(count for (number, _), count in self._sure.items() if number == ZERO)

    # -- what it says --------------------------------------------------------------------------------------------

    def occupancy(self, most: int) -> tuple[Counter[int], float]:
        """How many contents were found how often so far, of at most about so many pages; and of which share that is."""
        share = self.share * min(1.0, most / max(1, self._rows))
        return Counter(self._times(share).values()), share

    def _times(self, share: float) -> Counter[int]:
        """How many pages have each content that is not `sure`, of a share of contents."""
        threshold = threshold_of(share)
        times: Counter[int] = Counter()
        for _, numbers, _ in self.all():
            times.update([number for number in numbers if number < threshold] if share < self.share else numbers)
        for found in self.shared.values():
            if found.number < threshold:
                times[found.number] += found.pages
        for number in self.sure & times.keys():
            del times[number]
        return times

    def several(self) -> Several:
        """The contents that several pages have: most contents have one.

        In loops within the interpreter: what is done here for each page costs as much as reading it.
        """
        several = {number for number, pages in self._times(self.share).items() if pages > 1}
        by_kind: dict[int, list[int]] = {}
        for kind, numbers, _ in self.all():
            by_kind.setdefault(kind, []).extend(filter(several.__contains__, numbers))
        for frame in self.shared.values():
            if frame.number in several:
                by_kind.setdefault(self.kind(frame.kind()), []).append(frame.number)
        states: dict[int, int] = {}
        sets: list[PageSet] = [()]
        # Each page takes its content from one state to another; a state stands for pages that a content has. By kinds,
        # for in any order there would be many more states.
        for kind, found in by_kind.items():
            steps = _Steps(sets, kind)
            for number in found:
                states[number] = steps[states.get(number, 0)]
        return Several(self, states, sets)

    def sure_sets(self) -> tuple[Counter[PageSet], Counter[int]]:
        by_number: dict[int, Counter[int]] = {}
        for (number, kind), pages in self._sure.items():
            by_number.setdefault(number, Counter())[kind] += pages
        for found in self.shared.values():
            if found.number in self.sure:
                by_number.setdefault(found.number, Counter())[self.kind(found.kind())] += 1
        zeroes = by_number.pop(ZERO, Counter())
        return Counter(tuple(sorted(kinds.items())) for kinds in by_number.values()), zeroes


@dataclass(frozen=True, slots=True)
class Several:
    """Contents that several pages have.

    :ivar states: a number for each of these contents, of what its pages are in `sets`
    """

    kept: KeptPages
    states: Mapping[int, int]
    sets: Sequence[PageSet]

    def contents(self) -> Contents:
        """All of it."""
        found = Counter[PageSet]()
        for state, contents in Counter(self.states.values()).items():
            found[tuple(sorted(self.sets[state]))] += contents
        sure, zeroes = self.kept.sure_sets()
        return Contents(self.kept.kinds, found, self.kept.share, sure, zeroes)

    def again(self, most: int) -> tuple[list[Again], float]:
        """Some of the contents, to be looked at again.

        :param most: about how many pages
        :return: also the share of these contents that they are
        """
        wanted = self._wanted(most)
        chosen = {number: Again(self.sets[self.states[number]]) for number in wanted}
        for kind, numbers, addresses in self.kept.all():
            (owner,) = self.kept.kinds[kind].owners
            for place in compress(count(), map(wanted.__contains__, numbers)):
                chosen[numbers[place]].add(Row(numbers[place], owner, addresses[place]))
        for frame in self.kept.shared.values():
            if frame.number in wanted:
                chosen[frame.number].add(frame.row)
        # Not the chance with which they were taken: of few contents that may be all.
        return list(chosen.values()), len(chosen) / len(self.states) if self.states else 1.0

    def _wanted(self, most: int) -> set[int]:
        """Those with the least numbers, as everywhere."""
        # A frame is looked at once, whoever maps it.
        pages = [sum([count for _, count in one]) for one in self.sets]
        rows = sum(min(pages[state], AGAIN_OF_ONE) * times for state, times in Counter(self.states.values()).items())
        if rows <= most:
            return set(self.states)
        threshold = threshold_of(self.kept.share * min(1.0, _SOME_MORE * most / rows))
        low = sorted([number for number in self.states if number < threshold])
        return set(low[: len(self.states) * most // rows])


class _Steps(dict[int, int]):
    """To which state a content goes that has another page of a kind; states are numbered as they come up."""

    def __init__(self, sets: list[PageSet], kind: int) -> None:
        self._sets = sets
        self._kind = kind

    def __missing__(self, state: int) -> int:
        before, count = self._sets[state], 1
        if before and before[-1][0] == self._kind:
            before, count = before[:-1], before[-1][1] + 1
        self._sets.append((*before, (self._kind, count)))
        self[state] = len(self._sets) - 1
        return self[state]


@dataclass(slots=True)
class Again:
    """A content of which pages are looked at again.

    :ivar pages: all pages that have it, by their kinds
    :ivar rows: some of them, drawn by chance where there are many
    """

    pages: PageSet
    rows: list[Row] = field(default_factory=list)
    seen: int = 0

    def add(self, row: Row) -> None:
        self.seen += 1
        if len(self.rows) < AGAIN_OF_ONE:
            self.rows.append(row)
        elif (place := random.randrange(self.seen)) < AGAIN_OF_ONE:
            self.rows[place] = row
