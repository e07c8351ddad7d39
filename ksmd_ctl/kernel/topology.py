# SPDX-License-Identifier: GPL-2.0-or-later
"""The NUMA nodes of this machine, their memory blocks, and which node a frame lies on.

Sources: /sys/devices/system/node and /sys/devices/system/memory (Documentation/ABI/stable/sysfs-devices-node,
Documentation/admin-guide/mm/memory-hotplug.rst) and /proc/zoneinfo (mm/vmstat.c:zoneinfo_show_print). Nothing
here needs libnuma: nodes have sparse numbers, may have no memory or no CPUs, and may come and go.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.errors import Absent, ReadError, Rejected, Unparsable
from ksmd_ctl.host.memory import Node, Topology
from ksmd_ctl.host.sample import NodeMemory
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE, parse_list, read_text

_NODES = Path("sys/devices/system/node")
_MEMORY = Path("sys/devices/system/memory")


def read_meminfo(path: Path) -> dict[str, int]:
    """The sizes in a meminfo, the host's or a node's, in bytes.

    :raises ReadError: it can't be read
    """
    lines = re.findall(r"^(?:Node \d+ )?([\w()]+): +(\d+) kB$", read_text(path), re.MULTILINE | re.ASCII)
    return {name: int(kib) * 1024 for name, kib in lines}


def meminfo_bytes(path: Path, *names: str) -> list[int]:
    """These sizes in a meminfo.

    :raises ReadError: it can't be read, or has not all of them
    """
    found = read_meminfo(path)
    if missing := [name for name in names if name not in found]:
        raise Unparsable(str(path), f"no {' and '.join(missing)} in kB", path=str(path))
    return [found[name] for name in names]


def _list_in(path: Path) -> frozenset[int]:
    text = read_text(path)
    try:
        return parse_list(text)
    except ValueError as error:
        raise Unparsable(str(path), str(error), path=str(path), value=text[:80]) from error


def node_memory(number: int, root: Path = Path("/")) -> NodeMemory:
    """One node's memory from its meminfo; both 0 for a node without memory.

    :raises ReadError: there is no such node, or its file does not look as it should
    """
    return NodeMemory(*meminfo_bytes(root / _NODES / f"node{number}" / "meminfo", "MemTotal", "MemFree"))


def need_memory(node: int, what: str, root: Path = Path("/")) -> None:
    """
    :raises Rejected: there is no such node, or it has no memory
    """
    try:
        memory = node_memory(node, root).total_bytes
    except ReadError as error:
        raise Rejected(what, "there is no such node", hint="see `ksmd-ctl nodes`", value=node) from error
    if not memory:
        raise Rejected(what, "that node has no memory", hint="see `ksmd-ctl nodes`", value=node)


def read_topology(root: Path = Path("/"), *, numa: bool, going_offline: bool = False) -> Topology:
    """The nodes that are online now.

    A node that goes away while this reads it is left out: node files vanish one by one.

    :param numa: what `ksmd_ctl.kernel.libnuma.available` says; nodes are read in either case
    :param going_offline: KSM's `run` reads with bit 4 (KSM_RUN_OFFLINE), or a memory block is going offline
    """
    folder = root / _NODES
    try:
        online = _list_in(folder / "online")
    except Absent:
        # A kernel without CONFIG_NUMA: one node, the whole machine.
        return Topology((_only_node(root),), numa=False, going_offline=going_offline)
    nodes = []
    for number in sorted(online):
        try:
            nodes.append(_node(folder / f"node{number}", number, sorted(online), root))
        except Absent:
            if (folder / f"node{number}").is_dir():
                raise
    offlining = going_offline or any(block.state == "going-offline" for block in memory_blocks(root))
    return Topology(tuple(nodes), numa=numa, going_offline=offlining)


def _node(folder: Path, number: int, online: list[int], root: Path) -> Node:
    path = folder / "distance"
    text = read_text(path)
    distances = text.split()
    # One a node that is online, in order of their numbers (drivers/base/node.c:node_read_distance).
    if len(distances) != len(online) or not all(word.isdigit() for word in distances):
        raise Unparsable(str(path), f"{len(online)} nodes are online, it names others", path=str(path), value=text[:80])
    return Node(
        number=number,
        cpus=_list_in(folder / "cpulist"),
        memory_bytes=node_memory(number, root).total_bytes,
        distances=dict(zip(online, map(int, distances), strict=True)),
    )


def _only_node(root: Path) -> Node:
    (total,) = meminfo_bytes(root / "proc/meminfo", "MemTotal")
    try:
        cpus = _list_in(root / "sys/devices/system/cpu/online")
    except Absent:
        cpus = frozenset({0})
    return Node(0, cpus, total, {0: 10})


# -- memory blocks -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class MemoryBlock:
    """A piece of memory that can be taken offline.

    :ivar first: its first frame
    :ivar last: one past its last frame
    :ivar nodes: the nodes it lies on: one, save where a block spans a border between nodes
    :ivar state: ``online``, ``offline`` or ``going-offline``
    """

    number: int
    first: int
    last: int
    nodes: frozenset[int]
    state: str


def memory_blocks(root: Path = Path("/")) -> tuple[MemoryBlock, ...]:
    """Every memory block, by number; empty where the kernel has no memory hotplug."""
    folder = root / _MEMORY
    try:
        text = read_text(folder / "block_size_bytes").strip()
    except Absent:
        return ()
    try:
        frames = int(text, 16) // PAGE_SIZE
    except ValueError as error:
        path = str(folder / "block_size_bytes")
        raise Unparsable(path, "not a hexadecimal number", path=path, value=text) from error
    owners: dict[int, set[int]] = {}
    for link in (root / _NODES).glob("node[0-9]*/memory[0-9]*"):
        owners.setdefault(_suffix(link), set()).add(_suffix(link.parent))
    blocks = []
    for block in folder.glob("memory[0-9]*"):
        number = _suffix(block)
        try:
            state = read_text(block / "state").strip()
        except Absent:
            continue
        nodes = frozenset(owners.get(number, ()))
        blocks.append(MemoryBlock(number, number * frames, (number + 1) * frames, nodes, state))
    return tuple(sorted(blocks))


def _suffix(path: Path) -> int:
    return int(path.name.lstrip("abcdefghijklmnopqrstuvwxyz"))


# -- which node a frame lies on ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Frames from `first` up to but not including `last`, all on one node."""

    first: int
    last: int
    node: int


