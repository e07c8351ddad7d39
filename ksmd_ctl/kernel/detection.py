# SPDX-License-Identifier: GPL-2.0-or-later
"""Which frames hold KSM pages: by bit 21 of kpageflags where it tells the truth, else by pagemap and smaps.

Bit 21 lies on some kernels: 6.12's fs/proc/page.c sets it on every anonymous page (findings F19). So it is tried
at start on a fresh page of our own, which can't be merged.

**Detection by pagemap** joins two things that such kernels do tell rightly:

- a *necessary* condition a frame, `ksmd_ctl.kernel.kpageflags.candidate`: no KSM page fails it, and of other
  pages only those pass that fork shares and that were moved, swapped in or looked at by ksmd since. (That a page
  is mapped more than once is neither necessary nor sufficient: the last mapping of a KSM page is one.)
- an *exact count* a mapping, the line ``KSM:`` of smaps (since 6.7): KSM pages, counted once a mapping.

A mapping with no more candidates than KSM pages has no others: there every page is decided, exactly. A mapping
without KSM pages has none: exact too. What is left are mappings with both kinds. A frame that is decided in one
mapping is decided in all, and where the decided ones make up the count, the rest follows. Only what is left after
that is `State.UNDECIDED`: KSM pages are at most so many more. Limits:

- counts and pages are not read at one moment. While a process merges or writes, a page may be taken for what it
  was a moment ago, as with bit 21. A count that changed meanwhile is read again, and the greater one is used.
- a KSM page that MADV_FREE was called on and that is mapped once is no longer dirty; it is taken for a plain page.
- pages that ksmd mapped to the zero page are no KSM pages, however they are detected.
"""

from __future__ import annotations

import bisect
import mmap
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, ReadError
from ksmd_ctl.host.memory import KsmDetection, Range
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.kpageflags import MERGED, Bit, FrameFlags, candidate, merged
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of, own_parts, pieces
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, Closing
from ksmd_ctl.kernel.ranges import mappings, read_ranges

#: Pages that are looked at in one go: 128 MiB of address space, 256 KiB of pagemap.
WINDOW_PAGES = 32768
#: One more call to un-merge pages takes as long as to un-merge some thirty more: so up to so many pages of a process's
#: own between merged ones are passed over.
GAP_PAGES = 32
# Pages between two parts that are read over, where a second reading would take longer.
_READ_OVER_PAGES = 4096

_TRIES = 3


class State(IntEnum):
    """What a page is."""

    PLAIN = 0
    KSM = 1
    UNDECIDED = 2


@dataclass(frozen=True, slots=True)
class Probe:
    """What this kernel's files say about a fresh page, which is anonymous, mapped once and can't be merged.

    :ivar bit_lies: kpageflags calls it a KSM page
    :ivar exclusive_shows: kpageflags calls it exclusive
    :ivar smaps_counts: smaps has a line for KSM
    """

    bit_lies: bool
    exclusive_shows: bool
    smaps_counts: bool


def probe() -> Probe:
    """Look at a fresh page of our own, on the machine that this runs on.

    :raises Absent, Denied: pagemap or kpageflags can't be had
    """
    memory = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        # Random, so that ksmd has no second one, even where everything is mergeable (prctl, inherited).
        memory[:] = os.urandom(PAGE_SIZE)
        address = syscalls.address_of(memory)
        with Pagemap(os.getpid()) as pagemap, FrameFlags() as frame_flags:
            (frame,) = frames_of(pagemap.read_frames(address, 1))
            flags = frame_flags.at([frame])[frame]
    finally:
        memory.close()
    if not flags >> Bit.ANON & 1:
        raise Absent(
            "flags of frames", f"a fresh page has the flags {flags:#x}, which don't say anonymous", value=flags
        )
    return Probe(
        bit_lies=bool(flags >> Bit.KSM & 1),
        exclusive_shows=bool(flags >> Bit.ANON_EXCLUSIVE & 1),
        smaps_counts=any(item.ksm_pages is not None for item in mappings(os.getpid())),
    )


