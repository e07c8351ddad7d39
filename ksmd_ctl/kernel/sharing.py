# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts the frames that groups of processes share, from pagemap, kpageflags and kpagecount.

A host may have millions of merged pages, so what is done for each of them is a loop within the interpreter:

- Pages that are mapped once are left out by a bit of pagemap. How many of these are KSM pages is what smaps says (since
  6.7) less those that were counted; before, they are not known.
- Each frame has a state, a number that stands for the groups found to map it so far and how often each does: a group
  takes all of its frames from one state to another, so that no frame needs a list of groups.
- Only the states are counted, of the frames that somebody else maps, too, together with what /proc/kpagecount tells.

**A sample** takes a share of all frames by a hash of the frame's number, so that a frame is in it for whoever maps it,
or for nobody. Tabulation hashing is 3-independent (J. L. Carter and M. N. Wegman, *Universal classes of hash
functions*, 1979), so the variance of what is found is that of independent draws, and one call looks up a byte of all
the numbers. A smaller sample is part of a larger one: it is made smaller where there turns out to be too much to count.
Reading page tables costs the same then. Where that alone takes too long, processes are left out, and named.

**What fork shares** is mapped more than once as well, and is no KSM page. Where kpageflags does not tell these apart
(`ksmd_ctl.kernel.detection`), a process that is no fork and has none shares with others what KSM merged and nothing
else. What forks map smaps decides, as far as it can.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import compress, repeat
from operator import eq
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Cancelled, Denied, NoSuchProcess, ReadError
from ksmd_ctl.host.memory import ProcessId, Range
from ksmd_ctl.host.sharing import MOST_SETS, Sharing, SharingTally
from ksmd_ctl.kernel.contents import Asker
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.kpageflags import ANONYMOUS, MERGED, FrameCounts, spans
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, FRAME, PRESENT, Pagemap
from ksmd_ctl.kernel.proc_pid import START_TIME, LeftOut, read_stat, running_pids
from ksmd_ctl.kernel.processes import start_stack
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.reading import reading_seconds

_WORD_BYTES: Final = 8
# Frames that are kept, about 120 bytes each.
_MOST_FRAMES: Final = 1 << 20
# What is to be done at the end for a frame, in mappings of it that are taken in meanwhile.
_FRAME_COST: Final = 4
# Of the budget, what that may take however much was spent before.
_END_SHARE: Final = 0.2


def _octets(raw: bytes, place: int) -> bytes:
    """One byte of each word; 0 is the lowest."""
    return raw[(place if sys.byteorder == "little" else _WORD_BYTES - 1 - place) :: _WORD_BYTES]


@cache
def _table(mask: int, value: int) -> bytes:
    return bytes([octet & mask == value for octet in range(256)])


def having(words: array[int], mask: int, value: int) -> bytes:
    """For each word, 1 if it has this value under the mask, else 0."""
    raw, found = words.tobytes(), (1 << 8 * len(words)) - 1
    for place in range(_WORD_BYTES):
        if octet := mask >> 8 * place & 0xFF:
            table = _table(octet, value >> 8 * place & 0xFF)
            found &= int.from_bytes(_octets(raw, place).translate(table), "little")
    return found.to_bytes(len(words), "little")


def both(one: bytes, other: bytes, *, without: bool = False) -> bytes:
    """1 where both have 1; `without`: where the first has 1 and the other has not."""
    second = int.from_bytes(other, "little")
    return (int.from_bytes(one, "little") & (~second if without else second)).to_bytes(len(one), "little")


class _Sample:
    """Which frames are counted.

    :ivar chances: how many of 256
    """

    # Frames are told apart by 40 bits: 4 PiB of memory.
    _OCTETS = 5

    def __init__(self, chance: random.Random) -> None:
        self.chances = 256
        self._tables = [chance.randbytes(256) for _ in range(self._OCTETS)]

    @property
    def share(self) -> float:
        return self.chances / 256

    def taken(self, frames: array[int]) -> array[int]:
        """Those of frames, or of entries, that are counted."""
        if self.chances == 256:
            return frames
        raw, mixed = frames.tobytes(), 0
        for place, table in enumerate(self._tables):
            mixed ^= int.from_bytes(_octets(raw, place).translate(table), "little")
        low = bytes([1]) * self.chances + bytes(256 - self.chances)
        return array("Q", compress(frames, mixed.to_bytes(len(frames), "little").translate(low)))


