# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes huge pages again of memory whose huge pages were split, from outside of the process.

process_madvise(2) with MADV_COLLAPSE (since 6.1) copies the pages of a block of 2 MiB into a new huge page, on the
node where most of them are. What was merged, swapped out or freed as zeroes gets memory of its own by that
(mm/khugepaged.c:madvise_collapse). It needs CAP_SYS_NICE, and may read the process as ptrace would (mm/madvise.c).

A block is left alone where that would take many pages, and where ksmd would split the huge page again: while it runs
it does so in its next full scans (findings F33). A page that is mapped twice in a block can't be locked twice, so the
call fails after it has allocated: such blocks are not tried.

smaps tells what came of it.
"""

from __future__ import annotations

import errno
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess, ReadError, errno_text
from ksmd_ctl.host.knobs import RUN_OFFLINE, Knob
from ksmd_ctl.host.memory import ProcessId, Range
from ksmd_ctl.host.operation import KSMD_IS_RUNNING, Collapse, CollapsedProcess, CollapseResult, Progress
from ksmd_ctl.kernel import libnuma, syscalls
from ksmd_ctl.kernel.headroom import Headroom, MemoryPressure, rooms, tightest
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.pagemap import (
    EXCLUSIVE,
    FILE,
    FRAME,
    IS_HUGE,
    IS_PRESENT,
    PRESENT,
    SWAPPED,
    Pagemap,
    any_has,
    frames_of,
    own_parts,
    zero_frame,
)
from ksmd_ctl.kernel.proc_pid import Held, read_stat
from ksmd_ctl.kernel.processes import unit_members
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.split_blocks import could_be_huge, whole_blocks
from ksmd_ctl.kernel.topology import read_frame_map, read_topology
from ksmd_ctl.kernel.zero_pages import HUGE_BYTES

_BLOCK_PAGES = HUGE_BYTES // PAGE_SIZE
# Blocks that are read together, and at most made huge pages by one call: each call empties the queues of new pages of
# all CPUs (lru_add_drain_all). The process waits for one block at a time.
_READ_BLOCKS = 64
_CALL_BLOCKS = 8
_OWN = PRESENT | EXCLUSIVE
_OWN_MASK = PRESENT | EXCLUSIVE | FILE
_WHAT: Final = "making huge pages"

FORBIDDEN = "huge pages are not allowed there (transparent_hugepage/enabled, MADV_NOHUGEPAGE, or the process's setting)"
TWICE = "a merged page is mapped there more than once: un-merge it first (ksmd-ctl unmerge)"
_CAUSES: Final = {
    errno.EAGAIN: "a page there was in use by something else (pinned, locked, or under I/O)",
    errno.EBUSY: "its memory cgroup has no room for a huge page",
    errno.EINVAL: "the kernel allows no huge page there",
    errno.ENOMEM: "no huge page is free on its node, or nothing is mapped there any more",
}


def make_huge(
    request: Collapse,
    *,
    root: Path = Path("/"),
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> CollapseResult:
    """Make huge pages of memory of processes. It may block: run it in a child.

    :raises Absent: this kernel can't (before 6.1, or without transparent huge pages)
    :raises NoSuchProcess, Denied, ReadError: nothing could be done with the only process, or a privilege is missing
    """
    need_support()
    several = len(read_topology(root, numa=libnuma.available()).with_memory()) > 1
    pressure = MemoryPressure(request.max_pressure, root, clock, sleep)
    surroundings = _Surroundings(
        request,
        root,
        read_frame_map(root).node if several else lambda _: None,
        _ksmd_runs(root),
        progress,
        lambda: pressure.wait(stop),
        clock,
    )
    done: list[CollapsedProcess] = []
    stopped = ""
    for process in [request.process] if request.process else unit_members(request.unit, root):
        job = _Job(process, surroundings)
        try:
            stopped = job.run()
        except NoSuchProcess:
            if request.process:
                raise
            continue
        except (Denied, ReadError) as error:
            if request.process:
                raise
            job.error = error.why
        done.append(job.result())
        if stopped:
            break
    return CollapseResult(tuple(done), stopped)


def need_support() -> None:
    """See that this kernel makes huge pages for other processes, tried where nothing is mapped.

    :raises Absent: it does not
    :raises Denied: CAP_SYS_NICE is missing
    """
    address = syscalls.mmap(0, HUGE_BYTES, syscalls.PROT_NONE, syscalls.MAP_PRIVATE)
    syscalls.munmap(address, HUGE_BYTES)
    pidfd = os.pidfd_open(os.getpid())
    try:
        syscalls.process_madvise(pidfd, address, HUGE_BYTES, syscalls.MADV_COLLAPSE)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS):
            why = "this kernel does not do it for other processes"
            hint = "Linux 6.1 and later can, where they are built with transparent huge pages"
            raise Absent(_WHAT, why, hint=hint, path="process_madvise", errno=error.errno) from error
        if error.errno == errno.EPERM:
            raise _denied(error) from error
    finally:
        os.close(pidfd)


def _denied(error: OSError) -> Denied:
    why = f"this user may not advise other processes: {errno_text(error.errno or 0)}"
    hint = "needs CAP_SYS_NICE, and CAP_SYS_PTRACE for other users' processes"
    return Denied(_WHAT, why, hint=hint, path="process_madvise", errno=error.errno)


def _ksmd_runs(root: Path) -> bool:
    with closing(KsmFs(root)) as ksm:
        try:
            run = ksm.read(Knob.RUN)
        except ReadError:
            return False
    return isinstance(run, int) and run & ~RUN_OFFLINE == 1


@dataclass(frozen=True, slots=True)
class _Surroundings:
    """What all processes of a request have in common.

    :ivar node: of a frame; None where there is one node
    :ivar running: ksmd runs
    :ivar pause: waits until one may go on; says why not to
    """

    request: Collapse
    root: Path
    node: Callable[[int], int | None]
    running: bool
    progress: Callable[[Progress], None]
    pause: Callable[[], str]
    clock: Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Block:
    """A block that is no huge page.

    :ivar pages: pages that a huge page would take: those that are not in memory as the process's own
    :ivar node: where it belongs
    """

    address: int
    pages: int
    node: int | None


class _Job:
    """One process.

    :ivar error: why it could not be looked at or changed
    """

    def __init__(self, process: ProcessId, surroundings: _Surroundings) -> None:
        self.error = ""
        self._process = process
        self._common = surroundings
        request = surroundings.request
        self._headroom = Headroom(
            process.pid,
            request.floor_bytes,
            surroundings.root,
            grows=True,
            share=request.headroom_share,
            clock=surroundings.clock,
        )
        self._name = ""
        self._huge_before = self._huge_after = self._blocks = self._pages = self._kept = 0
        self._left: Counter[str] = Counter()

    def result(self) -> CollapsedProcess:
        return CollapsedProcess(
            self._process,
            self._name,
            self._huge_before,
            self._huge_after,
            self._blocks,
            self._pages,
            self._kept,
            dict(sorted(self._left.items())),
            self.error,
        )

    def run(self) -> str:
        """Do it; why it was stopped, empty where it was not.

        :raises NoSuchProcess, Denied, ReadError: it can't be looked at, or advised
        """
        pid, root = self._process.pid, self._common.root
        with Held(self._process, root) as held:
            self._name = read_stat(pid, root)[0]
            ranges = mappings(pid, root)
            self._huge_before = _huge_pages(ranges)
            blocks = self._look(ranges)
            if self._common.request.dry_run:
                self._plan(blocks)
                return ""
            stopped = self._change(held, blocks)
            held.verify()
            self._huge_after = _huge_pages(mappings(pid, root))
        return stopped

    # -- looking -------------------------------------------------------------------------------------------

    def _look(self, ranges: Iterable[Range]) -> list[_Block]:
        """The blocks that are to become huge pages."""
        found = []
        allowed = False
        large = [item for item in ranges if _is_private_memory(item) and whole_blocks(item)]
        with Pagemap(self._process.pid, self._common.root, killable=False) as pagemap:
            for item in large:
                if could_be_huge(item):
                    allowed = True
                    for block, entries in self._blocks_of(pagemap, item):
                        if self._is_wanted(item, block, entries):
                            found.append(block)
        if not allowed and (blocks := sum(item.anonymous_pages for item in large) // _BLOCK_PAGES):
            self._left[FORBIDDEN] = blocks
        return found

    def _blocks_of(self, pagemap: Pagemap, item: Range) -> Iterator[tuple[_Block, array[int]]]:
        """The blocks of a mapping that hold pages and are no huge pages, with their entries."""
        huge = _huge_blocks(pagemap, item)
        for run in _runs(_populated(pagemap, item), _READ_BLOCKS):
            entries = pagemap.read(run[0], len(run) * _BLOCK_PAGES)
            for number, address in enumerate(run):
                part = entries[number * _BLOCK_PAGES : (number + 1) * _BLOCK_PAGES]
                if not any_has(part, PRESENT | SWAPPED):
                    continue
                if (address in huge) if huge is not None else item.huge_bytes and _is_one_page(part):
                    continue
                own = [entry & FRAME for entry in part if entry & _OWN_MASK == _OWN]
                yield _Block(address, _BLOCK_PAGES - len(own), self._common.node(own[0]) if own else None), part

    def _is_wanted(self, item: Range, block: _Block, entries: array[int]) -> bool:
        if block.pages >= self._common.request.keep_pages:
            self._kept += 1
        elif block.pages and item.mergeable and self._common.running:
            self._left[KSMD_IS_RUNNING] += 1
        elif block.pages and _maps_twice(entries):
            self._left[TWICE] += 1
        else:
            return True
        return False

    # -- changing ------------------------------------------------------------------------------------------

    def _plan(self, blocks: list[_Block]) -> None:
        request = self._common.request
        nodes = frozenset({block.node for block in blocks if block.node is not None})
        room = tightest(rooms(self._process.pid, nodes, request.floor_bytes, self._common.root, grows=True))
        for block in blocks:
            # A huge page is allocated before the small ones are freed.
            if (self._pages + _BLOCK_PAGES) * PAGE_SIZE > room.free_bytes:
                self._left[room.full_text] += 1
                continue
            self._pages += block.pages
            self._blocks += 1
        self._huge_after = self._huge_before + self._blocks

    def _change(self, held: Held, blocks: list[_Block]) -> str:
        done = 0
        for run in _block_runs(blocks):
            self._common.progress(Progress(done, len(blocks), "huge pages"))
            if stopped := self._common.pause():
                return stopped
            held.verify()
            if any(self._headroom.take(_BLOCK_PAGES, block.node) < _BLOCK_PAGES for block in run):
                why = self._headroom.full or "there is too little memory for another huge page above the floor"
                self._left[why] += len(blocks) - done
                return ""
            if not self._advise(held, run) and len(run) > 1:
                # Which of them was refused is not told: those that are huge pages already are so at once.
                for block in run:
                    self._advise(held, [block], last=True)
            done += len(run)
        return ""

    def _advise(self, held: Held, run: list[_Block], *, last: bool = False) -> bool:
        """Have blocks in a row become huge pages; whether all did."""
        try:
            syscalls.process_madvise(held.pidfd, run[0].address, len(run) * HUGE_BYTES, syscalls.MADV_COLLAPSE)
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise NoSuchProcess(f"process {self._process.pid}", "it has exited", errno=error.errno) from error
            if error.errno in (errno.EPERM, errno.EACCES):
                raise _denied(error) from error
            if last or len(run) == 1:
                self._left[_CAUSES.get(error.errno or 0, errno_text(error.errno or 0))] += 1
            return False
        self._blocks += len(run)
        self._pages += sum(block.pages for block in run)
        return True


def _is_private_memory(item: Range) -> bool:
    # Of files and shared memory khugepaged makes huge pages in other ways; where userfaultfd watches, holes must stay.
    named = item.name and not item.name.startswith(("[heap]", "[anon:"))
    return not (named or item.flags & {"sh", "ht", "um", "uw", "ui"})


def _huge_pages(ranges: Iterable[Range]) -> int:
    return sum(item.huge_bytes for item in ranges) // HUGE_BYTES


def _huge_blocks(pagemap: Pagemap, item: Range) -> set[int] | None:
    """The blocks of a mapping that are huge pages; None where this kernel does not tell (before 6.7)."""
    found: set[int] = set()
    try:
        for begins, ends in pagemap.scan(item.start, item.end, wanted=IS_PRESENT | IS_HUGE):
            for begin, end in zip(begins, ends, strict=True):
                found.update(range(begin, end, HUGE_BYTES))
    except Absent:
        return None
    return found


def _is_one_page(entries: array[int]) -> bool:
    """Whether pages lie as those of a huge page do."""
    frames = frames_of(entries)
    return not frames[0] % _BLOCK_PAGES and frames == list(range(frames[0], frames[0] + _BLOCK_PAGES))


def _maps_twice(entries: array[int]) -> bool:
    shared = [entry & FRAME for entry in entries if entry & PRESENT and entry & _OWN_MASK != _OWN]
    found = [frame for frame in shared if frame not in (0, zero_frame())]
    return len(set(found)) < len(found)


def _populated(pagemap: Pagemap, item: Range) -> Iterator[int]:
    """The addresses of whole blocks that may hold pages, ascending."""
    whole = whole_blocks(item)
    next_block = whole.start
    for start, end in own_parts(pagemap, item):
        for block in range(max(next_block, start // HUGE_BYTES * HUGE_BYTES), min(end, whole.stop), HUGE_BYTES):
            yield block
            next_block = block + HUGE_BYTES


def _runs(blocks: Iterable[int], most: int) -> Iterator[list[int]]:
    """Addresses of blocks in runs without a gap, at most so many at a time."""
    run: list[int] = []
    for block in blocks:
        if run and (block != run[-1] + HUGE_BYTES or len(run) == most):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _block_runs(blocks: list[_Block]) -> Iterator[list[_Block]]:
    """Blocks in runs that are made huge pages together."""
    by_address = {block.address: block for block in blocks}
    for run in _runs(by_address, _CALL_BLOCKS):
        yield [by_address[address] for address in run]
