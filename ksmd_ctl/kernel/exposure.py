# SPDX-License-Identifier: GPL-2.0-or-later
"""What would be over its limit if everything un-merged now.

Every merged page that a process maps becomes a page of its own then, on the process's home at best, and charged to
its memory cgroup: there it may be new, for the merged page was charged to whoever had it first (findings F10). The
frames that the merged pages had come free; on which node the census says. All figures are upper bounds: a process
that is a fork of another, or that maps one page often, counts each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.memory import Census, Exposure, Process, Topology
from ksmd_ctl.kernel.headroom import CgroupLimit, cgroup_limits, host_available_bytes, node_available_bytes

__all__ = ["exposures"]


def exposures(
    processes: Iterable[Process],
    topology: Topology,
    census: Census | None,
    *,
    floor_bytes: int = 0,
    writer_node: int | None = None,
    reserve: bool = False,
    root: Path = Path("/"),
    page_size: int = 4096,
) -> tuple[Exposure, ...]:
    """The host, every node and every limited memory cgroup that would grow; what is most over comes first.

    :param census: where merged pages lie now; None: nothing is taken to come free anywhere
    :param floor_bytes: what has to stay free on host and nodes
    :param writer_node: where pages without a home go: the node of whoever writes ``run`` (findings F3); None: they
        are counted on every node, as they may go to any
    :param reserve: what a memory cgroup has to have left for itself counts as used
    """
    nodes: Counter[int] = Counter()
    groups: Counter[str] = Counter()
    limits: dict[str, CgroupLimit] = {}
    anywhere = total = 0
    for process in processes:
        # Zero pages un-merge too: they take memory for the first time then.
        size = (process.merged_pages + max(0, process.zero_pages or 0)) * page_size
        if not size:
            continue
        total += size
        home = process.home if process.home is not None else writer_node
        if home is None:
            anywhere += size
        else:
            nodes[home] += size
        try:
            above = cgroup_limits(process.id.pid, root)
        except KsmdError:
            # It ended, and what it had is free.
            continue
        for limit in above:
            limits[limit.path] = limit
            groups[limit.path] += size
    freed = {node: pages * page_size for node, pages in census.pages.items()} if census else {}
    found = [Exposure("host", max(0, total - sum(freed.values())), max(0, host_available_bytes(root) - floor_bytes))]
    for node in topology.with_memory():
        growth = nodes[node.number] + anywhere - freed.get(node.number, 0)
        free = max(0, node_available_bytes(node.number, root) - floor_bytes)
        found.append(Exposure(f"node {node.number}", max(0, growth), free))
    for path, size in groups.items():
        limit = limits[path]
        found.append(Exposure(path, size, limit.spare_bytes if reserve else limit.room_bytes))
    return tuple(sorted(found, key=lambda item: (-item.over_bytes, item.free_bytes - item.growth_bytes)))
