# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, NoSuchProcess, Unparsable
from ksmd_ctl.host.memory import Node, Range, Topology
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import (
    NumaRange,
    Surroundings,
    mappings,
    parse_numa_maps,
    parse_smaps,
    range_home,
    read_ranges,
    read_surroundings,
    single,
)
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.trees import write_tree

SMAPS = """\
1000-5000 rw-p 00000000 00:00 0 
Size:                 16 kB
Rss:                   8 kB
Anonymous:             4 kB
KSM:                   4 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd wr mr mw me ac nh mg 
5000-6000 r--p 00002000 fe:00 260131                     /a b\\012KSM: (deleted)
Rss:                   4 kB
VmFlags: rd mr mw me 
"""  # noqa: W291


def test_mappings_with_figures_and_flags() -> None:
    first, second = parse_smaps(SMAPS)
    assert (first.start, first.end, first.name) == (0x1000, 0x5000, "")
    assert (first.resident_pages, first.anonymous_pages, first.ksm_pages) == (2, 1, 1)
    assert {"mg", "nh", "wr"} <= first.flags
    assert second.name == "/a b\\012KSM: (deleted)"
    assert second.ksm_pages is None


@pytest.mark.parametrize("text", ["nonsense\n", "Rss: 1 kB x\n", "1000-2000 rw-p\n"])
def test_what_is_not_smaps_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a line of smaps"):
        parse_smaps(text)


@pytest.mark.parametrize(
    ("policy", "name", "nodes"),
    [
        ("default", "default", set()),
        ("local", "local", set()),
        ("bind:0", "bind", {0}),
        ("bind=static:0-1,65", "bind", {0, 1, 65}),
        ("prefer:3", "prefer", {3}),
        ("prefer=relative:3", "prefer", {3}),
        ("prefer (many):1-2", "prefer (many)", {1, 2}),
        ("interleave:0-1", "interleave", {0, 1}),
        ("weighted interleave:0-1", "weighted interleave", {0, 1}),
        ("weighted interleave=static:7", "weighted interleave", {7}),
    ],
)
@pytest.mark.parametrize(
    ("rest", "counts"),
    [
        ("", ({}, 0)),
        (" anon=3 dirty=3 N0=1 N12=2 kernelpagesize_kB=4", ({0: 1, 12: 2}, 3)),
        (" file=/x\\040N3=4 mapped=2 N1=2 kernelpagesize_kB=4", ({1: 2}, 0)),
        (" file=/x\\040anon=9 anon=1 mapped=3 N1=3 kernelpagesize_kB=4", ({1: 3}, 1)),
        (" heap anon=1 N0=1", ({0: 1}, 1)),
    ],
)
def test_policies_of_mappings(
    policy: str, name: str, nodes: set[int], rest: str, counts: tuple[dict[int, int], int]
) -> None:
    found = parse_numa_maps(f"7f00 {policy}{rest}\n")
    assert found == {0x7F00: NumaRange(0x7F00, name, frozenset(nodes), *counts)}


@given(st.text(max_size=60))
def test_other_text_is_an_error_and_never_another_exception(text: str) -> None:
    for parse in (parse_numa_maps, parse_smaps):
        try:
            parse(text)
        except ValueError:
            continue


def test_ranges_join_both_files(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {"proc/7/smaps": SMAPS, "proc/7/numa_maps": "1000 bind:1 anon=2 dirty=2 N1=2 kernelpagesize_kB=4\n"},
    )
    first, second = read_ranges(7, root)
    assert first == Range(
        0x1000,
        0x5000,
        first.flags,
        policy="bind",
        policy_nodes=frozenset({1}),
        resident_pages=2,
        anonymous_pages=1,
        ksm_pages=1,
        huge_eligible=False,
    )
    assert first.mergeable
    assert (second.policy, second.ksm_pages, second.mergeable) == ("default", None, False)


def test_a_process_that_is_gone_and_a_file_that_no_kernel_has(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"proc/7/comm": "x\n", "proc/9/smaps": "garbage\n"})
    with pytest.raises(Absent, match="smaps"):
        mappings(7, root)
    with pytest.raises(NoSuchProcess, match="process 8"):
        read_ranges(8, root)
    with pytest.raises(Unparsable, match="garbage"):
        mappings(9, root)


def test_this_process() -> None:
    with spawn("test-ranges") as process:
        start = process.map(5)
        process.advise(start, 5, mergeable=True)
        process.store(start, [b"x" * PAGE_SIZE, b"y" * PAGE_SIZE])
        (found,) = (item for item in read_ranges(process.id.pid) if item.mergeable)
    assert (found.start, found.end, found.resident_pages) == (start, start + 5 * PAGE_SIZE, 2)
    assert found.ksm_pages in (0, None)
    assert len(mappings(os.getpid())) > 5


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
