# SPDX-License-Identifier: GPL-2.0-or-later
"""What takes time on the simulated host: moving memory to a node, and un-merging pages."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar, cast

from ksmd_ctl.engine.machine import Machine, Process
from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, Page
from ksmd_ctl.engine.mm import Vma
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.errors import Cancelled, NoSuchProcess, Rejected, TimedOut, Unmapped, errno_text
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import (
    Move,
    MovePlan,
    MoveResult,
    Operation,
    Progress,
    Steps,
    Unshare,
    UnsharedPart,
    UnsharePart,
    UnshareResult,
)

T = TypeVar("T")

# What a page costs that is moved or un-merged, in virtual time.
_NS_PER_PAGE: Final = 2_500

# Pages that an operation goes through in one step.
_STEP_PAGES: Final = 256
_FULL: Final = "the node is full"


class SteppedOperation(Operation[T]):
    """An operation on the engine: each poll does one step, so there is nothing to wait on.

    :param what: what is being done, for errors
    :param clock: the host's time
    """

    def __init__(self, what: str, steps: Steps[T], clock: Callable[[], float], deadline_seconds: float) -> None:
        super().__init__(self._bounded(what, steps, clock, clock() + deadline_seconds, deadline_seconds))

    def _bounded(
        self, what: str, steps: Steps[T], clock: Callable[[], float], ends: float, deadline_seconds: float
    ) -> Steps[T]:
        while True:
            at = self.progress
            state = f"stopped at {at.done} of {at.total} {at.unit}".rstrip()
            if self.cancelled:
                raise Cancelled(what, state)
            if clock() > ends:
                raise TimedOut(what, f"{state}, after {deadline_seconds:g} s")
            try:
                step = next(steps)
            except StopIteration as stop:
                return cast(T, stop.value)
            yield step


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """The errors of system calls, as the interface has them."""
    try:
        yield
    except OSError as error:
        raise Rejected(what, errno_text(error.errno or 0), errno=error.errno) from error


def find_process(machine: Machine, process: ProcessId) -> Process:
    """The process of an id.

    :raises NoSuchProcess: it is gone
    """
    found = machine.processes.get(process.pid)
    if found is None or found.start_time_ticks != process.start_time_ticks:
        raise NoSuchProcess(f"process {process.pid}", "it is gone", errno=errno.ESRCH)
    return found


def pass_time(machine: Machine, pages: int) -> None:
    """Let the time pass that it takes to move or un-merge so many pages."""
    machine.ksm.now_ns += pages * _NS_PER_PAGE


def _free_bytes(machine: Machine, nid: int) -> int:
    node = machine.memory.nodes[nid]
    return (node.capacity - node.used) * PAGE_SIZE


# The present pages of what a request is about, with the VMA and address of each.
def _requested(process: Process, ranges: tuple[tuple[int, int], ...], everything: bool) -> list[tuple[Vma, int, Page]]:
    found = []
    for start, end in ranges:
        if not any(vma.start < end and start < vma.end for vma in process.mm.vmas):
            raise Unmapped(f"process {process.pid}", f"nothing is mapped in {start:#x}-{end:#x}", value=start)
    for vma in process.mm.vmas:
        if not (vma.mergeable or everything):
            continue
        for index, pte in enumerate(vma.ptes):
            address = vma.start + (index << PAGE_SHIFT)
            if isinstance(pte, Page) and (not ranges or any(start <= address < end for start, end in ranges)):
                found.append((vma, address, pte))
    return found


def plan(machine: Machine, request: Move) -> MovePlan:
    """Find out what a move would do; nothing changes."""
    process = find_process(machine, request.process)
    with refusals(f"moving memory to node {request.to}"):
        machine.check_node(request.to)
    frames = {page for _vma, _address, page in _requested(process, request.ranges, request.everything)}
    nodes = Counter(map(page_to_nid, frames))
    there = request.homes
    already = sum(nodes.pop(node, 0) for node in there)
    shared = sum(page.mapcount > 1 and page_to_nid(page) not in there for page in frames)
    room = max(0, _free_bytes(machine, request.to) - request.floor_bytes)
    plan = MovePlan(dict(sorted(nodes.items())), shared, already, {}, f"on node {request.to}", room)
    return plan.within_room(PAGE_SIZE, _FULL)


def move(machine: Machine, request: Move) -> Steps[MoveResult]:
    """Move memory to a node."""
    process, nid = find_process(machine, request.process), request.to
    with refusals(f"moving memory to node {nid}"):
        machine.check_node(nid)
    frames: dict[Page, int] = {}
    for _vma, address, page in _requested(process, request.ranges, request.everything):
        frames.setdefault(page, address)
    there = request.homes
    already = sum(page_to_nid(page) in there for page in frames)
    todo = [(page, address) for page, address in frames.items() if page_to_nid(page) not in there]
    left: Counter[str] = Counter()
    for done in range(0, len(todo), _STEP_PAGES):
        yield Progress(done, len(todo), "pages")
        part = [(page, address) for page, address in todo[done : done + _STEP_PAGES] if page.mapcount]
        if _free_bytes(machine, nid) - len(part) * PAGE_SIZE < request.floor_bytes:
            left[_FULL] += len(todo) - done
            break
        machine.move_pages(process.pid, [address for _page, address in part], nid, move_all=True)
        pass_time(machine, len(part))
        left["it can't be moved now"] += sum(page_to_nid(page) != nid for page, _address in part if page.mapcount)
    moved = sum(page_to_nid(page) == nid for page, _address in todo if page.mapcount)
    return MoveResult(moved, already, +left)


def unshare(machine: Machine, request: Unshare) -> Steps[UnshareResult]:
    """Un-merge pages of processes, their contents unchanged."""
    done = []
    for part in request.parts:
        try:
            done.append((yield from _unshare_part(machine, part, request.floor_bytes)))
        except (NoSuchProcess, Unmapped):
            if len(request.parts) == 1:
                raise
            done.append(UnsharedPart(0, {}, ended=True))
    return UnshareResult(tuple(done))


def _unshare_part(machine: Machine, part: UnsharePart, floor_bytes: int) -> Steps[UnsharedPart]:
    process = find_process(machine, part.process)
    what = f"un-merging pages of process {process.pid}"
    if machine.ksm.profile.unshare_clears:
        raise Rejected(what, "this kernel would clear a byte of every page", errno=errno.EOPNOTSUPP)
    if part.to is not None:
        with refusals(what):
            machine.check_node(part.to)
    todo = [
        (vma, address, page)
        for vma, address, page in _requested(process, part.ranges, True)
        if folio_test_ksm(page) and page_to_nid(page) not in part.keep
    ]
    left: Counter[str] = Counter()
    unshared = 0
    for done, (vma, address, page) in enumerate(todo):
        if done % _STEP_PAGES == 0:
            yield Progress(done, len(todo), "pages")
        if process.mm.page(address) is not page or not folio_test_ksm(page):
            continue
        if not vma.writable:
            left["the mapping can't be written"] += 1
            continue
        target = vma.policy if vma.policy is not None else part.to or 0
        if _free_bytes(machine, target) - PAGE_SIZE < floor_bytes:
            left[_FULL] += len(todo) - done
            break
        with refusals(what):
            unshared += machine.break_sharing(process.pid, address, 1, part.to)
        pass_time(machine, 1)
    return UnsharedPart(unshared, dict(left))
