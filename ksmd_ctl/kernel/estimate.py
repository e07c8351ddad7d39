# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at contents to estimate what merging would save (docs/estimate.md, `ksmd_ctl.host.estimate`).

- *A sample of pages* from everywhere, where reading everything takes longer than a first figure may.
- *A pass over everything*, in blocks in random order, of which contents are kept by a hash of the content.
- *A second look* at pages of what was found several times: those that changed are left out.

All of it takes no more of a CPU than the share given. What is read, and how, says `ksmd_ctl.kernel.contents`.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Final

from ksmd_ctl.errors import NoSuchProcess
from ksmd_ctl.host.estimate import Contents as KeptContents
from ksmd_ctl.host.estimate import Estimate, PageKind, Rules, SampledPages, Stability, Stage, narrowed
from ksmd_ctl.host.memory import Range
from ksmd_ctl.host.merging import estimate, of_those_left
from ksmd_ctl.host.sampling import Bounds, scored
from ksmd_ctl.kernel.content_numbers import ZERO, ContentSample, numbers_of
from ksmd_ctl.kernel.contents import Contents
from ksmd_ctl.kernel.estimate_targets import Files, Part, Target, blocks
from ksmd_ctl.kernel.kept_pages import KeptPages, Row
from ksmd_ctl.kernel.kpageflags import Bit, FrameCounts, FrameFlags, runs
from ksmd_ctl.kernel.pace import Pace
from ksmd_ctl.kernel.pagemap import (
    EXCLUSIVE,
    FILE,
    FRAME,
    PRESENT,
    Pagemap,
    all_own,
    frame_limits,
    own_parts,
    zero_frame,
)
from ksmd_ctl.kernel.proc_pid import LeftOut
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.second_look import SecondLook
from ksmd_ctl.kernel.topology import read_frame_map
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES, splits_free_zeroes

_LOCKED: Final = "lo"

# Pages that are kept, up to 200 bytes each while figures are made of them. So many tell a figure to 2 %.
_MOST_KEPT: Final = 1 << 17
_BLOCK_PAGES: Final = HUGE_BYTES // PAGE_SIZE
# A first figure is there after so long, and the sample that it is of has at most this share of all pages.
_FIRST_SECONDS: Final = 8.0
_SAMPLE_SHARE: Final = 1 / 32
_FIRST_ROUND_PAGES: Final = 256
# Of single pages so many are read between two looks at the clock.
_PACED_PAGES: Final = 64
# While everything is read, figures are given at these shares of it, of about so many pages.
_TOLD_SHARES: Final = (0.25, 0.5, 0.75)
_TOLD_PAGES: Final = 1 << 16
# What has no node (memory that came meanwhile).
_NO_NODE: Final = -1
# Of fewer, the clock doesn't tell what one took.
_ENOUGH_PAGES: Final = 10_000
#: CPU time for a page, about: only to tell whether all can be read before a first figure is due.
_PAGE_SECONDS: Final = 5e-6
# Pages that are looked at again, about; and pages of zeroes at most.
_AGAIN_PAGES: Final = 1 << 13
_AGAIN_ZEROES: Final = 1024
# In a block with so many all are looked at again, as long as they are not too many.
_FEW_ZEROES: Final = 64


