# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface to a host that has KSM. Two hosts stand behind it: the running kernel and the engine.

- `Host` is all that daemon, control and command line ever see.
- `Lab` is a host on which one can also make things happen; scenarios use it.
- `Inspect` shows what no kernel shows; only the engine has it, and control can't use it.

Reading is quick and can't block. Everything that changes the host, and everything that takes long, is an
`Operation`: it runs beside its caller (on the kernel in a child that can be killed), and only
`ksmd_ctl.control.executor` starts one that changes anything. Time is the host's: `Host.clock`, never the
wall clock. A process is a `ProcessId`, never a bare pid.
"""

from __future__ import annotations

import select
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

from ksmd_ctl.errors import ReadError, TimedOut
from ksmd_ctl.knobs import Knob, KnobValue

__all__ = [
    "PAGE_ITEM_BYTES",
    "Census",
    "Exposure",
    "HomeRange",
    "Host",
    "HostIdentity",
    "HostKind",
    "Inspect",
    "Inventory",
    "KsmWitness",
    "Lab",
    "Likeness",
    "Move",
    "MovePlan",
    "MoveResult",
    "Node",
    "NodeMemory",
    "Operation",
    "PageState",
    "Process",
    "ProcessClass",
    "ProcessId",
    "Progress",
    "Range",
    "Reading",
    "Sample",
    "Stock",
    "Survey",
    "Topology",
    "TwinPart",
    "Twins",
    "Unshare",
    "UnshareResult",
    "Writer",
    "finish",
]

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

#: What ksmd keeps for each page that it has seen: sizeof(struct ksm_rmap_item) on 64-bit, as in the kernel's
#: own formula for general_profit (Documentation/admin-guide/mm/ksm.rst).
PAGE_ITEM_BYTES = 64

Reading = int | float | str | ReadError
"""What reading a field gave: its value, or the error that says why there is none."""


class HostKind(StrEnum):
    KERNEL = "kernel"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Which host this is.

    :ivar release: the kernel's release, or the engine's profile
    :ivar boot_id: changes with each boot; what was found before belongs to it
    """

    kind: HostKind
    release: str
    page_size_bytes: int
    boot_id: str

    @property
    def simulated(self) -> bool:
        return self.kind is HostKind.ENGINE


@dataclass(frozen=True, slots=True, order=True)
class ProcessId:
    """A process that no other can be mistaken for: field 22 of /proc/PID/stat tells reused pids apart."""

    pid: int
    start_time_ticks: int


# -- what a tick sees --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """One NUMA node's memory in bytes, from /sys/devices/system/node/nodeN/meminfo."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All that one tick reads, and all that decisions and renderings see.

    :ivar time_seconds: `Host.clock` when it was taken
    :ivar readings: by field name (`ksmd_ctl.fields`)
    :ivar nodes: memory of each node, by node number
    """

    time_seconds: float
    readings: Mapping[str, Reading]
    nodes: Mapping[int, NodeMemory] = field(default_factory=dict)

    def value(self, name: str) -> int | float | str:
        """A field's value.

        :raises ReadError: there is none, and why
        """
        reading = self.readings[name]
        if isinstance(reading, ReadError):
            raise reading
        return reading

    def number(self, name: str) -> int | float | None:
        """A field's value where it is a number; None where there is none, for arithmetic on what is there."""
        reading = self.readings.get(name)
        return reading if isinstance(reading, int | float) else None

    def knob(self, knob: Knob) -> KnobValue | None:
        """A knob's value, None where it can't be had."""
        reading = self.readings.get(knob)
        return reading if isinstance(reading, int | str) else None


# -- topology, processes and where pages are ---------------------------------------------------------------


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
    :ivar split_blocks: blocks of a huge page's size that could be one and hold merged pages
    :ivar walked_bytes: address space of its mergeable mappings that hold a page: what run = 2 walks (findings F11)
    :ivar resident_bytes: what of its mergeable memory is in memory
    :ivar swapped_bytes: what of it is swapped out
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
    split_blocks: int | None = None
    walked_bytes: int | None = None
    resident_bytes: int | None = None
    swapped_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """A mapping, from /proc/PID/smaps.

    :ivar flags: its VmFlags, two letters each (``mg`` is VM_MERGEABLE)
    :ivar policy: its NUMA policy as numa_maps shows it
    :ivar policy_nodes: the nodes which that policy names, empty for the default policy
    :ivar ksm_pages: its merged pages, None where the kernel doesn't tell (before 6.7)
    """

    start: int
    end: int
    flags: frozenset[str]
    policy: str = "default"
    policy_nodes: frozenset[int] = frozenset()
    resident_pages: int = 0
    ksm_pages: int | None = None

    @property
    def mergeable(self) -> bool:
        return "mg" in self.flags


