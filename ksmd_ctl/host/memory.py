# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes, processes, and where their mergeable memory is: what is looked at less often than each tick."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Final

from ksmd_ctl.codec import between
from ksmd_ctl.figures import room_text

#: What ksmd keeps for each page that it has seen: sizeof(struct ksm_rmap_item) on 64-bit, as in the kernel's
#: own formula for general_profit (Documentation/admin-guide/mm/ksm.rst).
PAGE_ITEM_BYTES = 64

#: What un-merging and moving leave free on the host and on each node, whatever floor somebody asks for.
LEAST_FLOOR_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node: its CPUs, its memory, the distance to every node (by number), and the memory blocks on it."""

    number: int
    cpus: frozenset[int]
    memory_bytes: int
    distances: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes that are online.

    :ivar numa: False where the kernel or libnuma doesn't offer NUMA; then there is one node, 0
    :ivar going_offline: memory is being taken offline at this moment (`run` has bit 4)
    """

    nodes: tuple[Node, ...]
    numa: bool
    going_offline: bool = False

    def with_memory(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.memory_bytes)


@dataclass(frozen=True, slots=True, order=True)
class ProcessId:
    """A process that no other can be mistaken for: field 22 of /proc/PID/stat tells reused pids apart."""

    # PID_MAX_LIMIT of 64-bit kernels, include/linux/threads.h.
    pid: Annotated[int, between(1, 1 << 22)]
    start_time_ticks: Annotated[int, between(0, (1 << 63) - 1)]


class ProcessClass(StrEnum):
    """What a process is to KSM. Known before anything touches it."""

    MERGEABLE = "mergeable"
    SHARED = "shared"
    HUGETLB = "hugetlb"
    PINNED = "pinned"
    USERFAULTFD = "userfaultfd"
    MIGRATING = "migrating"
    ENCRYPTED = "encrypted"
    NOT_ELIGIBLE = "not eligible"


@dataclass(frozen=True, slots=True)
class SplitBlocks:
    """Blocks of a huge page's size that could be huge pages and are not, as ksmd has merged or freed pages of them.

    :ivar pages: their merged pages, and their zero pages where splits of huge pages or ksmd free these
    :ivar low: those with fewer than `ksmd_ctl.figures.LOW_YIELD_PAGES` of these, and `low_pages` the pages of those
    """

    count: int = 0
    pages: int = 0
    low: int = 0
    low_pages: int = 0

    def plus(self, other: SplitBlocks) -> SplitBlocks:
        """Both together."""
        return SplitBlocks(
            self.count + other.count, self.pages + other.pages, self.low + other.low, self.low_pages + other.low_pages
        )


