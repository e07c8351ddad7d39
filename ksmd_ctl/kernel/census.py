# SPDX-License-Identifier: GPL-2.0-or-later
"""How many KSM pages each node holds: all frames counted where that fits the budget, else a sample of them.

With detection by pagemap (`ksmd_ctl.kernel.detection`) a count of frames is only an upper bound, for pages that fork
shares may look alike. Where the budget allows it every process is looked at instead, which decides nearly every
frame. Where not, the bound is what there is, and `pages_shared` bounds it from below: what the other nodes can't
hold must be here. That counter may still hold pages that were freed since ksmd last passed them.

**The sample.** Merged pages lie in clusters (a machine's memory, a template's pages) or hardly anywhere, so frames are
drawn as blocks, and the usual interval for means is much too narrow where most blocks are empty. In a round the blocks
are cut into n strata of adjacent ones, as equal as can be, and one block is drawn from each. Rounds are independent;
how many there are depends on time alone, never on what was found.

**Its interval** is the empirical Bernstein bound for independent variables in [0, 1] (A. Maurer and M. Pontil,
*Empirical Bernstein bounds and sample variance penalization*, COLT 2009, theorem 11): with probability at least 1 - d
the mean of the expectations is below the mean found + sqrt(2 V ln(2/d) / n) + 7 ln(2/d) / (3 (n - 1)), V the sample
variance. It assumes nothing about how marked frames lie. The second term is its price: with 20,000 blocks 0.05 % of
memory. What was seen bounds it too: there are no fewer marked frames than were counted, nor fewer others.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ksmd_ctl.errors import Cancelled, KsmdError
from ksmd_ctl.host.memory import Census
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.kpageflags import count_candidates, count_ksm
from ksmd_ctl.kernel.proc_pid import running_pids
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.kernel.topology import FrameMap, Span

#: Frames in a block that is drawn: 4 KiB of flags. Smaller blocks make a narrower interval, larger ones less calls.
BLOCK_FRAMES = 512
# Both sides together miss with 5 % at most.
_LOG = math.log(2 / 0.025)
# 256 KiB of flags: findings F5.
_READ_FRAMES = 32768
# Draws of the first round on each node: enough to know what one costs.
_FIRST_DRAWS = 64
# Of the budget, for the last round is not to go over it.
_SHARE = 0.9
# And of it, for looking at processes: if they turn out to be too many, the rest must do for a sample.
_WALK_SHARE = 0.6


def take(
    budget_cpu_seconds: float,
    *,
    reader: PageReader,
    frames: FrameMap,
    pages_shared: int | None = None,
    root: Path = Path("/"),
    stop: Callable[[], bool] = lambda: False,
    chance: random.Random | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
) -> Census:
    """Count the KSM pages of each node.

    :param budget_cpu_seconds: CPU time of this process that it may cost, about
    :param pages_shared: the kernel's counter while ksmd runs; only detection by pagemap uses it
    :raises Cancelled: `stop` said so
    """
    job = _Job(budget_cpu_seconds, frames, reader, stop, cpu_clock)
    time_seconds = time.monotonic()
    if reader.exact:
        found, complete = job.count(count_ksm, chance or random.Random())
    else:
        try:
            found, complete = job.walk(root), True
        except _OverBudget:
            bounds, complete = job.count(count_candidates, chance or random.Random())
            complete = complete and not any(item.frames for item in bounds.values())
            found = _bounded(bounds, pages_shared)
    return Census(
        time_seconds=time_seconds,
        pages={node: estimate.frames for node, estimate in found.items()},
        low={node: estimate.low for node, estimate in found.items()},
        high={node: estimate.high for node, estimate in found.items()},
        complete=complete,
        detection=reader.detection,
        cpu_seconds=job.spent(),
    )


class _Job:
    def __init__(
        self,
        budget: float,
        frames: FrameMap,
        reader: PageReader,
        stop: Callable[[], bool],
        cpu_clock: Callable[[], float],
    ) -> None:
        self.budget = budget
        self.frames = frames
        self.reader = reader
        self.stop = stop
        self.cpu_clock = cpu_clock
        self.begin = cpu_clock()

    def spent(self) -> float:
        return self.cpu_clock() - self.begin

    def check(self) -> None:
        if self.stop():
            raise Cancelled("the census", "stopped before it was done")

    # -- all frames, or a sample of them ---------------------------------------------------------------------

    def count(self, marked: Callable[[bytes], int], chance: random.Random) -> tuple[dict[int, Estimate], bool]:
        """Frames that are marked on each node, and whether all were looked at."""
        blocks = {node: _Blocks(self.frames, node) for node in sorted(self.frames.nodes())}
        samples = {node: Sample(found.count, found.frames, chance) for node, found in blocks.items()}
        if not samples:
            return {}, True
        total = sum(sample.blocks for sample in samples.values())
        looked = 0
        strata = dict.fromkeys(samples, _FIRST_DRAWS)
        while True:
            for node, sample in samples.items():
                self.check()
                sample.round(strata[node], self._counter(marked, blocks[node]))
            before, looked = looked, sum(len(sample.drawn) for sample in samples.values())
            left = self.budget * _SHARE - self.spent()
            cost = self.spent() / max(1, looked)
            if cost * total <= left or looked == total:
                # Larger reads are cheaper than the blocks were, so this fits.
                return self._all(marked), True
            affordable = int(left / cost) if cost else total
            if affordable < len(samples) * 2 or looked == before:
                return {node: sample.estimate() for node, sample in samples.items()}, False
            strata = {node: max(1, affordable * sample.blocks // total) for node, sample in samples.items()}

    def _counter(self, marked: Callable[[bytes], int], blocks: _Blocks) -> Callable[[int], int]:
        def count(block: int) -> int:
            return sum(marked(self.reader.flags.raw(first, last - first)) for first, last in blocks.ranges(block))

        return count

    def _all(self, marked: Callable[[bytes], int]) -> dict[int, Estimate]:
        found: Counter[int] = Counter(dict.fromkeys(self.frames.nodes(), 0))
        for span in self.frames.spans:
            for first in range(span.first, span.last, _READ_FRAMES):
                self.check()
                found[span.node] += marked(self.reader.flags.raw(first, min(_READ_FRAMES, span.last - first)))
        return {node: Estimate(pages, pages, pages) for node, pages in sorted(found.items())}

    # -- every process, for detection by pagemap -------------------------------------------------------------

    def walk(self, root: Path) -> dict[int, Estimate]:
        """Decide frames by looking at every process.

        :raises _OverBudget: that would cost more than its share of the budget
        """
        reader, node_of = self.reader, self.frames.node
        running = running_pids(root)
        mixed = [pid for pid in running if self._learn(pid, root)]
        # Some mappings have both kinds of pages: only then look where there are none.
        for pid in running if mixed else ():
            self._learn(pid, root, plain=True)
        undecided: dict[int, float] = {}
        for pid in mixed:
            undecided.update(self._learn(pid, root))
        sure = Counter(node_of(frame) for frame, merged in reader.decided.items() if merged)
        more: Counter[int | None] = Counter()
        likely: dict[int | None, float] = defaultdict(float)
        for frame in undecided.keys() - reader.decided.keys():
            more[node_of(frame)] += 1
            likely[node_of(frame)] += undecided[frame]
        return {
            node: Estimate(sure[node] + round(likely[node]), sure[node], sure[node] + more[node])
            for node in sorted(self.frames.nodes())
        }

    def _learn(self, pid: int, root: Path, *, plain: bool = False) -> Mapping[int, float]:
        """Frames of a process that stay undecided (`PageReader.learn`); `plain`: of its mappings without KSM pages."""
        self.check()
        if self.spent() > self.budget * _WALK_SHARE:
            raise _OverBudget
        try:
            counts = read_counts(pid, root)
            if counts.mergeable is False and not counts.merging_pages:
                return {}
            ranges = [item for item in read_ranges(pid, root) if (item.ksm_pages == 0 if plain else item.ksm_pages)]
            # At least a microsecond a page in this language: what is much too large is not begun.
            if sum(item.resident_pages for item in ranges) * 1e-6 > self.budget * _WALK_SHARE - self.spent():
                raise _OverBudget
            if not plain:
                return self.reader.learn(pid, ranges)
            self.reader.learn_plain(pid, ranges)
        except KsmdError:
            # It ended, is not ours to look at, or is a kernel thread without memory.
            pass
        return {}


class _OverBudget(Exception):
    pass


class _Blocks:
    """A node's frames cut into blocks, over the holes between them; only the last is short."""

    def __init__(self, frames: FrameMap, node: int) -> None:
        self._spans: list[Span] = [span for span in frames.spans if span.node == node]
        self._starts = [0]
        for span in self._spans:
            self._starts.append(self._starts[-1] + span.last - span.first)
        self.frames = self._starts[-1]
        self.count = -(-self.frames // BLOCK_FRAMES)

    def ranges(self, block: int) -> Iterator[tuple[int, int]]:
        """The frames of a block: first, and one past the last."""
        begin = block * BLOCK_FRAMES
        end = min(begin + BLOCK_FRAMES, self.frames)
        for span, start in zip(self._spans, self._starts, strict=False):
            first, last = max(begin, start), min(end, start + span.last - span.first)
            if first < last:
                yield span.first + first - start, span.first + last - start


def _bounded(bounds: Mapping[int, Estimate], pages_shared: int | None) -> dict[int, Estimate]:
    """Make of upper bounds what can be said with the number of all KSM pages, if it is known."""
    if pages_shared is None:
        return {node: Estimate(item.frames, 0, item.high) for node, item in bounds.items()}
    candidates = sum(item.frames for item in bounds.values())
    scale = min(1.0, pages_shared / candidates) if candidates else 0.0
    highest = sum(item.high for item in bounds.values())
    found = {}
    for node, item in bounds.items():
        low = min(item.high, max(0, pages_shared - (highest - item.high)))
        high = item.high
        found[node] = Estimate(max(low, min(high, round(item.frames * scale))), low, high)
    return found


@dataclass(frozen=True, slots=True)
class Estimate:
    """Marked frames: the best guess, and its 95 % confidence interval."""

    frames: int
    low: int
    high: int


@dataclass(slots=True)
class Sample:
    """A growing sample of blocks.

    :ivar blocks: how many there are
    :ivar drawn: what was counted in the blocks that were drawn
    """

    blocks: int
    total_frames: int
    chance: random.Random
    drawn: dict[int, int] = field(default_factory=dict)
    # A round: the strata's sizes, and what was counted in the block drawn from each.
    _rounds: list[list[tuple[int, int]]] = field(default_factory=list)

    def round(self, strata: int, count: Callable[[int], int]) -> None:
        """Draw one block from each of so many strata.

        :param count: marked frames in the block with this number
        """
        strata = max(1, min(strata, self.blocks))
        found = []
        for stratum in range(strata):
            first, last = stratum * self.blocks // strata, (stratum + 1) * self.blocks // strata
            block = self.chance.randrange(first, last)
            if block not in self.drawn:
                self.drawn[block] = count(block)
            found.append((last - first, self.drawn[block]))
        self._rounds.append(found)

    def estimate(self) -> Estimate:
        """What the rounds so far say."""
        draws = sum(map(len, self._rounds))
        seen = sum(self.drawn.values())
        if len(self.drawn) == self.blocks:
            return Estimate(seen, seen, seen)
        if draws < 2:
            return Estimate(seen, seen, self._most())
        # A round counts by its draws; so every block drawn stands for about as many blocks as any other.
        values = [len(found) / draws * size * marked for found in self._rounds for size, marked in found]
        scale = BLOCK_FRAMES * max(len(found) / draws * size for found in self._rounds for size, _ in found)
        mean = sum(values) / draws
        variance = sum((value - mean) ** 2 for value in values) / (draws - 1)
        half = draws * (math.sqrt(2 * variance * _LOG / draws) + scale * 7 * _LOG / (3 * (draws - 1)))
        total = sum(values)
        return Estimate(
            frames=max(seen, min(self._most(), round(total))),
            low=max(seen, math.floor(total - half)),
            high=min(self._most(), math.ceil(total + half)),
        )

    def _most(self) -> int:
        # All but the frames that were seen not to be marked; only the last block may be short.
        looked = len(self.drawn) * BLOCK_FRAMES
        if self.blocks - 1 in self.drawn:
            looked -= self.blocks * BLOCK_FRAMES - self.total_frames
        return self.total_frames - looked + sum(self.drawn.values())
