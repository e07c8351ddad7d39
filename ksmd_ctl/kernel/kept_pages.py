# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of which the number of their content was kept, by a threshold of that number (`ksmd_ctl.host.sampling`).

A host may have millions of pages: those that are mapped once are kept in columns, 20 bytes each. Of a frame that
several map it is kept who they are, and where it lies in forks of one another, which is one place for all of them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress, groupby
from typing import Final, NamedTuple

from ksmd_ctl.host.estimate import Contents, PageKind
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

#: The number of the content of a page of zeroes.
ZERO: Final = hash(bytes(PAGE_SIZE))

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
    _numbers: array[int] = field(default_factory=lambda: array("q"))
    _kinds: array[int] = field(default_factory=lambda: array("I"))
    _addresses: array[int] = field(default_factory=lambda: array("Q"))
    _sure: Counter[tuple[int, int]] = field(default_factory=Counter)
    _shared_mappings: int = 0

    def __len__(self) -> int:
        return len(self._numbers) + self._shared_mappings

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

    def add(self, kind: int, address: int, numbers: Sequence[int]) -> None:
        """Pages that lie at an address one after the other, are mapped once each, and are of one kind."""
        addresses: Sequence[int] = range(address, address + len(numbers) * PAGE_SIZE, PAGE_SIZE)
        if not self.sure.isdisjoint(numbers):
            sure = self.sure
            for number, count in Counter([number for number in numbers if number in sure]).items():
                self.count(number, kind, count)
            other = [number not in sure for number in numbers]
            numbers, addresses = list(compress(numbers, other)), list(compress(addresses, other))
        if self.share < 1:
            threshold = self.threshold
            kept = [number < threshold for number in numbers]
            numbers, addresses = list(compress(numbers, kept)), list(compress(addresses, kept))
        self._numbers.extend(numbers)
        self._addresses.extend(addresses)
        self._kinds.extend([kind] * len(numbers))
        self._fit()

    def add_without(self, kind: int, address: int, numbers: Sequence[int], content: int) -> None:
        """As `add`, without the pages that have a content."""
        start = 0
        for found in [*(index for index, number in enumerate(numbers) if number == content), len(numbers)]:
            if start < found:
                self.add(kind, address + start * PAGE_SIZE, numbers[start:found])
            start = found + 1

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
            self.share /= 2
            threshold = self.threshold
            kept = [number < threshold for number in self._numbers]
            for column in ("_numbers", "_kinds", "_addresses"):
                whole: array[int] = getattr(self, column)
                setattr(self, column, array(whole.typecode, compress(whole, kept)))
            gone = [frame for frame, found in self.shared.items() if not self.keeps(found.number)]
            self.given_up.update(gone)
            for frame in gone:
                del self.shared[frame]
            self._shared_mappings = sum(len(found.owners) for found in self.shared.values())

    def sure_pages(self) -> int:
        """How many pages have a content that is `sure`."""
        return self._sure.total()

    # -- what it says --------------------------------------------------------------------------------------------

    def occupancy(self, most: int) -> tuple[Counter[int], float]:
        """How many contents were found how often so far, of at most about so many pages; and of which share that is."""
        share = self.share * min(1.0, most / max(1, len(self._numbers)))
        threshold = _LEAST + round(share * _NUMBERS)
        numbers = self._numbers if share == self.share else [one for one in self._numbers if one < threshold]
        times = Counter(numbers)
        for found in self.shared.values():
            if found.number < threshold and found.number not in self.sure:
                times[found.number] += found.pages
        return Counter(times.values()), share

    def groups(self) -> Iterator[tuple[int, list[int], list[Row]]]:
        """Contents that several pages have, ascending by number: that, the kinds of these pages, and the pages."""
        numbers, kinds, addresses = self._numbers, self._kinds, self._addresses
        times = Counter(numbers)
        places = Counter[int]()
        for found in self.shared.values():
            times[found.number] += 1
            places[found.number] += found.pages
        several = {number for number, count in times.items() if count > 1 or places.get(number, 0) > 1} - self.sure
        del times
        chosen = [index for index, number in enumerate(numbers) if number in several]
        chosen.sort(key=numbers.__getitem__)
        shared: dict[int, list[SharedFrame]] = {}
        for found in self.shared.values():
            if found.number in several:
                shared.setdefault(found.number, []).append(found)
        for number, group in groupby(chosen, key=numbers.__getitem__):
            indices, more = list(group), shared.pop(number, [])
            rows = [Row(number, self.kinds[kinds[index]].owners[0], addresses[index]) for index in indices]
            found_kinds = [kinds[index] for index in indices] + [self.kind(frame.kind()) for frame in more]
            yield number, found_kinds, rows + [frame.row for frame in more]
        for number, more in sorted(shared.items()):
            yield number, [self.kind(frame.kind()) for frame in more], [frame.row for frame in more]

    def contents(self, sets: Counter[tuple[int, ...]]) -> Contents:
        """All of it, with what `groups` gave as sets of kinds."""
        by_number: dict[int, Counter[int]] = {}
        for (number, kind), count in self._sure.items():
            by_number.setdefault(number, Counter())[kind] += count
        for found in self.shared.values():
            if found.number in self.sure:
                by_number.setdefault(found.number, Counter())[self.kind(found.kind())] += 1
        zeroes = by_number.pop(ZERO, Counter())
        sure = Counter(tuple(sorted(kinds.elements())) for kinds in by_number.values())
        return Contents(self.kinds, sets, self.share, sure, zeroes)