@dataclass(frozen=True, slots=True)
class Process:
    """A process as KSM sees it; counts are pages, None where this kernel doesn't tell.

    :ivar group: the stable name that figures are kept under: a virtual machine's, else the unit's
    :ivar unit: its systemd unit, empty outside of any
    :ivar reason: why it has this class, as a phrase
    :ivar nodes: its merged pages by node, counted once a mapping
    :ivar home: the node where it belongs, None where that is not one node
    :ivar remote_pages: its merged pages that lie on another node than the home of their range
    :ivar remote_nodes: these, by the node that they lie on
    :ivar relatives: how many others are forks of the same program. What fork shared counts as merged for each of
        them, so `merging_pages` and `profit_bytes` say too much then
    :ivar huge_bytes: transparent huge pages in its mergeable memory
    :ivar split_blocks: blocks of a huge page's size that could be huge pages and hold merged or freed pages; estimates
        where not every page was looked at
    :ivar walked_bytes: address space of its mergeable mappings that hold a page: what run = 2 walks (findings F11)
    :ivar resident_bytes: what of its mergeable memory is in memory: anonymous pages
    :ivar swapped_bytes: what of it is swapped out
    :ivar file_bytes: what is mapped of files there, which is never merged and is not the process's own
    :ivar mergeable_mappings: how many mappings its mergeable memory has
    :ivar adjacent_mappings: the longest run of mergeable mappings that touch each other. They have one anon_vma: who
        looks for the mappings of one of their KSM pages visits all of them (mm/ksm.c:rmap_walk_ksm)
    :ivar page_mappings: how often it maps the KSM page that it maps most often; counted of those only that have many
        adjacent mappings, and whose pages were all looked at
    :ivar zero_mapped_pages: how often its mergeable memory maps the zero page, huge ones left out: what ksmd put
        there (`zero_pages`, where use_zero_pages is on), what splits of huge pages freed (since 6.12, findings F32),
        and what was read and never written
    :ivar split_zero_pages: those that splits of huge pages freed; no counter of KSM has them
    :ivar ksm_mapped_pages: the KSM pages that it maps now, by smaps (since 6.7): also right while ksmd is stopped
    :ivar sharing_bytes: what of `pages_sharing` is its part: each KSM page is divided among its mappings. For forks it
        may include what fork shares
    :ivar uid: its effective user, None where that is not known
    :ivar cgroup: where systemd put it, below /sys/fs/cgroup
    :ivar machine: `group` is the name of a virtual machine
    :ivar namespace: that of its pod, as far as it is known; empty outside of any
    :ivar resident_nodes: the pages of its mergeable memory by node, merged ones counted once a mapping
    """

    id: ProcessId
    name: str
    group: str
    unit: str
    classes: frozenset[ProcessClass]
    reason: str
    merging_pages: int | None = None
    zero_pages: int | None = None
    rmap_items: int | None = None
    profit_bytes: int | None = None
    nodes: Mapping[int, int] = field(default_factory=dict)
    home: int | None = None
    remote_pages: int | None = None
    remote_nodes: Mapping[int, int] = field(default_factory=dict)
    relatives: int | None = None
    huge_bytes: int | None = None
    split_blocks: SplitBlocks | None = None
    walked_bytes: int | None = None
    resident_bytes: int | None = None
    swapped_bytes: int | None = None
    file_bytes: int | None = None
    mergeable_mappings: int | None = None
    adjacent_mappings: int | None = None
    page_mappings: int | None = None
    zero_mapped_pages: int | None = None
    split_zero_pages: int | None = None
    ksm_mapped_pages: int | None = None
    sharing_bytes: int | None = None
    uid: int | None = None
    cgroup: str = ""
    machine: bool = False
    namespace: str = ""
    resident_nodes: Mapping[int, int] = field(default_factory=dict)

    @property
    def merged_pages(self) -> int:
        """Its merged pages: as the kernel counts them, else as they were seen on the nodes (before 5.19)."""
        return sum(self.nodes.values()) if self.merging_pages is None else self.merging_pages

    @property
    def gone_pages(self) -> int:
        """Merged pages that the kernel's count still has and that are not mapped any more; 0 where it isn't known."""
        if self.merging_pages is None or self.ksm_mapped_pages is None:
            return 0
        return max(0, self.merging_pages - self.ksm_mapped_pages)


@dataclass(frozen=True, slots=True)
class Range:
    """A mapping, from /proc/PID/smaps.

    :ivar flags: its VmFlags, two letters each (``mg`` is VM_MERGEABLE)
    :ivar policy: its NUMA policy as numa_maps shows it
    :ivar policy_nodes: the nodes which that policy names, empty for the default policy
    :ivar resident_pages: what of it is in memory, pages of a file that it maps among them
    :ivar anonymous_pages: those that are the process's own: only they merge
    :ivar ksm_pages: its merged pages, None where the kernel doesn't tell (before 6.7)
    :ivar name: the file, ``[heap]``, ``[anon:...]``, or empty
    :ivar huge_bytes: what of it is in huge pages
    :ivar huge_eligible: whether it may have new ones; None where smaps does not tell (before 5.0)
    :ivar pss_bytes: its proportional share: each page divided by how often it is mapped; None where smaps has none
    """

    start: int
    end: int
    flags: frozenset[str]
    policy: str = "default"
    policy_nodes: frozenset[int] = frozenset()
    resident_pages: int = 0
    anonymous_pages: int = 0
    ksm_pages: int | None = None
    name: str = ""
    huge_bytes: int = 0
    swapped_bytes: int = 0
    pss_bytes: int | None = None
    huge_eligible: bool | None = None

    @property
    def mergeable(self) -> bool:
        return "mg" in self.flags


