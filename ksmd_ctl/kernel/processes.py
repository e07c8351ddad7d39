# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes as KSM sees them: counts, class, group, home, and on which nodes their merged pages lie.

Sources: /proc/PID/ksm_stat (6.1, more lines since 6.4, 6.6 and 6.14), /proc/PID/ksm_merging_pages (5.19), smaps,
numa_maps, cgroup, cmdline, fd, status. Mind that up to 6.17, save in stable kernels that have it fixed, a forked
child begins with a copy of its parent's counts.
"""

from __future__ import annotations

import functools
import math
import os
import random
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ksmd_ctl.errors import Absent, Cancelled, Denied, NoSuchProcess, ReadError, Unparsable
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import HomeRange, Process, ProcessId, Range, Skipped, SplitBlocks, Topology, Unmergeable
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel.classes import Evidence, classify, never_merged
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.machines import Membership, Origin, is_machine, membership
from ksmd_ctl.kernel.pagemap import Pagemap, anonymous_nodes, frames_of, own_parts, zero_frame
from ksmd_ctl.kernel.pods import running_pods
from ksmd_ctl.kernel.proc_pid import (
    START_TIME,
    LeftOut,
    command_words,
    effective_uid,
    memory_pid,
    merging_pages_of,
    read_process_file,
    read_stat,
    running_pids,
)
from ksmd_ctl.kernel.procfs import split_pages
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import numa_ranges, parsed, range_home, read_surroundings, with_policies
from ksmd_ctl.kernel.reading import TIMED_OUT
from ksmd_ctl.kernel.split_blocks import BlockPages, could_be_huge, figures_of, sampled_zero_blocks
from ksmd_ctl.kernel.topology import FrameMap
from ksmd_ctl.kernel.zero_pages import ZeroPages, count_zero_pages, splits_free_zeroes

_PF_KTHREAD = 0x00200000
_FLAGS, _START_STACK = 9 - 3, 28 - 3
#: Pages looked at together where not all of them are: as many as a huge page has.
_SAMPLE_PAGES = 512

#: Adjacent mappings from which on it is counted how often a page is mapped: with fewer the kernel finds these at once.
_MANY_ADJACENT = 256

#: Descriptors that are looked at; a process may have a million of them.
_MOST_DESCRIPTORS = 4096
#: A monitor creates its machine among the first things that it does (virt/kvm/kvm_main.c: kvm_dev_ioctl_create_vm).
_KVM, _KVM_DESCRIPTORS = "anon_inode:kvm-vm", 256
_NAMESPACES = ("pid", "user")


@dataclass(frozen=True, slots=True)
class KsmCounts:
    """What this kernel tells of one process; None where it doesn't."""

    rmap_items: int | None = None
    zero_pages: int | None = None
    merging_pages: int | None = None
    profit_bytes: int | None = None
    merge_any: bool | None = None
    mergeable: bool | None = None


def parse_ksm_stat(text: str) -> KsmCounts:
    """The text of /proc/PID/ksm_stat; lines that are not known are left out."""
    numbers = {match[1]: int(match[2]) for match in re.finditer(r"^(\w+) (-?\d+)$", text, re.MULTILINE | re.ASCII)}
    words = {match[1]: match[2] == "yes" for match in re.finditer(r"^(\w+): (yes|no)$", text, re.MULTILINE | re.ASCII)}
    return KsmCounts(
        rmap_items=numbers.get("ksm_rmap_items"),
        zero_pages=numbers.get("ksm_zero_pages"),
        merging_pages=numbers.get("ksm_merging_pages"),
        profit_bytes=numbers.get("ksm_process_profit"),
        merge_any=words.get("ksm_merge_any"),
        mergeable=words.get("ksm_mergeable"),
    )


