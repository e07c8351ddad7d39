# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface to a host that has KSM. There are two hosts: the running kernel and the engine.

- `Host` is all that the service and most commands use.
- `Lab` is a host on which processes can be started and memory changed; scenarios use it.
- `Inspect` shows what no kernel shows; only the engine has it.

Reading is quick and can't block. Everything that changes the host, and everything that takes long, is an
`ksmd_ctl.host.operation.Operation`, which its caller need not wait for; on the kernel it is done by a process that can
be killed. Only `ksmd_ctl.transactions` starts one that changes anything. Time is the host's: `Host.clock`,
never the wall clock. A process is a `ProcessId`, never a bare pid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ksmd_ctl.host.duplicates import DuplicateKsmPages, DuplicatePages
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import (
    Inventory,
    Losses,
    PageState,
    Placements,
    ProcessId,
    ProcessList,
    Range,
    Survey,
    Topology,
)
from ksmd_ctl.host.operation import (
    Collapse,
    CollapseResult,
    Move,
    MovePlan,
    MoveResult,
    Operation,
    Unshare,
    UnshareResult,
)
from ksmd_ctl.host.sample import HostIdentity, Sample, Writer
from ksmd_ctl.host.sharing import Sharing
from ksmd_ctl.host.switching import Method, Switch, SwitchResult


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
        """Read one knob now.

        :raises ReadError: it can't be read
        """

    def write(self, knob: Knob, value: KnobValue, deadline_seconds: float) -> Operation[KnobValue]:
        """Give a knob a value, unless it has that already. The result is the value read back.

        ``run`` = 2 un-merges everything. The copies are spread over all nodes with memory; the kernel by itself would
        place them all on the writer's node (findings F3).

        :raises Absent, Denied, Rejected: by the operation's result
        """

    def writers(self) -> Operation[tuple[Writer, ...]]:
        """Programs on this host that are known to write the knobs. It looks at every process: not for each tick."""

    def housekeeping(self) -> Operation[str]:
        """The list of CPUs that are not isolated and to which no virtual CPU is pinned. Not for each tick.

        :raises HostError: by the operation's result: there are none
        """

    def topology(self) -> Topology:
        """The nodes that are online now."""

    def placements(self, processes: Sequence[ProcessId]) -> Operation[Placements]:
        """On which nodes these may allocate. It looks at every thread of theirs: not for each tick."""

    def find(self, pid: int) -> ProcessId:
        """The process that has this pid now.

        :raises NoSuchProcess: there is none
        """

    def losses(self, processes: Sequence[ProcessId], cgroups: Sequence[str]) -> Losses:
        """What the OOM killer has done since boot on the host and in memory cgroups, and which processes are gone."""

    def processes(self) -> Operation[ProcessList]:
        """Every process with mergeable memory, and those that one would expect to have some, with the reason."""

    def ranges(self, process: ProcessId) -> tuple[Range, ...]:
        """A process's mappings.

        :raises NoSuchProcess: it is gone
        :raises Denied: this user may not read them
        """

    def survey(self, budget_cpu_seconds: float) -> Operation[Survey]:
        """Look at nodes and processes, and count KSM pages by node within the budget, all in one process."""

    def inventory(self, floor_bytes: int) -> Operation[Inventory]:
        """Look at everything that is mergeable, for a plan to un-merge it.

        :param floor_bytes: what has to stay free on the host and on every node
        """

    def duplicates(self, budget_frames: int) -> Operation[DuplicatePages]:
        """Compare contents of mergeable memory: at most so many frames, a random sample if there are more."""

    def duplicate_ksm_pages(self, budget_cpu_seconds: float, most_pages: int) -> Operation[DuplicateKsmPages]:
        """Find KSM pages with one content that max_page_sharing does not explain.

        :param budget_cpu_seconds: about what it may take; pages that were not compared by then are left out
        :param most_pages: pages that `DuplicateKsmPages.parts` may have
        """

    def sharing(self, groups: Sequence[Sequence[ProcessId]], budget_cpu_seconds: float) -> Operation[Sharing]:
        """Count the frames that groups of processes share, those that fork shares apart.

        :param groups: at most `ksmd_ctl.host.sharing.MOST_PROCESSES` processes, each once; the largest groups first,
            for where there is no time for all
        :param budget_cpu_seconds: about what it may take; with more to count, a sample is counted
        """

    def plan(self, request: Move) -> Operation[MovePlan]:
        """Find out what a move would do; nothing changes."""

    def move(self, request: Move, deadline_seconds: float) -> Operation[MoveResult]:
        """Move memory to a node."""

    def unshare(self, request: Unshare, deadline_seconds: float) -> Operation[UnshareResult]:
        """Un-merge pages of a process, its contents unchanged."""

    def unit_members(self, unit: str) -> Operation[tuple[ProcessId, ...]]:
        """The processes of a systemd unit, with or without mergeable memory, by pid."""

    def switch(
        self,
        request: Switch,
        method: Method | None,
        deadline_seconds: float,
        *,
        dry_run: bool = False,
    ) -> Operation[SwitchResult]:
        """Switch merging on or off for a process.

        :param method: None for the first that works
        :param dry_run: only find out what would be done; the result says what is so now
        """

    def make_huge(self, request: Collapse, deadline_seconds: float) -> Operation[CollapseResult]:
        """Make huge pages of memory whose huge pages were split, its contents unchanged.

        :raises Absent: by the operation's result: this host can't (before Linux 6.1)
        """


