# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that is mergeable on this machine: whose it is, where it belongs, what un-merging it would take.

What a transaction has to know before it un-merges anything, for afterwards nobody can tell where a page belonged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ksmd_ctl.errors import Absent, Denied, KsmdError, NoSuchProcess, ReadError
from ksmd_ctl.host.memory import Census, HomeRange, Inventory, Process, Range, Stock, Topology
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.anonymous import anonymous_nodes, own_parts
from ksmd_ctl.kernel.census import take as take_census
from ksmd_ctl.kernel.exposure import exposures
from ksmd_ctl.kernel.home import range_home, read_surroundings
from ksmd_ctl.kernel.kpageflags import FrameFlags
from ksmd_ctl.kernel.pagemap import Pagemap
from ksmd_ctl.kernel.processes import Surveyor
from ksmd_ctl.kernel.ranges import join, mappings, numa_ranges
from ksmd_ctl.kernel.topology import FrameMap, read_frame_map, read_topology
from ksmd_ctl.kernel.witness import PageReader, State, choose, probe

__all__ = ["inventory_of", "take"]

# Pages of one process that are looked at one by one; of larger ones the kernel's counts have to do.
_PAGE_BUDGET = 1 << 18
_CENSUS_CPU_SECONDS = 1.0


def take(
    floor_bytes: int,
    *,
    root: Path = Path("/"),
    page_size: int = 4096,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Inventory:
    """Look at every process with mergeable memory; those that end meanwhile are left out.

    :param floor_bytes: what has to stay free on the host and on every node
    :raises Denied: of all that there are not one could be looked at
    :raises Cancelled: `stop` said so
    """
    topology = read_topology(root, numa=libnuma.available())
    frames = read_frame_map(root, page_size)
    with ExitStack() as stack:
        reader, census = None, None
        try:
            witness = choose(probe())
            flags = stack.enter_context(FrameFlags(root))
            reader = stack.enter_context(PageReader(witness, root, page_size, flags))
            census = take_census(
                _CENSUS_CPU_SECONDS, witness=witness, frames=frames, flags=flags, root=root, page_size=page_size
            )
        except (ReadError, Denied):
            # Which pages are merged can't be seen here; how many, the processes say themselves.
            pass
        surveyor = Surveyor(topology, frames, reader, root=root, page_size=page_size)
        processes = surveyor.all(progress, stop)
        return inventory_of(processes, topology, frames, reader, census, floor_bytes, root, page_size)


def inventory_of(
    processes: Sequence[Process],
    topology: Topology,
    frames: FrameMap,
    reader: PageReader | None,
    census: Census | None,
    floor_bytes: int,
    root: Path,
    page_size: int,
) -> Inventory:
    """The inventory of processes that were found before.

    :param reader: tells merged pages; None where no witness is any good
    """
    stocks, shares = [], []
    for process in processes:
        try:
            ranges = _ranges(process.id.pid, topology, frames, reader, root, page_size)
        except (NoSuchProcess, Denied, Absent):
            continue
        counted = sum(item.merged_pages for item in ranges)
        merged = counted if process.merging_pages is None else process.merging_pages
        stocks.append(Stock(process.id, process.name, process.unit, process.classes, merged, ranges))
        shares += _by_home(process, ranges, merged)
    found = exposures(shares, topology, census, floor_bytes=floor_bytes, reserve=True, root=root, page_size=page_size)
    return Inventory(topology, tuple(stocks), found)


def _by_home(process: Process, ranges: Sequence[HomeRange], merged: int) -> list[Process]:
    """The process as one for each home that its ranges have, so that each node is told only what will come to it."""
    homes: Counter[int | None] = Counter()
    for item in ranges:
        homes[item.home] += item.merged_pages
    if homes.total() < merged:
        # Counts that don't go together, or none by range: the rest may come to any node.
        homes[process.home] += merged - homes.total()
    shares = [
        replace(process, home=home, merging_pages=pages, zero_pages=0, nodes={})
        for home, pages in homes.items()
        if pages
    ]
    return [*shares, replace(process, merging_pages=0, nodes={})]


def _ranges(
    pid: int, topology: Topology, frames: FrameMap, reader: PageReader | None, root: Path, page_size: int
) -> tuple[HomeRange, ...]:
    around = read_surroundings(pid, topology, root)
    numa = numa_ranges(pid, root)
    mergeable = [item for item in join(mappings(pid, root), numa, page_size) if item.mergeable and item.anonymous_pages]
    merged = _merged(pid, mergeable, frames, reader, root, page_size)
    found = []
    for item in mergeable:
        nodes = anonymous_nodes(pid, item, numa.get(item.start), frames, root, page_size)
        there = merged.get(item.start)
        if there is None:
            # Where most are merged, where they lie says nothing.
            count = item.ksm_pages or 0
            unmerged = nodes if 2 * count < item.anonymous_pages else {}
        else:
            count = there.total()
            unmerged = {node: pages - there[node] for node, pages in nodes.items()}
        found.append(HomeRange(item.start, item.end, range_home(item, unmerged, around), nodes, count))
    return tuple(found)


def _merged(
    pid: int, ranges: Sequence[Range], frames: FrameMap, reader: PageReader | None, root: Path, page_size: int
) -> dict[int, Counter[int]]:
    """Merged pages by node of each range, by its start; empty where they are too many to be looked at, or can't be."""
    holding = [item for item in ranges if item.ksm_pages != 0]
    if reader is None:
        return {}
    with Pagemap(pid, root, page_size) as pagemap:
        parts = [part for item in holding for part in own_parts(pagemap, item, page_size)]
    if sum(end - start for start, end in parts) // page_size > _PAGE_BUDGET:
        return {}
    found = {item.start: Counter[int]() for item in ranges}
    starts = sorted(found)
    try:
        for window in reader.windows(pid, holding):
            start = max(start for start in starts if start <= window.start)
            for index, state in enumerate(window.states):
                if state == State.KSM:
                    node = frames.node(window.frames[index])
                    found[start][0 if node is None else node] += 1
    except (NoSuchProcess, Denied):
        raise
    except KsmdError:
        return {}
    return found
