# SPDX-License-Identifier: GPL-2.0-or-later
"""/proc/kpageflags, kpagecount and kpagecgroup in bulk: 64 bits a frame.

Sources: include/uapi/linux/kernel-page-flags.h, fs/proc/page.c, Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, Unreadable, errno_text
from ksmd_ctl.kernel.pseudofile import Closing, read_error


class Bit(IntEnum):
    """KPF_*: numbers of bits, not masks."""

    DIRTY = 4
    SLAB = 7
    MMAP = 11
    ANON = 12
    SWAPCACHE = 13
    COMPOUND_HEAD = 15
    COMPOUND_TAIL = 16
    KSM = 21
    #: A huge page of any size, and a part of one.
    THP = 22
    #: KPF_MAPPEDTODISK for pages of files. On anonymous pages the same bit of the page means PageAnonExclusive
    #: since 5.19 (include/linux/page-flags.h: PG_anon_exclusive; tools/mm/page-types.c decodes it so).
    ANON_EXCLUSIVE = 34


# A read in the kernel costs about a microsecond before the first frame; a flag word 25 to 60 ns.
_GAP = 32
_ENTRY_BYTES = 8


def runs(frames: Iterable[int], gap: int = _GAP) -> list[tuple[int, int]]:
    """Ranges of frames (first, one past the last), ascending, that cover all of `frames` with holes up to `gap`."""
    return spans(sorted(set(frames)), gap)


def spans(frames: Iterable[int], gap: int = _GAP) -> list[tuple[int, int]]:
    """The same of frames that ascend."""
    found: list[tuple[int, int]] = []
    first = last = -1
    for frame in frames:
        if first < 0:
            first = last = frame
        elif frame - last <= gap:
            last = frame
        else:
            found.append((first, last + 1))
            first = last = frame
    if first >= 0:
        found.append((first, last + 1))
    return found


class FrameFile(Closing):
    """A file of the kernel's with 64 bits a frame."""

    def __init__(self, path: Path) -> None:
        """
        :raises Absent: the kernel doesn't have it (CONFIG_PROC_PAGE_MONITOR), or the unit hides it
        :raises Denied: only root may read it
        """
        self._path = path
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            what = str(self._path)
            if isinstance(error, FileNotFoundError):
                why = "this kernel does not have it, or ProcSubset=pid hides it"
                raise Absent(what, why, path=what, errno=error.errno) from error
            kind, why = Denied if isinstance(error, PermissionError) else Unreadable, errno_text(error.errno or 0)
            raise kind(what, why, hint="only root may read it", path=what, errno=error.errno) from error

    def raw(self, first: int, count: int) -> bytes:
        """What it has of `count` frames from `first` on, as the kernel wrote it; shorter where memory ends."""
        parts = []
        offset, left = first * _ENTRY_BYTES, count * _ENTRY_BYTES
        while left:
            try:
                data = os.pread(self._fd, left, offset)
            except OSError as error:
                raise read_error(str(self._path), error) from error
            if not data:
                break
            parts.append(data)
            offset += len(data)
            left -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read(self, first: int, count: int) -> array[int]:
        """The words of `count` frames from `first` on; fewer where memory ends."""
        words = array("Q")
        words.frombytes(self.raw(first, count))
        return words

    def at(self, frames: Iterable[int]) -> dict[int, int]:
        """The words of these frames, and of others that lay between; 0 beyond the end of memory."""
        found: dict[int, int] = {}
        for first, last in runs(frames):
            words = self.read(first, last - first)
            found.update(zip(range(first, first + len(words)), words, strict=True))
            found.update((frame, 0) for frame in range(first + len(words), last))
        return found

    def each(self, frames: Sequence[int], where: Iterable[tuple[int, int]]) -> array[int]:
        """The words of frames that ascend, one for each; 0 beyond the end of memory.

        :param where: their `spans`
        """
        found, index = array("Q"), 0
        for first, last in where:
            words = self.read(first, last - first)
            words.frombytes(bytes((last - first - len(words)) * _ENTRY_BYTES))
            until = bisect_left(frames, last, index)
            dense = until - index == last - first
            found.extend(words if dense else [words[frame - first] for frame in frames[index:until]])
            index = until
        return found

    def matching(self, frames: set[int], mask: int, value: int) -> set[int]:
        """Those of the frames whose words have this value under the mask."""
        found: set[int] = set()
        for first, last in runs(frames):
            words = self.read(first, last - first)
            found.update([frame for frame, word in enumerate(words, first) if word & mask == value])
        return found & frames

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FrameFlags(FrameFile):
    """The flags of frames."""

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__(root / "proc/kpageflags")


