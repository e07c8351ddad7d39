# SPDX-License-Identifier: GPL-2.0-or-later
"""Un-merges the memory of one process, or of a unit's processes, gently, and leaves everybody else's alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, cast

from ksmd_ctl.control.executor import MemoryHost, perform
from ksmd_ctl.control.migration import check_target, named_process, unit_name, unreadable
from ksmd_ctl.control.plan import LEFT_ALONE, Batch, Limits, batches_of, room_document, room_for
from ksmd_ctl.control.sequence import Sequence
from ksmd_ctl.control.transaction import UnshareStep, unshare_step
from ksmd_ctl.errors import Cancelled, KsmdError, NoSuchProcess, Refused, Unmapped, UsageError
from ksmd_ctl.host.memory import Exposure, Inventory, ProcessId, Stock
from ksmd_ctl.host.operation import Operation, Progress, UnshareResult

__all__ = ["UnmergeOrder", "UnmergeOutcome", "Unmerging"]

_WHAT: Final = "what is to be un-merged"
_GONE: Final = "it ended or replaced its memory meanwhile"


@dataclass(frozen=True, slots=True)
class UnmergeOrder:
    """Merged pages of a process, or of a unit's processes.

    :ivar to: the node that they go to; None for the home of each range
    """

    pid: int | None = None
    unit: str = ""
    to: int | None = None
    dry_run: bool = False

    def check(self) -> None:
        """
        :raises UsageError: it asks for something that can't be
        """
        if (self.pid is None) == (not self.unit):
            raise UsageError(_WHAT, "it is either one process or one unit", hint="give --pid P or --unit U")


@dataclass(slots=True)
class Unmerged:
    """One process: what was expected, and what came of it."""

    process: ProcessId
    name: str
    merged_pages: int
    unshared_pages: int = 0
    left: dict[str, int] = field(default_factory=dict)

    def add(self, unshared: int, left: Mapping[str, int]) -> None:
        """Count what came of a part of it."""
        self.unshared_pages += unshared
        for cause, pages in left.items():
            self.left[cause] = self.left.get(cause, 0) + pages


@dataclass(slots=True)
class UnmergeOutcome:
    """What came of an order, by process."""

    order: UnmergeOrder
    processes: dict[ProcessId, Unmerged] = field(default_factory=dict)
    cancelled: bool = False
    running: bool = False
    room: tuple[Exposure, ...] = ()
    floor_bytes: int = 0

    @property
    def complete(self) -> bool:
        """Nothing is left that was to be un-merged."""
        return not self.cancelled and not any(item.left for item in self.processes.values())

    def document(self) -> dict[str, object]:
        """As JSON (docs/json.md)."""
        return {
            "format": 1,
            "dry_run": self.order.dry_run,
            "to": self.order.to,
            "cancelled": self.cancelled,
            "merges_again": self.running,
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


class Unmerging(Sequence[Inventory, UnshareResult]):
    """An `Operation` that gives an `UnmergeOutcome`.

    :param look: gives the inventory, by what has to stay free; None: `MemoryHost.inventory`
    :raises UsageError: the order asks for something that can't be
    """

    def __init__(
        self,
        host: MemoryHost,
        order: UnmergeOrder,
        limits: Limits,
        look: Callable[[int], Operation[Inventory]] | None = None,
    ) -> None:
        order.check()
        if order.to is not None:
            check_target(host.topology(), order.to, "un-merging")
        self._host = host
        self._order = order
        self._limits = limits
        self._outcome = UnmergeOutcome(order, floor_bytes=limits.floor_bytes)
        self._step: UnshareStep | None = None
        self._batches: tuple[Batch, ...] = ()
        super().__init__((look or host.inventory)(limits.floor_bytes))

    def _found(self, found: Inventory) -> None:
        stocks = [stock for stock in found.stocks if self._meant(stock)]
        if not stocks:
            hint = "see `ksmd-ctl processes --all`"
            if self._order.pid is not None:
                named_process(self._host, self._order.pid)
                error = unreadable(_WHAT, self._order.pid, found.skipped, found.denied)
                if error is not None:
                    raise error
                hint = f"`ksmd-ctl processes --pid {self._order.pid}` says why"
                why = f"process {self._order.pid} has no mergeable memory"
            else:
                why = f"no process of unit {unit_name(self._order.unit)} has mergeable memory"
                unread = len(found.skipped) + len(found.denied)
                if unread:
                    why += f", as far as could be seen: {unread} on this host could not be looked at"
            raise Refused(_WHAT, why, hint=hint)
        for stock in stocks:
            item = Unmerged(stock.process, stock.name, sum(part.merged_pages for part in stock.ranges))
            self._outcome.processes[stock.process] = item
            for kind, reason in LEFT_ALONE.items():
                if kind in stock.classes and item.merged_pages:
                    item.left[reason] = item.merged_pages
        self._outcome.room = room_for(found, stocks, self._order.to, self._host.identity.page_size_bytes)
        if self._order.dry_run:
            return
        batches = batches_of(replace(found, stocks=tuple(stocks)))
        self._batches = tuple(
            batch if self._order.to is None else replace(batch, to=self._order.to) for batch in batches
        )

    def _next(self) -> Operation[UnshareResult] | None:
        if not self._batches or self._outcome.cancelled:
            self._outcome.running = self._host.sample().number("run") == 1
            return None
        self._step = unshare_step(self._batches, self._limits)
        return cast("Operation[UnshareResult]", perform(self._host, self._step))

    def _meant(self, stock: Stock) -> bool:
        if self._order.pid is not None:
            return stock.process.pid == self._order.pid
        return stock.unit == unit_name(self._order.unit)

    def _came(self, came: UnshareResult | KsmdError) -> None:
        assert self._step is not None
        parts = self._step.request.parts
        self._batches = self._batches[len(parts) :]
        if isinstance(came, Cancelled):
            self._outcome.cancelled = True
        elif isinstance(came, KsmdError):
            for part in parts:
                gone = isinstance(came, NoSuchProcess | Unmapped)
                self._outcome.processes[part.process].add(0, {_GONE if gone else came.why: part.pages})
        else:
            for part, one in zip(parts, came.parts, strict=False):
                left = {_GONE: part.pages - one.unshared} if one.ended else one.left
                self._outcome.processes[part.process].add(one.unshared, left)
            if came.stopped:
                self._outcome.cancelled = True

    @property
    def progress(self) -> Progress:
        if self._current is not None:
            return self._current.progress
        return Progress() if self._search is None else self._search.progress

    def cancel(self) -> None:
        """Stop; what was un-merged until then stays so until ksmd comes by."""
        self._outcome.cancelled = True
        super().cancel()

    def result(self) -> UnmergeOutcome:
        """What came of it.

        :raises KsmdError: nothing could be done
        """
        if self._error is not None:
            raise self._error
        return self._outcome
