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
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import ne
from typing import Final, NamedTuple

from ksmd_ctl.host.estimate import Contents, PageKind, PageSet
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

#: The number of the content of a page of zeroes.
ZERO: Final = hash(bytes(PAGE_SIZE))

#: Pages of one content that are looked at again.
AGAIN_OF_ONE: Final = 64

# Of contents that several pages have there are fewer.
_MOST_CANDIDATES: Final = 1 << 14
# Zeroes are only taken out at once where one page in so many is one.
_MANY_ZEROES: Final = 8
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


def _threshold(share: float) -> int:
    """Numbers below it are such a share of all."""
    return _LEAST + round(share * _NUMBERS)


@dataclass(slots=True)
class Candidates:
    """Where pages are that may be looked at again, by their kind: those of a smaller share of contents."""

    share: float
    rows: int = 0
    columns: dict[int, tuple[list[int], array[int]]] = field(default_factory=dict)

    def add(self, kind: int, address: int, numbers: Sequence[int]) -> None:
        """Pages that lie at an address one after the other."""
        into, addresses = self.columns.setdefault(kind, ([], array("Q")))
        if self.share == 1:
            into.extend(numbers)
            addresses.extend(range(address, address + len(numbers) * PAGE_SIZE, PAGE_SIZE))
            self.rows += len(numbers)
        else:
            threshold = _threshold(self.share)
            for index in [index for index, number in enumerate(numbers) if number < threshold]:
                into.append(numbers[index])
                addresses.append(address + index * PAGE_SIZE)
                self.rows += 1
        while self.rows > _MOST_CANDIDATES:
            self._halve()

    def _halve(self) -> None:
        self.share /= 2
        threshold = _threshold(self.share)
        for kind, (numbers, addresses) in self.columns.items():
            low = [number < threshold for number in numbers]
            self.columns[kind] = list(compress(numbers, low)), array("Q", compress(addresses, low))
        self.rows = sum(len(numbers) for numbers, _ in self.columns.values())


