# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a process's memory belongs.

The home of a range is the node that its policy names; without one (numa_maps shows the thread's where the mapping
has none) any that the cpuset allows. Among these it is the one where most of the range's un-merged pages are, else
the one where the process's CPUs are. It is never a node outside Mems_allowed, and may be no single node: memory that
is interleaved on purpose has no home.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.memory import Range, Topology
from ksmd_ctl.kernel.identity import parse_stat
from ksmd_ctl.kernel.ranges import read_process_file
from ksmd_ctl.kernel.topology import parse_list

__all__ = ["Surroundings", "range_home", "read_surroundings", "single"]

_CHOOSING = frozenset({"bind", "prefer", "prefer (many)"})
_SPREADING = frozenset({"interleave", "weighted interleave"})

# Of /proc/PID/task/TID/stat, from after the name: fields 14, 15 and 39 of proc(5).
_UTIME, _STIME, _PROCESSOR = 14 - 3, 15 - 3, 39 - 3


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where a process may be and is.

    :ivar allowed: nodes with memory that its cpuset allows
    :ivar cpu_node: the node where its CPUs are, None where that is not one
    """

    allowed: frozenset[int]
    cpu_node: int | None


def single(weights: Mapping[int, int]) -> int | None:
    """The node that has more than half of it all."""
    if not weights:
        return None
    node = max(weights, key=lambda node: weights[node])
    return node if 2 * weights[node] > sum(weights.values()) else None


def range_home(item: Range, unmerged: Mapping[int, int], around: Surroundings) -> int | None:
    """The home of one range.

    :param unmerged: its un-merged pages by node
    """
    if item.policy in _SPREADING and len(item.policy_nodes & around.allowed) > 1:
        return None
    allowed = around.allowed
    if item.policy in _CHOOSING | _SPREADING:
        # A policy may name nodes that the cpuset took away since; then the kernel uses what is left, or all.
        allowed = item.policy_nodes & around.allowed or around.allowed
    if len(allowed) == 1:
        return next(iter(allowed))
    there = single({node: pages for node, pages in unmerged.items() if node in allowed and pages > 0})
    if there is not None:
        return there
    return around.cpu_node if around.cpu_node in allowed else None


def read_surroundings(pid: int, topology: Topology, root: Path = Path("/")) -> Surroundings:
    """Where a process may be and is, from its status and its threads' stat.

    :raises NoSuchProcess, Denied, ReadError: as `ksmd_ctl.kernel.ranges.read_process_file`
    """
    memory = frozenset(node.number for node in topology.with_memory())
    if len(topology.nodes) == 1:
        return Surroundings(memory, topology.nodes[0].number)
    status = read_process_file(pid, "status", root)
    mems = _list_after("Mems_allowed_list", status)
    cpus = _list_after("Cpus_allowed_list", status)
    # Without CONFIG_CPUSETS there are no such lines: everything is allowed.
    allowed = memory if mems is None else memory & mems
    nodes = {node.number for node in topology.nodes if node.cpus and (cpus is None or node.cpus & cpus)}
    cpu_node = nodes.pop() if len(nodes) == 1 else single(_cpu_time(pid, topology, root))
    return Surroundings(allowed, cpu_node)


def _list_after(label: str, status: str) -> frozenset[int] | None:
    match = re.search(rf"^{label}:\t([\d,-]*)$", status, re.MULTILINE | re.ASCII)
    return parse_list(match[1]) if match else None


def _cpu_time(pid: int, topology: Topology, root: Path) -> Counter[int]:
    # CPU time by node, each thread's where it ran last: virtual CPUs outweigh helpers so.
    node_of = {cpu: node.number for node in topology.nodes for cpu in node.cpus}
    found: Counter[int] = Counter()
    for thread in _threads(pid, root):
        try:
            fields = parse_stat((thread / "stat").read_bytes())[1]
            node = node_of.get(int(fields[_PROCESSOR]))
            if node is not None:
                found[node] += int(fields[_UTIME]) + int(fields[_STIME])
        except (OSError, ValueError, IndexError, KsmdError):
            # It ended meanwhile.
            continue
    return found


def _threads(pid: int, root: Path) -> Iterable[Path]:
    try:
        return list((root / "proc" / str(pid) / "task").iterdir())
    except OSError:
        return []
