# SPDX-License-Identifier: GPL-2.0-or-later
"""Un-merges the memory of one process, or of a unit's processes, gently, and leaves everybody else's alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.errors import Cancelled, KsmdError, NoSuchProcess, Refused, Unmapped
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import Inventory, ProcessId, ProcessMemory, UnmergeDemand
from ksmd_ctl.host.operation import Operation, Steps, UnshareResult, outcome, waited
from ksmd_ctl.transactions.migration import check_pid_or_unit, check_target, named_process, unit_name, unreadable
from ksmd_ctl.transactions.plan import LEFT_ALONE, Limits, batches_of, room_document, room_for
from ksmd_ctl.transactions.transaction import UnshareStep, unshare_step

_WHAT: Final = "what is to be un-merged"
_GONE: Final = "it ended or replaced its memory meanwhile"


@dataclass(frozen=True, slots=True)
class UnmergeOrder:
    """Merged pages of a process, or of a unit's processes.

    :ivar to: the node that they go to; None for the home of each range
    :ivar keep: nodes on which pages stay merged
    """

    pid: int | None = None
    unit: str = ""
    to: int | None = None
    dry_run: bool = False
    keep: tuple[int, ...] = ()

    def check(self) -> None:
        """
        :raises UsageError: it asks for something that can't be
        """
        check_pid_or_unit(_WHAT, self.pid, self.unit)


@dataclass(slots=True)
class Unmerged:
    """One process: what was expected, and the result."""

    process: ProcessId
    name: str
    merged_pages: int
    unshared_pages: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def add(self, unshared: int, left: Mapping[str, int]) -> None:
        """Count the result of a part of it."""
        self.unshared_pages += unshared
        for cause, pages in left.items():
            self.left[cause] = self.left.get(cause, 0) + pages


@dataclass(slots=True)
class UnmergeOutcome:
    """The result of an order, by process.

    :ivar running: ksmd runs, and `split`: huge pages were split on this host since boot
    """

    order: UnmergeOrder
    processes: dict[ProcessId, Unmerged] = field(default_factory=dict)
    cancelled: bool = False
    running: bool = False
    split: bool = False
    room: tuple[UnmergeDemand, ...] = ()
    floor_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Nothing is left that was to be un-merged."""
        return not self.cancelled and not any(item.left for item in self.processes.values())

    def take(self, step: UnshareStep, came: UnshareResult | KsmdError) -> None:
        """Take in the result of a step."""
        parts = step.request.parts
        if isinstance(came, Cancelled):
            self.cancelled = True
        elif isinstance(came, KsmdError):
            for part in parts:
                gone = isinstance(came, NoSuchProcess | Unmapped)
                self.processes[part.process].add(0, {_GONE if gone else came.why: part.pages})
        else:
            for part, one in zip(parts, came.parts, strict=False):
                left = {_GONE: part.pages - one.unshared} if one.ended else one.left
                self.processes[part.process].add(one.unshared, left)
            self.cancelled = self.cancelled or bool(came.stopped)

    def document(self) -> dict[str, object]:
        """As JSON (docs/json.md)."""
        return {
            "format": 1,
            "dry_run": self.order.dry_run,
            "to": self.order.to,
            "cancelled": self.cancelled,
            "merges_again": self.running,
            "huge_pages_split": self.split,
            "fits": not any(item.over_bytes for item in self.room),
            "floor_bytes": self.floor_bytes,
            "room": room_document(self.room),
            "processes": [
                {
                    "pid": item.process.pid,
                    "name": item.name,
                    "merged": item.merged_pages,
                    "unshared": item.unshared_pages,
                    "left": dict(item.left),
                }
                for item in self.processes.values()
            ],
        }


class Unmerging(Operation[UnmergeOutcome]):
    """Un-merges pages batch by batch. After a cancel, what was un-merged until then stays so until ksmd comes by.

    :param look: gives the inventory, by what has to stay free; None: `Host.inventory`
    :raises UsageError: the order asks for something that can't be
    """

    def __init__(
        self,
        host: Host,
        order: UnmergeOrder,
        limits: Limits,
        look: Callable[[int], Operation[Inventory]] | None = None,
    ) -> None:
        order.check()
        if order.to is not None:
            check_target(host.topology(), order.to, "un-merging")
        super().__init__(self._unmerge(host, order, limits, (look or host.inventory)(limits.floor_bytes)))

    def _unmerge(
        self, host: Host, order: UnmergeOrder, limits: Limits, look: Operation[Inventory]
    ) -> Steps[UnmergeOutcome]:
        """
        :raises KsmdError: nothing could be done
        """
        result = UnmergeOutcome(order, floor_bytes=limits.floor_bytes)
        found = yield from waited(look)
        memories = tuple(_without_kept(order, memory) for memory in found.memories if _is_meant(order, memory))
        if not memories:
            raise _nothing_found(host, order, found)
        for memory in memories:
            item = Unmerged(memory.process, memory.name, sum(part.merged_pages for part in memory.ranges))
            result.processes[memory.process] = item
            for kind, reason in LEFT_ALONE.items():
                if kind in memory.classes and item.merged_pages:
                    item.left[reason] = item.merged_pages
        result.room = room_for(found, memories, order.to, host.identity.page_size_bytes)
        batches = () if order.dry_run else batches_of(replace(found, memories=memories))
        if order.to is not None:
            batches = tuple(replace(batch, to=order.to) for batch in batches)
        result.cancelled = self.cancelled
        while batches and not result.cancelled:
            step = _keeping(order, unshare_step(batches, limits))
            batches = batches[len(step.request.parts) :]
            unsharing = step.begin(host)
            yield unsharing
            result.take(step, outcome(unsharing))
            result.cancelled = result.cancelled or self.cancelled
        sample = host.sample()
        result.running = sample.number("run") == 1
        result.split = bool(sample.number("thp_split_page"))
        return result


def _is_meant(order: UnmergeOrder, memory: ProcessMemory) -> bool:
    if order.pid is not None:
        return memory.process.pid == order.pid
    return memory.unit == unit_name(order.unit)


def _without_kept(order: UnmergeOrder, memory: ProcessMemory) -> ProcessMemory:
    """The same without what stays merged: of a mapping no more can be un-merged than lies on other nodes."""
    if not order.keep:
        return memory
    ranges = [
        (item, sum(pages for node, pages in item.nodes.items() if node not in order.keep)) for item in memory.ranges
    ]
    meant = tuple(replace(item, merged_pages=min(item.merged_pages, pages)) for item, pages in ranges if pages)
    return replace(memory, ranges=meant)


def _keeping(order: UnmergeOrder, step: UnshareStep) -> UnshareStep:
    if not order.keep:
        return step
    parts = tuple(replace(part, keep=order.keep) for part in step.request.parts)
    return replace(step, request=replace(step.request, parts=parts))


def _nothing_found(host: Host, order: UnmergeOrder, found: Inventory) -> KsmdError:
    """The error where an order means no memory.

    :raises UsageError: there is no such process
    """
    if order.pid is not None:
        named_process(host, order.pid)
        error = unreadable(_WHAT, order.pid, found.skipped, found.denied)
        if error is not None:
            return error
        hint = f"`ksmd-ctl processes --pid {order.pid}` says why"
        return Refused(_WHAT, f"process {order.pid} has no mergeable memory", hint=hint)
    why = f"no process of unit {unit_name(order.unit)} has mergeable memory"
    unread = len(found.skipped) + len(found.denied)
    if unread:
        why += f", as far as could be seen: {unread} on this host could not be looked at"
    return Refused(_WHAT, why, hint="see `ksmd-ctl processes --all`")