def choose(found: Probe) -> KsmDetection:
    """How to detect KSM pages here.

    :raises Absent: neither is any good
    """
    if not found.bit_lies:
        return KsmDetection.KPAGEFLAGS
    if found.exclusive_shows and found.smaps_counts:
        return KsmDetection.PAGEMAP
    missing = "exclusive pages" if found.smaps_counts else "KSM pages in smaps"
    raise Absent("KSM pages", f"this kernel reports every anonymous page as a KSM page and does not provide {missing}")


@contextmanager
def reader_or_none(root: Path = Path("/")) -> Iterator[PageReader | None]:
    """`open_reader`; None where nothing can tell KSM pages here."""
    try:
        reader = open_reader(root)
    except (ReadError, Denied):
        yield None
        return
    with reader:
        yield reader


def open_reader(root: Path = Path("/")) -> PageReader:
    """A reader that detects KSM pages as this kernel allows.

    :raises Absent, Denied, Unreadable: none can
    """
    return PageReader(choose(probe()), root)


@dataclass(frozen=True, slots=True)
class Window:
    """Adjacent pages of one mapping.

    :ivar entries: a page each, as pagemap has it
    :ivar frames: a page each, 0 where none is present
    :ivar states: a page each, `State`
    """

    mapping: Range
    start: int
    entries: array[int]
    frames: Sequence[int]
    states: bytes

    def merged(self, first: int = 0, last: int | None = None) -> list[int]:
        """The indices of KSM pages, from `first` to before `last`."""
        # Of bytes this is ten times quicker than to compare each with a member of an enum.
        found = _MERGED_STATE.finditer(self.states, first, len(self.states) if last is None else last)
        return [match.start() for match in found]

    def runs(self) -> int:
        """In how many runs KSM pages lie, with at most `GAP_PAGES` other pages between two of them."""
        return sum(1 for _ in _MERGED_RUN.finditer(self.states))


_MERGED_STATE = re.compile(bytes([State.KSM]))
_MERGED_RUN = re.compile(b"%(ksm)b(?:[^%(ksm)b]{0,%(gap)d}%(ksm)b)*" % {b"ksm": bytes([State.KSM]), b"gap": GAP_PAGES})