class KsmWitness(StrEnum):
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
    witness: KsmWitness
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Exposure:
    """How much a place would grow if everything un-merged now, and what is free there; an upper bound.

    :ivar where: ``host``, ``node N``, or a memory cgroup's path
    """

    where: str
    growth_bytes: int
    free_bytes: int

    @property
    def over_bytes(self) -> int:
        """By how much it would be over; 0 if it fits."""
        return max(0, self.growth_bytes - self.free_bytes)


@dataclass(frozen=True, slots=True)
class Survey:
    """Nodes, processes and KSM pages, looked at one after the other.

    :ivar time_seconds: `Host.clock` when it began
    :ivar census: None where this host has no way to tell which frames are KSM pages
    :ivar lacking: why there is no census, empty where there is one
    :ivar exposures: what is most over comes first
    :ivar cpu_seconds: what it cost, census and all, without the start of the process that did it
    """

    time_seconds: float
    topology: Topology
    processes: tuple[Process, ...]
    census: Census | None
    lacking: str
    exposures: tuple[Exposure, ...]
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Likeness:
    """How much of what is mergeable has the same content and is not one frame, by a look at contents.

    :ivar mergeable_pages: pages of mergeable memory that are present, counted once a mapping
    :ivar frames: frames that were compared; one that many map counts once
    :ivar apart: how many of these are more than there need be: frames of a content and node, less those that
        max_page_sharing asks for. Where not all were compared there are more in truth
    :ivar complete: every frame was compared
    """

    mergeable_pages: int
    frames: int
    apart: int
    complete: bool
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class HomeRange:
    """A mergeable mapping that holds pages, and the node where it belongs.

    :ivar home: None where that is not one node
    :ivar nodes: its pages by node, merged ones counted once a mapping
    :ivar merged_pages: how many of these are merged
    """

    start: int
    end: int
    home: int | None
    nodes: Mapping[int, int]
    merged_pages: int


@dataclass(frozen=True, slots=True)
class Stock:
    """What one process has of mergeable memory.

    :ivar merged_pages: as the kernel counts them, or counted page by page where it doesn't
    """

    process: ProcessId
    name: str
    unit: str
    classes: frozenset[ProcessClass]
    merged_pages: int
    ranges: tuple[HomeRange, ...]


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that is mergeable: whose it is, where it belongs, and what un-merging all of it would take.

    :ivar exposures: room above the floor, on host and nodes, and above a reserve in memory cgroups; what is most
        over comes first
    """

    topology: Topology
    stocks: tuple[Stock, ...]
    exposures: tuple[Exposure, ...]


@dataclass(frozen=True, slots=True)
class PageState:
    """One page of a process: its frame and that frame's node, both None where nothing is mapped.

    The zero page has a frame and no node.
    """

    frame: int | None
    node: int | None
    ksm: bool


@dataclass(frozen=True, slots=True)
class Writer:
    """Somebody else who is known to write the knobs.

    :ivar name: the program's or the unit's name (ksmtuned, momd, virt-handler, ...), or ``advisor``
    :ivar pid: its process, None for the kernel's own advisor
    """

    name: str
    pid: int | None = None


# -- operations --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an operation is; `total` is 0 where nobody knows."""

    done: int = 0
    total: int = 0
    unit: str = ""


class Operation(Protocol[T_co]):
    """Something that takes its time on a host, beside its caller."""

    def fileno(self) -> int:
        """A descriptor that gets readable when `poll` has news; -1 where there is none (poll at any time)."""

    def poll(self) -> bool:
        """Take in what has happened, without waiting; True once it is finished."""

    @property
    def progress(self) -> Progress: ...

    def cancel(self) -> None:
        """Ask it to stop at the next safe point; it then finishes with `Cancelled`, or done if it was quicker."""

    def result(self) -> T_co:
        """What came of it.

        :raises KsmdError: it failed, was cancelled, or its deadline passed
        """


def finish(operation: Operation[T], timeout_seconds: float | None = None) -> T:
    """Wait for an operation, for callers that have nothing else to do.

    :raises KsmdError: as `Operation.result`; `TimedOut` where nothing came for `timeout_seconds`
    """
    while not operation.poll():
        descriptor = operation.fileno()
        if descriptor < 0:
            continue
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if not poller.poll(None if timeout_seconds is None else timeout_seconds * 1000):
            operation.cancel()
            raise TimedOut("waiting for the host", f"no word for {timeout_seconds:g} s")
    return operation.result()


