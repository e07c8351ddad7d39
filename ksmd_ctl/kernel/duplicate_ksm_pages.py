# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds KSM pages with one content that are not one page (docs/healing.md, `ksmd_ctl.kernel.contents`)."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Cancelled
from ksmd_ctl.host.duplicates import POLICY, DuplicateKsmPages, KsmPage, MergeRules, duplicate_ksm_pages
from ksmd_ctl.host.memory import ProcessId, Range
from ksmd_ctl.kernel.contents import Asker, Contents, merge_rules
from ksmd_ctl.kernel.detection import PageReader, Window
from ksmd_ctl.kernel.kpageflags import FrameCounts
from ksmd_ctl.kernel.proc_pid import LeftOut, running_pids, start_time_ticks
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import NumaRange, mappings, numa_ranges, with_policies
from ksmd_ctl.kernel.topology import FrameMap, read_frame_map
from ksmd_ctl.kernel.unshare import NOT_WRITABLE, WATCHED

HIDDEN = "also mapped by a process that can't be inspected or has just forked"

# About 300 bytes each, and 1 GiB of merged contents; 16 bytes each.
_MOST_FRAMES: Final = 1 << 18
_MOST_MAPPINGS: Final = 1 << 21
_SPREADING: Final = frozenset({"interleave", "weighted interleave"})


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
        job = _KsmSearch(merge_rules(root), reader, counts, read_frame_map(root), root)
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
    unread.need(compared)
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
        with Contents(pid, self.root) as contents:
            for window in self.reader.windows(pid, ranges, everything=joined):
                self._window(window, has_own_policy(window.mapping, stack), contents)
                if not go_on():
                    self.complete = False
                    return

    def _window(self, window: Window, own_policy: bool, contents: Contents) -> None:
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
            elif not self.rules.merge_across_nodes and leads_away(item, page.node):
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


def has_own_policy(item: Range, stack: NumaRange | None) -> bool:
    return stack is None or (item.policy, item.policy_nodes) != (stack.policy, stack.policy_nodes)


def leads_away(item: Range, node: int) -> bool:
    """Whether a policy would take a copy elsewhere than to this node, or may."""
    if item.policy == "default":
        return False
    if item.policy in _SPREADING:
        return item.policy_nodes != {node}
    return node not in item.policy_nodes