def read_counts(pid: int, root: Path = Path("/")) -> KsmCounts:
    """A process's counts, from whichever files this kernel has.

    :raises NoSuchProcess, Denied: it can't be looked at
    """
    try:
        counts = parse_ksm_stat(read_process_file(pid, "ksm_stat", root))
    except Absent:
        counts = KsmCounts()
    if counts.merging_pages is None:
        try:
            return replace(counts, merging_pages=merging_pages_of(pid, root))
        except (Absent, Unparsable):
            pass
    return counts


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


def holds_pages(item: Range) -> bool:
    """Whether a mapping holds any page of its own, here or in swap: one that never held any is skipped as a whole."""
    return bool(item.anonymous_pages or item.swapped_bytes)


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


def _ksm_mapped_pages(ranges: Sequence[Range]) -> int | None:
    found = [item.ksm_pages for item in ranges if item.ksm_pages is not None]
    return sum(found) if found else None


def _sharing_bytes(ranges: Sequence[Range], merging_pages: int | None) -> int | None:
    """Of each KSM page what its other mappings bear: what is resident less the proportional share.

    Other pages may be shared as well, by fork or as a file's: so at most what its KSM pages hold.

    :param merging_pages: how many there are, where smaps does not tell of each mapping (before 6.7)
    """
    total, uncounted = 0, 0
    for item in ranges:
        if not (item.mergeable or item.ksm_pages) or item.ksm_pages == 0:
            continue
        if item.pss_bytes is None:
            return None
        shared = max(0, item.resident_pages * PAGE_SIZE - item.pss_bytes)
        if item.ksm_pages is None:
            uncounted += shared
        else:
            total += min(shared, item.ksm_pages * PAGE_SIZE)
    if uncounted and merging_pages is None:
        return None
    return total + min(uncounted, (merging_pages or 0) * PAGE_SIZE)


