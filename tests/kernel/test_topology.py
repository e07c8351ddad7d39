# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Unparsable
from ksmd_ctl.kernel import topology
from ksmd_ctl.kernel.topology import FrameMap, MemoryBlock, Span, read_frame_map, read_topology
from tests.kernel.trees import node, write_tree, zone

NODES = "sys/devices/system/node"
MEMORY = "sys/devices/system/memory"


def test_sparse_numbers_memory_only_nodes_and_nodes_without_memory(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            f"{NODES}/online": "0,2-3\n",
            **node(0, "0-1", 1000, "10 20 40", free_kib=600),
            **node(2, "", 500, "20 10 30"),
            **node(3, "2", 0, "40 30 10"),
        },
    )
    found = read_topology(root, numa=True)
    assert [item.number for item in found.nodes] == [0, 2, 3]
    assert [item.number for item in found.with_memory()] == [0, 2]
    zero, two, three = found.nodes
    assert zero.cpus == {0, 1}
    assert zero.distances == {0: 10, 2: 20, 3: 40}
    assert (two.cpus, two.memory_bytes) == (frozenset(), 500 * 1024)
    assert (three.cpus, three.memory_bytes) == ({2}, 0)
    assert topology.node_memory(0, root).free_bytes == 600 * 1024
    assert found.numa
    assert not found.going_offline


def test_a_node_that_goes_while_we_look_is_left_out(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {f"{NODES}/online": "0-1\n", **node(0, "0", 1000, "10 20")})
    assert [item.number for item in read_topology(root, numa=True).nodes] == [0]


def test_a_node_that_lacks_a_file_is_an_error(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {f"{NODES}/online": "0\n", f"{NODES}/node0/distance": "10\n"})
    with pytest.raises(Absent, match="cpulist"):
        read_topology(root, numa=True)


def test_distances_that_do_not_match_the_nodes_are_an_error(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {f"{NODES}/online": "0\n", **node(0, "0", 1000, "10 20")})
    with pytest.raises(Unparsable, match="1 nodes are online"):
        read_topology(root, numa=True)


def test_without_numa_there_is_one_node(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {"proc/meminfo": "MemTotal:        2048 kB\nMemFree:  1 kB\n", "sys/devices/system/cpu/online": "0-3\n"},
    )
    found = read_topology(root, numa=False)
    assert not found.numa
    assert [(item.number, item.memory_bytes, len(item.cpus)) for item in found.nodes] == [(0, 2048 * 1024, 4)]


def _blocks(states: dict[int, tuple[str, str]]) -> dict[str, str]:
    files = {f"{MEMORY}/block_size_bytes": "8000000\n"}
    for number, (nodes, state) in states.items():
        files[f"{MEMORY}/memory{number}/state"] = f"{state}\n"
        for name in nodes:
            files[f"{NODES}/node{name}/memory{number}"] = f"-> ../../memory/memory{number}"
    return files


def test_blocks_have_a_state_and_one_that_goes_offline_shows(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            f"{NODES}/online": "0\n",
            **node(0, "0", 1000, "10"),
            **_blocks({0: ("0", "online"), 1: ("0", "going-offline"), 4: ("", "offline")}),
        },
    )
    assert topology.memory_blocks(root) == (
        MemoryBlock(0, 0, 0x8000, frozenset({0}), "online"),
        MemoryBlock(1, 0x8000, 0x10000, frozenset({0}), "going-offline"),
        MemoryBlock(4, 0x20000, 0x28000, frozenset(), "offline"),
    )
    assert read_topology(root, numa=True).going_offline


def test_going_offline_is_also_what_ksm_says(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {f"{NODES}/online": "0\n", **node(0, "0", 1000, "10")})
    assert not read_topology(root, numa=True).going_offline
    assert read_topology(root, numa=True, going_offline=True).going_offline


def test_a_block_over_a_border_is_cut_where_the_zones_say(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            **_blocks({0: ("0", "online"), 1: ("01", "online"), 2: ("1", "online"), 3: ("1", "offline")}),
            "proc/zoneinfo": zone(0, "DMA", 1, 0xFFF)
            + zone(0, "DMA32", 0x1000, 0xA000)
            + zone(1, "DMA32", 0xB000, 0x15000),
        },
    )
    frames = read_frame_map(root)
    assert frames.spans == (Span(0, 0xB000, 0), Span(0xB000, 0x18000, 1))
    assert [frames.node(frame) for frame in (0, 0xAFFF, 0xB000, 0x17FFF, 0x18000)] == [0, 0, 1, 1, None]


def test_without_blocks_the_zones_say_and_the_inner_one_wins(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {"proc/zoneinfo": zone(0, "Normal", 100, 900) + zone(1, "Normal", 300, 200) + zone(1, "Movable", 0, 0)},
    )
    assert read_frame_map(root).spans == (Span(100, 300, 0), Span(300, 500, 1), Span(500, 1000, 0))


def test_no_zone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unparsable, match="no zone"):
        read_frame_map(write_tree(tmp_path, {"proc/zoneinfo": "Node 0, zone\n"}))


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 3)), max_size=20))
def test_every_frame_has_the_node_of_its_span(pieces: list[tuple[int, int, int]]) -> None:
    spans, expected, at = [], {}, 0
    for length, gap, number in pieces:
        at += gap
        spans.append(Span(at, at + length, number))
        expected.update(dict.fromkeys(range(at, at + length), number))
        at += length
    frames = FrameMap(reversed(spans))
    assert {frame: frames.node(frame) for frame in range(-1, at + 2)} == {
        frame: expected.get(frame) for frame in range(-1, at + 2)
    }
    assert frames.frames == len(expected)
    for first, last in ((0, at), (at // 3, at // 2), (at // 2, at - 1)):
        inside = {expected[frame] for frame in range(first, last + 1) if frame in expected}
        whole = first in expected and last in expected and len(inside) == 1
        assert frames.only_node(first, last) == (inside.pop() if whole else None)


def test_frames_on_two_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="two nodes"):
        FrameMap([Span(0, 10, 0), Span(9, 12, 1)])


@pytest.mark.skipif(not os.path.isdir(f"/{NODES}"), reason="this kernel has no NUMA (/sys/devices/system/node)")
def test_this_machine() -> None:
    found = read_topology(numa=True)
    assert found.with_memory()
    assert read_frame_map().nodes() == {item.number for item in found.with_memory()}
