# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.host.memory import Node, Range, Topology
from ksmd_ctl.kernel.home import Surroundings, range_home, read_surroundings, single
from tests.kernel.trees import write_tree

BOTH = Surroundings(frozenset({0, 1}), None)
TOPOLOGY = Topology(
    (
        Node(0, frozenset({0, 1}), 1 << 30, {0: 10, 1: 20, 2: 30}),
        Node(1, frozenset({2, 3}), 1 << 30, {0: 20, 1: 10, 2: 30}),
        Node(2, frozenset(), 1 << 30, {0: 30, 1: 30, 2: 10}),
    ),
    numa=True,
)


def item(policy: str, *nodes: int) -> Range:
    return Range(0, 1 << 20, frozenset({"mg"}), policy=policy, policy_nodes=frozenset(nodes))


@pytest.mark.parametrize(
    ("policy", "nodes", "unmerged", "around", "home"),
    [
        ("bind", (1,), {0: 50}, BOTH, 1),
        ("prefer", (0,), {1: 50}, BOTH, 0),
        ("prefer (many)", (0, 1), {1: 50, 0: 3}, BOTH, 1),
        ("bind", (0, 1), {0: 50, 1: 50}, BOTH, None),
        ("bind", (0, 1), {}, Surroundings(frozenset({0, 1}), 1), 1),
        # The cpuset took a node of the policy away, or all of them.
        ("bind", (0, 1), {1: 9}, Surroundings(frozenset({0}), None), 0),
        ("bind", (5,), {1: 9}, BOTH, 1),
        ("interleave", (0, 1), {1: 50}, BOTH, None),
        ("weighted interleave", (0, 1), {1: 50}, BOTH, None),
        ("interleave", (1,), {0: 50}, BOTH, 1),
        ("default", (), {0: 10, 1: 90}, BOTH, 1),
        ("local", (), {0: 10, 1: 90}, BOTH, 1),
        ("default", (), {0: 10, 2: 90}, BOTH, 0),
        ("default", (), {}, Surroundings(frozenset({0, 1}), 1), 1),
        ("default", (), {}, Surroundings(frozenset({0, 1}), 2), None),
        ("default", (), {}, Surroundings(frozenset({1}), 0), 1),
        ("default", (), {}, BOTH, None),
    ],
)
def test_where_a_range_belongs(
    policy: str, nodes: tuple[int, ...], unmerged: dict[int, int], around: Surroundings, home: int | None
) -> None:
    assert range_home(item(policy, *nodes), unmerged, around) == home


@given(
    st.sampled_from(["default", "bind", "prefer", "prefer (many)", "interleave", "local", "weighted interleave"]),
    st.frozensets(st.integers(0, 5)),
    st.dictionaries(st.integers(0, 5), st.integers(-3, 100)),
    st.frozensets(st.integers(0, 5), min_size=1),
    st.none() | st.integers(0, 5),
)
def test_home_is_never_outside_of_what_is_allowed(
    policy: str, nodes: frozenset[int], unmerged: dict[int, int], allowed: frozenset[int], cpu: int | None
) -> None:
    home = range_home(item(policy, *nodes), unmerged, Surroundings(allowed, cpu))
    assert home is None or home in allowed


@given(st.dictionaries(st.integers(0, 5), st.integers(0, 100)))
def test_most_is_more_than_half(weights: dict[int, int]) -> None:
    most = {node for node, weight in weights.items() if weight > sum(weights.values()) / 2}
    assert single(weights) == (most.pop() if most else None)


def _stat(ticks: int, cpu: int) -> str:
    fields = ["0"] * 49
    fields[14 - 4], fields[39 - 4] = str(ticks), str(cpu)
    return "7 (a b) S " + " ".join(fields) + "\n"


@pytest.mark.parametrize(
    ("mems", "cpus", "allowed", "cpu_node"),
    [
        ("0-1", "0-1", {0, 1}, 0),
        ("0-7", "0-3", {0, 1, 2}, 1),
        ("2", "2", {2}, 1),
        (None, None, {0, 1, 2}, 1),
    ],
)
def test_surroundings_from_status_and_threads(
    tmp_path: Path, mems: str | None, cpus: str | None, allowed: set[int], cpu_node: int
) -> None:
    status = "Name:\tx\n"
    if mems and cpus:
        status += f"Cpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{mems}\n"
    # The thread on node 1 has had more CPU time than both on node 0.
    threads = {f"proc/7/task/{7 + cpu}/stat": _stat(ticks, cpu) for cpu, ticks in ((0, 10), (1, 10), (3, 50))}
    root = write_tree(tmp_path, {"proc/7/status": status, **threads})
    assert read_surroundings(7, TOPOLOGY, root) == Surroundings(frozenset(allowed), cpu_node)
