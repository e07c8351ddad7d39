# SPDX-License-Identifier: GPL-2.0-or-later
"""run = 2, which un-merges everything at once (mm/ksm.c:unmerge_and_remove_all_rmap_items): is there room, and where.

The broker asks this for whoever is not root. Not pages_sharing: it stays high after un-merging page by page until
ksmd comes by. So first an upper bound by what processes say of themselves, which takes no lock of theirs, and where
that is too much, a look at all mergeable memory.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, HostError, NoSuchProcess, ReadError, Refused
from ksmd_ctl.host.memory import LEAST_FLOOR_BYTES
from ksmd_ctl.host.sample import Reading
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.headroom import host_available_bytes, node_available_bytes
from ksmd_ctl.kernel.inventory import take
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.libnuma import Policy, PolicyMode
from ksmd_ctl.kernel.proc_pid import merging_pages_of, pids, read_stat
from ksmd_ctl.kernel.processes import start_stack
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.topology import read_topology

# What takes less than this share of what is free anywhere fits, whatever comes meanwhile, and wherever it belongs.
_SURELY_SHARE: Final = 0.5
# Of the time that the write has beside waiting for ksmd (`ksmd_ctl.transactions.transaction`).
_LOOK_SECONDS: Final = 60.0


def need_room(root: Path = Path("/")) -> None:
    """See that run = 2 leaves `LEAST_FLOOR_BYTES` free on the host and on every node.

    Memory cgroups don't count: what is over there takes from nobody outside of it.

    :raises Refused: it does not, with figures
    :raises Denied, ReadError: nobody can tell
    """
    counted = counted_pages(root)
    if counted is not None and _surely_fits(counted * PAGE_SIZE, root):
        return
    found = take(LEAST_FLOOR_BYTES, root=root, most_seconds=_LOOK_SECONDS)
    # Of a process that is too large to look at each page, the inventory has the kernel's count, which is as old as
    # pages_sharing; the pages that were seen are estimates, and of now.
    seen = sum(item.merged_pages for memory in found.memories for item in memory.ranges)
    if not found.skipped and _surely_fits(seen * PAGE_SIZE, root):
        return
    over = [item for item in found.demands if item.over_bytes and not item.where.startswith("/")]
    if over:
        raise Refused(
            "un-merging everything",
            "; ".join(item.text(LEAST_FLOOR_BYTES) for item in over[:4]),
            hint="free memory there, or end or move a tenant; beyond the floor only root itself can go: "
            "stop the service, then `ksmd-ctl set --force` as root",
        )


def counted_pages(root: Path = Path("/")) -> int | None:
    """At most so many merged pages all processes map, by the kernel's counters; None where it doesn't tell.

    A fork maps what its parent had merged, and where ksmd has not passed since, its own counter says 0 (kernels that
    begin it with its parent's say more). So forks of one program count as the one of them that has most.
    """
    families: dict[int, list[int]] = defaultdict(list)
    try:
        running = pids(root / "proc")
    except OSError:
        return None
    for pid in running:
        try:
            counted = merging_pages_of(pid, root)
            if counted is not None:
                # Without a place to know its family by it is one of its own.
                families[start_stack(read_stat(pid, root)[1]) or -pid].append(counted)
        except NoSuchProcess:
            continue
        except (Absent, Denied, ReadError, ValueError):
            return None
    merged = sum(max(family) * len(family) for family in families.values())
    readings: dict[str, Reading] = {}
    with closing(KsmFs(root)) as ksm:
        ksm.sample(readings)
    # They un-merge too. Kernels without the counter (before 6.6) leave them as they are.
    zeroes = readings.get("ksm_zero_pages")
    return merged + (zeroes if isinstance(zeroes, int) else 0)


def _surely_fits(size: int, root: Path) -> bool:
    nodes = read_topology(root, numa=libnuma.available()).with_memory()
    free = min(host_available_bytes(root), *(node_available_bytes(node.number, root) for node in nodes))
    return size <= _SURELY_SHARE * (free - LEAST_FLOOR_BYTES)


def spread_over_nodes(root: Path = Path("/")) -> frozenset[int]:
    """Have what this process allocates from now on come from all nodes in turn; for a child that ends soon.

    Un-merging copies each page in the context of whoever writes ``run`` = 2: where the mapping has no policy of its
    own, the copy comes from where the *writer's* policy says (mm/ksm.c:break_ksm, mm/mempolicy.c:get_task_policy), so
    by default all of a host's merged memory lands on one node (findings F3).

    :returns: the nodes; empty where there is nothing to spread over, and nothing was changed
    """
    if not libnuma.available():
        return frozenset()
    try:
        nodes = frozenset(node.number for node in read_topology(root, numa=True).with_memory())
        if len(nodes) < 2:
            return frozenset()
        libnuma.set_mempolicy(Policy(PolicyMode.INTERLEAVE, nodes))
    except HostError:
        # The cpuset of this process leaves out all of them, or a kernel without NUMA: then it is as it always was.
        return frozenset()
    return nodes