class KsmDetection(StrEnum):
    """How it was found out which frames hold KSM pages.

    KPAGEFLAGS is bit 21 of /proc/kpageflags, exact where it can be trusted: 6.12 sets it on every anonymous
    page. PAGEMAP stands in there: frames that mergeable ranges of registered processes map more than once.
    """

    KPAGEFLAGS = "kpageflags"
    PAGEMAP = "pagemap"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Census:
    """How many KSM pages (frames) each node holds.

    :ivar pages: frames by node
    :ivar low: with `high`, the 95 % confidence interval; both equal `pages` where every frame was looked at
    :ivar complete: every frame was looked at
    :ivar cpu_seconds: what the census cost
    """

    time_seconds: float
    pages: Mapping[int, int]
    low: Mapping[int, int]
    high: Mapping[int, int]
    complete: bool
    detection: KsmDetection
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class UnmergeDemand:
    """How much a place would grow if everything un-merged now, and what is free there.

    :ivar where: ``host``, ``node N``, or a memory cgroup's path
    :ivar free_bytes: in a memory cgroup above its reserve
    :ivar upper_bound: it grows by at most so much: which of the merged pages are there already was not to be seen
    """

    where: str
    growth_bytes: int
    free_bytes: int
    upper_bound: bool = True

    @property
    def over_bytes(self) -> int:
        """By how much it would be over; 0 if it fits."""
        return max(0, self.growth_bytes - self.free_bytes)

    def text(self, floor_bytes: int) -> str:
        """As a phrase with figures."""
        return room_text(
            self.where, self.growth_bytes, self.free_bytes, upper_bound=self.upper_bound, floor_bytes=floor_bytes
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """A process that could not be looked at, though it is there and may be: why, as a phrase."""

    pid: int
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Unmergeable:
    """A process that has much memory of a kind that KSM never merges, and nothing that is mergeable.

    :ivar unit: its systemd unit, empty outside of any
    :ivar reason: which memory that is, as a phrase
    """

    id: ProcessId
    name: str
    unit: str
    classes: frozenset[ProcessClass]
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessList:
    """All processes, as far as they matter to KSM.

    :ivar processes: those with mergeable memory, and virtual machines
    :ivar skipped: those that could not be read
    :ivar unmergeable: those with much shared or hugetlb memory and nothing that is mergeable
    :ivar denied: pids of those that may not be looked at
    """

    processes: tuple[Process, ...]
    skipped: tuple[Skipped, ...] = ()
    unmergeable: tuple[Unmergeable, ...] = ()
    denied: tuple[int, ...] = ()

    def total(self, count: Callable[[Process], int | None]) -> int | None:
        """The sum over all processes; None where it is unknown of one, or not all could be read."""
        counts = [count(process) for process in self.processes]
        known = [found for found in counts if found is not None]
        return None if self.skipped or self.denied or len(known) < len(counts) else sum(known)


@dataclass(frozen=True, slots=True)
class Placements:
    """On which nodes processes may allocate. Each thread has nodes of its own (Mems_allowed, cpuset(7)).

    :ivar nodes: by process, those of all its threads together; a process that has ended is not in it
    :ivar cpusets: whether this host can confine processes to nodes
    :ivar denied: pids of processes that may not be looked at
    """

    nodes: Mapping[ProcessId, frozenset[int]]
    cpusets: bool = True
    denied: tuple[int, ...] = ()
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey(ProcessList):
    """Nodes, processes and KSM pages, looked at one after the other.

    :ivar time_seconds: `Host.clock` when it began
    :ivar census: None where this host has no way to tell which frames are KSM pages
    :ivar lacking: why there is no census, empty where there is one
    :ivar demands: what is most over comes first
    :ivar cpu_seconds: what it cost, census and all, without the start of the process that did it
    """

    time_seconds: float
    topology: Topology
    census: Census | None
    lacking: str
    demands: tuple[UnmergeDemand, ...]
    cpu_seconds: float


#: Contents are not compared more often for anybody but root. A broker lives on for as long when it is idle.
CONTENTS_PAUSE_SECONDS: Final = 30.0
#: Counts of pages that depend on contents are rounded down to multiples of this for all but root (docs/security.md).
ROUND_PAGES: Final = 256


@dataclass(frozen=True, slots=True)
class Attempts:
    """What ksmd tried to merge in some time.

    :ivar tried: attempts to merge a page with an equal one, two for two pages of which none was merged before
    :ivar refused: those that failed: something held the page (vmsplice, O_DIRECT, a device), or it was written to
    """

    tried: int
    refused: int


@dataclass(frozen=True, slots=True)
class HomeRange:
    """A mergeable mapping that holds pages, or some that touch each other, and the node where they belong.

    :ivar home: None where that is not one node
    :ivar nodes: its anonymous pages by node, merged ones counted once a mapping
    :ivar merged_pages: how many of these are merged
    """

    start: int
    end: int
    home: int | None
    nodes: Mapping[int, int]
    merged_pages: int


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What one process has of mergeable memory.

    :ivar merged_pages: as the kernel counts them, or counted page by page where it doesn't
    :ivar read_only_pages: how many of these lie in mappings that are not writable: only run = 2 un-merges them
    :ivar calls: into how many calls un-merging the others is divided by what lies between them; 0 where not counted
    :ivar cgroups: the memory cgroups above it that have a limit
    """

    process: ProcessId
    name: str
    unit: str
    classes: frozenset[ProcessClass]
    merged_pages: int
    ranges: tuple[HomeRange, ...]
    cgroups: tuple[str, ...] = ()
    read_only_pages: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that is mergeable: whose it is, where it belongs, and what un-merging all of it would take.

    :ivar demands: room above the floor, on host and nodes, and above a reserve in memory cgroups; what is most
        over comes first
    :ivar skipped: processes that could not be read; of what they have only the room that it takes is known
    :ivar denied: pids of processes that may not be looked at; nothing of what they have is known
    :ivar sparse_seconds_per_gib: how long run = 2 takes for a GiB of empty address space, measured on this kernel: 0
        where it is skipped; None where that was not asked, or could not be told
    """

    topology: Topology
    memories: tuple[ProcessMemory, ...]
    demands: tuple[UnmergeDemand, ...]
    skipped: tuple[Skipped, ...] = ()
    denied: tuple[int, ...] = ()
    sparse_seconds_per_gib: float | None = None

    @property
    def mapped_bytes(self) -> int:
        """Mergeable address space that holds a page, with all that is empty in it."""
        return sum(item.end - item.start for memory in self.memories for item in memory.ranges)


@dataclass(frozen=True, slots=True)
class Losses:
    """What the OOM killer has done, and who is gone.

    :ivar oom_kills: processes killed since boot, by place: ``host`` counts all of them, memory cgroups (by path) their
        own; a place that is not in it doesn't tell
    :ivar gone: of the processes that were asked about, those that have ended or are about to
    """

    oom_kills: Mapping[str, int] = field(default_factory=dict)
    gone: tuple[ProcessId, ...] = ()


@dataclass(frozen=True, slots=True)
class PageState:
    """One page of a process: its frame and that frame's node, both None where nothing is mapped.

    The zero page has a frame and no node.
    """

    frame: int | None
    node: int | None
    ksm: bool