@dataclass(frozen=True, slots=True)
class Move:
    """Mergeable memory of one process to be moved to a node.

    :ivar ranges: (start, end) addresses; empty for all of the process's mergeable memory
    :ivar everything: also memory that is not mergeable
    :ivar latency_seconds: how long one call may keep the process from its memory
    """

    process: ProcessId
    to: int
    ranges: tuple[tuple[int, int], ...] = ()
    everything: bool = False
    latency_seconds: float = 0.01
    floor_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MoveResult:
    """What a query found after the calls, not what the calls said.

    :ivar moved: frames that are on the target now and were not before
    :ivar already: frames that were there before
    :ivar left: frames that stayed, by the cause in words
    """

    moved: int
    already: int
    left: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MovePlan:
    """What a move would have to do, counted in frames.

    :ivar nodes: frames that would be moved, by the node that they are on
    :ivar shared: of these, frames that are mapped more than once, as merged pages are
    :ivar already: frames that are there
    :ivar left: frames that would stay, by the cause in words
    :ivar room: where there is the least room for them, as a phrase
    """

    nodes: Mapping[int, int]
    shared: int
    already: int
    left: Mapping[str, int]
    room: str
    room_bytes: int


@dataclass(frozen=True, slots=True)
class Unshare:
    """Merged pages of one process to be un-merged, each onto `to`, or where its range's policy says.

    :ivar ranges: (start, end) addresses; empty for all of the process's mergeable memory
    """

    process: ProcessId
    ranges: tuple[tuple[int, int], ...] = ()
    to: int | None = None
    latency_seconds: float = 0.01
    floor_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UnshareResult:
    """What pagemap showed afterwards: pages that got a frame of their own, and those left, by cause."""

    unshared: int
    left: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TwinPart:
    """Pages of one process that are twins of others: un-merged onto their node, ksmd merges them with these.

    :ivar node: where they are
    :ivar ranges: (start, end) addresses, ascending
    """

    process: ProcessId
    node: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Twins:
    """KSM pages with one content that max_page_sharing does not explain: ksmd never merges them with one another.

    With merge_across_nodes = 0 only those on one node are twins.

    :ivar time_seconds: `Host.clock` when it began
    :ivar frames: KSM pages whose contents were compared
    :ivar unrealised: how many of these would come free if all twins were one
    :ivar left: of the unrealised, those that un-merging can't free, by the cause in words
    :ivar parts: what to un-merge for some of the others: all who map a page, those first that take fewest
    :ivar part_pages: how many pages (mappings) that are
    :ivar part_frames: how many frames come free once they are merged again
    :ivar complete: every KSM page was compared; else the figures are lower bounds
    :ivar cpu_seconds: what it cost, without the start of the process that did it
    """

    time_seconds: float
    frames: int
    unrealised: int
    left: Mapping[str, int]
    parts: tuple[TwinPart, ...]
    part_pages: int
    part_frames: int
    complete: bool
    witness: KsmWitness
    cpu_seconds: float


# -- the three interfaces ----------------------------------------------------------------------------------


class Host(Protocol):
    """A machine that has KSM."""

    @property
    def identity(self) -> HostIdentity: ...

    def clock(self) -> float:
        """Seconds on a clock that only goes forward."""

    def sample(self, *, fresh: bool = False) -> Sample:
        """Read everything that a tick needs. Never blocks, never raises for a single field.

        :param fresh: all of it; otherwise what is around ksmd may be some seconds old, which is cheaper
        """

    def read(self, knob: Knob) -> KnobValue:
        """One knob, read now.

        :raises ReadError: it can't be had
        """

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> Operation[KnobValue]:
        """Give a knob a value: skipped where it has it already, read back afterwards.

        ``run`` = 2 un-merges everything, and what comes of it is spread over all nodes with memory: by itself it
        would all land on the writer's node (findings F3). The result is the value read back.

        :raises Absent, Denied, Rejected: by the operation's result
        """

    def writers(self) -> tuple[Writer, ...]:
        """Others on this host that are known to write the knobs. Looks at every process: not for each tick."""

    def topology(self) -> Topology:
        """The nodes that are online now."""

    def find(self, pid: int) -> ProcessId:
        """The process that has this pid now.

        :raises NoSuchProcess: there is none
        """

    def processes(self) -> Operation[tuple[Process, ...]]:
        """Every process with mergeable memory, or that one would expect to have some."""

    def ranges(self, process: ProcessId) -> tuple[Range, ...]:
        """A process's mappings.

        :raises NoSuchProcess: it is gone
        :raises Denied: it is not ours to look at
        """

    def census(self, budget_cpu_seconds: float) -> Operation[Census]:
        """Count the KSM pages of each node, sampling where a full count would cost more than the budget."""

    def survey(self, budget_cpu_seconds: float) -> Operation[Survey]:
        """Look at nodes and processes and take a census within the budget, all at the cost of one process."""

    def inventory(self, floor_bytes: int) -> Operation[Inventory]:
        """Look at everything that is mergeable, for a plan to un-merge it.

        :param floor_bytes: what has to stay free on the host and on every node
        """

    def likeness(self, budget_frames: int) -> Operation[Likeness]:
        """Compare contents of mergeable memory: at most so many frames, drawn by chance where there are more."""

    def twins(self, budget_cpu_seconds: float, most_pages: int) -> Operation[Twins]:
        """Find KSM pages with one content that max_page_sharing does not explain.

        :param budget_cpu_seconds: about what it may cost; what was not compared by then is left out
        :param most_pages: pages that `Twins.parts` may have
        """

    def plan(self, request: Move) -> Operation[MovePlan]:
        """Find out what a move would do; nothing changes."""

    def move(self, request: Move, deadline_seconds: float) -> Operation[MoveResult]:
        """Move memory to a node."""

    def unshare(self, request: Unshare, deadline_seconds: float) -> Operation[UnshareResult]:
        """Un-merge pages of a process, its contents unchanged."""


