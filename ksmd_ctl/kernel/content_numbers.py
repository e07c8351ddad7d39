# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers of contents, of which only some are wanted: by a hash of some of its bytes a page is passed over at once.

To hash a page takes twice as long as to read it. So the upper bits of a number are made of every 61st byte, and
contents are sampled by these (`ksmd_ctl.host.sampling`): the rest of a page is hashed only where its content is taken.
Contents with the same bytes at these places are taken together or not at all. Of 220,000 contents of three Linux guests
and some programs 8 % were in such groups, none of more than 207 contents. Zeroes are different, which pages with little
in them have there: such pages are always hashed, and sampled by all of their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.kernel.pseudofile import PAGE_SIZE

#: The number of the content of a page of zeroes.
ZERO: Final = hash(_ZEROES := bytes(PAGE_SIZE))

# Numbers have so many bits, of which the lower ones are made of all bytes. From -2**63 to 2**63 - 1 each is as likely
# as any other.
_BITS: Final = 64
_OTHERS: Final = 40
_OTHER_BITS: Final = (1 << _OTHERS) - 1
#: At least such a share of contents is taken: the upper bits tell no smaller one.
LEAST_SHARE: Final = 2.0 ** (_OTHERS - _BITS)

#: Pages that are read in one call.
READ_PAGES: Final = 64

# Prime: structures lie at multiples of powers of two.
_STEP: Final = 61
_STARTS: Final = range(0, READ_PAGES * PAGE_SIZE, PAGE_SIZE)
_PAGES: Final = tuple(slice(start, start + PAGE_SIZE) for start in _STARTS)
_SOME_BYTES: Final = tuple(slice(start, start + PAGE_SIZE, _STEP) for start in _STARTS)
_KEY_OF_ZEROES: Final = hash(_ZEROES[::_STEP])
_ALWAYS_ALSO: Final = frozenset({_KEY_OF_ZEROES >> _OTHERS})


def numbers_of(data: bytes, number: Callable[[bytes], int] = hash, parts: Sequence[slice] = _PAGES) -> Iterator[int]:
    """The numbers of pages that lie one after the other, at most `READ_PAGES`.

    :param number: makes one of a content. Of SipHash with a key of this process's own, which is three times as quick as
        anything of hashlib's, nobody can make contents that meet.
    :param parts: of what of each page
    """
    return map(number, map(data.__getitem__, parts[: len(data) // PAGE_SIZE]))


def threshold_of(share: float) -> int:
    """Numbers below it are such a share of all."""
    return round(share * (1 << _BITS)) - (1 << _BITS - 1)


@dataclass(slots=True)
class ContentSample:
    """
    :ivar threshold: contents with numbers below it are taken
    :ivar also: the upper bits of numbers; contents whose numbers may have these are taken, too
    """

    threshold: int = threshold_of(1.0)
    also: Set[int] = _ALWAYS_ALSO

    def take(self, share: float, numbers: Set[int]) -> None:
        """Take this share of contents from now on, and besides those with these numbers."""
        self.threshold = threshold_of(share)
        self.also = _ALWAYS_ALSO.union(number >> _OTHERS for number in numbers)

    def numbers(self, data: bytes) -> list[int]:
        """The numbers of pages that lie one after the other; of those that are not taken any that is not below."""
        found = list(numbers_of(data, parts=_SOME_BYTES))
        threshold, also = self.threshold, self.also
        for index in [index for index, key in enumerate(found) if key < threshold or key >> _OTHERS in also]:
            content, key = data[_PAGES[index]], found[index]
            if key != _KEY_OF_ZEROES:
                found[index] = key & ~_OTHER_BITS | hash(content) & _OTHER_BITS
            else:
                # To compare takes a tenth of the time.
                found[index] = ZERO if content == _ZEROES else hash(content)
        return found
