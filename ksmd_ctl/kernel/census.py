# SPDX-License-Identifier: GPL-2.0-or-later
"""How many KSM pages each node holds: all frames counted where that fits the budget, else a sample of them.

With detection by pagemap (`ksmd_ctl.kernel.detection`) a count of frames is only an upper bound, for pages that fork
shares may look alike. Where the budget allows it every process is looked at instead, which decides nearly every
frame. Where not, the bound is what there is, and `pages_shared` bounds it from below: what the other nodes can't
hold must be here. That counter may still hold pages that were freed since ksmd last passed them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import Cancelled, KsmdError
from ksmd_ctl.host.memory import Census, KsmDetection
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.kpageflags import FrameFlags, count_candidates, count_ksm
from ksmd_ctl.kernel.proc_pid import running_pids
from ksmd_ctl.kernel.processes import read_counts
from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.kernel.sampling import BLOCK_FRAMES, Estimate, Sample, shared_out
from ksmd_ctl.kernel.topology import FrameMap, Span

__all__ = ["take"]

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
    detection: KsmDetection,
    frames: FrameMap,
    flags: FrameFlags,
    pages_shared: int | None = None,
    root: Path = Path("/"),
    page_size: int = 4096,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    chance: random.Random | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
    clock: Callable[[], float] = time.monotonic,
) -> Census:
    """Count the KSM pages of each node.

    :param budget_cpu_seconds: CPU time of this process that it may cost, about
    :param pages_shared: the kernel's counter while ksmd runs; only detection by pagemap uses it
    :param clock: `Host.clock`
    :raises Cancelled: `stop` said so
    """
    job = _Job(budget_cpu_seconds, detection, frames, flags, root, page_size, progress, stop, cpu_clock)
    time_seconds = clock()
    found, complete = job.run(pages_shared, chance or random.Random())
    return Census(
        time_seconds=time_seconds,
        pages={node: estimate.frames for node, estimate in found.items()},
        low={node: estimate.low for node, estimate in found.items()},
        high={node: estimate.high for node, estimate in found.items()},
        complete=complete,
        detection=detection,
        cpu_seconds=job.spent(),
    )


class _TooDear(Exception):
    """The budget is used up, and what was found so far says nothing."""


@dataclass(slots=True)
class _Job:
    budget: float
    detection: KsmDetection
    frames: FrameMap
    flags: FrameFlags
    root: Path
    page_size: int
    tell: Callable[[Progress], None]
    stop: Callable[[], bool]
    cpu_clock: Callable[[], float]
    begin: float = 0.0

    def __post_init__(self) -> None:
        self.begin = self.cpu_clock()

    def spent(self) -> float:
        return self.cpu_clock() - self.begin

    def check(self) -> None:
        if self.stop():
            raise Cancelled("the census", "stopped before it was done")

    def run(self, pages_shared: int | None, chance: random.Random) -> tuple[dict[int, Estimate], bool]:
        if self.detection is KsmDetection.KPAGEFLAGS:
            return self.count(count_ksm, chance)
        try:
            return self.walk(), True
        except _TooDear:
            pass
        bounds, complete = self.count(count_candidates, chance)
        return _bounded(bounds, pages_shared), complete and all(item.frames == 0 for item in bounds.values())

    # -- all frames, or a sample of them ---------------------------------------------------------------------

    def count(self, marked: Callable[[bytes], int], chance: random.Random) -> tuple[dict[int, Estimate], bool]:
        nodes = {node: _Blocks(self.frames, node) for node in sorted(self.frames.nodes())}
        samples = {node: Sample(blocks.count, blocks.frames, chance) for node, blocks in nodes.items()}
        if not nodes:
            return {}, True
        looked = 0
        strata = dict.fromkeys(nodes, _FIRST_DRAWS)
        while True:
            for node, sample in samples.items():
                self.check()
                blocks = nodes[node]
                sample.round(strata[node], self._counter(marked, blocks))
            before, looked = looked, sum(len(sample.drawn) for sample in samples.values())
            total = sum(sample.blocks for sample in samples.values())
            self.tell(Progress(looked, total, "blocks"))
            left = self.budget * _SHARE - self.spent()
            cost = self.spent() / max(1, looked)
            if cost * total <= left or looked == total:
                # Larger reads are cheaper than the blocks were, so this fits.
                return self.all(marked), True
            affordable = int(left / cost) if cost else total
            if affordable < len(nodes) * 2 or looked == before:
                return {node: sample.estimate() for node, sample in samples.items()}, False
            shares = shared_out(affordable, [sample.blocks for sample in samples.values()], 1)
            strata = dict(zip(samples, shares, strict=True))

    def _counter(self, marked: Callable[[bytes], int], blocks: _Blocks) -> Callable[[int], int]:
        def count(block: int) -> int:
            return sum(marked(self.flags.raw(first, last - first)) for first, last in blocks.ranges(block))

        return count

    def all(self, marked: Callable[[bytes], int]) -> dict[int, Estimate]:
        found: Counter[int] = Counter(dict.fromkeys(self.frames.nodes(), 0))
        done, total = 0, self.frames.frames
        for span in self.frames.spans:
            for first in range(span.first, span.last, _READ_FRAMES):
                self.check()
                size = min(_READ_FRAMES, span.last - first)
                found[span.node] += marked(self.flags.raw(first, size))
                done += size
                self.tell(Progress(done, total, "frames"))
        return {node: Estimate(pages, pages, pages) for node, pages in sorted(found.items())}

    # -- every process, for detection by pagemap ---------------------------------------------------------------

    def walk(self) -> dict[int, Estimate]:
        """Decide frames by looking at every process.

        :raises _TooDear: it would cost more than the budget
        """
        reader = PageReader(self.detection, self.root, self.page_size, self.flags)
        open_: dict[int, float] = {}
        running = running_pids(self.root)
        mixed = []
        for number, pid in enumerate(running):
            self._afford()
            self.tell(Progress(number, len(running), "processes"))
            if self._learn(reader, pid, deep=False):
                mixed.append(pid)
        if mixed:
            # Some mappings have both kinds of pages: only now look where there are none.
            for pid in running:
                self._afford()
                self._learn(reader, pid, deep=True)
            for pid in mixed:
                self._afford()
                open_.update(self._learn(reader, pid, deep=False))
        sure: Counter[int] = Counter(dict.fromkeys(self.frames.nodes(), 0))
        more: Counter[int] = Counter()
        likely: dict[int, float] = {}
        for frame, merged in reader.decided.items():
            node = self.frames.node(frame)
            if merged and node is not None:
                sure[node] += 1
        for frame, share in open_.items():
            node = self.frames.node(frame)
            if frame not in reader.decided and node is not None:
                more[node] += 1
                likely[node] = likely.get(node, 0.0) + share
        return {
            node: Estimate(pages + round(likely.get(node, 0.0)), pages, pages + more[node])
            for node, pages in sorted(sure.items())
        }

    def _afford(self) -> None:
        self.check()
        if self.spent() > self.budget * _WALK_SHARE:
            raise _TooDear

    def _learn(self, reader: PageReader, pid: int, *, deep: bool) -> Mapping[int, float]:
        try:
            counts = read_counts(pid, self.root)
            if counts.mergeable is False and not counts.merging_pages:
                return {}
            ranges = read_ranges(pid, self.root, self.page_size)
            if not deep:
                ranges = tuple(item for item in ranges if item.ksm_pages)
            # At least a microsecond a page in this language: what is much too large is not begun.
            if sum(item.resident_pages for item in ranges) * 1e-6 > self.budget * _WALK_SHARE - self.spent():
                raise _TooDear
            return reader.learn(pid, ranges, deep=deep)
        except KsmdError:
            # It ended, is not ours to look at, or is a kernel thread without memory.
            return {}


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
