# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the merged pages of one process lie, and where they belong. Sources: pagemap, numa_maps."""

from __future__ import annotations

import functools
import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, ReadError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import HomeRange, Range, SplitBlocks, Topology
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.pagemap import Pagemap, anonymous_nodes, frames_of, own_parts, zero_frame
from ksmd_ctl.kernel.procfs import split_pages
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import numa_ranges, range_home, read_surroundings, with_policies
from ksmd_ctl.kernel.split_blocks import BlockPages, could_be_huge, figures_of, sampled_zero_blocks
from ksmd_ctl.kernel.topology import FrameMap
from ksmd_ctl.kernel.zero_pages import ZeroPages, count_zero_pages, splits_free_zeroes

#: Pages looked at together where not all of them are: as many as a huge page has.
_SAMPLE_PAGES = 512


@dataclass(frozen=True, slots=True)
class Walk:
    """What the page tables of one process showed.

    :ivar merged: merged pages by node of each range, by its start; estimates where it is not `complete`
    :ivar split: blocks that could be huge pages and hold merged or freed pages
    :ivar frames: the frame of each merged page; of none where it is not `complete`
    :ivar complete: each page was looked at
    :ivar homes: each range that holds pages, with its home
    :ivar read_only: merged pages in mappings that are not writable
    :ivar calls: runs of merged pages in others, as un-merging takes each with one call
    """

    merged: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    split: SplitBlocks = field(default_factory=SplitBlocks)
    frames: array[int] = field(default_factory=lambda: array("Q"))
    complete: bool = False
    homes: Sequence[HomeRange] = ()
    read_only: int = 0
    calls: int = 0

    @property
    def home(self) -> int | None:
        """The home of all ranges; None where they have not one."""
        homes = {item.home for item in self.homes}
        return homes.pop() if len(homes) == 1 else None

    def resident_nodes(self) -> dict[int, int]:
        """Pages of all ranges by node."""
        found: Counter[int] = Counter()
        for item in self.homes:
            found.update(item.nodes)
        return dict(sorted(found.items()))

    def page_mappings(self) -> int:
        """How often the page is mapped that is mapped most often, where each was looked at."""
        return max(Counter(self.frames).values(), default=0)

    def nodes(self, *, remote: bool = False) -> dict[int, int]:
        """Merged pages by node; `remote`: those that are not on their range's home."""
        homes = {item.start: item.home for item in self.homes}
        found: Counter[int] = Counter()
        for start, there in self.merged.items():
            for node, pages in there.items():
                if not remote or (pages and homes.get(start) not in (None, node)):
                    found[node] += pages
        return dict(sorted(found.items()))


def _uses_zero_pages(root: Path) -> bool:
    with closing(KsmFs(root)) as ksm:
        try:
            return ksm.read(Knob.USE_ZERO_PAGES) == 1
        except ReadError:
            return False


