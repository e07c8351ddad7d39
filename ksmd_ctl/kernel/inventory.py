# SPDX-License-Identifier: GPL-2.0-or-later
"""What un-merging takes: everything that is mergeable, whose it is, where it belongs, and what would be over its limit.

Every merged page that a process maps becomes a page of its own then, on the process's home at best, and charged to
its memory cgroup. The frames that the merged pages had come free. A merged page is charged to one cgroup only, whoever
had it first (findings F10): where all who map it are in one cgroup, and it is charged there, the first copy of it costs
that cgroup nothing. /proc/kpagecount and /proc/kpagecgroup tell. What could not be seen page by page is an upper bound.

A transaction has to look before it un-merges anything, for afterwards nobody can tell where a page belonged.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ksmd_ctl.errors import Denied, NoSuchProcess, ReadError
from ksmd_ctl.host.memory import (
    HomeRange,
    Inventory,
    Process,
    ProcessMemory,
    Skipped,
    Topology,
    UnmergeDemand,
)
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel import libnuma, sparse_walk
from ksmd_ctl.kernel.census import take as take_census
from ksmd_ctl.kernel.detection import reader_or_none
from ksmd_ctl.kernel.headroom import CgroupLimit, cgroup_limits, host_available_bytes, node_available_bytes
from ksmd_ctl.kernel.kpageflags import FrameCgroups, FrameCounts
from ksmd_ctl.kernel.proc_pid import merging_pages_of
from ksmd_ctl.kernel.process_pages import Walk
from ksmd_ctl.kernel.processes import Surveyor
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.topology import FrameMap, read_frame_map, read_topology

# Pages of one process that are looked at one by one, 4 GiB; of larger ones a random part.
_PAGE_BUDGET = 1 << 20
_CENSUS_CPU_SECONDS = 1.0
# Of one process: a few dozen such processes fit into an answer.
_MOST_RANGES = 4096
# With less address space it does not matter whether the kernel walks it: 15 ms at most.
_ASK_BYTES = 1 << 30
# Of the time that the request has (`ksmd_ctl.privileged.host`), half: what was not read by then is named.
_LOOK_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class ProcessDemand:
    """Pages that un-merging one process takes on one node.

    :ivar home: None where they may go to any node
    :ivar exact: each of its pages was looked at; else there are at most so many
    """

    pid: int
    home: int | None
    pages: int
    exact: bool = False


def take(
    floor_bytes: int,
    *,
    root: Path = Path("/"),
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    most_seconds: float = _LOOK_SECONDS,
) -> Inventory:
    """Look at every process with mergeable memory; those that end meanwhile are left out.

    :param floor_bytes: what has to stay free on the host and on every node
    :param most_seconds: processes whose turn has not come by then are only named
    :raises Denied: of all that there are not one could be looked at
    :raises Cancelled: `stop` said so
    """
    topology = read_topology(root, numa=libnuma.available())
    frames = read_frame_map(root)
    # Where it can't be seen which pages are merged, the processes still say how many.
    with reader_or_none(root) as reader:
        surveyor = Surveyor(topology, frames, reader, root=root, page_budget=_PAGE_BUDGET)
        processes = surveyor.all(progress, stop, most_seconds=most_seconds)
        freed = None if reader is None else freed_pages(surveyor.walks.values(), frames)
        if reader is not None and freed is None:
            freed = Counter(take_census(_CENSUS_CPU_SECONDS, reader=reader, frames=frames, root=root).pages)
        found = inventory_of(processes, surveyor, topology, freed, floor_bytes, root)
    if found.mapped_bytes < _ASK_BYTES:
        return found
    return replace(found, sparse_seconds_per_gib=sparse_walk.seconds_per_gib())


def inventory_of(
    processes: Sequence[Process],
    surveyor: Surveyor,
    topology: Topology,
    freed: Mapping[int, int] | None,
    floor_bytes: int,
    root: Path,
) -> Inventory:
    """The inventory of processes that a surveyor has found.

    :param freed: merged frames by node; None where nobody can tell
    """
    walks, skipped = surveyor.walks, surveyor.skipped
    limits = limits_above([one.id.pid for one in processes] + [one.pid for one in skipped], root)
    memories = []
    for process in processes:
        walk = walks.get(process.id.pid, Walk())
        above = tuple(limit.path for limit in limits.get(process.id.pid, ()))
        memories.append(
            ProcessMemory(
                *(process.id, process.name, process.unit, process.classes),
                *(_merged_pages(process, walk), joined(walk.homes), above),
                read_only_pages=walk.read_only,
                calls=walk.calls,
            )
        )
    demands = survey_demands(processes, skipped, walks, topology, freed, root, floor_bytes, limits)
    return Inventory(topology, tuple(memories), demands, tuple(skipped), tuple(surveyor.denied))


def survey_demands(
    processes: Sequence[Process],
    skipped: Sequence[Skipped],
    walks: Mapping[int, Walk],
    topology: Topology,
    freed: Mapping[int, int] | None,
    root: Path = Path("/"),
    floor_bytes: int = 0,
    limits: Mapping[int, Sequence[CgroupLimit]] | None = None,
) -> tuple[UnmergeDemand, ...]:
    """What un-merging everything takes, of processes that a surveyor has found: `unmerge_demands`."""
    if limits is None:
        limits = limits_above([one.id.pid for one in processes] + [one.pid for one in skipped], root)
    found = _unread(skipped, root)
    for process in processes:
        found += _by_home(process, walks.get(process.id.pid, Walk()))
    return unmerge_demands(found, topology, limits, freed, charged_pages(walks, limits, root), floor_bytes, root)


def _merged_pages(process: Process, walk: Walk) -> int:
    if walk.complete or process.merging_pages is None:
        return sum(item.merged_pages for item in walk.homes)
    return process.merging_pages


def _unread(skipped: Iterable[Skipped], root: Path) -> list[ProcessDemand]:
    # By their count of merged pages, for which no lock is needed. Where the pages belong can't be told.
    found = []
    for one in skipped:
        try:
            pages = merging_pages_of(one.pid, root)
        except (NoSuchProcess, ReadError, Denied):
            continue
        if pages:
            found.append(ProcessDemand(one.pid, None, pages))
    return found


def _by_home(process: Process, walk: Walk) -> Iterator[ProcessDemand]:
    """What a process takes at each home that its ranges have, so that each node is told only what will come to it."""
    merged = _merged_pages(process, walk)
    homes: Counter[int | None] = Counter()
    for item in walk.homes:
        homes[item.home] += item.merged_pages
    if homes.total() < merged:
        # Counts that don't go together, or none by range: the rest may come to any node.
        homes[process.home] += merged - homes.total()
    # Zero pages un-merge too: they take memory for the first time then.
    homes[process.home] += max(0, process.zero_pages or 0)
    for home, pages in homes.items():
        if pages:
            yield ProcessDemand(process.id.pid, home, pages, walk.complete)


def joined(ranges: Sequence[HomeRange]) -> tuple[HomeRange, ...]:
    """Ranges with one home that touch each other as one: a process may have 65,530 mappings, a message no such length.

    Where that leaves too many, those with a gap between them are joined as well, and then all of them.
    """
    found = _joined(ranges, lambda one, other: one.end == other.start and one.home == other.home)
    if len(found) > _MOST_RANGES:
        found = _joined(found, lambda one, other: one.home == other.home)
    if len(found) > _MOST_RANGES:
        found = _joined([replace(item, home=None) for item in found], lambda *_: True)
    return tuple(found)


def _joined(ranges: Sequence[HomeRange], fit: Callable[[HomeRange, HomeRange], bool]) -> list[HomeRange]:
    found: list[HomeRange] = []
    for item in ranges:
        if found and fit(found[-1], item):
            last = found[-1]
            nodes = {
                node: last.nodes.get(node, 0) + item.nodes.get(node, 0) for node in sorted({*last.nodes, *item.nodes})
            }
            merged = last.merged_pages + item.merged_pages
            found[-1] = HomeRange(last.start, item.end, last.home, nodes, merged)
        else:
            found.append(item)
    return found


def limits_above(pids: Iterable[int], root: Path = Path("/")) -> dict[int, tuple[CgroupLimit, ...]]:
    """The memory cgroups with a limit above each process, innermost first; without processes that are gone.

    :raises Denied, ReadError: it can't be told for one that is there
    """
    found = {}
    for pid in pids:
        try:
            found[pid] = cgroup_limits(pid, root)
        except NoSuchProcess:
            # It ended, and what it had is free.
            continue
    return found


def freed_pages(walks: Iterable[Walk], frames: FrameMap) -> Counter[int] | None:
    """How many merged frames there are on each node; None where not all pages were looked at."""
    distinct: set[int] = set()
    for walk in walks:
        if not walk.complete:
            return None
        distinct.update(walk.frames)
    found: Counter[int] = Counter()
    for span in frames.spans:
        found[span.node] += 0
    for frame in distinct:
        node = frames.node(frame)
        if node is not None:
            found[node] += 1
    return found


def charged_pages(
    walks: Mapping[int, Walk], limits: Mapping[int, Sequence[CgroupLimit]], root: Path = Path("/")
) -> dict[str, int]:
    """For each limited memory cgroup: merged frames that are charged there and that nobody outside of it maps.

    Empty where this kernel doesn't tell (/proc/kpagecgroup).
    """
    mapped: dict[str, Counter[int]] = {}
    folders: dict[str, Path] = {}
    for pid, above in limits.items():
        walk = walks.get(pid, Walk())
        for limit in above:
            mapped.setdefault(limit.path, Counter()).update(walk.frames)
            folders[limit.path] = limit.folder
    if not mapped:
        return {}
    try:
        with FrameCounts(root) as counts, FrameCgroups(root) as cgroups:
            return {path: _charged(times, counts, cgroups, _inodes(folders[path])) for path, times in mapped.items()}
    except (Denied, ReadError):
        return {}


def _charged(times: Counter[int], counts: FrameCounts, cgroups: FrameCgroups, inodes: frozenset[int]) -> int:
    everywhere = counts.at(times)
    inside = [frame for frame, count in times.items() if everywhere[frame] == count]
    inode_of = cgroups.at(inside)
    return sum(inode_of[frame] in inodes for frame in inside)


def _inodes(folder: Path) -> frozenset[int]:
    """The inode numbers of a cgroup and all below it: what kpagecgroup calls them."""
    found = set()
    for path, _, _ in os.walk(folder):
        try:
            found.add(os.stat(path).st_ino)
        except OSError:
            # Removed meanwhile.
            continue
    return frozenset(found)


def unmerge_demands(
    found: Iterable[ProcessDemand],
    topology: Topology,
    limits: Mapping[int, Sequence[CgroupLimit]],
    freed: Mapping[int, int] | None,
    charged: Mapping[str, int],
    floor_bytes: int = 0,
    root: Path = Path("/"),
) -> tuple[UnmergeDemand, ...]:
    """The host, every node and every limited memory cgroup that would grow; what is most over comes first.

    :param limits: `limits_above`; a process that is not in it is gone
    :param freed: frames that come free by node; None: nothing is taken to come free anywhere
    :param charged: `charged_pages`
    :param floor_bytes: what has to stay free on host and nodes; a memory cgroup keeps its reserve
    """
    nodes: Counter[int] = Counter()
    groups: Counter[str] = Counter()
    places: dict[str, CgroupLimit] = {}
    bounds: set[str] = set()
    anywhere = total = 0
    exact = freed is not None
    for demand in found:
        size = demand.pages * PAGE_SIZE
        total += size
        exact = exact and demand.exact
        if demand.home is None:
            anywhere += size
        else:
            nodes[demand.home] += size
        for limit in limits.get(demand.pid, ()):
            places[limit.path] = limit
            groups[limit.path] += size
            if not demand.exact:
                bounds.add(limit.path)
    gone = {node: pages * PAGE_SIZE for node, pages in (freed or {}).items()}
    free = max(0, host_available_bytes(root) - floor_bytes)
    rooms = [UnmergeDemand("host", max(0, total - sum(gone.values())), free, upper_bound=not exact)]
    for node in topology.with_memory():
        growth = max(0, nodes[node.number] + anywhere - gone.get(node.number, 0))
        free = max(0, node_available_bytes(node.number, root) - floor_bytes)
        rooms.append(UnmergeDemand(f"node {node.number}", growth, free, upper_bound=bool(anywhere) or not exact))
    for path, size in groups.items():
        growth = max(0, size - charged.get(path, 0) * PAGE_SIZE)
        bound = path in bounds or path not in charged
        rooms.append(UnmergeDemand(path, growth, places[path].spare_bytes, upper_bound=bound))
    return tuple(sorted(rooms, key=lambda item: (-item.over_bytes, item.free_bytes - item.growth_bytes)))