#: Which groups map a frame, in order, and how often each of them.
_Mapped = tuple[tuple[int, int], ...]


class _Steps(dict[int, int]):
    """To which state a frame goes that one more group maps so often; states are numbered as they come up."""

    def __init__(self, members: list[_Mapped], group: int, times: int) -> None:
        self._members = members
        self._more = (group, times)

    def __missing__(self, state: int) -> int:
        self._members.append((*self._members[state], self._more))
        self[state] = len(self._members) - 1
        return self[state]


@dataclass(slots=True)
class _Seen:
    """What was found of frames.

    :ivar states: the state of each frame
    :ivar members: who maps the frames of each state; of the first, nobody
    :ivar groups: how many were taken in
    :ivar mappings: frames that were taken in, once a group, and `seconds` the CPU time that this took
    """

    sample: _Sample
    states: dict[int, int] = field(default_factory=dict)
    members: list[_Mapped] = field(default_factory=lambda: [()])
    groups: int = 0
    mappings: int = 0
    seconds: float = 0.0

    def add(self, frames: Counter[int]) -> None:
        """Take in how often the next group maps each frame."""
        states = self.states
        for times, these in _by_times(frames).items():
            steps = _Steps(self.members, self.groups, times)
            states.update(zip(these, map(steps.__getitem__, map(states.get, these, repeat(0))), strict=True))
        self.groups += 1
        self.mappings += len(frames)

    def thin(self) -> None:
        """Count half as many frames."""
        self.sample.chances //= 2
        self.mappings //= 2
        self.seconds /= 2
        kept = self.sample.taken(array("Q", self.states))
        self.states = {frame: self.states[frame] for frame in kept}


def _by_times(frames: Counter[int]) -> Mapping[int, Collection[int]]:
    """The frames that are mapped equally often, by how often that is."""
    alike = set(frames.values())
    if len(alike) == 1:
        return {alike.pop(): frames.keys()}
    found: dict[int, list[int]] = {times: [] for times in alike}
    for frame, times in frames.items():
        found[times].append(frame)
    return found


def count_shared(
    groups: Sequence[Sequence[ProcessId]],
    budget_cpu_seconds: float,
    *,
    reader: PageReader,
    uid: int = 0,
    root: Path = Path("/"),
    stop: Callable[[], bool] = lambda: False,
    chance: random.Random | None = None,
    cpu_clock: Callable[[], float] = lambda: time.process_time() + reading_seconds(),
) -> Sharing:
    """Count the frames that groups of processes share: `ksmd_ctl.host.interface.Host.sharing`.

    :param budget_cpu_seconds: CPU time that it may cost, about
    :param reader: tells KSM pages; for this look alone
    :param uid: of the user who asks, whose own processes are left out unless it is root
    :raises Denied, Absent: somebody's memory could not be looked at, and nobody else's was
    :raises Cancelled: `stop` said so
    """
    sample = _Sample(chance or random.Random())
    return _Look(groups, budget_cpu_seconds, reader, Asker(uid, root), stop, sample, cpu_clock).take()