class Walker:
    """Looks at the pages of one process after the other.

    :param reader: tells KSM pages; None where no detection is any good, and then no pages are looked at
    :param page_budget: pages of one process that are looked at; of larger ones a random part is, and counts of
        pages by node are estimates then
    """

    def __init__(
        self,
        topology: Topology,
        frames: FrameMap,
        reader: PageReader | None,
        root: Path,
        page_budget: int,
        chance: random.Random,
    ) -> None:
        self._topology = topology
        self._frames = frames
        self._reader = reader
        self._root = root
        self._budget = page_budget
        self._chance = chance
        self._zeroes = _uses_zero_pages(root)
        self._split_pages = split_pages(root)

    def place(self, pid: int, mergeable: Sequence[Range], zeroes: ZeroPages | None) -> Walk:
        around = read_surroundings(pid, self._topology, self._root)
        with_memory = self._topology.with_memory()
        # With one node all that numa_maps could tell is known, and reading it walks all page tables.
        numa = numa_ranges(pid, self._root) if len(with_memory) != 1 else {}
        ranges = with_policies(mergeable, numa)
        walk = self._walk(pid, ranges, self._saving_zeroes(zeroes))
        homes = []
        for item in ranges:
            if not item.anonymous_pages:
                continue
            there = walk.merged.get(item.start, {})
            if len(with_memory) == 1:
                pages: Mapping[int, int] = {with_memory[0].number: item.anonymous_pages}
            else:
                pages = anonymous_nodes(pid, item, numa.get(item.start), self._frames, self._root)
            unmerged = {node: count - there.get(node, 0) for node, count in pages.items()}
            if self._reader is None and 2 * (item.ksm_pages or 0) >= item.anonymous_pages:
                # Where most are merged, where they lie says nothing.
                unmerged = {}
            merged = sum(there.values()) if item.start in walk.merged else item.ksm_pages or 0
            homes.append(HomeRange(item.start, item.end, range_home(item, unmerged, around), dict(pages), merged))
        return replace(walk, homes=homes)

    def zero_pages(self, pid: int, mergeable: Sequence[Range]) -> ZeroPages | None:
        try:
            with Pagemap(pid, self._root) as pagemap:
                return count_zero_pages(pagemap, mergeable, self._budget if self._zeroes else 0)
        except (Denied, Absent):
            return None

    def freed_by_splits(self, zeroes: ZeroPages | None, counted: int | None) -> int | None:
        # Most hosts without huge pages, and kernels that do not free what is split, need no count to know.
        if self._split_pages == 0 or (zeroes is not None and zeroes.mapped == zeroes.unsplit):
            return 0
        if self._splits_free is False:
            return 0
        if zeroes is None or self._splits_free is None or (self._zeroes and counted is None):
            return None
        freed = zeroes.freed_by_splits(counted)
        return freed if self._split_pages is None else min(freed, self._split_pages)

    @functools.cached_property
    def _splits_free(self) -> bool | None:
        return splits_free_zeroes()

    def _saving_zeroes(self, zeroes: ZeroPages | None) -> Mapping[int, int]:
        """Zero pages of each mapping, by its start, where they were frames before: not what was only read."""
        if zeroes is None or zeroes.mapped == zeroes.unsplit:
            return {}
        saving = self._zeroes or (self._split_pages != 0 and self._splits_free is True)
        return zeroes.by_range if saving else {}

    def _walk(self, pid: int, ranges: Sequence[Range], zeroes: Mapping[int, int]) -> Walk:
        """Merged pages by node for each range, and blocks that can't be huge pages for them.

        :param zeroes: zero pages of each range that has any, by its start
        """
        if self._reader is None:
            return Walk()
        holding = [item for item in ranges if item.anonymous_pages and item.ksm_pages != 0]
        only_zeroes = zeroes.keys() - {item.start for item in holding}
        others = [item for item in ranges if item.start in only_zeroes and could_be_huge(item)]
        if not holding and not others:
            return Walk(complete=True)
        with Pagemap(pid, self._root) as pagemap:
            split = sampled_zero_blocks(pagemap, others, zero_frame(), self._budget, self._chance)
            parts = {item.start: own_parts(pagemap, item) for item in holding}
            pages = sum(end - start for found in parts.values() for start, end in found) // PAGE_SIZE
            if pages > self._budget:
                walk = self._some_pages(self._reader, pagemap, holding, parts, zeroes)
                return replace(walk, split=walk.split.plus(split))
        walk = self._all_pages(self._reader, pid, holding, zeroes)
        return replace(walk, split=walk.split.plus(split))

    def _all_pages(self, reader: PageReader, pid: int, ranges: Sequence[Range], zeroes: Mapping[int, int]) -> Walk:
        found: dict[int, Mapping[int, int]] = {item.start: {} for item in ranges}
        blocks = BlockPages(zero_frame())
        mapped = array("Q")
        read_only = calls = 0
        only = next(iter(self._frames.nodes())) if len(self._frames.nodes()) == 1 else None
        # All at once: with detection by pagemap each call reads all of smaps.
        for window in reader.windows(pid, ranges):
            item = window.mapping
            blocks.add(window, zeroes.get(item.start, 0))
            merged = window.merged()
            if not merged:
                continue
            if "wr" in item.flags:
                calls += window.runs()
            else:
                read_only += len(merged)
            frames = [window.frames[index] for index in merged]
            mapped.extend(frames)
            nodes = Counter(found[item.start])
            if only is not None:
                nodes[only] += len(frames)
            else:
                nodes.update(node for frame in frames if (node := self._frames.node(frame)) is not None)
            found[item.start] = nodes
        return Walk(found, blocks.figures(), mapped, complete=True, read_only=read_only, calls=calls)

    def _some_pages(
        self,
        reader: PageReader,
        pagemap: Pagemap,
        ranges: Sequence[Range],
        parts: Mapping[int, Sequence[tuple[int, int]]],
        zeroes: Mapping[int, int],
    ) -> Walk:
        found: dict[int, Mapping[int, int]] = {}
        split = SplitBlocks()
        size = _SAMPLE_PAGES * PAGE_SIZE
        anonymous = sum(item.anonymous_pages for item in ranges)
        for item in ranges:
            places = sorted(
                {place for start, end in parts[item.start] for place in range(start - start % size, end, size)}
            )
            # By what it holds, not by its length: one with many holes must not take the others' share.
            share = round(self._budget * item.anonymous_pages / anonymous / _SAMPLE_PAGES)
            chosen = self._chance.sample(places, min(len(places), max(8, share)))
            counts: Counter[int] = Counter()
            blocks = []
            for place in chosen:
                start, end = max(place, item.start), min(place + size, item.end)
                frames = frames_of(pagemap.read_frames(start, (end - start) // PAGE_SIZE))
                merged = reader.likely(frames)
                counts.update(node for frame in merged if (node := self._frames.node(frame)) is not None)
                if end - start == size:
                    blocks.append(len(merged) + (frames.count(zero_frame()) if item.start in zeroes else 0))
            scale = len(places) / len(chosen)
            if could_be_huge(item):
                split = split.plus(figures_of(blocks, scale))
            if item.ksm_pages is not None and counts.total():
                # How many there are is known: only their shares are estimated.
                scale = item.ksm_pages / counts.total()
            found[item.start] = {node: round(count * scale) for node, count in counts.items()}
        return Walk(found, split)
