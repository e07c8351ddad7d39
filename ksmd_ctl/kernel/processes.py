# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes as KSM sees them: counts, class, group, home, and on which nodes their merged pages lie.

Sources: smaps, cgroup, cmdline, fd and status of /proc/PID, and what `process_counts` and `process_pages` read.
"""

from __future__ import annotations

import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ksmd_ctl.errors import Cancelled, Denied, NoSuchProcess, ReadError
from ksmd_ctl.host.memory import Process, ProcessId, Range, Skipped, Topology, Unmergeable
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel.classes import Evidence, classify, never_merged
from ksmd_ctl.kernel.containers import ContainerNames
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.machines import Membership, Origin, is_machine, membership, systemd_path, unit_of
from ksmd_ctl.kernel.pods import running_pods
from ksmd_ctl.kernel.proc_pid import (
    START_TIME,
    LeftOut,
    command_words,
    effective_uid,
    memory_pid,
    read_process_file,
    read_stat,
    running_pids,
)
from ksmd_ctl.kernel.process_counts import ksm_mapped_pages, read_counts, sharing_bytes
from ksmd_ctl.kernel.process_pages import Walk, Walker
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import holds_pages, parsed
from ksmd_ctl.kernel.reading import TIMED_OUT
from ksmd_ctl.kernel.topology import FrameMap

_PF_KTHREAD = 0x00200000
_FLAGS, _START_STACK = 9 - 3, 28 - 3
#: Adjacent mappings from which on it is counted how often a page is mapped: with fewer the kernel finds these at once.
_MANY_ADJACENT = 256

#: Descriptors that are looked at; a process may have a million of them.
_MOST_DESCRIPTORS = 4096
#: A monitor creates its machine among the first things that it does (virt/kvm/kvm_main.c: kvm_dev_ioctl_create_vm).
_KVM, _KVM_DESCRIPTORS = "anon_inode:kvm-vm", 256
_NAMESPACES = ("pid", "user")


def start_stack(fields: Sequence[bytes]) -> int:
    """Where a process's stack begins (mm->start_stack), of the fields that `read_stat` gives; 0 where it is hidden."""
    return int(fields[_START_STACK])


def count_relatives(stacks: Mapping[int, int]) -> dict[int, int | None]:
    """How many others are forks of the same program, by pid; None where that can't be told.

    A fork's stack begins where its parent's does (mm->start_stack), and each program that is executed gets a random
    place for it. Where that is switched off (randomize_va_space, setarch -R) unrelated ones may look related.

    :param stacks: where the stack of each process begins, 0 where it may not be known
    """
    found = Counter(stacks.values())
    return {pid: found[start] - 1 if start else None for pid, start in stacks.items()}


def adjacent_mappings(ranges: Sequence[Range]) -> int:
    """The longest run of mappings that touch each other.

    What mprotect and madvise split has one anon_vma, and so do neighbours that a first write finds (mm/vma.c:
    find_mergeable_anon_vma).

    :param ranges: by address
    """
    longest = run = end = 0
    for item in ranges:
        run = run + 1 if item.start == end else 1
        end = item.end
        longest = max(longest, run)
    return longest


