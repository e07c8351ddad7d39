# SPDX-License-Identifier: GPL-2.0-or-later
"""What would be over its limit if everything un-merged now.

Every merged page that a process maps becomes a page of its own then, on the process's home at best, and charged to
its memory cgroup. The frames that the merged pages had come free. A merged page is charged to one cgroup only, whoever
had it first (findings F10): where all who map it are in one cgroup, and it is charged there, the first copy of it costs
that cgroup nothing. /proc/kpagecount and /proc/kpagecgroup tell. What could not be seen page by page is an upper bound.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import Denied, NoSuchProcess, ReadError
from ksmd_ctl.host.memory import Exposure, Process, Topology
from ksmd_ctl.kernel.headroom import CgroupLimit, cgroup_limits, host_available_bytes, node_available_bytes
from ksmd_ctl.kernel.kpageflags import FrameCgroups, FrameCounts
from ksmd_ctl.kernel.processes import Walk
from ksmd_ctl.kernel.topology import FrameMap

__all__ = ["UnmergeDemand", "charged_pages", "demands", "exposures", "freed_pages", "limits_above"]


@dataclass(frozen=True, slots=True)
class UnmergeDemand:
    """Pages that un-merging one process takes on one node.

    :ivar home: None where they may go to any node
    :ivar exact: each of its pages was looked at; else there are at most so many
    """

    pid: int
    home: int | None
    pages: int
    exact: bool = False


def demands(processes: Iterable[Process], walks: Mapping[int, Walk]) -> Iterator[UnmergeDemand]:
    """What each process takes at its home: by its page tables where these were looked at, else by its counters."""
    for process in processes:
        walk = walks.get(process.id.pid)
        exact = walk is not None and walk.complete
        merged = len(walk.frames) if walk is not None and walk.complete else process.merged_pages
        # Zero pages un-merge too: they take memory for the first time then.
        pages = merged + max(0, process.zero_pages or 0)
        if pages:
            yield UnmergeDemand(process.id.pid, process.home, pages, exact)


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


def exposures(
    found: Iterable[UnmergeDemand],
    topology: Topology,
    limits: Mapping[int, Sequence[CgroupLimit]],
    *,
    freed: Mapping[int, int] | None = None,
    charged: Mapping[str, int] | None = None,
    floor_bytes: int = 0,
    reserve: bool = False,
    root: Path = Path("/"),
    page_size: int = 4096,
) -> tuple[Exposure, ...]:
    """The host, every node and every limited memory cgroup that would grow; what is most over comes first.

    :param limits: `limits_above`; a process that is not in it is gone
    :param freed: frames that come free by node; None: nothing is taken to come free anywhere
    :param charged: `charged_pages`
    :param floor_bytes: what has to stay free on host and nodes
    :param reserve: what a memory cgroup has to have left for itself counts as used
    """
    nodes: Counter[int] = Counter()
    groups: Counter[str] = Counter()
    places: dict[str, CgroupLimit] = {}
    bounds: set[str] = set()
    anywhere = total = 0
    exact = freed is not None
    for demand in found:
        size = demand.pages * page_size
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
    gone = {node: pages * page_size for node, pages in (freed or {}).items()}
    free = max(0, host_available_bytes(root) - floor_bytes)
    rooms = [Exposure("host", max(0, total - sum(gone.values())), free, upper_bound=not exact)]
    for node in topology.with_memory():
        growth = max(0, nodes[node.number] + anywhere - gone.get(node.number, 0))
        free = max(0, node_available_bytes(node.number, root) - floor_bytes)
        rooms.append(Exposure(f"node {node.number}", growth, free, upper_bound=bool(anywhere) or not exact))
    for path, size in groups.items():
        limit = places[path]
        growth = max(0, size - (charged or {}).get(path, 0) * page_size)
        bound = path in bounds or path not in (charged or {})
        free = limit.spare_bytes if reserve else limit.room_bytes
        rooms.append(Exposure(path, growth, free, upper_bound=bound))
    return tuple(sorted(rooms, key=lambda item: (-item.over_bytes, item.free_bytes - item.growth_bytes)))
