# SPDX-License-Identifier: GPL-2.0-or-later
"""Switches merging on or off for processes: what is asked for, and what came of it (docs/switching.md).

Before it is switched off, there has to be room to un-merge it on the host, on its nodes and in its memory cgroups.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.codec import JSON, encode
from ksmd_ctl.errors import ExitCode, KsmdError, Refused, TimedOut, UsageError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import HomeRange, Inventory, Process, ProcessId, UnmergeDemand
from ksmd_ctl.host.operation import Operation, Steps, outcome, waited
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.reports.document import part, parts
from ksmd_ctl.reports.numa import error_document
from ksmd_ctl.switch.keep import Switched, SwitchJournal, short
from ksmd_ctl.switch.persist import Start, Starter, start_of
from ksmd_ctl.transactions.assignment import is_unit_name
from ksmd_ctl.transactions.migration import named_process, unit_name
from ksmd_ctl.transactions.plan import LEFT_ALONE, Limits, room_document, room_for
from ksmd_ctl.transactions.transaction import unmerging_seconds

_WHAT: Final = "switching merging"
# For the calls that switch one process; un-merging it takes its time beside.
_CALLS_SECONDS: Final = 480.0
# Linux's largest user address space on x86-64, with five levels of page tables.
_LAST_ADDRESS: Final = 1 << 56
_PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class SwitchOrder:
    """Merging to be switched for one process, for the processes of a unit, or for a virtual machine.

    :ivar vm: as `ksmd-ctl processes` calls its group
    :ivar ranges: (start, end) addresses of one process; empty for all of its memory
    :ivar method: None for the first that works
    :ivar dry_run: only find out what would be done
    """

    on: bool
    pid: int | None = None
    unit: str = ""
    vm: str = ""
    ranges: tuple[tuple[int, int], ...] = ()
    method: Method | None = None
    dry_run: bool = False

    def check(self) -> None:
        """
        :raises UsageError: it asks for something that can't be
        """
        if sum((self.pid is not None, bool(self.unit), bool(self.vm))) != 1:
            why = "it is one process, one unit or one virtual machine"
            raise UsageError(_WHAT, why, hint="give --pid P, --unit U or --vm NAME")
        if self.unit and not is_unit_name(unit_name(self.unit)):
            hint = "`systemctl list-units` shows those that are there"
            raise UsageError(_WHAT, f"{self.unit[:100]!a} is no name of a service, a scope or a slice", hint=hint)
        if self.ranges and self.pid is None:
            raise UsageError(_WHAT, "addresses are one process's own", hint="give --pid P")
        if self.ranges and self.method is Method.QMP:
            why = "QEMU's monitor switches whole memory backends, not addresses"
            raise UsageError(_WHAT, why, hint="--method inject switches addresses")
        for start, end in self.ranges:
            if why := _range_error(start, end):
                hint = "/proc/PID/maps has those of a process"
                raise UsageError(_WHAT, f"the range {start:x}-{end:x} {why}", hint=hint)

    @property
    def words(self) -> str:
        """As on a command line: ``off --pid 1234``."""
        whose = f"--pid {self.pid}" if self.pid is not None else f"--unit {self.unit}" if self.unit else ""
        return f"{'on' if self.on else 'off'} {whose or f'--vm {self.vm}'}"


def _range_error(start: int, end: int) -> str:
    """What is wrong with a range of addresses; empty where it is fine."""
    if start >= end:
        return "ends before it has begun"
    if start < 0 or end > _LAST_ADDRESS:
        return "ends behind the addresses that a process has"
    if (start | end) % _PAGE_SIZE:
        return f"does not begin and end with a page (of {_PAGE_SIZE} bytes)"
    return ""


@dataclass(slots=True)
class SwitchedProcess:
    """One process.

    :ivar known: what was seen of it in the list of processes; None for one without mergeable memory
    :ivar merged_pages: pages that are un-merged before it is switched off, as far as was known
    :ivar came: None where it was not its turn
    """

    process: ProcessId
    known: Process | None = None
    merged_pages: int = 0
    came: SwitchResult | KsmdError | None = None

    @property
    def name(self) -> str:
        if self.known is not None:
            return self.known.name
        return (isinstance(self.came, SwitchResult) and self.came.name) or "process"

    @property
    def switched(self) -> bool:
        """At least a part of it is as it was asked for."""
        return isinstance(self.came, SwitchResult) and self.came.after is not (not self.came.on)


@dataclass(slots=True)
class SwitchOutcome:
    """The result of an order, by process.

    :ivar room: what un-merging takes, where there is a limit
    """

    order: SwitchOrder
    floor_bytes: int
    processes: list[SwitchedProcess] = field(default_factory=list)
    room: tuple[UnmergeDemand, ...] = ()
    cancelled: bool = False

    def document(self) -> dict[str, object]:
        """As JSON (docs/json.md)."""
        return {
            "format": 1,
            "on": self.order.on,
            "dry_run": self.order.dry_run,
            "cancelled": self.cancelled,
            "fits": not any(item.over_bytes for item in self.room),
            "floor_bytes": self.floor_bytes,
            "room": room_document(self.room),
            "processes": [_document(one, self.order) for one in self.processes],
        }


def _start(one: SwitchedProcess, order: SwitchOrder) -> JSON:
    """Who starts a process, as far as that is known."""
    if one.known is not None:
        return encode(start_of(one.known))
    unit = unit_name(order.unit) if order.unit else ""
    return encode(Start(Starter.SYSTEMD, unit)) if unit.endswith(".service") else None


def _document(one: SwitchedProcess, order: SwitchOrder) -> dict[str, object]:
    came = one.came
    error = error_document(came) if isinstance(came, KsmdError) else None
    result = came if isinstance(came, SwitchResult) else None
    return {
        "pid": one.process.pid,
        "start_time_ticks": one.process.start_time_ticks,
        "name": one.name,
        "group": one.known.group if one.known else "",
        "unit": one.known.unit if one.known else "",
        "machine": one.known is not None and one.known.machine,
        "start": _start(one, order),
        "unmerged": one.merged_pages if order.dry_run else 0 if result is None else result.unmerged_pages,
        "method": None if result is None else result.method.value,
        "how": "" if result is None else result.how,
        "before": None if result is None else result.before,
        "after": None if result is None else result.after,
        "mergeable_bytes": None if result is None else result.mergeable_bytes,
        "merging_pages": None if result is None else result.merging_pages,
        "stopped_seconds": None if result is None else result.stopped_seconds,
        "left": [] if result is None else list(result.left),
        "error": error,
    }


class Switching(Operation[SwitchOutcome]):
    """Switches one process after the other. After a cancel, what was switched until then stays so.

    :param journal: has a record of each process before it is switched; None only for a dry run
    :param by: who asks for it
    :raises UsageError: the order asks for something that can't be
    """

    def __init__(
        self, host: Host, order: SwitchOrder, limits: Limits, journal: SwitchJournal | None = None, by: str = ""
    ) -> None:
        order.check()
        self._order = order
        self._journal = None if order.dry_run else journal
        self._by = short(by)
        super().__init__(self._switch(host, order, limits))

    def _switch(self, host: Host, order: SwitchOrder, limits: Limits) -> Steps[SwitchOutcome]:
        """
        :raises KsmdError: nothing could be done about any process; then nothing is as it was not before
        """
        result = SwitchOutcome(order, limits.floor_bytes)
        result.processes = yield from _meant(host, order)
        inventory: Inventory | None = None
        if not order.on:
            inventory = yield from _inventory(host, order, limits)
            result.room = _rooms(host, inventory, result.processes)
            if not order.dry_run:
                _need_room(result.room, limits)
        for one in result.processes:
            result.cancelled = result.cancelled or self.cancelled
            if result.cancelled:
                break
            if one.process.pid == os.getpid():
                why = f"process {one.process.pid} is ksmd-ctl itself"
                one.came = Refused(_WHAT, why, hint="choose another process")
            elif inventory is not None:
                one.came = _take_in(one, inventory)
            if one.came is None:
                before = () if self._journal is None else self._journal.records
                self._note(host, one)
                seconds = _CALLS_SECONDS + unmerging_seconds(one.merged_pages)
                request = _request(order, one.process, limits)
                switching = host.switch(request, order.method, seconds, dry_run=order.dry_run)
                yield switching
                one.came = outcome(switching)
                if one.switched:
                    self._note(host, one)
                elif self._journal is not None and not isinstance(one.came, TimedOut):
                    self._journal.put_back(before)
        result.cancelled = result.cancelled or self.cancelled
        errors = [one.came for one in result.processes if isinstance(one.came, KsmdError)]
        if errors and len(errors) == len(result.processes) and not result.cancelled:
            raise errors[0]
        if order.on and not order.dry_run:
            # Before it was mergeable the list did not have it.
            listed = yield from waited(host.processes())
            known = {process.id: process for process in listed.processes}
            for one in result.processes:
                if one.known is None and one.process in known and one.switched:
                    one.known = known[one.process]
                    self._note(host, one)
        return result

    def _note(self, host: Host, one: SwitchedProcess) -> None:
        """Keep on disk that a process is about to be switched, or was.

        :raises Denied, NotRecorded: it can't be written
        """
        if self._journal is None:
            return
        record = Switched(
            process=one.process,
            name=one.name,
            group="",
            unit="",
            machine=False,
            on=self._order.on,
            how=short(one.came.how) if isinstance(one.came, SwitchResult) else "",
            by=self._by,
            at_seconds=host.clock(),
            done=one.switched,
        )
        self._journal.note(record.with_process(one.known))


def _take_in(one: SwitchedProcess, inventory: Inventory) -> KsmdError | None:
    """Take in what of a process is merged; why it may not be switched off then, None where it may."""
    for memory in inventory.memories:
        if memory.process != one.process:
            continue
        one.merged_pages = sum(item.merged_pages for item in memory.ranges)
        for kind, why in LEFT_ALONE.items():
            if one.merged_pages and kind in memory.classes:
                # To un-merge a page that userfaultfd protects waits for its handler, which the call may keep waiting.
                return Refused(_WHAT, f"{one.name} (pid {one.process.pid}): {why}", hint="try again when that is over")
    return None


def _request(order: SwitchOrder, process: ProcessId, limits: Limits) -> Switch:
    return Switch(
        process,
        order.on,
        order.ranges,
        limits.latency_seconds,
        limits.floor_bytes,
        limits.headroom_share,
        limits.max_pressure,
    )


def _meant(host: Host, order: SwitchOrder) -> Steps[list[SwitchedProcess]]:
    """The processes of an order, by pid.

    :raises UsageError: there is no such process
    :raises Refused: there is no such unit or machine
    """
    pids: tuple[ProcessId, ...] = ()
    if order.pid is not None:
        pids = (named_process(host, order.pid),)
    elif order.unit:
        pids = yield from waited(host.unit_members(unit_name(order.unit)))
        if not pids:
            hint = f"systemctl status {unit_name(order.unit)}"
            raise Refused(_WHAT, f"unit {unit_name(order.unit)} has no process", hint=hint)
    listed = yield from waited(host.processes())
    known = {process.id: process for process in listed.processes}
    if order.vm:
        pids = tuple(process.id for process in listed.processes if process.machine and process.group == order.vm)
        if not pids:
            names = sorted({process.group for process in listed.processes if process.machine})
            hint = f"virtual machines here: {', '.join(names[:8])}" if names else "`ksmd-ctl processes --all` shows all"
            raise Refused(_WHAT, f"there is no virtual machine {order.vm[:100]!a}", hint=hint)
    return [SwitchedProcess(process, known.get(process)) for process in sorted(pids)]


def _inventory(host: Host, order: SwitchOrder, limits: Limits) -> Steps[Inventory]:
    """The inventory, of one process only what the order's ranges touch."""
    found = yield from waited(host.inventory(limits.floor_bytes))
    if not order.ranges:
        return found
    size = host.identity.page_size_bytes
    memories = tuple(
        replace(memory, ranges=tuple(_touched(memory.ranges, order.ranges, size))) for memory in found.memories
    )
    return replace(found, memories=memories)