class FrameCounts(FrameFile):
    """How often frames are mapped, exact for pages that are no part of a huge one, as KSM pages are."""

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__(root / "proc/kpagecount")


class FrameCgroups(FrameFile):
    """The inode of the memory cgroup that each frame is charged to (its folder's, st_ino); 0 for none."""

    def __init__(self, root: Path = Path("/")) -> None:
        super().__init__(root / "proc/kpagecgroup")


# -- counting, many frames at once ---------------------------------------------------------------------------

# One big number for a block of flag words: CPython's big-integer loops are the fastest that the standard
# library has here, about as fast as numpy (findings F5). A mask longer than the block does no harm.
_BLOCK_FRAMES = 32768
_LOWEST = int.from_bytes((1).to_bytes(_ENTRY_BYTES, sys.byteorder) * _BLOCK_FRAMES, sys.byteorder)
_KSM = _LOWEST << Bit.KSM


def merged(flags: int) -> bool:
    """Whether a frame is a KSM page that is mapped, by bit 21.

    The bit alone is not enough: 6.18 shows it, with bit 12, on pages of the slab allocator, whose own data lies
    where the mapping would be (2639 of them on an idle host). No process maps these.
    """
    return flags & _MERGED_MASK == _MERGED


_MERGED = 1 << Bit.KSM | 1 << Bit.MMAP
_MERGED_MASK = _MERGED | 1 << Bit.SLAB
#: Mask and value of `merged`, for `FrameFile.matching`.
MERGED = (_MERGED_MASK, _MERGED)
#: The same of any anonymous page that is mapped.
ANONYMOUS = (1 << Bit.ANON | 1 << Bit.MMAP | 1 << Bit.SLAB, 1 << Bit.ANON | 1 << Bit.MMAP)


def count_ksm(raw: bytes) -> int:
    """How many of at most 32768 frames `merged` is true for."""
    flags = int.from_bytes(raw, sys.byteorder)
    marked = flags & _KSM
    if not marked:
        # Most blocks of most hosts: what follows is spared.
        return 0
    return ((marked >> Bit.KSM) & (flags >> Bit.MMAP) & ~(flags >> Bit.SLAB)).bit_count()


def candidate(flags: int) -> bool:
    """Whether a frame may hold a KSM page that is mapped, told without bit 21.

    A KSM page is anonymous, one page long, never PageAnonExclusive, and dirty unless it has a place in swap
    (mm/ksm.c:try_to_merge_one_page sets it dirty, lest reclaim drop it; only writing it to swap cleans it).
    So every KSM page passes. So do a few others: pages that fork shares *and* that were moved, swapped in or
    looked at by ksmd since, for these too end up dirty. Kernels before 5.19 don't mark exclusive pages.
    """
    return flags & _CANDIDATE_MASK == _CANDIDATE and flags & (1 << Bit.DIRTY | 1 << Bit.SWAPCACHE) != 0


_CANDIDATE = 1 << Bit.ANON | 1 << Bit.MMAP
_CANDIDATE_MASK = _CANDIDATE | 1 << Bit.SLAB | 1 << Bit.ANON_EXCLUSIVE | 1 << Bit.COMPOUND_HEAD | 1 << Bit.COMPOUND_TAIL
_MAPPED_ANON = _LOWEST << Bit.ANON


def count_candidates(raw: bytes) -> int:
    """How many of at most 32768 frames `candidate` is true for."""
    flags = int.from_bytes(raw, sys.byteorder)
    yes = (flags & _MAPPED_ANON) >> Bit.ANON & flags >> Bit.MMAP & (flags >> Bit.DIRTY | flags >> Bit.SWAPCACHE)
    if not yes:
        return 0
    no = flags >> Bit.ANON_EXCLUSIVE | flags >> Bit.COMPOUND_HEAD | flags >> Bit.COMPOUND_TAIL | flags >> Bit.SLAB
    return (yes & ~no).bit_count()
