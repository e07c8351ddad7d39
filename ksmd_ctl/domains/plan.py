# SPDX-License-Identifier: GPL-2.0-or-later
"""Proposes nodes for domains from what their memory takes. Pure.

The nodes that there are come first. Where they are too few, the kernel parameter ``numa=fake=NU`` splits each real
node into N of one size, which keep its CPUs and distances (findings F30). The new nodes of the first real node have
the lowest numbers (mm/numa_emulation.c, arch/x86/mm/numa_emulation.c before 6.12: numa_emulation).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ksmd_ctl.codec import encode
from ksmd_ctl.errors import Refused
from ksmd_ctl.figures import bytes_text, plural, ranges_text
from ksmd_ctl.host.memory import Topology

#: Into so many nodes a real one is split at most. Each has free lists, a kswapd and a reserve of its own.
MOST_SPLIT: Final = 64
#: The kernel makes no node of other sizes than a multiple of this (FAKE_NODE_MIN_SIZE).
FAKE_NODE_BYTES: Final = 32 << 20
#: What a domain needs at least, whatever it has now.
LEAST_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Need:
    """What a domain's memory takes.

    :ivar memory_bytes: what its members have in memory and in swap
    :ivar on_nodes: bytes by the node that they are on now
    """

    domain: str
    memory_bytes: int
    on_nodes: Mapping[int, int] = field(default_factory=dict)

    def with_reserve(self, share: float) -> int:
        """Bytes that its nodes have to have at least."""
        return max(LEAST_BYTES, math.ceil(self.memory_bytes * (1 + share)))


@dataclass(frozen=True, slots=True)
class DomainPlan:
    """The nodes of one domain.

    :ivar needed_bytes: its memory with the reserve
    :ivar room_bytes: what its nodes have for it
    :ivar moved_bytes: what lies on other real nodes now
    """

    nodes: tuple[int, ...]
    needed_bytes: int
    room_bytes: int
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class NodePlan:
    """Nodes for domains, by name.

    :ivar split: into how many nodes each real one is to be split; 0: the nodes stay as they are
    :ivar rest: nodes that no domain gets
    """

    domains: Mapping[str, DomainPlan]
    split: int
    rest: tuple[int, ...]

    @property
    def parameter(self) -> str:
        """What the kernel command line needs; empty for nothing."""
        return f"numa=fake={self.split}U" if self.split else ""

    @property
    def costs(self) -> tuple[str, ...]:
        """What it costs, as sentences."""
        spare = sum(one.room_bytes - one.needed_bytes for one in self.domains.values())
        moved = sum(one.moved_bytes for one in self.domains.values())
        reboot = (
            f"the host has to be started anew, also for each change of the sizes; each real node becomes {self.split}, "
            "and memory is reclaimed for each by itself"
        )
        return (
            f"{bytes_text(spare)} more than the domains need is reserved for them, and none can borrow it from another",
            "a domain that needs more than its nodes have swaps, or the OOM killer acts, while other nodes are free",
            "what is merged across domains now is saved no longer (`ksmd-ctl sharing --by domain` shows it)",
            *([f"{bytes_text(moved)} has to be moved to another node"] if moved else []),
            *([reboot] if self.split else []),
        )


@dataclass(slots=True)
class _Real:
    """A real node.

    :ivar numbers: the nodes that it is now: several where the kernel was started with numa=fake
    :ivar size: bytes that each of its parts has for domains
    :ivar free: numbers of parts that nobody has yet
    """

    numbers: frozenset[int]
    size: int
    free: list[int]


def propose(needs: Sequence[Need], topology: Topology, reserve_share: float, host_bytes: int = 0) -> NodePlan:
    """Nodes for domains: each gets at least its need with the reserve, and no node is given twice.

    :param reserve_share: of its memory, what a domain gets in addition
    :param host_bytes: what all else on the host takes; each node is taken to bear its part of that
    :raises Refused: there is too little memory
    """
    memory = {node.number: node.memory_bytes for node in topology.with_memory()}
    share = host_bytes / sum(memory.values())
    rooms = {node: max(0, size - math.ceil(size * share)) for node, size in memory.items()}
    wanted = [need.with_reserve(reserve_share) for need in needs]
    # Where the memory is, if there is such a way; and each real node whole, or in as few parts as are enough.
    for parts, stay in itertools.product(range(1, MOST_SPLIT + 1), (True, False)):
        reals = _reals(topology, rooms, parts)
        sizes = {number: real.size for real in reals for number in real.free}
        found = _packed(needs, wanted, reals, stay=stay)
        if found is not None:
            domains = {
                need.domain: DomainPlan(nodes, needed, sum(sizes[node] for node in nodes), moved)
                for need, needed, (nodes, moved) in zip(needs, wanted, found, strict=True)
            }
            rest = sizes.keys() - {node for nodes, _ in found for node in nodes}
            return NodePlan(domains, parts if parts > 1 else 0, tuple(sorted(rest)))
    raise Refused(
        "planning the nodes of domains",
        f"{plural(len(needs), 'domain')} need {bytes_text(sum(wanted))}, the nodes have "
        f"{bytes_text(sum(rooms.values()))} for them, and into more than {MOST_SPLIT} parts no node is split",
        hint="--reserve and --memory say what they need; or put domains onto other hosts",
    )


def _reals(topology: Topology, rooms: Mapping[int, int], parts: int) -> list[_Real]:
    """The real nodes in parts. In one part each, they are the nodes that there are now."""
    if parts == 1:
        return [_Real(frozenset({node}), room, [node]) for node, room in rooms.items()]
    found: dict[frozenset[int] | int, list[int]] = {}
    for node in topology.with_memory():
        # Nodes that have the same CPUs are one real node that was split.
        found.setdefault(node.cpus or node.number, []).append(node.number)
    return [
        _Real(
            frozenset(some),
            sum(rooms[node] for node in some) // parts // FAKE_NODE_BYTES * FAKE_NODE_BYTES,
            [at * parts + part for part in range(parts)],
        )
        for at, some in enumerate(found.values())
    ]


def _packed(
    needs: Sequence[Need], wanted: Sequence[int], reals: Sequence[_Real], *, stay: bool
) -> list[tuple[tuple[int, ...], int]] | None:
    """Nodes of each domain, and bytes of its own that lie on other real nodes; None where there are too few.

    The largest domain comes first. It gets parts of one real node if one has enough of them, else of several.

    :param stay: where its memory is, rather than where it fits best
    """
    gifts: dict[int, tuple[tuple[int, ...], int]] = {}
    for index in sorted(range(len(needs)), key=lambda one: -wanted[one]):
        own = [sum(needs[index].on_nodes.get(node, 0) for node in real.numbers) for real in reals]
        rooms = [len(real.free) * real.size for real in reals]
        whole = [at for at, room in enumerate(rooms) if room >= wanted[index]]
        if whole:
            order = [min(whole, key=lambda at: (-own[at] if stay else 0, rooms[at]))]
        else:
            order = sorted(range(len(reals)), key=lambda at: (-own[at] if stay else 0, -rooms[at]))
        nodes: list[int] = []
        missing, moved = wanted[index], sum(own)
        for at in order:
            real = reals[at]
            take = min(len(real.free), -(-missing // real.size)) if missing > 0 and real.size else 0
            nodes += real.free[:take]
            del real.free[:take]
            missing -= take * real.size
            moved -= own[at] if take else 0
        if missing > 0:
            return None
        gifts[index] = tuple(sorted(nodes)), moved
    return [gifts[index] for index in range(len(needs))]


# For programs that start members by themselves; NODES stands for a domain's nodes.
_PROGRAMS: Final = {
    "libvirt": (
        "virsh numatune VM --mode strict --nodeset NODES --config, and start the machine anew; in its XML "
        "<numatune><memory mode='strict' nodeset='NODES'/></numatune>",
    ),
    "Proxmox": (
        "qm set VMID --numa 1 --numa0 cpus=0-LAST,memory=MIB,hostnodes=NODES,policy=bind (with ; for , in NODES)",
        "for the rest of QEMU, in a hookscript's post-start: systemctl set-property --runtime VMID.scope "
        "AllowedMemoryNodes=NODES",
        "containers: lxc.cgroup2.cpuset.mems: NODES in /etc/pve/lxc/CTID.conf",
    ),
    "podman": ("podman run --cpuset-mems=NODES, and podman update --cpuset-mems=NODES for containers that run",),
    "Kubernetes": (
        "the kubelet chooses nodes itself (memoryManagerPolicy: Static), so no manifest gives a namespace nodes",
        "with the systemd cgroup driver `ksmd-ctl domains assign` limits the scopes of containers that run",
    ),
}


def settings(plan: NodePlan, units: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """What to set for a plan, by whom it is for: commands and texts.

    :param units: systemd units and slices of each domain
    """
    kernel = (
        f"add {plan.parameter} to the kernel command line, and start the host anew (needs CONFIG_NUMA_EMU)",
        "with GRUB: GRUB_CMDLINE_LINUX_DEFAULT in /etc/default/grub, then update-grub",
        "Proxmox with systemd-boot: /etc/kernel/cmdline, then proxmox-boot-tool refresh",
    )
    numbers = {name: ranges_text(one.nodes) for name, one in plan.domains.items()}
    return {
        **({"kernel": kernel} if plan.split else {}),
        "ksmd-ctl": (
            *(f'[domains.{name}] nodes = "{nodes}"' for name, nodes in numbers.items()),
            f"ksmd-ctl domains assign {' '.join(numbers)}: limits and moves what runs, until the next start",
            '[domains] mode = "nodes", once all members are on their nodes',
        ),
        "systemd": tuple(
            f"systemctl set-property {unit} AllowedMemoryNodes={nodes}"
            for name, nodes in numbers.items()
            for unit in units.get(name, ())
        ),
        **_PROGRAMS,
    }


def plan_document(plan: NodePlan, units: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """As JSON (docs/json.md)."""
    return {
        "format": 1,
        "kernel_parameter": plan.parameter,
        "split": plan.split,
        "domains": {name: encode(one) for name, one in plan.domains.items()},
        "rest": list(plan.rest),
        "costs": list(plan.costs),
        "settings": {whom: list(lines) for whom, lines in settings(plan, units).items()},
    }
