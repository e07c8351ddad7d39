# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves memory of processes to a node: what is asked for and checked before anything moves, and the result."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.errors import Cancelled, Denied, ExitCode, KsmdError, NoSuchProcess, Refused, Unreadable, UsageError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.memory import Process, ProcessId, Skipped, Topology
from ksmd_ctl.host.operation import Move, MovePlan, MoveResult, Operation, Steps, outcome, waited
from ksmd_ctl.reports.document import number, part, parts
from ksmd_ctl.reports.numa import FORMAT, error_document

#: A cause that names one of these is a privilege that was missing (capabilities(7)).
_CAPABILITY: Final = "CAP_"
#: For the memory of one process: at 1 GB a second, which is slow, it is enough for all that fits into a machine.
MOVE_DEADLINE_SECONDS: Final = 3600.0
#: What may be asked for as the longest time of one call, as in `[limits] batch_latency`.
LEAST_LATENCY_SECONDS: Final = 0.0005
MOST_LATENCY_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class MigrationOrder:
    """Memory of one process, or of all of a systemd unit, to be moved to a node.

    :ivar pid: None for a unit's processes
    :ivar ranges: (start, end) addresses; empty for all of their mergeable memory
    :ivar everything: also memory that is not mergeable
    :ivar dry_run: only find out what would be done
    :ivar floor_bytes: what has to stay free on the node
    :ivar latency_seconds: how long one call may keep a process from its memory; 0 for as long as it takes, None for
        what the configuration has
    :ivar keep: nodes whose pages stay there
    """

    to: int
    pid: int | None = None
    unit: str = ""
    ranges: tuple[tuple[int, int], ...] = ()
    everything: bool = False
    dry_run: bool = False
    floor_bytes: int = 0
    latency_seconds: float | None = None
    keep: tuple[int, ...] = ()

    def check(self) -> None:
        """
        :raises UsageError: it asks for something that can't be
        """
        what = "what is to be moved"
        check_pid_or_unit(what, self.pid, self.unit)
        if self.ranges and self.pid is None:
            raise UsageError(what, "addresses are one process's own, and a unit may have several", hint="give --pid P")
        for start, end in self.ranges:
            if not 0 <= start < end:
                raise UsageError(what, f"{start:#x}-{end:#x} is no range: it ends where it begins, or before")
        if self.latency_seconds and not LEAST_LATENCY_SECONDS <= self.latency_seconds <= MOST_LATENCY_SECONDS:
            least, most = LEAST_LATENCY_SECONDS, MOST_LATENCY_SECONDS
            raise UsageError(what, f"latency_seconds is not 0, and not from {least} to {most}")

    def within(self, floor_bytes: int, latency_seconds: float) -> MigrationOrder:
        """The same within the limits of the configuration; a latency that was asked for stays."""
        asked = self.latency_seconds
        return replace(self, floor_bytes=floor_bytes, latency_seconds=latency_seconds if asked is None else asked)

    def move(self, process: ProcessId) -> Move:
        """The part of one process."""
        latency = self.latency_seconds or 0.0
        return Move(process, self.to, self.ranges, self.everything, latency, self.floor_bytes, self.keep)


def check_target(topology: Topology, to: int, doing: str = "moving memory") -> None:
    """
    :param doing: what is done with memory that ends up on the node, as a phrase
    :raises UsageError: there can be no memory on it
    """
    with_memory = ", ".join(str(node.number) for node in topology.with_memory())
    hint = f"nodes with memory: {with_memory}"
    node = next((node for node in topology.nodes if node.number == to), None)
    if node is None:
        raise UsageError(f"{doing} to node {to}", "there is no such node", hint=hint)
    if not node.memory_bytes:
        raise UsageError(f"{doing} to node {to}", "that node has no memory", hint=hint)


def named_process(host: Host, pid: int) -> ProcessId:
    """The process that somebody named.

    :raises UsageError: there is none
    """
    try:
        return host.find(pid)
    except NoSuchProcess as error:
        raise UsageError(
            "looking for the process", f"there is no process {pid}", hint="see `ksmd-ctl processes`"
        ) from error


def unreadable(what: str, pid: int, skipped: Iterable[Skipped], denied: Iterable[int]) -> KsmdError | None:
    """Why nothing is known of a process that is there; None where it could be looked at.

    :param what: what fails for that, as a phrase
    :param skipped: processes that could not be read, and `denied` pids of those that may not be
    """
    for one in skipped:
        if one.pid == pid:
            return Unreadable(what, f"process {pid} could not be read: {one.why}")
    if pid in denied:
        hint = "needs CAP_SYS_PTRACE, and CAP_DAC_READ_SEARCH for another user's process; a container may refuse it"
        return Denied(what, f"process {pid} may not be looked at", hint=hint)
    return None


def check_pid_or_unit(what: str, pid: int | None, unit: str) -> None:
    """
    :raises UsageError: both are given, or neither is
    """
    if (pid is None) == (not unit):
        raise UsageError(what, "it is either one process or one unit", hint="give --pid P or --unit U")


def unit_name(unit: str) -> str:
    """A unit as systemd calls it; without a suffix it is a service."""
    return unit if unit.endswith((".service", ".scope", ".slice")) else f"{unit}.service"


def members(processes: Iterable[Process], unit: str) -> tuple[Process, ...]:
    """The processes of a unit, by pid.

    :raises Refused: none of them has mergeable memory, or there is no such unit
    """
    name = unit_name(unit)
    found = tuple(sorted((process for process in processes if process.unit == name), key=lambda process: process.id))
    if not found:
        why = f"no process of unit {name} has mergeable memory"
        raise Refused("what is to be moved", why, hint="see `ksmd-ctl processes`")
    return found