class Lab(Host, Protocol):
    """A host on which processes can be started and memory changed. Addresses are in bytes, lengths in pages."""

    def spawn(self, name: str, nodes: frozenset[int] = frozenset()) -> ProcessId:
        """Start a process without mergeable memory that prefers the first node with memory.

        :param nodes: confine it, and what it forks, to these by a cpuset; memory without a policy is from the first
        """

    def lacks_cpusets(self) -> str:
        """Why processes can't be confined to nodes; empty where they can."""

    def map(self, process: ProcessId, pages: int, node: int | None) -> int:
        """Private anonymous memory without huge pages, bound to a node if one is given; its address.

        Maps of one process lie at ascending addresses, with gaps between.
        """

    def advise(self, process: ProcessId, start: int, pages: int, *, mergeable: bool) -> None:
        """MADV_MERGEABLE or MADV_UNMERGEABLE."""

    def store(self, process: ProcessId, start: int, contents: Sequence[bytes | None]) -> None:
        """Write whole pages, one content a page from `start` on; None leaves a page alone."""

    def read_pages(self, process: ProcessId, start: int, pages: int) -> None:
        """The process reads them: swaps in, or maps the zero page where nothing was."""

    def swap_out(self, process: ProcessId, start: int, pages: int) -> None:
        """MADV_PAGEOUT: swap out those that no other page table entry maps."""

    def lacks_swap(self) -> str:
        """Why `swap_out` would not do the same each time; empty where it does."""

    def collapse(self, process: ProcessId, start: int, pages: int) -> tuple[bool, ...]:
        """MADV_COLLAPSE, block by block: which of them are a huge page now. Nobody else makes huge pages of them."""

    def lacks_huge_pages(self) -> str:
        """Why `collapse` can't be done; empty where it can."""

    def discard(self, process: ProcessId, start: int, pages: int) -> None:
        """MADV_DONTNEED."""

    def unmap(self, process: ProcessId, start: int, pages: int) -> None:
        """munmap."""

    def mremap(self, process: ProcessId, start: int, pages: int) -> int:
        """mremap of what is mapped there to an address above all others, which is returned; holes stay holes."""

    def protect(self, process: ProcessId, start: int, pages: int, *, writable: bool) -> None:
        """mprotect: readable, and writable or not."""

    def merge(self, process: ProcessId, *, on: bool) -> None:
        """prctl(PR_SET_MEMORY_MERGE); of the process's memory only its maps are left mergeable.

        :raises Rejected: EINVAL where the kernel lacks it
        """

    def removable_nodes(self) -> frozenset[int]:
        """The nodes whose pages `offline` moves away, all to one place."""

    def offline(self, node: int) -> bool:
        """The node's memory goes offline, as far as it can, and comes back; whether it went."""

    def sleep(self, seconds: float) -> None:
        """Let so much of the host's time pass, without a batch of ksmd."""

    def fork(self, process: ProcessId, name: str) -> ProcessId:
        """A child with all of its memory, at the same addresses."""

    def exit(self, process: ProcessId) -> None:
        """End a process and wait until it is gone."""

    def exec(self, process: ProcessId) -> None:
        """execve: the process goes on without any of its memory; from 6.7 on PR_SET_MEMORY_MERGE stays on."""

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

    def pages(self, process: ProcessId, start: int, pages: int, *, ksm: bool = True) -> tuple[PageState, ...]:
        """What is mapped there.

        :param ksm: False: frames and nodes alone, which takes less time; which are KSM pages is void then
        """

    def load(self, process: ProcessId, start: int, pages: int) -> tuple[bytes, ...]:
        """Contents of present pages; b"" where nothing is mapped."""

    def close(self) -> None:
        """End every process that the lab spawned and put the knobs back."""


class Inspect(Protocol):
    """What no kernel shows."""

    def state(self) -> Mapping[str, object]:
        """Trees by node, exiles, chains and items, as a JSON document (docs/engine.md)."""
