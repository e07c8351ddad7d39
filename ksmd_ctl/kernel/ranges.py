# SPDX-License-Identifier: GPL-2.0-or-later
"""A process's mappings, from /proc/PID/smaps and /proc/PID/numa_maps, and the home node of each.

Sources: proc(5), fs/proc/task_mmu.c (``show_smap``, ``show_map_vma``, ``show_numa_map``) and
mm/mempolicy.c:mpol_to_str. Reading smaps walks the page tables: a few tens of nanoseconds a page.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, KsmdError, Unparsable
from ksmd_ctl.host.memory import Range, Topology
from ksmd_ctl.kernel.proc_pid import parse_stat, read_process_file
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, parse_list

# -- smaps ---------------------------------------------------------------------------------------------------


_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) [rwxsp-]{4} [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ \d+(?: +(.*))?", re.ASCII)
_FIGURES: Final = frozenset({"Rss", "Pss", "Anonymous", "AnonHugePages", "KSM", "Swap"})


def parse_smaps(text: str) -> tuple[Range, ...]:
    """The mappings in the text of smaps.

    A file's name is printed with line feeds escaped, so no name can look like a line of its own.

    :raises ValueError: a line is of no known form
    """
    found: list[tuple[re.Match[str], dict[str, int]]] = []
    flags: list[frozenset[str]] = []
    eligible: dict[int, bool] = {}
    figures: dict[str, int] = {}
    # Most mappings of a process have the same flags as some others.
    known: dict[str, frozenset[str]] = {}
    for line in text.split("\n"):
        name, _, value = line.partition(":")
        if value.endswith(" kB") and name.isidentifier():
            if name in _FIGURES:
                figures[name] = int(value[:-3]) * 1024
        elif name == "THPeligible" and found:
            eligible[len(found) - 1] = value.strip() == "1"
        elif match := _HEAD.fullmatch(line):
            figures = {}
            found.append((match, figures))
            flags.append(frozenset())
        elif line.startswith("VmFlags:") and found:
            if line not in known:
                known[line] = frozenset(line[8:].split())
            flags[-1] = known[line]
        elif line and not (found and ":" in line):
            # ProtectionKey and what later kernels bring have other forms and don't matter here.
            raise ValueError(f"{line[:60]!r} is not a line of smaps")
    return tuple(
        _range(*item, shown, eligible.get(number))
        for number, (item, shown) in enumerate(zip(found, flags, strict=True))
    )


def _range(head: re.Match[str], figures: Mapping[str, int], flags: frozenset[str], eligible: bool | None) -> Range:
    resident, ksm = figures.get("Rss", 0), figures.get("KSM")
    return Range(
        start=int(head[1], 16),
        end=int(head[2], 16),
        flags=flags,
        resident_pages=resident // PAGE_SIZE,
        anonymous_pages=figures.get("Anonymous", resident) // PAGE_SIZE,
        ksm_pages=None if ksm is None else ksm // PAGE_SIZE,
        name=head[3] or "",
        huge_bytes=figures.get("AnonHugePages", 0),
        swapped_bytes=figures.get("Swap", 0),
        pss_bytes=figures.get("Pss"),
        huge_eligible=eligible,
    )


def mappings(pid: int, root: Path = Path("/")) -> tuple[Range, ...]:
    """A process's mappings.

    :raises NoSuchProcess, Denied, ReadError: as `read_process_file`
    """
    return parsed(pid, read_process_file(pid, "smaps", root), root)


def parsed(pid: int, text: str, root: Path = Path("/")) -> tuple[Range, ...]:
    """The mappings in the text of a process's smaps.

    :raises Unparsable: a line is of no known form
    """
    try:
        return parse_smaps(text)
    except ValueError as error:
        path = str(root / "proc" / str(pid) / "smaps")
        raise Unparsable(path, str(error), path=path) from error


# -- numa_maps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NumaRange:
    """A line of numa_maps.

    :ivar policy: the mapping's, else that of the thread whose numa_maps it is (fs/proc/task_mmu.c:show_numa_map)
    :ivar nodes: pages by node, counted once a mapping; those of a file that it maps among them
    :ivar anonymous_pages: how many are anonymous
    """

    start: int
    policy: str
    policy_nodes: frozenset[int]
    nodes: Mapping[int, int]
    anonymous_pages: int = 0


_NODE = re.compile(r"N(\d+)=(\d+)", re.ASCII)
_ANONYMOUS = re.compile(r"anon=(\d+)", re.ASCII)
# mm/mempolicy.c:policy_modes; the name, then "=" and flags, then ":" and nodes.
_POLICY = re.compile(
    r"(default|prefer(?: \(many\))?|bind|(?:weighted )?interleave|local|[a-z]+)(?:=[a-z|]+)?(?::([\d,-]+))?", re.ASCII
)


def parse_numa_maps(text: str) -> dict[int, NumaRange]:
    """The lines of numa_maps by their first address.

    :raises ValueError: a line is of no known form
    """
    found = {}
    for line in filter(None, text.split("\n")):
        address, blank, rest = line.partition(" ")
        # A file's name comes after the policy, so it can't be taken for one.
        policy = _POLICY.match(rest)
        if not (blank and policy and re.fullmatch(r"[0-9a-f]+", address, re.ASCII)):
            raise ValueError(f"{line[:60]!r} is not a line of numa_maps")
        figures = rest[policy.end() :].split(" ")
        counts = {int(match[1]): int(match[2]) for word in figures if (match := _NODE.fullmatch(word))}
        anonymous = sum(int(match[1]) for word in figures if (match := _ANONYMOUS.fullmatch(word)))
        start = int(address, 16)
        found[start] = NumaRange(start, policy[1], parse_list(policy[2] or ""), counts, anonymous)
    return found


def numa_ranges(pid: int, root: Path = Path("/")) -> dict[int, NumaRange]:
    """A process's lines of numa_maps by their first address; empty on a kernel without NUMA.

    :raises NoSuchProcess, Denied, ReadError: as `read_process_file`
    """
    try:
        text = read_process_file(pid, "numa_maps", root)
    except Absent:
        return {}
    try:
        return parse_numa_maps(text)
    except ValueError as error:
        path = str(root / "proc" / str(pid) / "numa_maps")
        raise Unparsable(path, str(error), path=path) from error


def read_ranges(pid: int, root: Path = Path("/")) -> tuple[Range, ...]:
    """A process's mappings with their policies.

    The two files are read one after the other: a mapping made in between has the default policy here.

    :raises NoSuchProcess, Denied, ReadError: as `read_process_file`
    """
    policies = numa_ranges(pid, root)
    return with_policies(mappings(pid, root), policies)


def with_policies(found: Iterable[Range], numa: Mapping[int, NumaRange]) -> tuple[Range, ...]:
    """Mappings from smaps with their policies from numa_maps."""
    policies = {start: item for start, item in numa.items() if item.policy != "default"}
    return tuple(
        replace(item, policy=policies[item.start].policy, policy_nodes=policies[item.start].policy_nodes)
        if item.start in policies
        else item
        for item in found
    )


# -- home ----------------------------------------------------------------------------------------------------

# The home of a range is the node that its policy names; without one (numa_maps shows the thread's where the mapping
# has none) any that the cpuset allows. Among these it is the one where most of the range's un-merged pages are, else
# the one where the process's CPUs are. It is never a node outside Mems_allowed, and may be no single node: memory that
# is interleaved on purpose has no home.
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

    :raises NoSuchProcess, Denied, ReadError: as `ksmd_ctl.kernel.proc_pid.read_process_file`
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


def holds_pages(item: Range) -> bool:
    """Whether a mapping holds any page of its own, here or in swap: one that never held any is skipped as a whole."""
    return bool(item.anonymous_pages or item.swapped_bytes)