class FrameMap:
    """Which node a frame lies on, and which frames there are at all.

    :ivar spans: ascending, without overlap, and adjacent ones of one node joined
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        joined: list[Span] = []
        for span in sorted(spans):
            if joined and joined[-1].last > span.first:
                raise ValueError(f"frames {span.first}..{joined[-1].last} lie on two nodes or are named twice")
            if joined and joined[-1].last == span.first and joined[-1].node == span.node:
                joined[-1] = Span(joined[-1].first, span.last, span.node)
            else:
                joined.append(span)
        self.spans = tuple(joined)
        self._starts = [span.first for span in joined]

    def node(self, frame: int) -> int | None:
        """The node of a frame, None where there is no memory."""
        index = bisect.bisect_right(self._starts, frame) - 1
        if index < 0 or frame >= self.spans[index].last:
            return None
        return self.spans[index].node

    def only_node(self, first: int, last: int) -> int | None:
        """The node of all frames from `first` to `last`, both included; None where they are not on one node.

        Holes between them don't matter; the two themselves must be memory.
        """
        if self.node(first) is None or self.node(last) is None:
            return None
        begin = bisect.bisect_right(self._starts, first) - 1
        nodes = {span.node for span in self.spans[begin : bisect.bisect_right(self._starts, last)]}
        return nodes.pop() if len(nodes) == 1 else None

    @property
    def frames(self) -> int:
        return sum(span.last - span.first for span in self.spans)

    def nodes(self) -> frozenset[int]:
        return frozenset(span.node for span in self.spans)


_ZONE = re.compile(
    r"^Node (\d+), zone +(\w+)$(.*?)(?=^Node |\Z)",
    re.MULTILINE | re.DOTALL | re.ASCII,
)


def _zones(text: str) -> list[Span]:
    spans = []
    for match in _ZONE.finditer(text):
        spanned = re.search(r"^ +spanned +(\d+)$", match[3], re.MULTILINE)
        start = re.search(r"^ +start_pfn: +(\d+)$", match[3], re.MULTILINE)
        if spanned and start and int(spanned[1]):
            spans.append(Span(int(start[1]), int(start[1]) + int(spanned[1]), int(match[1])))
    return spans


def read_frame_map(root: Path = Path("/")) -> FrameMap:
    """Where memory is now, from the memory blocks that are online and, where these don't say, from the zones.

    A block knows its nodes, but where it spans a border between nodes it only knows both; a zone knows its
    first frame and its length exactly, but zones of different nodes may be interleaved. So a block with one
    node is taken as it is, and one with several is cut along the zones. Without memory hotplug there are only
    zones.

    :raises ReadError: neither can be read
    """
    blocks = memory_blocks(root)
    path = root / "proc/zoneinfo"
    zones = sorted(_zones(read_text(path)))
    if not zones:
        raise Unparsable(str(path), "no zone with frames in it", path=str(path))
    if not blocks:
        return FrameMap(_disjoint(zones))
    spans: list[Span] = []
    for block in blocks:
        if block.state == "offline":
            continue
        if len(block.nodes) == 1:
            (node,) = block.nodes
            spans.append(Span(block.first, block.last, node))
            continue
        inside = [
            Span(max(zone.first, block.first), min(zone.last, block.last), zone.node)
            for zone in zones
            if zone.first < block.last and block.first < zone.last
        ]
        spans += _disjoint(inside)
    return FrameMap(spans)


def _disjoint(zones: list[Span]) -> list[Span]:
    # Where zones overlap the one that begins later is the smaller piece inside: it wins there.
    edges = sorted({edge for zone in zones for edge in (zone.first, zone.last)})
    found = []
    for first, last in itertools.pairwise(edges):
        holding = [zone for zone in zones if zone.first <= first and last <= zone.last]
        if holding:
            found.append(Span(first, last, max(holding).node))
    return found