def _uses_zero_pages(root: Path) -> bool:
    with closing(KsmFs(root)) as ksm:
        try:
            return ksm.read(Knob.USE_ZERO_PAGES) == 1
        except ReadError:
            return False


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
        self._topology = topology
        self._frames = frames
        self._reader = reader
        self._root = root
        self._budget = page_budget
        self._chance = chance or random.Random()
        self._zeroes = _uses_zero_pages(root)
        self._split_pages = split_pages(root)
        self.walks: dict[int, Walk] = {}
        self.skipped: list[Skipped] = []
        self.denied: list[int] = []
        self.unmergeable: list[Unmergeable] = []
        # Where the stack of each process begins, to tell forks of one another.
        self._stacks: dict[int, int] = {}
        self._claims = _Claims()
        self._pods = running_pods(root)
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
            zeroes = self._zero_pages(pid, mergeable)
            walk = self.walks[pid] = self._place(pid, mergeable, zeroes)
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
            split_zero_pages=self._freed_by_splits(zeroes, counts) if mergeable else 0,
            ksm_mapped_pages=_ksm_mapped_pages(ranges),
            sharing_bytes=_sharing_bytes(ranges, counts.merging_pages),
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
        found = membership(Origin(cgroup, command, name, uid, contained, machine), self._pods)
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

    # -- where its pages are ---------------------------------------------------------------------------------

    def _place(self, pid: int, mergeable: Sequence[Range], zeroes: ZeroPages | None) -> Walk:
        around = read_surroundings(pid, self._topology, self._root)
        with_memory = self._topology.with_memory()
        # With one node all that numa_maps could tell is known, and reading it walks all page tables.
        numa = numa_ranges(pid, self._root) if len(with_memory) != 1 else {}
        ranges = with_policies(mergeable, numa)
        walk = self._walk(pid, ranges, self._saving_zeroes(zeroes))
        homes = []
        for item in ranges:
            if not item.anonymous_pages:
                continue
            there = walk.merged.get(item.start, {})
            if len(with_memory) == 1:
                pages: Mapping[int, int] = {with_memory[0].number: item.anonymous_pages}
            else:
                pages = anonymous_nodes(pid, item, numa.get(item.start), self._frames, self._root)
            unmerged = {node: count - there.get(node, 0) for node, count in pages.items()}
            if self._reader is None and 2 * (item.ksm_pages or 0) >= item.anonymous_pages:
                # Where most are merged, where they lie says nothing.
                unmerged = {}
            merged = sum(there.values()) if item.start in walk.merged else item.ksm_pages or 0
            homes.append(HomeRange(item.start, item.end, range_home(item, unmerged, around), dict(pages), merged))
        return replace(walk, homes=homes)

    def _zero_pages(self, pid: int, mergeable: Sequence[Range]) -> ZeroPages | None:
        try:
            with Pagemap(pid, self._root) as pagemap:
                return count_zero_pages(pagemap, mergeable, self._budget if self._zeroes else 0)
        except (Denied, Absent):
            return None

    def _freed_by_splits(self, zeroes: ZeroPages | None, counts: KsmCounts) -> int | None:
        # Most hosts without huge pages, and kernels that do not free what is split, need no count to know.
        if self._split_pages == 0 or (zeroes is not None and zeroes.mapped == zeroes.unsplit):
            return 0
        if self._splits_free is False:
            return 0
        if zeroes is None or self._splits_free is None or (self._zeroes and counts.zero_pages is None):
            return None
        freed = zeroes.freed_by_splits(counts.zero_pages)
        return freed if self._split_pages is None else min(freed, self._split_pages)

    @functools.cached_property
    def _splits_free(self) -> bool | None:
        return splits_free_zeroes()

    def _saving_zeroes(self, zeroes: ZeroPages | None) -> Mapping[int, int]:
        """Zero pages of each mapping, by its start, where they were frames before: not what was only read."""
        if zeroes is None or zeroes.mapped == zeroes.unsplit:
            return {}
        saving = self._zeroes or (self._split_pages != 0 and self._splits_free is True)
        return zeroes.by_range if saving else {}

    def _walk(self, pid: int, ranges: Sequence[Range], zeroes: Mapping[int, int]) -> Walk:
        """Merged pages by node for each range, and blocks that can't be huge pages for them.

        :param zeroes: zero pages of each range that has any, by its start
        """
        if self._reader is None:
            return Walk()
        holding = [item for item in ranges if item.anonymous_pages and item.ksm_pages != 0]
        only_zeroes = zeroes.keys() - {item.start for item in holding}
        others = [item for item in ranges if item.start in only_zeroes and could_be_huge(item)]
        if not holding and not others:
            return Walk(complete=True)
        with Pagemap(pid, self._root) as pagemap:
            split = sampled_zero_blocks(pagemap, others, zero_frame(), self._budget, self._chance)
            parts = {item.start: own_parts(pagemap, item) for item in holding}
            pages = sum(end - start for found in parts.values() for start, end in found) // PAGE_SIZE
            if pages > self._budget:
                walk = self._some_pages(self._reader, pagemap, holding, parts, zeroes)
                return replace(walk, split=walk.split.plus(split))
        walk = self._all_pages(self._reader, pid, holding, zeroes)
        return replace(walk, split=walk.split.plus(split))

    def _all_pages(self, reader: PageReader, pid: int, ranges: Sequence[Range], zeroes: Mapping[int, int]) -> Walk:
        found: dict[int, Mapping[int, int]] = {item.start: {} for item in ranges}
        blocks = BlockPages(zero_frame())
        mapped = array("Q")
        read_only = calls = 0
        only = next(iter(self._frames.nodes())) if len(self._frames.nodes()) == 1 else None
        # All at once: with detection by pagemap each call reads all of smaps.
        for window in reader.windows(pid, ranges):
            item = window.mapping
            blocks.add(window, zeroes.get(item.start, 0))
            merged = window.merged()
            if not merged:
                continue
            if "wr" in item.flags:
                calls += window.runs()
            else:
                read_only += len(merged)
            frames = [window.frames[index] for index in merged]
            mapped.extend(frames)
            nodes = Counter(found[item.start])
            if only is not None:
                nodes[only] += len(frames)
            else:
                nodes.update(node for frame in frames if (node := self._frames.node(frame)) is not None)
            found[item.start] = nodes
        return Walk(found, blocks.figures(), mapped, complete=True, read_only=read_only, calls=calls)

    def _some_pages(
        self,
        reader: PageReader,
        pagemap: Pagemap,
        ranges: Sequence[Range],
        parts: Mapping[int, Sequence[tuple[int, int]]],
        zeroes: Mapping[int, int],
    ) -> Walk:
        found: dict[int, Mapping[int, int]] = {}
        split = SplitBlocks()
        size = _SAMPLE_PAGES * PAGE_SIZE
        anonymous = sum(item.anonymous_pages for item in ranges)
        for item in ranges:
            places = sorted(
                {place for start, end in parts[item.start] for place in range(start - start % size, end, size)}
            )
            # By what it holds, not by its length: one with many holes must not take the others' share.
            share = round(self._budget * item.anonymous_pages / anonymous / _SAMPLE_PAGES)
            chosen = self._chance.sample(places, min(len(places), max(8, share)))
            counts: Counter[int] = Counter()
            blocks = []
            for place in chosen:
                start, end = max(place, item.start), min(place + size, item.end)
                frames = frames_of(pagemap.read_frames(start, (end - start) // PAGE_SIZE))
                merged = reader.likely(frames)
                counts.update(node for frame in merged if (node := self._frames.node(frame)) is not None)
                if end - start == size:
                    blocks.append(len(merged) + (frames.count(zero_frame()) if item.start in zeroes else 0))
            scale = len(places) / len(chosen)
            if could_be_huge(item):
                split = split.plus(figures_of(blocks, scale))
            if item.ksm_pages is not None and counts.total():
                # How many there are is known: only their shares are estimated.
                scale = item.ksm_pages / counts.total()
            found[item.start] = {node: round(count * scale) for node, count in counts.items()}
        return Walk(found, split)


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


@dataclass(frozen=True, slots=True)
class Walk:
    """What the page tables of one process showed.

    :ivar merged: merged pages by node of each range, by its start; estimates where it is not `complete`
    :ivar split: blocks that could be huge pages and hold merged or freed pages
    :ivar frames: the frame of each merged page; of none where it is not `complete`
    :ivar complete: each page was looked at
    :ivar homes: each range that holds pages, with its home
    :ivar read_only: merged pages in mappings that are not writable
    :ivar calls: runs of merged pages in others, as un-merging takes each with one call
    """

    merged: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    split: SplitBlocks = field(default_factory=SplitBlocks)
    frames: array[int] = field(default_factory=lambda: array("Q"))
    complete: bool = False
    homes: Sequence[HomeRange] = ()
    read_only: int = 0
    calls: int = 0

    @property
    def home(self) -> int | None:
        """The home of all ranges; None where they have not one."""
        homes = {item.home for item in self.homes}
        return homes.pop() if len(homes) == 1 else None

    def resident_nodes(self) -> dict[int, int]:
        """Pages of all ranges by node."""
        found: Counter[int] = Counter()
        for item in self.homes:
            found.update(item.nodes)
        return dict(sorted(found.items()))

    def page_mappings(self) -> int:
        """How often the page is mapped that is mapped most often, where each was looked at."""
        return max(Counter(self.frames).values(), default=0)

    def nodes(self, *, remote: bool = False) -> dict[int, int]:
        """Merged pages by node; `remote`: those that are not on their range's home."""
        homes = {item.start: item.home for item in self.homes}
        found: Counter[int] = Counter()
        for start, there in self.merged.items():
            for node, pages in there.items():
                if not remote or (pages and homes.get(start) not in (None, node)):
                    found[node] += pages
        return dict(sorted(found.items()))