@dataclass(slots=True)
class KeptPages:
    """The pages, until there are more than `most`: then the contents of half of them are given up.

    :ivar most: about how many
    :ivar pages: about how many there will be
    :ivar sure: contents of which all pages are counted whatever their number is; the zero page's is among them
    :ivar share: the share of contents that is kept
    :ivar shared: by frame, those that are mapped more than once and whose content is kept
    :ivar given_up: other frames that are mapped more than once and were read
    """

    most: int
    pages: int = 0
    sure: Set[int] = frozenset({ZERO})
    share: float = 1.0
    kinds: list[PageKind] = field(default_factory=list)
    shared: dict[int, SharedFrame] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)
    _kind_numbers: dict[PageKind, int] = field(default_factory=dict)
    _numbers: dict[int, list[int]] = field(default_factory=dict)
    _rows: int = 0
    _again: Candidates = field(init=False)
    _sure: Counter[tuple[int, int]] = field(default_factory=Counter)
    _shared_mappings: int = 0

    def __post_init__(self) -> None:
        self._again = Candidates(min(1.0, _MOST_CANDIDATES / max(1, self.pages)))

    def __len__(self) -> int:
        return self._rows + self._shared_mappings

    @property
    def threshold(self) -> int:
        """Numbers below it are kept."""
        return _threshold(self.share)

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
        self._again.add(kind, address, numbers)
        if len(self.sure) > 1:
            sure, threshold = self.sure, self.threshold
            for number, count in Counter([number for number in numbers if number in sure]).items():
                if number != ZERO:
                    self.count(number, kind, count)
            numbers = [number for number in numbers if number < threshold and number not in sure]
        elif self.share < 1:
            threshold = self.threshold
            numbers = [number for number in numbers if number < threshold]
        elif zeroes * _MANY_ZEROES >= len(numbers):
            numbers = list(compress(numbers, map(ne, numbers, repeat(ZERO))))
        if numbers:
            self._numbers.setdefault(kind, []).extend(numbers)
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
        self._fit()

    def _fit(self) -> None:
        while len(self) > self.most and self.share > 2**-40:
            if self.share == 1:
                self._take_for_sure()
            self.share /= 2
            threshold = self.threshold
            for numbers in self._numbers.values():
                numbers[:] = [number for number in numbers if number < threshold]
            self._rows = sum(map(len, self._numbers.values()))
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
        for numbers in self._numbers.values():
            times.update(numbers)
        many = {number for number, count in times.items() if count >= _MANY_PAGES} - self.sure
        self.sure = self.sure | many
        for kind, numbers in self._numbers.items():
            for number, count in Counter([number for number in numbers if number in many]).items():
                self.count(number, kind, count)
            numbers[:] = [number for number in numbers if number not in self.sure]

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
        threshold = _threshold(share)
        times: Counter[int] = Counter()
        for numbers in self._numbers.values():
            times.update([number for number in numbers if number < threshold] if share < self.share else numbers)
        for number in self.sure & times.keys():
            del times[number]
        for found in self.shared.values():
            if found.number < threshold and found.number not in self.sure:
                times[found.number] += found.pages
        return Counter(times.values()), share

    def contents(self, again: int) -> tuple[Contents, list[Again], float]:
        """All of it, and some of the contents that several pages have, to be looked at again.

        :param again: about how many pages that may be
        :return: also the share of these contents that is
        """
        states, sets = self._states()
        several = [sum(self.kinds[kind].places * count for kind, count in pages) > 1 for pages in sets]
        kept = Counter[PageSet]()
        for state, contents in Counter(states.values()).items():
            if several[state]:
                kept[tuple(sorted(sets[state]))] += contents
        chosen: dict[int, Again] = {}
        share = min(self.share, self._again.share) if again else 0.0
        for row in self._candidates(share):
            if several[state := states[row.number]]:
                (chosen.get(row.number) or chosen.setdefault(row.number, Again(sets[state]))).add(row)
        if (rows := sum(len(one.rows) for one in chosen.values())) > again:
            # As everywhere: those with the least numbers.
            wanted = sorted(chosen)[: max(1, len(chosen) * again // rows)]
            chosen = {number: chosen[number] for number in wanted}
        # Not the chance with which they were taken: of few contents that may be all.
        taken = len(chosen) / kept.total() if kept else 1.0
        sure, zeroes = self._sure_sets()
        return Contents(self.kinds, kept, self.share, sure, zeroes), list(chosen.values()), taken

    def _candidates(self, share: float) -> Iterator[Row]:
        threshold = _threshold(share)
        for kind, (numbers, addresses) in self._again.columns.items():
            (owner,) = self.kinds[kind].owners
            for number, address in zip(numbers, addresses, strict=True):
                if number < threshold and number not in self.sure:
                    yield Row(number, owner, address)
        for frame in self.shared.values():
            if frame.number < threshold and frame.number not in self.sure:
                yield frame.row

    def _states(self) -> tuple[dict[int, int], list[PageSet]]:
        """Of each content a number that stands for the pages that have it, and what each stands for.

        Each kind takes all of its contents from one such state to another, in loops within the interpreter.
        """
        states: dict[int, int] = {}
        sets: list[PageSet] = [()]
        for kind, numbers in self._numbers.items():
            times = Counter(numbers)
            for number in self.sure & times.keys():
                del times[number]
            steps = _Steps(sets, kind)
            wanted = zip(map(states.get, times, repeat(0)), times.values(), strict=True)
            states.update(zip(times, list(map(steps.__getitem__, wanted)), strict=True))
        for found in self.shared.values():
            if found.number not in self.sure:
                steps = _Steps(sets, self.kind(found.kind()))
                states[found.number] = steps[states.get(found.number, 0), 1]
        return states, sets

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