class _Look:
    def __init__(
        self,
        groups: Sequence[Sequence[ProcessId]],
        budget: float,
        reader: PageReader,
        asker: Asker,
        stop: Callable[[], bool],
        sample: _Sample,
        cpu_clock: Callable[[], float],
    ) -> None:
        self.groups = groups
        self.budget = budget
        self.reader = reader
        self.asker = asker
        self.root = asker.root
        self.stop = stop
        self.clock = cpu_clock
        self.begin = cpu_clock()
        self.seen = _Seen(sample)
        self.unread = LeftOut()
        # Those for which there was no time.
        self.late: set[int] = set()
        # What is to be read of each process, and the KSM pages that it has.
        self.ranges: dict[ProcessId, list[Range]] = {}
        self.ksm_pages: dict[ProcessId, int] = {}
        self.pages = self.pages_read = 0
        self.read_seconds = 0.0
        # How many processes have a stack that begins at one place: forks of one another. Only where flags do not tell.
        self.stacks: Counter[int] = Counter()
        self.sole: set[int] = set()
        self.related: list[ProcessId] = []

    def take(self) -> Sharing:
        began = time.monotonic()
        if not self.reader.exact:
            for pid in running_pids(self.root):
                with suppress(NoSuchProcess, ReadError):
                    self.stacks[start_stack(read_stat(pid, self.root)[1])] += 1
        found = {process for group in self.groups for process in group if self._looked(process, self._find)}
        for group in self.groups:
            frames: Counter[int] = Counter()
            for process in group:
                if process in found and not self._looked(process, partial(self._read, frames)):
                    found.discard(process)
            before = self.clock()
            self.seen.add(frames)
            self.seen.seconds += self.clock() - before
            self._fit()
        self.unread.need(found)
        return self._result(began, found)

    def _spent(self) -> float:
        return self.clock() - self.begin

    def _looked(self, process: ProcessId, look: Callable[[ProcessId], None]) -> bool:
        """Look at a process; whether that could be done."""
        if self.stop():
            raise Cancelled("looking at who shares pages", "stopped before it was done")
        if self._spent() > self.budget:
            self.late.add(process.pid)
            return False
        with self.unread.looking_at(process.pid):
            look(process)
            return True
        return False

    def _fields(self, process: ProcessId) -> list[bytes]:
        """The fields of its stat, if it is still there."""
        fields = read_stat(process.pid, self.root)[1]
        if int(fields[START_TIME]) != process.start_time_ticks:
            raise NoSuchProcess(f"process {process.pid}", "it is gone, and its pid belongs to another process now")
        return fields

    def _find(self, process: ProcessId) -> None:
        """Find out what is to be read of a process."""
        pid = process.pid
        self._fields(process)
        if not self.asker.may_compare(pid):
            raise Denied(f"process {pid}", "it is the asking user's own")
        # Nothing else is ever merged.
        mergeable = [item for item in mappings(pid, self.root) if item.mergeable and item.anonymous_pages]
        self.ksm_pages[process] = sum(item.ksm_pages or 0 for item in mergeable)
        self.ranges[process] = [item for item in mergeable if _shares(item)]
        self.pages += sum(item.anonymous_pages for item in self.ranges[process])

    def _read(self, frames: Counter[int], process: ProcessId) -> None:
        """Add the frames that a process maps and somebody else maps, too."""
        before, ranges = self.clock(), self.ranges[process]
        if not ranges:
            return
        found: list[int] = []
        with Pagemap(process.pid, self.root) as pagemap:
            for _, _, entries in self.reader.read(pagemap, ranges):
                shared = having(entries, PRESENT | FILE | EXCLUSIVE, PRESENT)
                if 1 in shared:
                    taken = self.seen.sample.taken(array("Q", compress(entries, shared)))
                    found += [entry & FRAME for entry in taken]
        self.read_seconds += self.clock() - before
        self.pages_read += sum(item.anonymous_pages for item in ranges)
        before = self.clock()
        # A pid that was given to another meanwhile has told nothing.
        fields = self._fields(process)
        if not self.reader.exact:
            start = start_stack(fields)
            if start and self.stacks[start] == 1:
                self.sole.update(found)
            else:
                self.related.append(process)
        frames.update(found)
        self.seen.seconds += self.clock() - before

    def _fit(self) -> None:
        """Make the sample smaller until what is to be done fits into the budget, and what is kept into memory."""
        seen = self.seen
        while seen.sample.chances > 1 and (len(seen.states) > _MOST_FRAMES or self._needed() > self._left()):
            seen.thin()

    def _left(self) -> float:
        """What there is left for frames: a smaller sample makes no page table faster to read."""
        to_read = self.read_seconds * (self.pages / self.pages_read - 1) if self.pages_read else 0.0
        return max(self.budget - self._spent() - to_read, self.budget * _END_SHARE)

    def _needed(self) -> float:
        if not self.pages_read or not self.seen.mappings:
            return 0.0
        more = self.pages / self.pages_read
        to_take = self.seen.mappings * (more - 1) + _FRAME_COST * len(self.seen.states) * more
        return self.seen.seconds / self.seen.mappings * to_take

    # -- at the end ------------------------------------------------------------------------------------------

    def _result(self, began: float, found: set[ProcessId]) -> Sharing:
        frames = sorted(self.seen.states)
        where = spans(frames)
        merged, forked = self._kinds(frames, self.reader.flags.each(frames, where))
        with FrameCounts(self.root) as counts:
            mapped = counts.each(frames, where)
        tally = self._tally(frames, merged, forked, mapped)
        while len(tally) > MOST_SETS and self.seen.sample.chances > 1:
            self.seen.thin()
            kept = bytes(map(self.seen.states.__contains__, frames))
            merged, forked = bytes(compress(merged, kept)), bytes(compress(forked, kept))
            frames, mapped = list(compress(frames, kept)), array("Q", compress(mapped, kept))
            tally = self._tally(frames, merged, forked, mapped)
        share, sets = self.seen.sample.share, tally.sets()
        counted = [0] * len(self.groups)
        for one in sets:
            for group, pages in zip(one.groups, one.pages, strict=True):
                counted[group] += pages if one.merged else 0
        ksm_pages = [sum(self.ksm_pages[one] for one in group if one in found) for group in self.groups]
        unread = {*self.unread.errors, *self.late}
        everybody = {process for group in self.groups for process in group}
        return Sharing(
            time_seconds=began,
            sets=sets,
            alone=tuple(max(0, all_ - round(some / share)) for all_, some in zip(ksm_pages, counted, strict=True)),
            share=share,
            complete=share == 1 and not unread,
            detection=self.reader.detection,
            cpu_seconds=self._spent(),
            gone=tuple(sorted(process.pid for process in everybody - found if process.pid not in unread)),
            unread=tuple(sorted(unread)),
        )

    def _kinds(self, frames: Sequence[int], flags: array[int]) -> tuple[bytes, bytes]:
        """For each frame, 1 if it is a KSM page, and 1 if it is another anonymous page."""
        anonymous = having(flags, *ANONYMOUS)
        if self.reader.exact:
            merged = having(flags, *MERGED)
            return merged, both(anonymous, merged, without=True)
        likely: dict[int, float] = {}
        for process in self.related:
            with self.unread.looking_at(process.pid):
                likely.update(self.reader.learn(process.pid, self.ranges[process]))
        # Those that are decided not to be are not likely either.
        sure = self.sole | {frame for frame, ksm in self.reader.decided.items() if ksm}
        sure.update([one for one, chance in likely.items() if chance > 0.5 and one not in self.reader.decided])
        merged = both(anonymous, bytes(map(sure.__contains__, frames)))
        return merged, both(anonymous, merged, without=True)

    def _tally(self, frames: Sequence[int], merged: bytes, forked: bytes, mapped: array[int]) -> SharingTally:
        members = self.seen.members
        states = list(map(self.seen.states.__getitem__, frames))
        found = [sum(times for _, times in who) for who in members]
        # As many mappings as were found: nobody else maps it.
        usual = bytes(map(eq, mapped, map(found.__getitem__, states)))
        tally = SharingTally()
        for kind, chosen in ((True, merged), (False, forked)):
            for state, count in Counter(compress(states, both(chosen, usual))).items():
                tally.add(dict(members[state]), merged=kind, frames=count)
            unusual = Counter(compress(zip(states, mapped, strict=True), both(chosen, usual, without=True)))
            for (state, all_), count in unusual.items():
                tally.add(dict(members[state]), unseen=max(0, all_ - found[state]), merged=kind, frames=count)
        return tally


def _shares(item: Range) -> bool:
    """Whether some page of a mapping may be mapped elsewhere, too."""
    return item.pss_bytes is None or item.pss_bytes < item.resident_pages * PAGE_SIZE
