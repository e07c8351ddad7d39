# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that is mergeable on this machine: whose it is, where it belongs, what un-merging it would take.

What a transaction has to know before it un-merges anything, for afterwards nobody can tell where a page belonged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ksmd_ctl.errors import Denied, NoSuchProcess, ReadError
from ksmd_ctl.host.memory import HomeRange, Inventory, Process, Skipped, Stock, Topology
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.census import take as take_census
from ksmd_ctl.kernel.detection import PageReader, choose, probe
from ksmd_ctl.kernel.exposure import UnmergeDemand, charged_pages, exposures, freed_pages, limits_above
from ksmd_ctl.kernel.kpageflags import FrameFlags
from ksmd_ctl.kernel.proc_pid import merging_pages_of
from ksmd_ctl.kernel.processes import Surveyor, Walk
from ksmd_ctl.kernel.topology import read_frame_map, read_topology

__all__ = ["inventory_of", "joined", "take", "unread_demands"]

# Pages of one process that are looked at one by one, 4 GiB; of larger ones a random part.
_PAGE_BUDGET = 1 << 20
_CENSUS_CPU_SECONDS = 1.0
# Of one process: a few dozen such processes fit into an answer.
_MOST_RANGES = 4096
# Of the time that the request has (`ksmd_ctl.kernel.host`), half: what was not read by then is named.
_LOOK_SECONDS = 300.0


def take(
    floor_bytes: int,
    *,
    root: Path = Path("/"),
    page_size: int = 4096,
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
    frames = read_frame_map(root, page_size)
    with ExitStack() as stack:
        reader = None
        try:
            detection = choose(probe())
            flags = stack.enter_context(FrameFlags(root))
            reader = stack.enter_context(PageReader(detection, root, page_size, flags))
        except (ReadError, Denied):
            # Which pages are merged can't be seen here; how many, the processes say themselves.
            pass
        surveyor = Surveyor(topology, frames, reader, root=root, page_size=page_size, page_budget=_PAGE_BUDGET)
        processes = surveyor.all(progress, stop, most_seconds=most_seconds)
        freed = None if reader is None else freed_pages(surveyor.walks.values(), frames)
        if reader is not None and freed is None:
            census = take_census(
                _CENSUS_CPU_SECONDS, detection=detection, frames=frames, flags=flags, root=root, page_size=page_size
            )
            freed = Counter(census.pages)
        return inventory_of(processes, surveyor, topology, freed, floor_bytes, root, page_size)


def inventory_of(
    processes: Sequence[Process],
    surveyor: Surveyor,
    topology: Topology,
    freed: Counter[int] | None,
    floor_bytes: int,
    root: Path,
    page_size: int,
) -> Inventory:
    """The inventory of processes that a surveyor has found.

    :param freed: merged frames by node; None where nobody can tell
    """
    skipped = surveyor.skipped
    limits = limits_above((*(process.id.pid for process in processes), *(one.pid for one in skipped)), root)
    stocks: list[Stock] = []
    demands: list[UnmergeDemand] = []
    for process in processes:
        walk = surveyor.walks.get(process.id.pid, Walk())
        counted = sum(item.merged_pages for item in walk.homes)
        known = walk.complete or process.merging_pages is None
        merged = counted if known else process.merging_pages or 0
        above = tuple(limit.path for limit in limits.get(process.id.pid, ()))
        ranges = joined(walk.homes)
        stocks.append(
            Stock(
                *(process.id, process.name, process.unit, process.classes, merged, ranges, above),
                read_only_pages=walk.read_only,
                calls=walk.calls,
            )
        )
        demands += _by_home(process, ranges, merged, exact=walk.complete)
    demands += unread_demands(skipped, root)
    found = exposures(
        demands,
        topology,
        limits,
        freed=freed,
        charged=charged_pages(surveyor.walks, limits, root),
        floor_bytes=floor_bytes,
        reserve=True,
        root=root,
        page_size=page_size,
    )
    return Inventory(topology, tuple(stocks), found, tuple(skipped), tuple(surveyor.denied))


def unread_demands(skipped: Iterable[Skipped], root: Path) -> list[UnmergeDemand]:
    """What processes take that could not be read, by their count of merged pages, for which no lock is needed."""
    # Where their pages belong can't be told.
    return [UnmergeDemand(one.pid, None, pages, False) for one in skipped if (pages := _merged(one.pid, root))]


def _merged(pid: int, root: Path) -> int:
    """How many merged pages a process has that can't be looked at; 0 where that can't be read either."""
    try:
        return merging_pages_of(pid, root) or 0
    except (NoSuchProcess, ReadError, Denied):
        return 0


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


def _by_home(process: Process, ranges: Sequence[HomeRange], merged: int, *, exact: bool) -> Iterator[UnmergeDemand]:
    """What a process takes at each home that its ranges have, so that each node is told only what will come to it."""
    homes: Counter[int | None] = Counter()
    for item in ranges:
        homes[item.home] += item.merged_pages
    if homes.total() < merged:
        # Counts that don't go together, or none by range: the rest may come to any node.
        homes[process.home] += merged - homes.total()
    # Zero pages un-merge too: they take memory for the first time then.
    homes[process.home] += max(0, process.zero_pages or 0)
    for home, pages in homes.items():
        if pages:
            yield UnmergeDemand(process.id.pid, home, pages, exact)
