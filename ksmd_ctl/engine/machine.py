# SPDX-License-Identifier: GPL-2.0-or-later
"""A simulated machine: memory nodes, processes with their system calls, ksmd, and virtual time.

Refusals are OSError with the errno of the system call.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.engine.memory import HUGE_PAGES, HUGE_SIZE, PAGE_SHIFT, PAGE_SIZE, Memory, Page, SwapEntry
from ksmd_ctl.engine.migrate import (
    mem_cancel_offline,
    mem_going_offline,
    mem_offline,
    migrate_page,
    move_pages,
    swap_out_page,
)
from ksmd_ctl.engine.mm import Mm, Vma, break_ksm, collapse, read_fault, split_huge_page, write_fault, zap_pte
from ksmd_ctl.engine.profile import CURRENT, Profile
from ksmd_ctl.engine.registry import (
    ksm_disable_merge_any,
    ksm_enable_merge_any,
    ksm_execve,
    ksm_exit,
    ksm_fork,
    ksm_madvise,
    ksm_vma_flags,
)
from ksmd_ctl.engine.scan import ksm_do_scan, ksm_scan_thread
from ksmd_ctl.engine.state import KSM_RUN_OFFLINE, Ksm, folio_test_ksm
from ksmd_ctl.engine.sysfs import ksm_show, ksm_store

_FIRST_ADDRESS: Final = 0x7F00_0000_0000
_GAP: Final = 16 * PAGE_SIZE
_FIRST_PID: Final = 1000

#: ksmd's time for a page, in the order of what a kernel needs (about 300,000 pages a second).
NS_PER_PAGE: Final = 3_000


@dataclass(slots=True)
class Process:
    """A process: its pid, its start in ticks of 10 ms, its memory, and the unit that it belongs to.

    :ivar machine: it is a virtual machine
    """

    pid: int
    start_time_ticks: int
    name: str
    mm: Mm
    next_address: int = _FIRST_ADDRESS
    unit: str = ""
    machine: bool = False


# The address from one on that may hold huge pages as another does, for ranges that hold any.
def _aligned(address: int, other: int, pages: int) -> int:
    return address if pages < HUGE_PAGES else address + (other - address) % HUGE_SIZE


class Machine:
    """A machine with memory nodes 0 to n-1, one CPU on each.

    :ivar ksm: KSM's state
    :ivar processes: by pid; those that exited are gone
    """

    def __init__(
        self,
        nodes: int = 1,
        profile: Profile = CURRENT,
        *,
        node_pages: int = 1 << 18,
        content_bytes: int = PAGE_SIZE,
    ) -> None:
        self.memory = Memory([node_pages] * nodes, content_bytes)
        self.ksm = Ksm(self.memory, profile)
        self.processes: dict[int, Process] = {}
        self._next_pid = _FIRST_PID

    # -- processes ---------------------------------------------------------------------------------

    def _process(self, pid: int) -> Process:
        try:
            return self.processes[pid]
        except KeyError:
            raise OSError(errno.ESRCH, f"no process {pid}") from None

    def mm(self, pid: int) -> Mm:
        """A process's memory; ESRCH."""
        return self._process(pid).mm

    def _add(self, name: str, mm: Mm, next_address: int) -> int:
        pid = self._next_pid
        self._next_pid += 1
        ticks = self.ksm.now_ns // 10_000_000
        self.processes[pid] = Process(pid, ticks, name, mm, next_address)
        return pid

    def spawn(self, name: str, nid: int = 0, mems_allowed: frozenset[int] | None = None) -> int:
        """A process without memory, whose task prefers a node; its pid.

        :param mems_allowed: of its cpuset, which what it forks is in, too (engine.md 15.5)
        """
        self.check_node(nid)
        return self._add(name, Mm(name, nid, mems_allowed), _FIRST_ADDRESS)

    def fork(self, pid: int, name: str) -> int:
        """A child that shares all pages; its pid (engine.md 14.4)."""
        parent = self._process(pid)
        mm = Mm(name, parent.mm.policy, parent.mm.mems_allowed)
        ksm_fork(self.ksm, parent.mm, mm)
        for vma in parent.mm.vmas:
            child = vma.fork_into(mm)
            child.ptes = list(vma.ptes)
            for entry in child.ptes:
                if isinstance(entry, Page):
                    entry.mapcount += 1
                elif isinstance(entry, SwapEntry):
                    entry.count += 1
            mm.insert(child)
        return self._add(name, mm, parent.next_address)

    def exit(self, pid: int) -> None:
        """End a process: its mappings go now, its rmap_items when ksmd comes by (engine.md 14.6)."""
        self._mmput(self._process(pid).mm)
        del self.processes[pid]

    def _mmput(self, mm: Mm) -> None:
        mm.exited = True
        ksm_exit(self.ksm, mm)
        for vma in list(mm.vmas):
            self._zap(vma)
            mm.remove(vma)

    def exec(self, pid: int) -> None:
        """Another program in the same process: a new mm, then the old one ends as in an exit (engine.md 14.7)."""
        process = self._process(pid)
        old, process.mm = process.mm, Mm(process.name, process.mm.policy, process.mm.mems_allowed)
        process.next_address = _FIRST_ADDRESS
        ksm_execve(self.ksm, old, process.mm)
        self._mmput(old)

    def prctl_merge(self, pid: int, on: bool) -> None:
        """PR_SET_MEMORY_MERGE (engine.md 14.13); EINVAL where the profile is older than that."""
        mm = self._process(pid).mm
        if not self.ksm.profile.process_profit:
            raise OSError(errno.EINVAL, "PR_SET_MEMORY_MERGE")
        if on:
            ksm_enable_merge_any(self.ksm, mm)
        else:
            ksm_disable_merge_any(self.ksm, mm)

    # -- mappings ----------------------------------------------------------------------------------

    def check_node(self, nid: int) -> int:
        """The node; ENODEV where there is none."""
        if not 0 <= nid < self.memory.nr_node_ids or not self.memory.nodes[nid].online:
            raise OSError(errno.ENODEV, f"node {nid} does not exist")
        return nid

    def mmap(self, pid: int, pages: int, nid: int | None = None, *, private: bool = True) -> int:
        """Anonymous memory, bound to a node where one is given; its address. EINVAL of no page; ENODEV.

        :param private: False: of a kind that KSM ignores (engine.md 14.11)
        """
        process = self._process(pid)
        if pages <= 0:
            raise OSError(errno.EINVAL, f"{pages} pages")
        if nid is not None:
            self.check_node(nid)
        vma = Vma(process.mm, _aligned(process.next_address, 0, pages), pages)
        vma.policy = nid
        vma.compatible = private
        ksm_vma_flags(vma)
        process.mm.insert(vma)
        process.next_address = vma.end + _GAP
        return vma.start

    # The VMAs of a range, split at its ends; without `holes`, ENOMEM after the last where they don't cover all of it.
    def _range(self, pid: int, start: int, pages: int, *, holes: bool = False) -> Iterator[Vma]:
        if start % PAGE_SIZE or pages < 0:
            raise OSError(errno.EINVAL, f"{pages} pages at {start:#x}")
        vmas = self._process(pid).mm.covering(start, start + pages * PAGE_SIZE)
        complete = sum(len(vma.ptes) for vma in vmas) == pages
        yield from vmas
        if not complete and not holes:
            raise OSError(errno.ENOMEM, f"not all of {pages} pages at {start:#x} is mapped")

    def _zap(self, vma: Vma) -> None:
        for index in range(len(vma.ptes)):
            zap_pte(self.ksm, vma, index)

    def munmap(self, pid: int, start: int, pages: int) -> None:
        """Take mappings away; holes in the range do no harm."""
        for vma in self._range(pid, start, pages, holes=True):
            self._zap(vma)
            vma.mm.remove(vma)

    def mremap(self, pid: int, start: int, pages: int) -> int:
        """Move what is mapped there, VMA by VMA, to a new address, which is returned; holes stay holes.

        KSM pages are un-merged before, and what was mergeable stays so (engine.md 14.8).
        """
        process = self._process(pid)
        to = _aligned(process.next_address, start, pages)
        for vma in self._range(pid, start, pages, holes=True):
            if vma.mergeable:
                break_ksm(self.ksm, vma, vma.start, vma.end, vma.mm.policy)
            vma.mm.move(vma, to + vma.start - start)
        process.next_address = to + pages * PAGE_SIZE + _GAP
        return to

    def collapse(self, pid: int, start: int, pages: int) -> list[bool]:
        """MADV_COLLAPSE of each block of the range that can be a huge page: which of them are one now.

        EINVAL where the profile is older than that.
        """
        if not self.ksm.profile.collapse:
            raise OSError(errno.EINVAL, "MADV_COLLAPSE")
        end, found = start + pages * PAGE_SIZE, []
        for block in range(start + -start % HUGE_SIZE, end - HUGE_SIZE + 1, HUGE_SIZE):
            vmas = list(self._range(pid, block, HUGE_PAGES, holes=True))
            covered = sum(len(vma.ptes) for vma in vmas) == HUGE_PAGES
            found.append(covered and collapse(self.ksm, vmas, block))
        return found

    def discard(self, pid: int, start: int, pages: int) -> None:
        """MADV_DONTNEED; ENOMEM where part of the range is not mapped, after the rest was done."""
        for vma in self._range(pid, start, pages):
            self._zap(vma)

    def madvise(self, pid: int, start: int, pages: int, *, mergeable: bool) -> None:
        """MADV_MERGEABLE or MADV_UNMERGEABLE; ENOMEM as `discard`."""
        for vma in self._range(pid, start, pages):
            ksm_madvise(self.ksm, vma, mergeable)

    def mprotect(self, pid: int, start: int, pages: int, *, writable: bool) -> None:
        """PROT_READ, with or without PROT_WRITE; ENOMEM as `discard`."""
        for vma in self._range(pid, start, pages):
            vma.writable = writable

    def _vma(self, pid: int, address: int) -> Vma:
        vma = self._process(pid).mm.vma_lookup(address)
        if vma is None:
            raise OSError(errno.EFAULT, f"nothing is mapped at {address:#x}")
        return vma

    def write(self, pid: int, address: int, content: bytes) -> None:
        """The process writes a whole page; EFAULT where it is not mapped or can't be written; ENOMEM."""
        vma = self._vma(pid, address)
        if not vma.writable:
            raise OSError(errno.EFAULT, f"{address:#x} can't be written")
        write_fault(self.ksm, vma, address, content, vma.mm.policy)

    def read(self, pid: int, address: int) -> bytes:
        """The process reads a page; EFAULT where it is not mapped; ENOMEM."""
        vma = self._vma(pid, address)
        return read_fault(self.ksm, vma, address, vma.mm.policy)

    # -- pages -------------------------------------------------------------------------------------

    def _present(self, pid: int, start: int, pages: int) -> Iterator[tuple[Vma, int, Page]]:
        mm = self._process(pid).mm
        for address in range(start, start + pages * PAGE_SIZE, PAGE_SIZE):
            vma = mm.vma_lookup(address)
            if vma is not None:
                entry = vma.ptes[(address - vma.start) >> PAGE_SHIFT]
                if isinstance(entry, Page):
                    yield vma, address, entry

    def move_pages(self, pid: int, addresses: Sequence[int], nid: int, *, move_all: bool) -> tuple[int, list[int]]:
        """move_pages(2); what it returns, and the statuses."""
        return move_pages(self.ksm, self._process(pid).mm, addresses, nid, move_all=move_all)

    def break_sharing(self, pid: int, start: int, pages: int, nid: int | None) -> int:
        """Unshare, from outside, those of the pages that are KSM pages and writable (findings.md F7); how many.

        :param nid: the node that the caller prefers, node 0 where none is given
        """
        if nid is not None:
            self.check_node(nid)
        broken = 0
        for vma, address, page in list(self._present(pid, start, pages)):
            if folio_test_ksm(page) and vma.writable:
                break_ksm(self.ksm, vma, address, address + PAGE_SIZE, nid or 0)
                if self.ksm.profile.unshare_clears:
                    write_fault(self.ksm, vma, address, b"\0" + page.content[1:], nid or 0)
                broken += 1
        return broken

    def swap_out(self, pid: int, start: int, pages: int) -> int:
        """Swap pages out, a KSM page from all its mappings at once (engine.md 14.9); how many."""
        return self._swap_out([page for _vma, _address, page in self._present(pid, start, pages)])

    def pageout(self, pid: int, start: int, pages: int) -> int:
        """MADV_PAGEOUT: swap out those of the pages that have no other mapping; how many."""
        return self._swap_out([page for _vma, _address, page in self._present(pid, start, pages) if page.mapcount == 1])

    def _swap_out(self, pages: list[Page]) -> int:
        mms = [process.mm for process in self.processes.values()]
        for page in pages:
            split_huge_page(self.ksm, page)
        # Those of one page go together.
        return sum(swap_out_page(self.memory, mms, page) for page in pages if page.mapcount)

    # -- memory going offline ------------------------------------------------------------------------

    def going_offline(self, nid: int) -> None:
        """A node's memory begins to go offline; ksmd is stopped until that is over (engine.md 14.14)."""
        self.check_node(nid)
        if sum(node.online for node in self.memory.nodes) < 2:
            raise OSError(errno.EBUSY, "the last node can't go")
        mem_going_offline(self.ksm)

    def offline(self, nid: int) -> None:
        """Move a node's pages away and take it offline; EBUSY where one can't be moved: then it stays."""
        node = self.memory.nodes[self.check_node(nid)]
        others = [each.nid for each in self.memory.nodes if each.online and each is not node]
        left = [page for page in list(node.pages()) if not any(migrate_page(self.ksm, page, other) for other in others)]
        if left:
            self.cancel_offline()
            raise OSError(errno.EBUSY, f"{left[0]!r} can't be moved")
        mem_offline(self.ksm, node)

    def cancel_offline(self) -> None:
        """The memory stays."""
        mem_cancel_offline(self.ksm)

    def online(self, nid: int) -> None:
        """A node's memory comes back."""
        self.memory.nodes[nid].online = True

    # -- knobs, ksmd and time ------------------------------------------------------------------------

    def show(self, name: str) -> str:
        """Read a file of /sys/kernel/mm/ksm."""
        return ksm_show(self.ksm, name)

    def store(self, name: str, value: object, nid: int = 0) -> None:
        """Write a file of /sys/kernel/mm/ksm, by a task that prefers a node."""
        ksm_store(self.ksm, name, str(value), nid)

    def batch(self, pages: int) -> int:
        """One batch of ksmd, whatever ``run`` is; how many pages it scanned."""
        if self.ksm.run & KSM_RUN_OFFLINE:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        scanned = ksm_do_scan(self.ksm, pages)
        self.ksm.cpu_ns += scanned * NS_PER_PAGE
        self.ksm.now_ns += scanned * NS_PER_PAGE
        return scanned

    def scan(self, count: int = 1) -> int:
        """So many full scans, or fewer where no mm is registered any more; how many were done."""
        for done in range(count):
            before = self.ksm.scan.seqnr
            while self.ksm.scan.seqnr == before:
                if self.ksm.mm_head.next is self.ksm.mm_head:
                    return done
                self.batch(1 << 40)
        return count

    def run_until(self, time_ns: int, most_pages: int = 1 << 62) -> int:
        """Let virtual time pass with ksmd working in it; as ksm_scan_thread."""
        return ksm_scan_thread(self.ksm, self.batch, time_ns, most_pages)