def _status_bytes(status: str, name: str) -> int:
    """A figure of /proc/PID/status in bytes, 0 where it isn't there."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE | re.ASCII)
    return int(match[1]) * 1024 if match else 0


class Surveyor:
    """Looks at every process of this machine.

    :ivar walks: what the page tables of each process showed, by pid
    :ivar skipped: processes that could not be read
    :ivar denied: pids of processes that may not be looked at
    :ivar unmergeable: processes with much shared or hugetlb memory and nothing that is mergeable
    :param reader: tells KSM pages; None where no detection is any good, and then no pages are looked at
    :param page_budget: pages of one process that are looked at; of larger ones a random part is, and counts of
        pages by node are estimates then
    """

    def __init__(
        self,
        topology: Topology,
        frames: FrameMap,
        reader: PageReader | None,
        *,
        root: Path = Path("/"),
        page_budget: int = 1 << 18,
        chance: random.Random | None = None,
    ) -> None:
        self._reader = reader
        self._root = root
        self._walker = Walker(topology, frames, reader, root, page_budget, chance or random.Random())
        self.walks: dict[int, Walk] = {}
        self.skipped: list[Skipped] = []
        self.denied: list[int] = []
        self.unmergeable: list[Unmergeable] = []
        # Where the stack of each process begins, to tell forks of one another.
        self._stacks: dict[int, int] = {}
        self._claims = _Claims()
        self._pods = running_pods(root)
        self._containers = ContainerNames(root)
        self._own_namespaces = {kind: self._link("self", f"ns/{kind}") for kind in _NAMESPACES}

    def all(
        self,
        progress: Callable[[Progress], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        *,
        most_seconds: float = math.inf,
    ) -> tuple[Process, ...]:
        """Every process with mergeable memory, and every virtual machine, by pid.

        Processes that end meanwhile are left out. Those that can't be read are in `skipped`, and those that are not
        ours to look at in `denied`.

        :param most_seconds: those whose turn has not come by then are in `skipped` as well
        :raises Denied: of all that there are not one could be looked at
        :raises Cancelled: `stop` said so
        """
        found = []
        left_out = LeftOut()
        running = running_pids(self._root)
        until = time.monotonic() + most_seconds
        for number, pid in enumerate(running):
            if stop():
                raise Cancelled("looking at processes", f"stopped after {number} of {len(running)}")
            progress(Progress(number, len(running), "processes"))
            if time.monotonic() >= until:
                self._skip(running[number:], f"looking at the processes before it took {most_seconds:g} s")
                break
            with left_out.looking_at(pid):
                if process := self.one(pid):
                    found.append(process)
                elif other := self._unmergeable(pid):
                    self.unmergeable.append(other)
        for pid, error in left_out.errors.items():
            if isinstance(error, Denied):
                self.denied.append(pid)
            else:
                self.skipped.append(Skipped(pid, self._name(pid), error.why))
        if self.denied and not found:
            error = left_out.errors[self.denied[-1]]
            why = "this user may not look at other users' processes"
            raise Denied("looking at processes", why, hint="run as root", path=error.path, errno=error.errno)
        relatives = count_relatives(self._stacks)
        return tuple(self._claims.settled(replace(process, relatives=relatives[process.id.pid])) for process in found)

    def one(self, pid: int) -> Process | None:
        """One process; None where it has no mergeable memory and isn't a virtual machine.

        :raises NoSuchProcess, Denied, ReadError: as `ksmd_ctl.kernel.proc_pid.read_process_file`
        """
        name, fields = read_stat(pid, self._root)
        if (seen_at := memory_pid(pid, fields, self._root)) != pid:
            pid = seen_at
            name, fields = read_stat(pid, self._root)
        if int(fields[_FLAGS]) & _PF_KTHREAD:
            return None
        command = self._command(pid)
        counts = read_counts(pid, self._root)
        machine = self._is_machine(pid, command)
        if counts.mergeable is False and not machine and not counts.merging_pages:
            # Since 6.14 a kernel says so itself, and smaps need not be read to know.
            return None
        wanted = machine or counts.merge_any or counts.merging_pages
        text = read_process_file(pid, "smaps", self._root)
        if not wanted and " mg " not in text:
            return None
        ranges = parsed(pid, text, self._root)
        mergeable = [item for item in ranges if item.mergeable]
        if not (mergeable or wanted):
            return None
        verdict = classify(
            Evidence(
                ranges=ranges,
                command=command,
                descriptors=self._links(pid),
                threads=self._threads(pid) if machine else frozenset(),
                merge_any=counts.merge_any,
                pinned_bytes=self._pinned(pid),
                machine=machine,
            )
        )
        self._stacks[pid] = start_stack(fields)
        member = self._membership(pid, name, command, machine)
        walk, zeroes = Walk(), None
        if mergeable:
            zeroes = self._walker.zero_pages(pid, mergeable)
            walk = self.walks[pid] = self._walker.place(pid, mergeable, zeroes)
        remote = walk.nodes(remote=True)
        adjacent = adjacent_mappings(mergeable)
        return Process(
            id=ProcessId(pid, int(fields[START_TIME])),
            name=name,
            group=member.group,
            unit=member.unit,
            classes=verdict.classes,
            reason=verdict.reason,
            merging_pages=counts.merging_pages,
            zero_pages=counts.zero_pages,
            rmap_items=counts.rmap_items,
            profit_bytes=counts.profit_bytes,
            nodes=walk.nodes(),
            home=walk.home,
            remote_pages=sum(remote.values()) if self._reader else None,
            remote_nodes=remote,
            huge_bytes=sum(item.huge_bytes for item in mergeable) if mergeable else None,
            split_blocks=walk.split if self._reader and mergeable else None,
            walked_bytes=sum(item.end - item.start for item in mergeable if holds_pages(item)),
            resident_bytes=sum(item.anonymous_pages for item in mergeable) * PAGE_SIZE,
            swapped_bytes=sum(item.swapped_bytes for item in mergeable),
            file_bytes=sum(item.resident_pages - item.anonymous_pages for item in mergeable) * PAGE_SIZE,
            mergeable_mappings=len(mergeable),
            adjacent_mappings=adjacent,
            page_mappings=walk.page_mappings() if walk.complete and adjacent >= _MANY_ADJACENT else None,
            zero_mapped_pages=None if zeroes is None else zeroes.mapped,
            split_zero_pages=self._walker.freed_by_splits(zeroes, counts.zero_pages) if mergeable else 0,
            ksm_mapped_pages=ksm_mapped_pages(ranges),
            sharing_bytes=sharing_bytes(ranges, counts.merging_pages),
            uid=member.uid,
            cgroup=member.cgroup,
            machine=member.machine,
            namespace=member.namespace,
            resident_nodes=walk.resident_nodes(),
        )

    def belongs(self, pid: int) -> Process:
        """A process and what it belongs to, whether it has mergeable memory or not; no figures of it.

        :raises NoSuchProcess, Unparsable: as `ksmd_ctl.kernel.proc_pid.read_stat`
        """
        name, fields = read_stat(pid, self._root)
        command = self._command(pid)
        member = self._membership(pid, name, command, self._is_machine(pid, command))
        return Process(
            id=ProcessId(pid, int(fields[START_TIME])),
            name=name,
            group=member.group,
            unit=member.unit,
            classes=frozenset(),
            reason="",
            uid=member.uid,
            cgroup=member.cgroup,
            machine=member.machine,
            namespace=member.namespace,
        )

    def _unmergeable(self, pid: int) -> Unmergeable | None:
        # Of the status alone, which costs little: smaps of a large database would walk all of its shared memory.
        status = self._optional(pid, "status")
        found = never_merged(_status_bytes(status, "RssShmem"), _status_bytes(status, "HugetlbPages"))
        if found is None:
            return None
        name, fields = read_stat(pid, self._root)
        member = self._membership(pid, name, self._command(pid), machine=False)
        id = ProcessId(pid, int(fields[START_TIME]))
        return Unmergeable(id, name, member.unit, found.classes, found.reason)

    # What follows are files without which a process can still be told: one that can't be read tells nothing.
    def _optional(self, pid: int, name: str) -> str:
        try:
            return read_process_file(pid, name, self._root)
        except NoSuchProcess:
            raise
        except ReadError as error:
            if error.errno == TIMED_OUT:
                raise
            return ""

    def _skip(self, rest: Sequence[int], why: str) -> None:
        """Leave out all of these that have memory of their own."""
        for pid in rest:
            try:
                name, fields = read_stat(pid, self._root)
            except (NoSuchProcess, ReadError):
                continue
            if not int(fields[_FLAGS]) & _PF_KTHREAD:
                self.skipped.append(Skipped(pid, name, why))

    def _name(self, pid: int) -> str:
        try:
            return read_stat(pid, self._root)[0]
        except (NoSuchProcess, ReadError):
            return ""

    def _command(self, pid: int) -> list[str]:
        return command_words(self._optional(pid, "cmdline"))

    def _is_machine(self, pid: int, command: Sequence[str]) -> bool:
        if is_machine(self._link(pid, "exe")) or (command and is_machine(command[0])):
            return True
        # Whatever it is called (microvm.nix starts QEMU as microvm@NAME): it has a virtual machine of KVM's.
        return _KVM in self._links(pid, _KVM_DESCRIPTORS)

    def _membership(self, pid: int, name: str, command: Sequence[str], machine: bool) -> Membership:
        cgroup = self._optional(pid, "cgroup")
        uid = effective_uid(pid, self._root)
        contained = any(self._link(pid, f"ns/{kind}") != self._own_namespaces[kind] for kind in _NAMESPACES)
        found = membership(Origin(cgroup, command, name, uid, contained, machine), self._pods, self._containers)
        if found.unsure:
            self._claims.add(found.group, found.cgroup, found.unsure)
        return found

    def _pinned(self, pid: int) -> int:
        return _status_bytes(self._optional(pid, "status"), "VmPin")

    def _link(self, pid: int | str, name: str) -> str:
        try:
            return os.readlink(self._root / "proc" / str(pid) / name)
        except OSError:
            return ""

    def _links(self, pid: int, most: int = _MOST_DESCRIPTORS) -> frozenset[str]:
        found = set()
        folder = self._root / "proc" / str(pid) / "fd"
        try:
            for name in os.listdir(folder)[:most]:
                try:
                    found.add(os.readlink(folder / name))
                except OSError:
                    # Closed meanwhile.
                    continue
        except OSError:
            return frozenset()
        return frozenset(found)

    def _threads(self, pid: int) -> frozenset[str]:
        found = set()
        for path in (self._root / "proc" / str(pid) / "task").glob("*/comm"):
            try:
                found.add(path.read_text(errors="replace").strip())
            except OSError:
                continue
        return frozenset(found)


def unit_members(unit: str, root: Path) -> list[ProcessId]:
    """The processes of a unit, with or without mergeable memory; one that may not be looked at is in none."""
    found = []
    left_out = LeftOut()
    for pid in running_pids(root):
        with left_out.looking_at(pid):
            if unit_of(systemd_path(read_process_file(pid, "cgroup", root))) == unit:
                found.append(ProcessId(pid, int(read_stat(pid, root)[1][START_TIME])))
    return found


class _Claims:
    """Groups that pods say they are. Nothing else tells one pod's word from another's: two that claim one get none."""

    def __init__(self) -> None:
        # By group, what each of the cgroups that claim it is called otherwise.
        self._found: dict[str, dict[str, str]] = {}

    def add(self, group: str, cgroup: str, otherwise: str) -> None:
        self._found.setdefault(group, {})[cgroup] = otherwise

    def settled(self, process: Process) -> Process:
        claims = self._found.get(process.group, {})
        if len(claims) < 2 or process.cgroup not in claims:
            return process
        return replace(process, group=claims[process.cgroup], machine=False, namespace="")
