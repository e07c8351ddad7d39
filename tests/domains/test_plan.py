# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.domains.plan import (
    FAKE_NODE_BYTES,
    LEAST_BYTES,
    MOST_SPLIT,
    Need,
    NodePlan,
    plan_document,
    propose,
    settings,
)
from ksmd_ctl.errors import Refused
from ksmd_ctl.host.memory import Node, Topology

GIB = 1 << 30


def topology(*sizes: int, cpus: tuple[int, ...] = ()) -> Topology:
    """Nodes of so many bytes, each with a CPU of its own, or with these."""
    return Topology(
        tuple(
            Node(number, frozenset({cpus[number] if cpus else number}), size, {}) for number, size in enumerate(sizes)
        ),
        numa=True,
    )


def needs(*sizes: int) -> list[Need]:
    return [Need(f"d{number}", size) for number, size in enumerate(sizes)]


def nodes_of(plan: NodePlan) -> list[tuple[int, ...]]:
    return [one.nodes for one in plan.domains.values()]


_SIZES = st.integers(1, 64).map(lambda count: count * 256 << 20)


@given(
    st.lists(_SIZES, min_size=1, max_size=5),
    st.lists(st.integers(0, 16 * GIB), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.integers(0, GIB),
)
def test_what_holds_of_each_plan(sizes: list[int], memory: list[int], reserve: float, host_bytes: int) -> None:
    there = topology(*sizes)
    try:
        plan = propose(needs(*memory), there, reserve, host_bytes)
    except Refused:
        return
    given_away = [node for one in plan.domains.values() for node in one.nodes]
    # No node twice, none that is not there, and none lost.
    numbers = range(len(sizes) * (plan.split or 1))
    assert sorted([*given_away, *plan.rest]) == list(numbers)
    # Each domain has a node, and at least its need with the reserve.
    total = sum(sizes)
    for one, size in zip(plan.domains.values(), memory, strict=True):
        assert one.nodes
        assert one.room_bytes >= one.needed_bytes >= max(LEAST_BYTES, size * (1 + reserve))
        rooms = [sizes[node // (plan.split or 1)] / (plan.split or 1) for node in one.nodes]
        assert sum(rooms) * (1 - host_bytes / total) >= one.needed_bytes - len(one.nodes)
    assert plan.split == 0 or 2 <= plan.split <= MOST_SPLIT


@given(st.lists(_SIZES, min_size=1, max_size=4), st.lists(st.integers(0, 8 * GIB), min_size=1, max_size=4))
def test_real_nodes_are_taken_wherever_there_is_one_for_each(sizes: list[int], memory: list[int]) -> None:
    wanted = sorted((need.with_reserve(0.25) for need in needs(*memory)), reverse=True)
    largest = sorted(sizes, reverse=True)
    if len(wanted) <= len(sizes) and all(size >= need for size, need in zip(largest, wanted, strict=False)):
        assert propose(needs(*memory), topology(*sizes), 0.25).split == 0


def test_a_domain_stays_where_its_memory_is() -> None:
    found = propose(
        [Need("a", GIB, {1: GIB}), Need("b", GIB, {0: GIB // 4, 1: 3 * GIB // 4})], topology(4 * GIB, 4 * GIB), 0.25
    )
    assert nodes_of(found) == [(1,), (0,)]
    assert [one.moved_bytes for one in found.domains.values()] == [0, 3 * GIB // 4]
    assert any("768.0 MiB has to be moved" in cost for cost in found.costs)


def test_a_domain_may_get_several_nodes_and_no_more_than_it_needs() -> None:
    found = propose(needs(6 * GIB, GIB), topology(*[4 * GIB] * 4), 0.25)
    assert (found.split, [len(nodes) for nodes in nodes_of(found)], len(found.rest)) == (0, [2, 1], 1)


def test_with_too_few_nodes_each_real_one_is_split() -> None:
    found = propose(needs(GIB, GIB, GIB), topology(8 * GIB, 8 * GIB), 0.25)
    assert (found.split, found.parameter) == (2, "numa=fake=2U")
    assert len(found.rest) == 1
    assert any("started anew" in cost for cost in found.costs)


def test_a_split_node_is_as_small_as_the_needs_let_it_be() -> None:
    """Two domains of 3.5 GiB and two small ones: halves are too large, as each small one would take one."""
    found = propose(needs(5 * GIB, 5 * GIB, GIB, GIB), topology(16 * GIB), 0.25)
    assert found.split > 4
    assert all(one.room_bytes >= one.needed_bytes for one in found.domains.values())


def test_domains_of_one_real_node_stay_on_it() -> None:
    found = propose(
        [Need("a", GIB, {1: GIB}), Need("b", GIB, {1: GIB}), Need("c", GIB, {0: GIB})], topology(8 * GIB, 8 * GIB), 0.0
    )
    assert nodes_of(found) == [(2,), (3,), (0,)]
    assert sum(one.moved_bytes for one in found.domains.values()) == 0


def test_nodes_with_the_same_cpus_are_one_real_node() -> None:
    """The host runs with numa=fake=2U, and three domains want more nodes than that."""
    there = topology(*[4 * GIB] * 2, cpus=(0, 0))
    found = propose(needs(GIB, GIB, GIB), there, 0.25)
    assert (found.split, found.rest) == (3, ())
    assert nodes_of(found) == [(0,), (1,), (2,)]


def test_with_many_real_nodes_they_are_still_taken() -> None:
    found = propose(needs(*[GIB] * 9), topology(*[2 * GIB] * 12), 0.25)
    assert found.split == 0
    assert len({node for nodes in nodes_of(found) for node in nodes}) == 9


def test_nodes_without_memory_are_left_out() -> None:
    found = propose(needs(GIB), topology(0, 4 * GIB), 0.25)
    assert (nodes_of(found), found.rest) == ([(1,)], ())


@pytest.mark.parametrize(
    ("memory", "why"),
    [
        ([8 * GIB], r"1 domain need 10\.0 GiB, the nodes have 8\.0 GiB"),
        ([LEAST_BYTES] * (MOST_SPLIT + 1), "into more than 64 parts no node is split"),
    ],
)
def test_what_can_not_be(memory: list[int], why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        propose(needs(*memory), topology(8 * GIB), 0.25)
    assert caught.value.hint


def test_what_all_else_takes_is_borne_by_each_node() -> None:
    with pytest.raises(Refused, match=r"the nodes have 6\.0 GiB"):
        propose(needs(6 * GIB), topology(4 * GIB, 4 * GIB), 0.25, 2 * GIB)


def test_split_nodes_have_sizes_that_the_kernel_makes() -> None:
    found = propose(needs(GIB, GIB), topology(3 * GIB + 12345), 0.25)
    assert all(one.room_bytes % FAKE_NODE_BYTES == 0 for one in found.domains.values())


def test_what_to_set() -> None:
    found = propose(needs(GIB, GIB), topology(8 * GIB), 0.25)
    said = settings(found, {"d0": ("a.service", "b.slice")})
    assert list(said) == ["kernel", "ksmd-ctl", "systemd", "libvirt", "Proxmox", "podman", "Kubernetes"]
    assert "numa=fake=2U" in said["kernel"][0]
    assert said["ksmd-ctl"][:2] == ('[domains.d0] nodes = "0"', '[domains.d1] nodes = "1"')
    assert said["systemd"][:2] == (
        "systemctl set-property a.service AllowedMemoryNodes=0",
        "systemctl set-property b.slice AllowedMemoryNodes=0",
    )
    real = propose(needs(GIB, GIB), topology(8 * GIB, 8 * GIB), 0.25)
    assert "kernel" not in settings(real, {})


def test_the_document() -> None:
    document = plan_document(propose(needs(GIB, GIB), topology(8 * GIB), 0.25), {})
    assert document["kernel_parameter"] == "numa=fake=2U"
    assert document["domains"] == {
        name: {"nodes": [node], "needed_bytes": 5 * GIB // 4, "room_bytes": 4 * GIB, "moved_bytes": 0}
        for name, node in (("d0", 0), ("d1", 1))
    }
    assert document["costs"]
