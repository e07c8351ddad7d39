# SPDX-License-Identifier: GPL-2.0-or-later
"""The running kernel as a lab: real processes, real calls, and ksmd stepped by single batches.

It tears the host's KSM down by design. What it found is written down first (`ksmd_ctl.scenario.lab_restore`); its
processes end with it, however it ends. Processes are forked off one that has no map of its own, for starting an
interpreter takes long where scenarios take milliseconds.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ksmd_ctl.engine.memory import HUGE_SIZE
from ksmd_ctl.errors import Absent, HostError, NoSuchProcess, ReadError, Refused
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import KsmDetection, PageState, ProcessId, Range, Topology
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.kernel import libnuma, syscalls
from ksmd_ctl.kernel.detection import PageReader, State, Window, choose, probe
from ksmd_ctl.kernel.kpageflags import FrameFlags
from ksmd_ctl.kernel.ksmd import Ksmd
from ksmd_ctl.kernel.libnuma import PageMover, Policy, PolicyMode
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, read_file
from ksmd_ctl.kernel.topology import memory_blocks, read_topology
from ksmd_ctl.kernel.writers import WriterFinder
from ksmd_ctl.privileged.client import OwnBroker
from ksmd_ctl.privileged.host import KernelHost
from ksmd_ctl.scenario import lab_restore, regions
from ksmd_ctl.scenario.cpusets import Cpusets
from ksmd_ctl.scenario.lab_restore import find_users
from ksmd_ctl.scenario.regions import RegionProcess

_MEMORY = Path("/sys/devices/system/memory")
_OFFLINE_SECONDS = 30.0


def open_kernel_lab(*, take_over: bool = False, directory: Path = lab_restore.DIRECTORY) -> KernelLab:
    """This machine's KSM, to be taken by `KernelLab.take`, or by ``with``.

    What a run that was cut short left behind is put back first.

    :param take_over: also where a program runs that is known to write the knobs
    :raises Refused: somebody else uses KSM here, and nothing was changed
    :raises Absent: this kernel has no KSM, or doesn't show what it takes
    :raises Denied: this needs root
    """
    lab_restore.repair(directory=directory)
    what = "taking this machine's KSM"
    writers = finish(WriterFinder().find())
    if writers and not take_over:
        shown = ", ".join(f"{writer.name} ({writer.pid})" for writer in writers)
        raise Refused(what, f"it is managed by {shown}", hint="stop that first; --take-over goes on all the same")
    users = find_users()
    if users:
        # Their pages can't be kept out of the trees and the counters, so nothing helps.
        shown = ", ".join(f"{user.name} ({user.pid})" for user in users[:5])
        raise Refused(
            what,
            f"others have mergeable memory: {shown}{' and more' if len(users) > 5 else ''}",
            hint="end them, or run it in a virtual machine of its own (without KVM it is slower, and as good)",
        )
    return KernelLab(directory)


class KernelLab(KernelHost):
    """`ksmd_ctl.host.interface.Lab` on the running kernel, from `take` until `close`. Not for several threads."""

    def __init__(self, directory: Path = lab_restore.DIRECTORY) -> None:
        root = Path("/")
        super().__init__(root, OwnBroker(root))
        self._before = lab_restore.Before.look(self._ksm)
        self._topology = read_topology(root, numa=libnuma.available())
        first = min(self._topology.with_memory(), key=lambda node: node.number)
        self._first = first.number
        self._pages = LabPages()
        self._mover = PageMover()
        self._processes: dict[ProcessId, RegionProcess] = {}
        # Which maps are mergeable, to know whether an mm stays registered: (process, first address).
        self._registered: dict[ProcessId, set[tuple[int, int]]] = {}
        # Whether the lists of pages to be added to the LRU are empty.
        self._drained = False
        self._own_page = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._own_page[0] = 1
        self._unreadable = syscalls.mmap(0, PAGE_SIZE, syscalls.PROT_NONE, syscalls.MAP_PRIVATE)
        self._policy = libnuma.get_mempolicy()
        self._recovery = lab_restore.Recovery(directory=directory)
        # By the nodes that processes are confined to, to none at first.
        self._templates: dict[frozenset[int], RegionProcess] = {}
        self._templates[frozenset()] = regions.spawn("ksmd-ctl lab", prefer=self._first)
        self._cpusets = Cpusets(root)
        self._cpus = first.cpus
        self._ksmd: Ksmd | None = None
        self._taken = False

    def take(self) -> None:
        """Change what has to be changed; from its beginning on, `close` puts it back.

        :raises Denied: no permission to write the knobs
        """
        self._taken = True
        self._recovery.begin(self._before)
        # Copies of pages without a policy of their own are made by the task that breaks them: by run=2, by us.
        self._prefer(self._first)
        if self._cpus:
            # ksmd breaks pages, too, where a merge fails half way; its copies come from where it runs.
            os.sched_setaffinity(self._before.ksmd, self._cpus)
        self._ksmd = Ksmd(self._ksm, self._before.ksmd)

    def _prefer(self, node: int) -> None:
        libnuma.set_mempolicy(Policy(PolicyMode.PREFERRED, frozenset({node})))

    def topology(self) -> Topology:
        """The nodes that were online when the lab was opened."""
        return self._topology

    @property
    def detection(self) -> KsmDetection:
        """What tells KSM pages from others here."""
        return self._pages.detection

    def ksm_stat_names(self) -> set[str]:
        """The names of the lines in /proc/PID/ksm_stat; none where the kernel has no such file."""
        try:
            text = read_file(Path("/proc/self/ksm_stat")).decode()
        except ReadError:
            return set()
        return {line.split()[0].rstrip(":") for line in text.splitlines() if line.strip()}

    def sample(self, *, fresh: bool = False) -> Sample:
        """Only what a scenario looks at: KSM's files and vmstat."""
        readings: dict[str, Reading] = {}
        self._ksm.sample(readings)
        self._files.sample(readings)
        return Sample(self.clock(), readings)

    # -- processes -----------------------------------------------------------------------------------------

    def _process(self, process: ProcessId) -> RegionProcess:
        try:
            return self._processes[process]
        except KeyError:
            raise NoSuchProcess(f"process {process.pid}", "the lab has none like that, or has ended it") from None

    # A process of which something is about to change.
    def _changed(self, process: ProcessId) -> RegionProcess:
        self._note_change()
        return self._process(process)

    def _new(self, process: RegionProcess) -> ProcessId:
        self._note_change()
        self._processes[process.id] = process
        self._registered[process.id] = set()
        return process.id

    def spawn(self, name: str, nodes: frozenset[int] = frozenset()) -> ProcessId:
        return self._new(self._template(nodes).fork())

    # What is forked is born in the cpuset, so that none of its memory has to be moved there.
    def _template(self, nodes: frozenset[int]) -> RegionProcess:
        if nodes not in self._templates:
            process = self._templates[nodes] = self._templates[frozenset()].fork()
            self._cpusets.confine(process.id.pid, nodes)
            process.bind(min(nodes))
        return self._templates[nodes]

    def lacks_cpusets(self) -> str:
        return self._cpusets.lacks()

    def fork(self, process: ProcessId, name: str) -> ProcessId:
        child = self._new(self._process(process).fork())
        self._registered[child] = set(self._registered[process])
        return child

    def exit(self, process: ProcessId) -> None:
        self._changed(process).exit()
        del self._processes[process], self._registered[process]

    def exec(self, process: ProcessId) -> None:
        self._changed(process).exec()
        self._registered[process].clear()

    def map(self, process: ProcessId, pages: int, node: int | None) -> int:
        return self._process(process).map(pages, node)

    def advise(self, process: ProcessId, start: int, pages: int, *, mergeable: bool) -> None:
        self._changed(process).advise(start, pages, mergeable=mergeable)
        # Only whole ranges count as registered for sure.
        if mergeable:
            self._registered[process].add((start, pages))
        else:
            self._registered[process].clear()

    def store(self, process: ProcessId, start: int, contents: Sequence[bytes | None]) -> None:
        # A page that nobody shares any more is written to in place, unless some CPU's list has a reference to it.
        self._drain()
        self._changed(process).store(start, contents)

    def read_pages(self, process: ProcessId, start: int, pages: int) -> None:
        self._changed(process).read(start, pages)

    def swap_out(self, process: ProcessId, start: int, pages: int) -> None:
        # The kernel finds pages on the LRU only.
        self._drain()
        self._changed(process).swap_out(start, pages)

    def lacks_swap(self) -> str:
        devices = [line.split()[0] for line in read_file(Path("/proc/swaps")).decode().splitlines()[1:]]
        # Elsewhere, writing a page out takes its time, and it is still there until somebody reclaims it.
        if not devices or not all(device.startswith("/dev/zram") for device in devices):
            return "needs swap, on zram alone"
        if int(read_file(Path("/proc/sys/vm/page-cluster"))):
            return "needs vm.page-cluster = 0: no page is read back that nobody asked for"
        return ""

    def collapse(self, process: ProcessId, start: int, pages: int) -> tuple[bool, ...]:
        self._drain()
        return self._changed(process).collapse(start, pages)

    def lacks_huge_pages(self) -> str:
        size = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
        if not size.exists() or int(read_file(size)) != HUGE_SIZE:
            return f"this kernel has no huge pages of {HUGE_SIZE >> 10} kB"
        if not regions.can_collapse():
            return "this kernel has no MADV_COLLAPSE (it came with 6.1)"
        return ""

    def discard(self, process: ProcessId, start: int, pages: int) -> None:
        self._changed(process).discard(start, pages)

    def unmap(self, process: ProcessId, start: int, pages: int) -> None:
        self._changed(process).unmap(start, pages)
        self._registered[process].clear()

    def mremap(self, process: ProcessId, start: int, pages: int) -> int:
        return self._changed(process).mremap(start, pages)

    def protect(self, process: ProcessId, start: int, pages: int, *, writable: bool) -> None:
        self._changed(process).protect(start, pages, writable=writable)

    def merge(self, process: ProcessId, *, on: bool) -> None:
        self._changed(process).merge(on)
        self._registered[process].clear()

    # -- KSM -----------------------------------------------------------------------------------------------

    def set(self, knob: Knob, value: KnobValue) -> None:
        self._note_change()
        self._ksm.store(knob, value)

    def batch(self, pages: int) -> None:
        assert self._ksmd is not None
        self._drain()
        self._note_change()
        self._ksmd.batch(pages, registered=any(self._registered.values()))

    def _note_change(self) -> None:
        # Something is about to change.
        self._pages.forget()
        self._drained = False

    def _drain(self) -> None:
        # Pages on a CPU's list of pages to be added to the LRU have a reference too many to be merged. A scan
        # empties these lists when it starts, but not in its middle; move_pages does so before it looks at any
        # page (mm/migrate.c: migrate_prep, lru_cache_disable).
        if not self._drained:
            self._mover.move(os.getpid(), [syscalls.address_of(self._own_page)], self._first, shared=False)
            self._drained = True

    def removable_nodes(self) -> frozenset[int]:
        # With more than one other the kernel chooses where pages go; the first one has what does not move.
        nodes = sorted(node.number for node in self._topology.with_memory())
        return frozenset(node for node in nodes[1:] if len(nodes) == 2 and self._movable_blocks(node))

    def offline(self, node: int) -> bool:
        self._drain()
        self._note_change()
        blocks = self._movable_blocks(node)
        try:
            went = [_take_offline(block / "state") for block in blocks]
            return all(went)
        finally:
            for block in blocks:
                if read_file(block / "state") == b"offline\n":
                    (block / "state").write_text("online_movable")

    # Pages of processes lie in movable memory as long as there is some.
    def _movable_blocks(self, node: int) -> list[Path]:
        found = [_MEMORY / f"memory{block.number}" for block in memory_blocks() if block.nodes == {node}]
        try:
            return [path for path in found if read_file(path / "valid_zones") == b"Movable\n"]
        except Absent:
            return []  # a kernel without CONFIG_MEMORY_HOTREMOVE

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    # -- pages ---------------------------------------------------------------------------------------------

    def move_pages(self, process: ProcessId, addresses: Sequence[int], node: int, *, shared: bool) -> tuple[int, ...]:
        return tuple(self._mover.move(self._changed(process).id.pid, addresses, node, shared=shared))

    def break_sharing(self, process: ProcessId, start: int, pages: int, *, node: int | None) -> None:
        found = self.pages(process, start, pages)
        self._note_change()
        try:
            if node is not None:
                self._prefer(node)
            for page, state in enumerate(found):
                if state.ksm:
                    self._break(process.pid, start + page * PAGE_SIZE)
        finally:
            self._prefer(self._first)

    def _break(self, pid: int, address: int) -> None:
        # The kernel takes the target's page for writing, which breaks its sharing, and then fails to read what
        # should be written there (findings F7).
        try:
            syscalls.process_vm_writev(pid, self._unreadable, address, PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise HostError(f"un-merging {address:#x} of process {pid}", str(error), errno=error.errno) from error

    def pages(self, process: ProcessId, start: int, pages: int, *, ksm: bool = True) -> tuple[PageState, ...]:
        look = self._pages.look if ksm else self._pages.places
        return look(self._process(process), start, pages)

    def load(self, process: ProcessId, start: int, pages: int) -> tuple[bytes, ...]:
        return self._process(process).load(start, pages)

    def close(self) -> None:
        """End every process that the lab spawned and put the knobs back."""
        try:
            for process in list(self._processes):
                self.exit(process)
            for template in self._templates.values():
                template.exit()
            self._cpusets.close()
        finally:
            if self._ksmd is not None:
                self._ksmd.close()
            if self._taken:
                self._before.restore(self._ksm)
                self._recovery.end()
                libnuma.set_mempolicy(self._policy)
        syscalls.munmap(self._unreadable, PAGE_SIZE)
        self._own_page.close()
        self._pages.close()
        super().close()

    def __enter__(self) -> KernelLab:
        try:
            self.take()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _take_offline(state: Path) -> bool:
    # The kernel tries on and on, until it is done or the writer is killed.
    words = ["sh", "-c", f"echo offline >{state}"]
    try:
        return subprocess.run(words, stderr=subprocess.DEVNULL, timeout=_OFFLINE_SECONDS, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


# -- pages at the lab's addresses ----------------------------------------------------------------------------

# Test regions lie below this, libraries and stack above (ksmd_ctl.scenario.region_child).
_END = 1 << 38


class LabPages:
    """Looks at pages of the lab's processes: frames, nodes, and which are KSM pages.

    Between two things that the lab does, nothing changes: what detection by pagemap needs of a process is read once.

    :raises Absent, Denied: this kernel doesn't show frames, or these processes may not see them
    """

    def __init__(self) -> None:
        self.detection = choose(probe())
        self._flags = FrameFlags()
        self._mover = PageMover()
        self._reader: PageReader | None = None
        self._ranges: dict[ProcessId, list[Range]] = {}

    def close(self) -> None:
        """Give the descriptors back."""
        self._flags.close()

    def forget(self) -> None:
        """Something may have changed."""
        self._reader = None
        self._ranges.clear()

    def look(self, process: RegionProcess, start: int, pages: int) -> tuple[PageState, ...]:
        """What is mapped at adjacent pages of a process."""
        if self._reader is None:
            self._reader = PageReader(self.detection, flags=self._flags, still=True)
        windows = self._windows(self._reader, process.id, start, pages)
        frames = [frame for window in windows for frame in window.frames]
        ksm = [state == State.KSM for window in windows for state in window.states]
        if any(State.UNDECIDED in window.states for window in windows):
            ksm = self._counted_alone(process, start, pages)
        return self._states(process.id, start, frames, ksm)

    def places(self, process: RegionProcess, start: int, pages: int) -> tuple[PageState, ...]:
        """As `look`, but for which of them are KSM pages."""
        with Pagemap(process.id.pid) as pagemap:
            return self._states(process.id, start, frames_of(pagemap.read_frames(start, pages)), [False] * pages)

    def _states(
        self, process: ProcessId, start: int, frames: Sequence[int], ksm: Sequence[bool]
    ) -> tuple[PageState, ...]:
        nodes = self._nodes(process, start, frames)
        return tuple(
            PageState(frame, node, merged) if frame else PageState(None, None, False)
            for frame, node, merged in zip(frames, nodes, ksm, strict=True)
        )

    def _counted_alone(self, process: RegionProcess, start: int, pages: int) -> list[bool]:
        # What no look from outside decides, the process itself can: a mapping of one page has a count of its own.
        process.split(start, pages, on=True)
        try:
            counts = {found.start: found.ksm_pages for found in _own_ranges(process.id.pid)}
        finally:
            process.split(start, pages, on=False)
        return [bool(counts[start + page * PAGE_SIZE]) for page in range(pages)]

    def _windows(self, reader: PageReader, process: ProcessId, start: int, pages: int) -> Sequence[Window]:
        end = start + pages * PAGE_SIZE
        if self.detection is KsmDetection.KPAGEFLAGS:
            # Bit 21 needs no count of the mapping: any range will do.
            return list(reader.windows(process.pid, [Range(start, end, frozenset())]))
        return list(reader.windows(process.pid, self._mergeable(process), [(start, end)]))

    def _mergeable(self, process: ProcessId) -> list[Range]:
        if process not in self._ranges:
            self._ranges[process] = _own_ranges(process.pid)
        return self._ranges[process]

    def _nodes(self, process: ProcessId, start: int, frames: Sequence[int]) -> list[int | None]:
        there = [index for index, frame in enumerate(frames) if frame]
        found: list[int | None] = [None] * len(frames)
        if there:
            statuses = self._mover.query(process.pid, [start + index * PAGE_SIZE for index in there])
            for index, status in zip(there, statuses, strict=True):
                # The zero page has no node: -EFAULT.
                found[index] = status if status >= 0 else None
        return found


_RANGE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")
_KSM = re.compile(rb"\nKSM: +(\d+) kB")


def _own_ranges(pid: int) -> list[Range]:
    # Where every look costs a smaps, as with detection by pagemap, parsing all of an interpreter's hundred mappings
    # is most of a scenario's time.
    found: list[Range] = []
    for number, part in enumerate(read_file(Path(f"/proc/{pid}/smaps")).split(b"\nVmFlags:")[:-1]):
        # What is before the head of a mapping are the flags of the one before it.
        at = part.find(b"\n") + 1 if number else 0
        head = _RANGE.match(part, at)
        assert head is not None
        start, end = int(head[1], 16), int(head[2], 16)
        if start >= _END:
            break
        count = _KSM.search(part, at)
        found.append(Range(start, end, frozenset({"mg"}), ksm_pages=int(count[1]) * 1024 // PAGE_SIZE if count else 0))
    return found