class Lab(Host, Protocol):
    """A host on which one can make things happen. Addresses are in bytes, lengths in pages."""

    def spawn(self, name: str) -> ProcessId:
        """A process of its own, registered with nothing, that prefers the first node with memory."""

    def map(self, process: ProcessId, pages: int, node: int | None) -> int:
        """Private anonymous memory without huge pages, bound to a node if one is given; its address.

        Maps of one process lie at ascending addresses, with gaps between.
        """

    def advise(self, process: ProcessId, start: int, pages: int, *, mergeable: bool) -> None:
        """MADV_MERGEABLE or MADV_UNMERGEABLE."""

    def store(self, process: ProcessId, start: int, contents: Sequence[bytes | None]) -> None:
        """Write whole pages, one content a page from `start` on; None leaves a page alone."""

    def discard(self, process: ProcessId, start: int, pages: int) -> None:
        """MADV_DONTNEED."""

    def unmap(self, process: ProcessId, start: int, pages: int) -> None:
        """munmap."""

    def protect(self, process: ProcessId, start: int, pages: int, *, writable: bool) -> None:
        """mprotect: readable, and writable or not."""

    def merge(self, process: ProcessId, *, on: bool) -> None:
        """prctl(PR_SET_MEMORY_MERGE); of the process's memory only its maps are left mergeable.

        :raises Rejected: EINVAL where the kernel lacks it
        """

    def sleep(self, seconds: float) -> None:
        """Let so much of the host's time pass, without a batch of ksmd."""

    def fork(self, process: ProcessId, name: str) -> ProcessId:
        """A child with all of its memory, at the same addresses."""

    def exit(self, process: ProcessId) -> None:
        """End a process and wait until it is gone."""

    def set(self, knob: Knob, value: KnobValue) -> None:
        """Write a knob at once, without asking whether it has the value already.

        :raises Absent, Rejected: with the kernel's errno
        """

    def batch(self, pages: int) -> None:
        """Exactly one batch of ksmd with pages_to_scan = `pages`; it may end a full scan early, never cross one."""

    def move_pages(self, process: ProcessId, addresses: Sequence[int], node: int, *, shared: bool) -> tuple[int, ...]:
        """move_pages(2) with MPOL_MF_MOVE_ALL (`shared`) or MPOL_MF_MOVE; a status an address: node or -errno."""

    def break_sharing(self, process: ProcessId, start: int, pages: int, *, node: int | None) -> None:
        """Unshare those of the pages that are KSM pages now, the caller's policy on `node`."""

    def pages(self, process: ProcessId, start: int, pages: int) -> tuple[PageState, ...]:
        """What is mapped there."""

    def load(self, process: ProcessId, start: int, pages: int) -> tuple[bytes, ...]:
        """Contents of present pages; b"" where nothing is mapped."""

    def close(self) -> None:
        """End every process that the lab spawned and put the knobs back."""


class Inspect(Protocol):
    """What no kernel shows."""

    def state(self) -> Mapping[str, object]:
        """Trees by node, exiles, chains and items, as a JSON document (docs/engine.md)."""

    def contents(self, frame: int) -> bytes:
        """What a frame holds."""
