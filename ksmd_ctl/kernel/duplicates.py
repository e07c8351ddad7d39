# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds equal contents that are not one page, in all mergeable memory (docs/healing.md).

No counter of any kernel tells it: a page that smart_scan always skips (findings F2), a migrated KSM page (F1) and a
page without an equal look the same in /sys/kernel/mm/ksm. So contents are compared (`ksmd_ctl.kernel.contents`), of
each frame once, however many map it: what fork shares and what is merged already are no duplicates.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Cancelled
from ksmd_ctl.host.duplicates import DuplicatePages, MergeRules
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel.contents import Asker, Contents, merge_rules
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, PRESENT, SPARSE, Pagemap, frames_of, own_parts, pieces, zero_frame
from ksmd_ctl.kernel.proc_pid import LeftOut, read_stat, running_pids
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.processes import start_stack
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.kernel.topology import FrameMap, read_frame_map

#: Pages that are drawn together where not all are compared.
_BLOCK_PAGES: Final = 512


@dataclass(slots=True)
class _Group:
    """Frames with one content: how many each stands for, and how many mappings were seen of them."""

    frames: dict[int, float] = field(default_factory=dict)
    mappings: float = 0.0


@dataclass(slots=True)
class _ForkedFrames:
    """Where forks of one another map the frames that several map, and which of these others map as well.

    What fork shares lies at the same address in all of them. So a frame that is mapped at two places, or by a process
    that is no relative, was merged, and each place beyond the first is a page saved.

    :ivar families: stacks that several processes have (`ksmd_ctl.kernel.processes.count_relatives`)
    :ivar related: by frame, the places: family and address
    """

    families: Set[int]
    related: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)

    def add(self, stack: int, address: int, frame: int) -> None:
        if stack in self.families:
            self.related.setdefault(frame, set()).add((stack, address))
        elif self.families:
            self.others.add(frame)

    def merged_places(self) -> int:
        return sum(len(places) for frame, places in self.related.items() if len(places) > 1 or frame in self.others)


def find_duplicates(
    budget_frames: int,
    *,
    uid: int = 0,
    root: Path = Path("/"),
    stop: Callable[[], bool] = lambda: False,
    chance: random.Random | None = None,
) -> DuplicatePages:
    """Compare the contents of mergeable memory, of at most about so many frames.

    Where there is more, blocks of address space are drawn by chance. Holes are skipped where the kernel offers that
    (6.7); else fewer blocks are drawn of a mapping that is mostly holes, and of no other. A frame that was drawn with
    a chance p stands for 1/p frames; one that is mapped more than once had more chances, and stands for itself. Of
    those of one content, the ones that stand for most are taken for those that are required: so the figure is a lower
    bound on the average, whatever the chances.

    :param uid: of the user who asks
    :raises Refused: `Asker.need_merging`
    :raises Denied, Absent: of all processes with mergeable memory not one could be looked at
    :raises Cancelled: `stop` said so
    """
    asker = Asker(uid, root)
    asker.need_merging("comparing the contents of mergeable memory")
    began = time.process_time()
    found: list[tuple[int, int, tuple[Range, ...]]] = []
    unread = LeftOut()
    for pid in running_pids(root):
        with unread.looking_at(pid):
            if read_counts(pid, root).mergeable is False or not asker.may_compare(pid):
                continue
            stack = start_stack(read_stat(pid, root)[1])
            ranges = read_ranges(pid, root)
            if ranges := tuple(item for item in ranges if item.mergeable and item.anonymous_pages):
                found.append((pid, stack, ranges))
    pages = sum(item.anonymous_pages for _, _, ranges in found for item in ranges)
    stacks = Counter(stack for _, stack, _ in found)
    job = _Comparison(
        merge_rules(root),
        min(1.0, budget_frames / max(1, pages)),
        read_frame_map(root),
        chance or random.Random(),
        _ForkedFrames({stack for stack, count in stacks.items() if stack and count > 1}),
    )
    for pid, stack, ranges in found:
        if stop():
            raise Cancelled("comparing contents", "stopped before it was done")
        with unread.looking_at(pid), Contents(pid, root) as contents, Pagemap(pid, root) as pagemap:
            for item in ranges:
                job.compare(pagemap, contents, item, stack)
    unread.need(job.groups)
    return DuplicatePages(
        mergeable_pages=pages,
        frames=asker.rounded(len(job.group_of)),
        pages=asker.rounded(job.duplicates()),
        complete=job.complete and not unread.errors,
        cpu_seconds=time.process_time() - began,
        related_places=asker.rounded(job.forked.merged_places()),
        unread=len(unread.errors),
    )


@dataclass(slots=True)
class _Comparison:
    rules: MergeRules
    share: float
    nodes: FrameMap
    chance: random.Random
    forked: _ForkedFrames
    #: By frame: the group that it is in.
    group_of: dict[int, _Group] = field(default_factory=dict)
    groups: dict[tuple[int | None, int], _Group] = field(default_factory=dict)
    complete: bool = True

    def compare(self, pagemap: Pagemap, contents: Contents, item: Range, stack: int) -> None:
        """Take in what was drawn of a mapping."""
        parts = own_parts(pagemap, item)
        # Looking for a page costs a small part of what comparing it does: only who has hardly any pays for it.
        walked = sum(end - start for start, end in parts) // PAGE_SIZE
        share = self.share * min(1.0, SPARSE * item.anonymous_pages / max(1, walked))
        self.complete = self.complete and share == 1.0
        for start, count in pieces(parts, _BLOCK_PAGES):
            if share == 1.0 or self.chance.random() < share:
                self._block(pagemap, contents, start, count, share, stack)

    def _block(self, pagemap: Pagemap, contents: Contents, start: int, count: int, share: float, stack: int) -> None:
        entries = pagemap.read_frames(start, count)
        frames = frames_of(entries)
        new = []
        several = set()
        zero = zero_frame()
        for index, (entry, frame) in enumerate(zip(entries, frames, strict=True)):
            if not entry & PRESENT or entry & FILE or frame in (0, zero):
                continue
            if not entry & EXCLUSIVE:
                several.add(frame)
                self.forked.add(stack, start + index * PAGE_SIZE, frame)
            if frame in self.group_of:
                self.group_of[frame].mappings += 1 / share
            else:
                new.append(index)
        for index, number in contents.numbers(start, new):
            frame = frames[index]
            node = None if self.rules.merge_across_nodes else self.nodes.node(frame)
            group = self.group_of.get(frame) or self.groups.setdefault((node, number), _Group())
            group.frames.setdefault(frame, 1.0 if frame in several else 1 / share)
            group.mappings += 1 / share
            self.group_of[frame] = group

    def duplicates(self) -> int:
        """Frames that are not required; a lower bound where only a share was drawn."""
        found = 0.0
        for group in self.groups.values():
            needed = max(1, math.ceil(group.mappings / self.rules.max_page_sharing))
            if needed < len(group.frames):
                found += sum(sorted(group.frames.values())[:-needed])
        return round(found)
