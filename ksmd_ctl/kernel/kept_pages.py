# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of which the number of their content was kept, by a threshold of that number (`ksmd_ctl.host.sampling`).

A host may have millions of pages: those that are mapped once are kept in columns, 20 bytes each. Of a frame that
several map it is kept who they are, and where it lies in forks of one another, which is one place for all of them.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import lt, ne
from typing import Final, NamedTuple

from ksmd_ctl.host.estimate import Contents, PageKind, PageSet
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

#: The number of the content of a page of zeroes.
ZERO: Final = hash(bytes(PAGE_SIZE))

#: Pages of one content that are looked at again.
AGAIN_OF_ONE: Final = 64

# Of so many pages with one content, among the first that are kept.
_MANY_PAGES: Final = 64

# Numbers are from -2**63 to 2**63 - 1, each as likely as any other.
_LEAST, _NUMBERS = -(1 << 63), 1 << 64


class Row(NamedTuple):
    """A page that can be looked at again."""

    number: int
    owner: int
    address: int


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
    """The pages, until there are more than `most`: then the contents of half of them are given up.

    :ivar most: about how many
    :ivar sure: contents of which all pages are counted whatever their number is; the zero page's is among them
    :ivar share: the share of contents that is kept
    :ivar shared: by frame, those that are mapped more than once and whose content is kept
    :ivar given_up: other frames that are mapped more than once and were read
    """

    most: int
    sure: Set[int] = frozenset({ZERO})
    share: float = 1.0
    kinds: list[PageKind] = field(default_factory=list)
    shared: dict[int, SharedFrame] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)
    _kind_numbers: dict[PageKind, int] = field(default_factory=dict)
    _columns: dict[int, tuple[array[int], array[int]]] = field(default_factory=dict)
    _rows: int = 0
    _sure: Counter[tuple[int, int]] = field(default_factory=Counter)
    _shared_mappings: int = 0

    def __len__(self) -> int:
        return self._rows + self._shared_mappings

    @property
    def threshold(self) -> int:
        """Numbers below it are kept."""
        return _LEAST + round(self.share * _NUMBERS)

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

        :param zeroes: the kind of those that are zeroes
        """
        addresses: Iterable[int] = range(address, address + len(numbers) * PAGE_SIZE, PAGE_SIZE)
        if len(self.sure) == 1 and (count := numbers.count(ZERO)):
            self.count(ZERO, zeroes, count)
            addresses = list(compress(addresses, map(ne, numbers, repeat(ZERO))))
            numbers = list(compress(numbers, map(ne, numbers, repeat(ZERO))))
        elif not self.sure.isdisjoint(numbers):
            sure = self.sure
            for number, count in Counter([number for number in numbers if number in sure]).items():
                self.count(number, zeroes if number == ZERO else kind, count)
            kept = [number not in sure for number in numbers]
            addresses, numbers = list(compress(addresses, kept)), list(compress(numbers, kept))
        if self.share < 1:
            low = list(map(lt, numbers, repeat(self.threshold)))
            addresses, numbers = compress(addresses, low), list(compress(numbers, low))
        if numbers:
            column = self._columns.setdefault(kind, (array("q"), array("Q")))
            column[0].extend(numbers)
            column[1].extend(addresses)
            self._rows += len(numbers)
            self._fit()

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

    def _fit(self) -> None:
        while len(self) > self.most and self.share > 2**-40:
            if self.share == 1:
                self._take_for_sure()
            self.share /= 2
            threshold = self.threshold
            for kind, (numbers, addresses) in self._columns.items():
                kept = list(map(lt, numbers, repeat(threshold)))
                self._columns[kind] = array("q", compress(numbers, kept)), array("Q", compress(addresses, kept))
            self._rows = sum(len(numbers) for numbers, _ in self._columns.values())
            gone = [frame for frame, found in self.shared.items() if not self.keeps(found.number)]
            self.given_up.update(gone)
            for frame in gone:
                del self.shared[frame]
            self._shared_mappings = sum(len(found.owners) for found in self.shared.values())

    def _take_for_sure(self) -> None:
        """Count what many pages have apart: whether one of these is kept is not to decide on the figure.

        Only while everything is kept: so it doesn't depend on their numbers which contents these are.
        """
        times: Counter[int] = Counter()
        for numbers, _ in self._columns.values():
            times.update(numbers)
        many = {number for number, count in times.items() if count >= _MANY_PAGES}
        self.sure = self.sure | many
        for kind, (numbers, addresses) in self._columns.items():
            for number, count in Counter([number for number in numbers if number in many]).items():
                self.count(number, kind, count)
            other = [number not in many for number in numbers]
            self._columns[kind] = array("q", compress(numbers, other)), array("Q", compress(addresses, other))

    def sure_pages(self) -> int:
        """How many pages have a content that is `sure`."""
        return self._sure.total()

    def zero_pages(self) -> int:
        """How many pages of zeroes were found that are mapped once."""
        return sum(count for (number, _), count in self._sure.items() if number == ZERO)

    # -- what it says --------------------------------------------------------------------------------------------

    def occupancy(self, most: int) -> tuple[Counter[int], float]:
        """How many contents were found how often so far, of at most about so many pages; and of which share that is."""
        share = self.share * min(1.0, most / max(1, self._rows))
        threshold = _LEAST + round(share * _NUMBERS)
        times: Counter[int] = Counter()
        for numbers, _ in self._columns.values():
            times.update([number for number in numbers if number < threshold] if share < self.share else numbers)
        for found in self.shared.values():
            if found.number < threshold and found.number not in self.sure:
                times[found.number] += found.pages
        return Counter(times.values()), share

    def contents(self, again: float) -> tuple[Contents, list[Again], float]:
        """All of it, and some of the contents that several pages have, to be looked at again.

        :param again: about how many pages that may be
        :return: also the share of these contents that is
        """
        states, sets = self._states()
        several = [sum(self.kinds[kind].places * count for kind, count in pages) > 1 for pages in sets]
        how_many = Counter(states.values())
        rows = sum(
            contents * sum(min(count, AGAIN_OF_ONE) for _, count in sets[state])
            for state, contents in how_many.items()
            if several[state]
        )
        taken = min(1.0, again / max(1, rows))
        chosen = self._again(states, sets, several, _LEAST + round(self.share * taken * _NUMBERS))
        kept = Counter[PageSet]()
        for state, contents in how_many.items():
            if several[state]:
                kept[tuple(sorted(sets[state]))] += contents
        sure, zeroes = self._sure_sets()
        return Contents(self.kinds, kept, self.share, sure, zeroes), chosen, taken

    def _states(self) -> tuple[dict[int, int], list[PageSet]]:
        """Of each content a number that stands for the pages that have it, and what each stands for.

        Each kind takes all of its contents from one such state to another, in loops within the interpreter.
        """
        states: dict[int, int] = {}
        sets: list[PageSet] = [()]
        for kind, (numbers, _) in self._columns.items():
            times = Counter(numbers)
            steps = _Steps(sets, kind)
            wanted = zip(map(states.get, times, repeat(0)), times.values(), strict=True)
            states.update(zip(times, list(map(steps.__getitem__, wanted)), strict=True))
        for found in self.shared.values():
            if found.number not in self.sure:
                steps = _Steps(sets, self.kind(found.kind()))
                states[found.number] = steps[states.get(found.number, 0), 1]
        return states, sets

    def _again(
        self, states: dict[int, int], sets: Sequence[PageSet], several: Sequence[bool], threshold: int
    ) -> list[Again]:
        found: dict[int, Again] = {}
        for kind, (numbers, addresses) in self._columns.items():
            (owner,) = self.kinds[kind].owners
            for index in [index for index, number in enumerate(numbers) if number < threshold]:
                number = numbers[index]
                if several[state := states[number]]:
                    again = found.get(number) or found.setdefault(number, Again(sets[state]))
                    again.add(Row(number, owner, addresses[index]))
        for frame in self.shared.values():
            if frame.number < threshold and frame.number not in self.sure and several[state := states[frame.number]]:
                found.setdefault(frame.number, Again(sets[state])).add(frame.row)
        return list(found.values())

    def _sure_sets(self) -> tuple[Counter[PageSet], Counter[int]]:
        by_number: dict[int, Counter[int]] = {}
        for (number, kind), count in self._sure.items():
            by_number.setdefault(number, Counter())[kind] += count
        for found in self.shared.values():
            if found.number in self.sure:
                by_number.setdefault(found.number, Counter())[self.kind(found.kind())] += 1
        zeroes = by_number.pop(ZERO, Counter())
        return Counter(tuple(sorted(kinds.items())) for kinds in by_number.values()), zeroes


class _Steps(dict[tuple[int, int], int]):
    """To which state a content goes that so many more pages of a kind have; states are numbered as they come up."""

    def __init__(self, sets: list[PageSet], kind: int) -> None:
        self._sets = sets
        self._kind = kind

    def __missing__(self, step: tuple[int, int]) -> int:
        state, count = step
        self._sets.append((*self._sets[state], (self._kind, count)))
        self[step] = len(self._sets) - 1
        return self[step]


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