def _touched(items: Iterable[HomeRange], ranges: Iterable[tuple[int, int]], page_size: int) -> Iterator[HomeRange]:
    """What of mappings lies in ranges: at most all of its pages are merged."""
    for item in items:
        if touched := sum(max(min(item.end, end) - max(item.start, start), 0) for start, end in ranges):
            yield replace(item, merged_pages=min(item.merged_pages, touched // page_size))


def _rooms(host: Host, inventory: Inventory, processes: list[SwitchedProcess]) -> tuple[UnmergeDemand, ...]:
    meant = {one.process for one in processes}
    memories = [memory for memory in inventory.memories if memory.process in meant]
    return room_for(inventory, memories, None, host.identity.page_size_bytes)


def _need_room(rooms: tuple[UnmergeDemand, ...], limits: Limits) -> None:
    """
    :raises Refused: un-merging would take more than there is
    """
    over = [room for room in rooms if room.over_bytes]
    if over:
        hint = "free memory there, or lower [limits] floor_bytes; what is un-merged so far merges again by itself"
        raise Refused(_WHAT, "; ".join(room.text(limits.floor_bytes) for room in over[:4]), hint=hint)


def exit_code(document: Mapping[str, object]) -> ExitCode:
    """The exit code that a document stands for; of a dry run the one that it would end with now."""
    processes = parts(document, "processes")
    if document.get("cancelled"):
        return ExitCode.TIMED_OUT
    if document.get("dry_run"):
        fits = document.get("fits") is True
        return (
            ExitCode.CHECK_FAILED
            if any(part(one, "error") for one in processes)
            else (ExitCode.DONE if fits else ExitCode.REFUSED)
        )
    on = document.get("on")
    done = not any(part(one, "error") or one.get("left") or one.get("after") is (not on) for one in processes)
    return ExitCode.DONE if done else ExitCode.CHECK_FAILED