@dataclass(frozen=True, slots=True)
class MigratedProcess:
    """One process: its result, plan or error."""

    process: ProcessId
    name: str
    came: MoveResult | MovePlan | KsmdError


def _frames(came: MoveResult | MovePlan) -> int:
    return sum(came.nodes.values()) if isinstance(came, MovePlan) else came.moved


@dataclass(slots=True)
class MigrationResult:
    """The result of a migration.

    :ivar cancelled: it was stopped before it was done
    :ivar untouched: processes that it did not get to
    """

    order: MigrationOrder
    parts: list[MigratedProcess] = field(default_factory=list)
    cancelled: bool = False
    untouched: int = 0

    @property
    def nothing(self) -> bool:
        """There was not one page that could be moved, at the target or elsewhere."""
        found = [one.came for one in self.parts if not isinstance(one.came, KsmdError)]
        counted = [came.already + sum(came.left.values()) + _frames(came) for came in found]
        return len(found) == len(self.parts) and not any(counted)

    def errors(self) -> list[KsmdError]:
        return [one.came for one in self.parts if isinstance(one.came, KsmdError)]

    def totals(self) -> dict[str, int]:
        """Pages of all processes together."""
        totals: Counter[str] = Counter(moved=0, would_move=0, already=0, left=0)
        for one in self.parts:
            if isinstance(one.came, KsmdError):
                continue
            totals["already"] += one.came.already
            totals["left"] += sum(one.came.left.values())
            totals["would_move" if isinstance(one.came, MovePlan) else "moved"] += _frames(one.came)
        return dict(totals)

    def document(self) -> dict[str, object]:
        """As in docs/json.md."""
        return {
            "format": FORMAT,
            "to": self.order.to,
            "dry_run": self.order.dry_run,
            "cancelled": self.cancelled,
            "untouched": self.untouched,
            "processes": [_document(one) for one in self.parts],
            "totals": self.totals(),
        }


def _document(one: MigratedProcess) -> dict[str, object]:
    came = one.came
    found: dict[str, object] = {
        "pid": one.process.pid,
        "start_time_ticks": one.process.start_time_ticks,
        "name": one.name,
        "error": None,
    }
    if isinstance(came, KsmdError):
        return {**found, "error": error_document(came)}
    found |= {"already": came.already, "left": dict(came.left)}
    if isinstance(came, MovePlan):
        nodes = {str(node): pages for node, pages in came.nodes.items()}
        return {
            **found,
            "would_move": nodes,
            "shared": came.shared,
            "room": came.room,
            "room_bytes": came.room_bytes,
        }
    return {**found, "moved": came.moved}


class Migration(Operation[MigrationResult]):
    """Moves the memory of one process after the other.

    :raises KsmdError: nothing of the kind can be done on this host
    """

    def __init__(self, host: Host, order: MigrationOrder) -> None:
        order.check()
        check_target(host.topology(), order.to)
        waiting: deque[tuple[ProcessId, str]] = deque()
        if order.pid is not None:
            waiting.append((named_process(host, order.pid), ""))
        super().__init__(self._migrate(host, order, waiting))

    def _migrate(
        self, host: Host, order: MigrationOrder, waiting: deque[tuple[ProcessId, str]]
    ) -> Steps[MigrationResult]:
        """
        :raises KsmdError: nothing could be done about any process; then nothing was moved
        """
        result = MigrationResult(order)
        if order.pid is None:
            found = yield from waited(host.processes())
            waiting.extend((process.id, process.name) for process in members(found.processes, order.unit))
        result.cancelled = self.cancelled
        while waiting and not result.cancelled:
            process, name = waiting.popleft()
            request = order.move(process)
            moving: Operation[MoveResult] | Operation[MovePlan] = (
                host.plan(request) if order.dry_run else host.move(request, MOVE_DEADLINE_SECONDS)
            )
            yield moving
            came: MoveResult | MovePlan | KsmdError = outcome(moving)
            result.parts.append(MigratedProcess(process, name, came))
            # What was moved stays where it is then.
            result.cancelled = self.cancelled or isinstance(came, Cancelled)
        result.untouched = len(waiting)
        if result.nothing and not result.cancelled:
            what = f"process {order.pid}" if order.pid is not None else f"unit {order.unit}"
            raise Refused(
                "what is to be moved",
                f"{what} has no mergeable memory that could be moved",
                hint="see `ksmd-ctl processes`; --everything moves memory that is not mergeable, too",
            )
        errors = result.errors()
        if errors and len(errors) == len(result.parts) and not result.cancelled:
            raise errors[0]
        return result


def exit_code(document: Mapping[str, object]) -> ExitCode:
    """The exit code that a migration's document stands for; of a dry run the one that it would end with now."""
    if document.get("cancelled"):
        return Cancelled.exit_code
    processes = parts(document, "processes")
    failed = any(item.get("error") is not None for item in processes)
    stayed = [(cause, number(part(item, "left"), cause) or 0) for item in processes for cause in part(item, "left")]
    left = sum(pages for _, pages in stayed)
    denied = sum(pages for cause, pages in stayed if _CAPABILITY in cause)
    totals = part(document, "totals")
    moved = number(totals, "moved") or number(totals, "would_move")
    if left and left == denied and not moved and not failed:
        return Denied.exit_code
    return ExitCode.CHECK_FAILED if left or failed else ExitCode.DONE
