# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds equal contents that are not one page: in all mergeable memory, and among KSM pages (docs/healing.md).

No counter of any kernel tells it: a page that smart_scan always skips (findings F2), a migrated KSM page (F1) and a
page without an equal look the same in /sys/kernel/mm/ksm. So contents are read, from /proc/PID/mem:

- Only pages that are present: nothing is faulted in. process_vm_readv(2) would un-merge each KSM page that it reads
  (F22): since 5.19 pinning a page that is not exclusive gives the process a copy (mm/gup.c: gup_must_unshare).
- Each frame once, however many map it: what fork shares and what is merged already are no duplicates.
- Only a number made of each page is kept, and only counts and addresses leave this process. Two contents may, once in
  2**64, give one number, and a page may be written to after it was read. Un-merging never changes a content, and ksmd
  compares all bytes before it merges.

Figures that depend on which pages of different owners are equal are bound by the rules of `Asker`.
"""

from __future__ import annotations

import math
import os
import random
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Cancelled, NoSuchProcess, ReadError, Refused
from ksmd_ctl.host.duplicates import (
    NO_LIMIT,
    POLICY,
    DuplicateKsmPages,
    DuplicatePages,
    KsmPage,
    MergeRules,
    duplicate_ksm_pages,
)
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ROUND_PAGES, ProcessId, Range
from ksmd_ctl.kernel.detection import PageReader, Window
from ksmd_ctl.kernel.kpageflags import FrameCounts, runs
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.pagemap import EXCLUSIVE, FILE, PRESENT, SPARSE, Pagemap, frames_of, own_parts, pieces, zero_frame
from ksmd_ctl.kernel.proc_pid import LeftOut, process_file_error, read_stat, running_pids, start_time_ticks
from ksmd_ctl.kernel.processes import read_counts, start_stack
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, Closing, read_file
from ksmd_ctl.kernel.ranges import NumaRange, mappings, numa_ranges, read_ranges, with_policies
from ksmd_ctl.kernel.topology import FrameMap, read_frame_map
from ksmd_ctl.kernel.unshare import NOT_WRITABLE, WATCHED

HIDDEN = "also mapped by a process that can't be inspected or has just forked"

#: Pages that are drawn together where not all are compared.
_BLOCK_PAGES: Final = 512
#: Pages that are read in one call.
_READ_PAGES: Final = 256
# About 300 bytes each, and 1 GiB of merged contents; 16 bytes each.
_MOST_FRAMES: Final = 1 << 18
_MOST_MAPPINGS: Final = 1 << 21
_SPREADING: Final = frozenset({"interleave", "weighted interleave"})
# Real, effective, saved and file system uid.
_UIDS: Final = re.compile(rb"^Uid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", re.MULTILINE)


# -- what both have in common ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asker:
    """The user who asks, and what that user may learn about equal contents (docs/security.md).

    Who could have a page compared with everybody's could guess at others' contents. So whoever is not root learns
    nothing beyond what merging itself tells the owner of a mergeable page.
    """

    uid: int
    root: Path

    def need_merging(self, what: str) -> None:
        """
        :raises Refused: KSM does not merge, and it is not root that asks
        """
        if self.uid == 0:
            return
        with closing(KsmFs(self.root)) as ksm:
            run = ksm.read(Knob.RUN)
        if run != 1:
            raise Refused(what, f"run is {run}: contents are compared for root only while KSM does not merge")

    def rounded(self, pages: int) -> int:
        """A count of pages as the asker gets it: rounded down, but for root."""
        return pages if self.uid == 0 else pages // ROUND_PAGES * ROUND_PAGES

    def may_compare(self, pid: int) -> bool:
        """Whether a process takes part: it has none of its uids from the asker.

        :raises NoSuchProcess: it is gone
        """
        if self.uid == 0:
            return True
        path = self.root / "proc" / str(pid) / "status"
        try:
            match = _UIDS.search(read_file(path))
        except Absent as error:
            raise NoSuchProcess(f"process {pid}", "it is gone", path=str(path), errno=error.errno) from error
        except ReadError:
            return False
        return match is not None and str(self.uid).encode() not in match.groups()


def _merge_rules(root: Path) -> MergeRules:
    with closing(KsmFs(root)) as ksm:

        def number(knob: Knob, lacking: int) -> int:
            try:
                return int(ksm.read(knob))
            except Absent:
                return lacking

        # Without NUMA there is one node.
        return MergeRules(number(Knob.MERGE_ACROSS_NODES, 1) != 0, number(Knob.MAX_PAGE_SHARING, NO_LIMIT))


class _Contents(Closing):
    """Numbers made of the contents of one process's pages."""

    def __init__(self, pid: int, root: Path) -> None:
        """
        :raises NoSuchProcess, Denied: they can't be read
        """
        path = root / "proc" / str(pid) / "mem"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise process_file_error(pid, path, error) from error

    def numbers(self, start: int, pages: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Each of the pages that is still there, counted from an address, and the number of its content."""
        for begin, end in runs(pages, 1):
            for first in range(begin, end, _READ_PAGES):
                try:
                    data = os.pread(
                        self._fd, (min(end, first + _READ_PAGES) - first) * PAGE_SIZE, start + first * PAGE_SIZE
                    )
                except OSError:
                    # It was unmapped meanwhile.
                    continue
                for index in range(len(data) // PAGE_SIZE):
                    # SipHash with a key of this process's own: three times as quick as anything of hashlib's, and
                    # nobody can make contents that meet.
                    yield first + index, hash(data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])

    def close(self) -> None:
        os.close(self._fd)


# -- all mergeable memory --------------------------------------------------------------------------------------


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
        _merge_rules(root),
        min(1.0, budget_frames / max(1, pages)),
        read_frame_map(root),
        chance or random.Random(),
        _ForkedFrames({stack for stack, count in stacks.items() if stack and count > 1}),
    )
    for pid, stack, ranges in found:
        if stop():
            raise Cancelled("comparing contents", "stopped before it was done")
        with unread.looking_at(pid), _Contents(pid, root) as contents, Pagemap(pid, root) as pagemap:
            for item in ranges:
                job.compare(pagemap, contents, item, stack)
    if (refusal := unread.refusal()) and not job.groups:
        raise refusal
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

    def compare(self, pagemap: Pagemap, contents: _Contents, item: Range, stack: int) -> None:
        """Take in what was drawn of a mapping."""
        parts = own_parts(pagemap, item)
        # Looking for a page costs a small part of what comparing it does: only who has hardly any pays for it.
        walked = sum(end - start for start, end in parts) // PAGE_SIZE
        share = self.share * min(1.0, SPARSE * item.anonymous_pages / max(1, walked))
        self.complete = self.complete and share == 1.0
        for start, count in pieces(parts, _BLOCK_PAGES):
            if share == 1.0 or self.chance.random() < share:
                self._block(pagemap, contents, start, count, share, stack)

    def _block(self, pagemap: Pagemap, contents: _Contents, start: int, count: int, share: float, stack: int) -> None:
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


# -- KSM pages -------------------------------------------------------------------------------------------------


def find_duplicate_ksm_pages(
    budget_cpu_seconds: float,
    most_pages: int,
    *,
    reader: PageReader,
    uid: int = 0,
    root: Path = Path("/"),
    stop: Callable[[], bool] = lambda: False,
) -> DuplicateKsmPages:
    """Find KSM pages with one content that max_page_sharing does not explain.

    - A page with max_page_sharing mappings or more can't be one (`ksmd_ctl.host.duplicates`): it is not read.
    - Where the kernel counts more mappings of a page than were found (/proc/kpagecount), somebody maps it who can't be
      looked at, or who forked meanwhile: it is not un-merged, for that would only make one page more.
    - Where userfaultfd watches a mapping nothing is read through it: the page might be gone by then, and the read
      would wait for the handler.
    - A copy comes from the node that the mapping's own policy names, if it has one; numa_maps doesn't tell that from
      the policy of the thread. Where both are alike un-merging is tried last, and the outcome tells.

    :param budget_cpu_seconds: CPU time of this process that it may cost, about
    :param most_pages: mappings that `DuplicateKsmPages.parts` may have
    :param reader: for this search alone
    :param uid: of the user who asks
    :raises Denied, Absent: somebody's memory could not be looked at, and nobody else's was of any use
    :raises Cancelled: `stop` said so
    """
    began, asker, unread = time.monotonic(), Asker(uid, root), LeftOut()
    with FrameCounts(root) as counts:
        job = _KsmSearch(_merge_rules(root), reader, counts, read_frame_map(root), root)
        spent = time.process_time

        def go_on() -> bool:
            if stop():
                raise Cancelled("looking for duplicate KSM pages", "stopped before it was done")
            return spent() - job.begin < budget_cpu_seconds

        for pid in running_pids(root):
            if not go_on():
                job.complete = False
                break
            with unread.looking_at(pid):
                counted = read_counts(pid, root)
                if counted.merging_pages != 0 and counted.mergeable is not False and asker.may_compare(pid):
                    job.process(pid, go_on)
    compared = [(page.number, page) for page in job.pages.values() if page is not None and page.number is not None]
    if (refusal := unread.refusal()) and not compared:
        raise refusal
    for _, page in compared:
        if not page.stuck and page.found != page.mapped:
            page.stuck = HIDDEN
        page.mapped = max(page.found, page.mapped)
    return duplicate_ksm_pages(
        compared,
        job.mappings(),
        job.rules,
        most_pages,
        page_size=PAGE_SIZE,
        time_seconds=began,
        detection=reader.detection,
        complete=job.complete and not unread.errors,
        cpu_seconds=spent() - job.begin,
    )


@dataclass(slots=True)
class _Page(KsmPage):
    """
    :ivar found: how many mappings were found
    :ivar number: of its content, None until that was read
    """

    found: int = 0
    number: int | None = None


@dataclass(slots=True)
class _KsmSearch:
    rules: MergeRules
    reader: PageReader
    counts: FrameCounts
    nodes: FrameMap
    root: Path
    begin: float = field(default_factory=time.process_time)
    complete: bool = True
    #: By frame; None for one that doesn't matter.
    pages: dict[int, _Page | None] = field(default_factory=dict)
    kept: int = 0
    # Each process's mappings of such pages: frames and addresses by turns.
    mapped: list[tuple[ProcessId, array[int]]] = field(default_factory=list)
    mappings_left: int = _MOST_MAPPINGS

    def process(self, pid: int, go_on: Callable[[], bool]) -> None:
        """Take in what a process maps, as far as there is budget."""
        owner = ProcessId(pid, start_time_ticks(pid, self.root))
        numa = numa_ranges(pid, self.root)
        joined = with_policies(mappings(pid, self.root), numa)
        ranges = [item for item in joined if item.mergeable and item.anonymous_pages and item.ksm_pages != 0]
        if not ranges:
            return
        # Nobody but the kernel places a stack, so what it shows is the thread's own policy.
        stack = next((numa.get(item.start) for item in joined if item.name == "[stack]"), None)
        self.mapped.append((owner, array("Q")))
        with _Contents(pid, self.root) as contents:
            for window in self.reader.windows(pid, ranges, everything=joined):
                self._window(window, _own_policy(window.mapping, stack), contents)
                if not go_on():
                    self.complete = False
                    return

    def _window(self, window: Window, own_policy: bool, contents: _Contents) -> None:
        item, indices = window.mapping, window.merged()
        if not indices:
            return
        mapped = self.counts.at({window.frames[index] for index in indices})
        watched = bool(item.flags & {"um", "uw"})
        cause = WATCHED if watched else NOT_WRITABLE if "wr" not in item.flags else ""
        unread = []
        for index in indices:
            frame = window.frames[index]
            page = self.pages[frame] if frame in self.pages else self._enter(frame, mapped[frame])
            if page is None:
                continue
            if not self.mappings_left:
                self.complete = False
                break
            self.mappings_left -= 1
            page.found += 1
            self.mapped[-1][1].extend((frame, window.start + index * PAGE_SIZE))
            if page.number is None and not watched:
                unread.append(index)
            if cause:
                page.stuck = cause
            elif not self.rules.merge_across_nodes and _leads_away(item, page.node):
                if own_policy:
                    page.stuck = page.stuck or POLICY
                else:
                    page.doubtful = True
        for index, number in contents.numbers(window.start, unread):
            page = self.pages[window.frames[index]]
            assert page is not None
            page.number = number

    def _enter(self, frame: int, mapped: int) -> _Page | None:
        node = self.nodes.node(frame)
        if node is None or mapped >= self.rules.max_page_sharing:
            self.pages[frame] = None
            return None
        if self.kept == _MOST_FRAMES:
            self.complete = False
            return None
        self.kept += 1
        page = self.pages[frame] = _Page(frame, node, mapped)
        return page

    def mappings(self) -> Iterator[tuple[int, ProcessId, int]]:
        """Frame, process and address of each mapping."""
        for owner, found in self.mapped:
            for frame, address in zip(found[::2], found[1::2], strict=True):
                yield frame, owner, address


def _own_policy(item: Range, stack: NumaRange | None) -> bool:
    return stack is None or (item.policy, item.policy_nodes) != (stack.policy, stack.policy_nodes)


def _leads_away(item: Range, node: int) -> bool:
    """Whether a policy would take a copy elsewhere than to this node, or may."""
    if item.policy == "default":
        return False
    if item.policy in _SPREADING:
        return item.policy_nodes != {node}
    return node not in item.policy_nodes
