# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory policy of whoever writes ``run`` = 2.

Un-merging copies each page in the writer's context: where the mapping has no policy of its own, the copy comes from
where the *writer's* policy says (mm/ksm.c:break_ksm, mm/mempolicy.c:get_task_policy), so by default all of a host's
merged memory lands on one node (findings F3). Spread over all nodes with memory, no node takes more than its share.
"""

from __future__ import annotations

from pathlib import Path

from ksmd_ctl.errors import HostError
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.libnuma import Policy, PolicyMode
from ksmd_ctl.kernel.topology import read_topology

__all__ = ["spread_over_nodes"]


def spread_over_nodes(root: Path = Path("/")) -> frozenset[int]:
    """Have what this process allocates from now on come from all nodes in turn; for a child that ends soon.

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