class Look:
    """One look at contents, which gives better figures as it goes on: `estimates`.

    :ivar left_out: processes that could not be looked at, and why
    :ivar gone: pids of processes that ended meanwhile
    :ivar pages: pages (mappings) that there are to be read, about
    :ivar read: how many of these were read by the pass over everything
    :ivar drawn: how many were read for the sample
    :ivar page_cpu_seconds: CPU time that reading a page took in the pass over everything; None for few pages
    :ivar interval_seconds: between the two looks at a page; 0 where there was nothing to look at again
    """

    def __init__(
        self,
        targets: Sequence[Target],
        rules: Rules,
        pace: Pace,
        *,
        interval_seconds: float,
        left_out: LeftOut,
        domain_of: Sequence[str] | None = None,
        more: bool = False,
        most_kept: int = _MOST_KEPT,
        root: Path = Path("/"),
        chance: random.Random | None = None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """
        :param interval_seconds: between the two looks at a page
        :param tell: called now and then
        """
        self.targets = targets
        self.rules = rules
        self.pace = pace
        self.left_out = left_out
        self.gone: set[int] = set()
        self.pages = sum(target.pages for target in targets)
        self.read = self.drawn = 0
        self.page_cpu_seconds: float | None = None
        self.interval_seconds = interval_seconds
        self._domain_of = domain_of
        self._more = more
        self._root = root
        self._chance = chance or random.Random()
        self._tell = tell
        # To take half of the contents costs as much as to keep twice as many.
        sample = ContentSample() if self.pages > 2 * most_kept else None
        self._files = Files(targets, root, sample.numbers if sample else numbers_of)
        # To read where nodes begin takes a while, and where there is one node, no figure depends on it.
        self._nodes = read_frame_map(root) if rules.nodes > 1 else None
        stacks = Counter(target.stack for target in targets)
        self._family = [target.stack if stacks[target.stack] > 1 else 0 for target in targets]
        self._frees = any(item.huge_bytes for target in targets for item, _ in target.ranges) and (
            splits_free_zeroes() is True
        )
        self._kinds: dict[tuple[int, int, bool], int] = {}
        self._mapped: Counter[tuple[int, bool]] = Counter()
        self._zero_rows: list[Row] = []
        self._kept = KeptPages(most_kept if sample else 2 * most_kept, self.pages, sample)
        self._sample: Estimate | None = None

    def estimates(self) -> Generator[Estimate]:
        """Estimates that get better; the last is of everything, looked at twice."""
        try:
            with FrameFlags(self._root) as self._flags, FrameCounts(self._root) as self._counts:
                parts = list(self._parts())
                if self.pages * _PAGE_SECONDS / self.pace.share > _FIRST_SECONDS - self.pace.seconds:
                    yield from self._sampled(parts)
                yield from self._everything(parts)
                # What was kept is given back only now.
                self.pace.keep(exactly=True)
        finally:
            self._files.close()

    def _at(self, owner: int, look: Callable[[Pagemap, Contents], None]) -> None:
        """Look at a process that is still there and may be looked at."""
        pid = self.targets[owner].process.id.pid
        if pid in self.gone or pid in self.left_out.errors:
            return
        with self.left_out.looking_at(pid):
            try:
                look(*self._files.of(owner))
            except NoSuchProcess:
                self.gone.add(pid)

    def _parts(self) -> Iterator[Part]:
        for owner in range(len(self.targets)):
            found: list[Part] = []
            self._at(owner, partial(self._find, owner, found))
            yield from found
            self.pace.keep()

    def _find(self, owner: int, found: list[Part], pagemap: Pagemap, _: Contents) -> None:
        for item, marked in self.targets[owner].ranges:
            found.extend(Part(owner, item, marked, *part) for part in own_parts(pagemap, item))

    # -- a sample of pages -----------------------------------------------------------------------------------------

    def _sampled(self, parts: Sequence[Part]) -> Iterator[Estimate]:
        ends = list(accumulate(part.pages for part in parts))
        drawn: set[int] = set()
        marked, all_ = SampledPages(), SampledPages()
        size, told = _FIRST_ROUND_PAGES, -1.0
        most = min(ends[-1] if ends else 0, max(_FIRST_ROUND_PAGES, round(self.pages * _SAMPLE_SHARE)))
        while len(drawn) < most:
            began = self.pace.seconds
            fresh = {self._chance.randrange(ends[-1]) for _ in range(min(size, most - len(drawn)))} - drawn
            for index, places in groupby(sorted(fresh), key=partial(bisect_right, ends)):
                part = parts[index]
                first = part.end - ends[index] * PAGE_SIZE
                into = (marked, all_) if part.marked else (all_,)
                addresses = [first + place * PAGE_SIZE for place in places]
                self._at(part.owner, partial(self._draw, part, addresses, into))
            drawn |= fresh
            size *= 2
            share = len(drawn) / ends[-1]
            # Another round takes twice as long as this one did.
            last = len(drawn) >= most or 3 * self.pace.seconds - 2 * began > _FIRST_SECONDS
            if last or self.pace.seconds > 1.5 * told:
                told = self.pace.seconds
                more = all_.outcomes(share, self.pages, self.rules) if self._more else ()
                self._sample = Estimate(
                    stage=Stage.SAMPLE,
                    read_share=share,
                    content_share=1.0,
                    pages=self._pages(True),
                    more_pages=self._pages(False),
                    outcomes=marked.outcomes(share, self._pages(True), self.rules),
                    outcomes_with_more=more,
                )
                yield self._sample
            if last:
                break

    def _pages(self, marked: bool) -> int:
        return sum(
            item.anonymous_pages for target in self.targets for item, is_marked in target.ranges if is_marked is marked
        )

    def _draw(
        self,
        part: Part,
        addresses: Sequence[int],
        into: Sequence[SampledPages],
        pagemap: Pagemap,
        contents: Contents,
    ) -> None:
        """Take in single pages of a part."""
        zero, family = zero_frame(), self._family[part.owner]
        pagemap.read_frames(addresses[0], 1)
        for count, address in enumerate(addresses, 1):
            for entry in pagemap.read(address, 1):
                frame = entry & FRAME
                if not entry & PRESENT or entry & FILE or frame == zero:
                    continue
                if family and not entry & EXCLUSIVE and not self._once(frame):
                    continue
                for number in contents.block(address, 1):
                    self.drawn += 1
                    if number == ZERO:
                        frees = self._split_frees(part.item, frame)
                        for sample in into:
                            sample.zeroes[frees] += 1
                    else:
                        node = self._node(frame)
                        for sample in into:
                            sample.add(number, node)
            if count % _PACED_PAGES == 0:
                self.pace.keep()
        self.pace.keep()

    def _once(self, frame: int) -> bool:
        """Whether a frame that fork shares is taken: each of its mappings may be drawn, and it is one page."""
        return self._chance.random() * max(1, *self._counts.read(frame, 1)) < 1

    def _node(self, frame: int) -> int:
        node = 0 if self._nodes is None else self._nodes.node(frame)
        return _NO_NODE if node is None else node

    def _split_frees(self, item: Range, frame: int) -> bool:
        """Whether a page of zeroes is freed by a split of its huge page."""
        if not (self._frees and item.huge_bytes) or _LOCKED in item.flags:
            return False
        return any(flags >> Bit.THP & 1 for flags in self._flags.read(frame, 1))

    # -- a pass over everything ------------------------------------------------------------------------------------

    def _everything(self, parts: Sequence[Part]) -> Iterator[Estimate]:
        places = [(part, start, count) for part in parts for start, count in blocks(part)]
        self._chance.shuffle(places)
        waiting = [share for share in _TOLD_SHARES if self._sample is not None]
        used = self.pace.cpu_seconds
        for number, (part, start, count) in enumerate(places):
            self._at(part.owner, partial(self._block, part, start, count))
            self.pace.keep()
            self._tell()
            if waiting and number >= waiting[0] * len(places):
                del waiting[0]
                yield self._so_far()
        if self.read >= _ENOUGH_PAGES:
            self.page_cpu_seconds = (self.pace.cpu_seconds - used) / self.read
        several = self._kept.several()
        contents = several.contents()
        yield self._told(contents, None)
        if not self.interval_seconds:
            return
        again, taken = several.again(_AGAIN_PAGES)
        if not again and not self._zero_rows:
            # Nothing would be freed, so nothing of that can change.
            self.interval_seconds = 0.0
            yield self._told(contents, Stability())
            return
        self.pace.wait_until(self.pace.seconds + self.interval_seconds)
        second = SecondLook(self._kept, self.rules.max_page_sharing, self._at, self.pace)
        yield self._told(contents, second.stability(again, taken, self._zero_rows))

    def _told(self, contents: KeptContents, stable: Stability | None) -> Estimate:
        mapped: Mapping[tuple[int, bool], int] = self._mapped
        if stable is not None:
            there = [target.process.id.pid not in self.gone for target in self.targets]
            mapped, stable = of_those_left(mapped, stable, there)
        found = estimate(
            contents,
            mapped,
            self.rules,
            len(self.targets),
            more=self._more,
            domain_of=self._domain_of,
            stable=stable,
        )
        self.pace.keep(exactly=True)
        return found

    def _so_far(self) -> Estimate:
        """The sample's figures, with the bounds that follow from what was read."""
        assert self._sample is not None
        seen, share = self._kept.occupancy(_TOLD_PAGES)
        limit = self.rules.max_page_sharing
        freed = {times: times - -(-times // limit) for times in seen if times > 1}
        found = scored(
            sum(seen[times] * one for times, one in freed.items()),
            sum(seen[times] * one * one for times, one in freed.items()),
            share,
        ).plus(self._kept.sure_pages() * (1 - 1 / limit))
        # Of contents that are counted whatever their number is, each takes a frame more at most.
        unread, sure = max(0, self.pages - self._mapped.total()), len(self._kept.sure)
        bounds = Bounds(found.found, found.low - sure, found.high + unread + sure)
        name = "outcomes_with_more" if self._more else "outcomes"
        read = self._mapped.total() / max(1, self.pages)
        changed: dict[str, Any] = {name: narrowed(getattr(self._sample, name), bounds)}
        self._sample = replace(self._sample, stage=Stage.READING, read_share=min(1.0, read), **changed)
        return self._sample

    def _block(self, part: Part, start: int, count: int, pagemap: Pagemap, contents: Contents) -> None:
        entries = pagemap.read_frames(start, count)
        if all_own(entries):
            node = 0 if self._nodes is None else None
            if self._nodes is not None and (limits := frame_limits(entries)) is not None:
                node = self._nodes.only_node(*limits)
            if node is not None:
                self._add(part, start, contents.block(start, len(entries)), node, entries)
                return
        several = []
        zero = zero_frame()
        own: dict[int, list[int]] = {}
        for index, entry in enumerate(entries):
            if not entry & PRESENT or entry & FILE or entry & FRAME == zero:
                continue
            if entry & EXCLUSIVE:
                own.setdefault(self._node(entry & FRAME), []).append(index)
            else:
                several.append(index)
        for node, indices in own.items():
            for first, last in runs(indices, 1):
                address = start + first * PAGE_SIZE
                self._add(part, address, contents.block(address, last - first), node, entries[first:last])
        for index in several:
            self._shared(part, start + index * PAGE_SIZE, entries[index] & FRAME, contents)

    def _add(self, part: Part, start: int, numbers: Sequence[int], node: int, entries: array[int]) -> None:
        self._mapped[part.owner, part.marked] += len(numbers)
        self.read += len(numbers)
        kind = zeroes = self._kind(part, node)
        if count := numbers.count(ZERO):
            first = numbers.index(ZERO)
            some = self._some_zeroes(numbers, first, count)
            self._zero_rows += [Row(ZERO, part.owner, start + index * PAGE_SIZE) for index in some]
            if len(self._zero_rows) > 2 * _AGAIN_ZEROES:
                self._zero_rows = self._chance.sample(self._zero_rows, _AGAIN_ZEROES)
            if self._split_frees(part.item, entries[first] & FRAME):
                zeroes = self._kept.kind(PageKind(node, (part.owner,), marked=part.marked, split_frees=True))
            self._kept.count(ZERO, zeroes, count)
        self._kept.add(kind, start, numbers, count)

    def _kind(self, part: Part, node: int) -> int:
        """The number of the kind of pages that are mapped once; to make one for each block costs more than all else."""
        key = node, part.owner, part.marked
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._kept.kind(PageKind(node, (part.owner,), marked=part.marked))
        return kind

    def _some_zeroes(self, numbers: Sequence[int], first: int, count: int) -> Iterable[int]:
        """Some of the places of zeroes, of which this is the first: all where they are few."""
        if count <= _FEW_ZEROES and len(self._zero_rows) < _AGAIN_ZEROES:
            return [index for index, number in enumerate(numbers) if number == ZERO]
        try:
            return (numbers.index(ZERO, self._chance.randrange(first, len(numbers))),)
        except ValueError:
            return (first,)

    def _shared(self, part: Part, address: int, frame: int, contents: Contents) -> None:
        kept = self._kept
        found = kept.shared.get(frame)
        if found is None and frame not in kept.given_up:
            for number in contents.block(address, 1):
                frees = number == ZERO and self._split_frees(part.item, frame)
                row = Row(number, part.owner, address)
                found = kept.add_shared(frame, number, self._node(frame), row, split_frees=frees)
        self.read += 1
        self._mapped[part.owner, part.marked] += 1
        if found is not None:
            found.add(part.owner, self._family[part.owner], address, part.marked)
            kept.mapped()