class PageReader(Closing):
    """Tells the KSM pages of processes, in one of the two ways.

    What it learns about frames with detection by pagemap it keeps: use one for one job, and not for long.

    :ivar decided: frames whose state was found out in some mapping
    :ivar exact: a frame's flags alone decide
    :ivar may_be_merged: tells by a frame's flags whether it holds a KSM page, or may hold one where it is not `exact`
    """

    def __init__(
        self,
        detection: KsmDetection,
        root: Path = Path("/"),
        flags: FrameFlags | None = None,
        *,
        still: bool = False,
    ) -> None:
        """
        :param still: nothing merges or changes while it looks, so counts are read once
        """
        self.detection = detection
        self.exact = detection is KsmDetection.KPAGEFLAGS
        self.may_be_merged = merged if self.exact else candidate
        self.decided: dict[int, bool] = {}
        self.flags = flags or FrameFlags(root)
        self._root = root
        self._still = still

    def close(self) -> None:
        self.flags.close()

    def windows(
        self,
        pid: int,
        ranges: Iterable[Range],
        within: Sequence[tuple[int, int]] = (),
        everything: Iterable[Range] = (),
    ) -> Iterator[Window]:
        """The pages of mappings, or of the parts of them that lie in one of `within`, which ascend and do not overlap.

        Holes of mappings that are mostly holes are left out, where the kernel can skip them. Without KSM pages in a
        mapping its flags aren't read at all.

        :param everything: all mappings of the process, where they are to help to decide what is in these
        :raises NoSuchProcess: it went away; windows that were handed out stand
        :raises Denied: it is not ours to look at
        """
        ranges = list(ranges)
        with Pagemap(pid, self._root) as pagemap:
            candidates = {} if self.exact else self._survey(pid, pagemap, list(everything) or ranges)[0]
            for item, start, entries in self.read(pagemap, ranges, within):
                frames = frames_of(entries)
                if self.exact and item.ksm_pages != 0:
                    ksm = self.flags.matching(set(frames) - {0}, *MERGED)
                    states = bytes([frame in ksm for frame in frames])
                else:
                    states = self._states(frames, candidates.get(item.start, {}))
                yield Window(item, start, entries, frames, states)

    def _states(self, frames: list[int], candidates: dict[int, int]) -> bytes:
        found = {frame: self.decided.get(frame, State.UNDECIDED) for frame in candidates.keys() & set(frames)}
        return bytes([found.get(frame, State.PLAIN) for frame in frames]) if found else bytes(len(frames))

    def likely(self, frames: Iterable[int]) -> list[int]:
        """Those of the frames that are KSM pages, once a mapping; with detection by pagemap frames that may be.

        For estimates: it looks at nothing but these pages.

        :param frames: a page each, 0 where none is present
        """
        frames = [frame for frame in frames if frame]
        flags = self.flags.at(frames)
        return [frame for frame in frames if self.may_be_merged(flags[frame])]

    def learn(self, pid: int, ranges: Iterable[Range]) -> dict[int, float]:
        """Decide by pagemap what can be decided in a process, for the sake of others that map the same frames.

        :returns: frames that stay undecided, and how likely each is a KSM page if they all are alike
        :raises NoSuchProcess, Denied: as `windows`
        """
        with Pagemap(pid, self._root) as pagemap:
            candidates, counts = self._survey(pid, pagemap, list(ranges))
        found: dict[int, float] = {}
        for start, frames in candidates.items():
            unknown = {frame: times for frame, times in frames.items() if frame not in self.decided}
            if unknown and self._open(frames, counts[start]):
                sure = sum(times for frame, times in frames.items() if self.decided.get(frame))
                share = (counts[start] - sure) / sum(unknown.values())
                found.update((frame, max(share, found.get(frame, 0.0))) for frame in unknown)
        return found

    def learn_plain(self, pid: int, ranges: Iterable[Range]) -> None:
        """Look at mappings without KSM pages: what they hold is none elsewhere.

        :raises NoSuchProcess, Denied: as `windows`
        """
        with Pagemap(pid, self._root) as pagemap:
            self._learn_plain(pagemap, ranges)

    def _learn_plain(self, pagemap: Pagemap, ranges: Iterable[Range]) -> None:
        plain = [item for item in ranges if item.ksm_pages == 0]
        for candidates in self._candidates(pagemap, plain).values():
            self.decided.update(dict.fromkeys(candidates, False))

    def read(
        self, pagemap: Pagemap, ranges: Iterable[Range], within: Sequence[tuple[int, int]] = ()
    ) -> Iterator[tuple[Range, int, array[int]]]:
        """Mappings, or the parts of them that lie in one of `within`: where each begins, and the entries of its pages.

        Parts that are near to one another are read together: a process may have 65,530 mappings of a page each.
        """
        for group in _near(self._places(pagemap, ranges, within)):
            first, last = group[0][1], group[-1][2]
            entries = pagemap.read_frames(first, (last - first) // PAGE_SIZE)
            if len(group) == 1:
                yield group[0][0], first, entries
                continue
            for item, start, end in group:
                yield item, start, entries[(start - first) // PAGE_SIZE : (end - first) // PAGE_SIZE]

    def _places(
        self, pagemap: Pagemap, ranges: Iterable[Range], within: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[Range, int, int]]:
        for item in ranges:
            for start, count in pieces(_parts(own_parts(pagemap, item), within), WINDOW_PAGES):
                yield item, start, start + count * PAGE_SIZE

    def _survey(
        self, pid: int, pagemap: Pagemap, ranges: list[Range]
    ) -> tuple[dict[int, dict[int, int]], dict[int, int]]:
        # Candidate frames of each mapping with KSM pages, and their number, both by the mapping's start.
        candidates: dict[int, dict[int, int]] = {}
        counts = {item.start: item.ksm_pages or 0 for item in ranges}
        left = [item for item in ranges if item.mergeable and item.ksm_pages]
        for _ in range(_TRIES):
            candidates.update(self._candidates(pagemap, left))
            # Read again after the pages: what changed meanwhile shows in the difference.
            if self._still or not left:
                break
            again = {item.start: item for item in read_ranges(pid, self._root)}
            moving = []
            for item in left:
                now = again.get(item.start, item)
                counts[item.start] = max(item.ksm_pages or 0, now.ksm_pages or 0)
                if now.ksm_pages != item.ksm_pages and self._open(candidates[item.start], counts[item.start]):
                    moving.append(now)
            left = moving
        self._settle(candidates, counts)
        if any(self._open(found, counts[start]) for start, found in candidates.items()):
            # Only now is it worth it to look at mappings without KSM pages: what they hold is none elsewhere.
            self._learn_plain(pagemap, ranges)
            self._settle(candidates, counts)
        return candidates, counts

    def _open(self, candidates: dict[int, int], count: int) -> bool:
        # Whether a mapping has both kinds, and some frames in it are of unknown kind.
        return sum(candidates.values()) > count and any(frame not in self.decided for frame in candidates)

    def _settle(self, candidates: dict[int, dict[int, int]], counts: dict[int, int]) -> None:
        # Each round may decide a frame that decides another mapping.
        known = -1
        while known != len(self.decided):
            known = len(self.decided)
            for start, found in candidates.items():
                self._decide(found, counts[start])

    def _decide(self, candidates: dict[int, int], count: int) -> None:
        if sum(candidates.values()) <= count:
            self.decided.update(dict.fromkeys(candidates, True))
            return
        unknown = {frame: times for frame, times in candidates.items() if frame not in self.decided}
        sure = sum(times for frame, times in candidates.items() if self.decided.get(frame))
        if sure >= count:
            self.decided.update(dict.fromkeys(unknown, False))
        elif sure + sum(unknown.values()) <= count:
            self.decided.update(dict.fromkeys(unknown, True))

    def _candidates(self, pagemap: Pagemap, ranges: Sequence[Range]) -> dict[int, dict[int, int]]:
        # Candidate frames of each mapping, by its start, and how often each is mapped there.
        found: dict[int, dict[int, int]] = {item.start: {} for item in ranges}
        for item, _, entries in self.read(pagemap, ranges):
            counts = found[item.start]
            for frame in self.likely(frames_of(entries)):
                counts[frame] = counts.get(frame, 0) + 1
        return found


def _near(places: Iterable[tuple[Range, int, int]]) -> Iterator[list[tuple[Range, int, int]]]:
    """Places with start and end, ascending, in groups that are worth one reading each."""
    group: list[tuple[Range, int, int]] = []
    for place in places:
        if group:
            between = place[1] - group[-1][2]
            if not 0 <= between <= _READ_OVER_PAGES * PAGE_SIZE or place[2] - group[0][1] > WINDOW_PAGES * PAGE_SIZE:
                yield group
                group = []
        group.append(place)
    if group:
        yield group


def _parts(parts: Sequence[tuple[int, int]], within: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of `parts` lies in one of `within`; both ascend and do not overlap. `within` is empty for everything."""
    if not within:
        yield from parts
    for first, last in parts:
        for index in range(bisect.bisect_right(within, first, key=lambda one: one[1]), len(within)):
            start, end = within[index]
            if start >= last:
                break
            yield max(start, first), min(end, last)
