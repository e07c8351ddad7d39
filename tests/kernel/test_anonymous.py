# SPDX-License-Identifier: GPL-2.0-or-later
"""Only anonymous pages are a process's own: page cache of a file that it maps privately says nothing about it."""

from __future__ import annotations

import mmap
import os
from array import array
from pathlib import Path

import pytest

from ksmd_ctl.host.memory import HomeRange, KsmWitness, Range
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.anonymous import anonymous_nodes, own_parts, zero_frame, zero_mappings
from ksmd_ctl.kernel.inventory import inventory_of
from ksmd_ctl.kernel.kpageflags import Bit
from ksmd_ctl.kernel.pagemap import FILE, PRESENT, SOFT_DIRTY, Pagemap
from ksmd_ctl.kernel.processes import Surveyor
from ksmd_ctl.kernel.ranges import NumaRange, numa_ranges, read_ranges
from ksmd_ctl.kernel.syscalls import PAGE_SIZE
from ksmd_ctl.kernel.topology import read_frame_map
from ksmd_ctl.kernel.witness import PageReader
from tests.kernel.test_home import TOPOLOGY
from tests.kernel.test_processes import FRAMES, MERGED, stat
from tests.kernel.trees import node, write_tree

PAGE = 4096
START = 0x100000


def snapshot(root: Path, *, frames: bool = True) -> Path:
    """A process on node 0 that maps a file of 4096 pages, cached on node 1, and has written 20 of them."""
    write_tree(
        root,
        {
            "proc/meminfo": "MemTotal: 2048 kB\nMemAvailable:    1024 kB\n",
            **node(0, "0", 1024, "10 20 20"),
            **node(1, "1", 1024, "20 10 20"),
            **node(2, "", 1024, "20 20 10"),
            "proc/7/stat": stat(7, "snapshot"),
            "proc/7/status": "Cpus_allowed_list:\t0\nMems_allowed_list:\t0-1\n",
            "proc/7/ksm_stat": "ksm_rmap_items 20\nksm_merging_pages 5\n",
            "proc/7/smaps": (
                f"{START:x}-{START + 4096 * PAGE:x} rw-p 00000000 fe:00 11 /var/lib/vm/snapshot\n"
                f"Rss: {4096 * 4} kB\nAnonymous: {20 * 4} kB\nKSM: {5 * 4} kB\nVmFlags: rd wr mg \n"
            ),
            "proc/7/numa_maps": f"{START:x} default file=/var/lib/vm/snapshot mapped=4096 anon=20 N0=20 N1=4076\n",
        },
    )
    entries = array("Q", bytes(8 * (START // PAGE + 4096)))
    for page in range(4096):
        # Every two hundredth page was written, and five of these are merged.
        own = page % 200 == 0 and page < 4000
        frame = 100 + page // 200 if own else 1000 + page % 500
        entries[START // PAGE + page] = PRESENT | (0 if own else FILE) | (frame if frames else 0)
    (root / "proc/7/pagemap").write_bytes(entries.tobytes())
    flags = array("Q", bytes(8 * 2000))
    for frame in range(100, 120):
        flags[frame] = MERGED if frame < 105 else 1 << Bit.ANON
    (root / "proc/kpageflags").write_bytes(flags.tobytes())
    return root


def test_cached_files_are_neither_home_nor_size(tmp_path: Path) -> None:
    root = snapshot(tmp_path)
    with PageReader(KsmWitness.KPAGEFLAGS, root) as reader:
        surveyor = Surveyor(TOPOLOGY, FRAMES, reader, root=root)
        processes = surveyor.all()
        inventory = inventory_of(processes, surveyor, TOPOLOGY, None, 0, root, PAGE)
    (found,) = processes
    assert (found.resident_bytes, found.file_bytes) == (20 * PAGE, 4076 * PAGE)
    assert (found.home, found.remote_pages, found.nodes) == (0, 0, {0: 5})
    (stock,) = inventory.stocks
    assert stock.ranges == (HomeRange(START, START + 4096 * PAGE, 0, {0: 20}, 5),)


def test_where_frames_are_not_shown_the_cpu_decides(tmp_path: Path) -> None:
    (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=snapshot(tmp_path, frames=False)).all()
    assert (found.home, found.resident_bytes) == (0, 20 * PAGE)


def test_anonymous_pages_of_a_mixed_mapping_by_node(tmp_path: Path) -> None:
    root = snapshot(tmp_path)
    (item,), numa = read_ranges(7, root), numa_ranges(7, root)

    def nodes(found: NumaRange | None) -> dict[int, int]:
        return dict(anonymous_nodes(7, item, found, FRAMES, root, PAGE))

    assert nodes(numa[START]) == {0: 20}
    # Without pages of files numa_maps tells it all; without NUMA there is one node.
    assert nodes(NumaRange(START, "default", frozenset(), {0: 12, 1: 8}, 20)) == {0: 12, 1: 8}
    assert nodes(None) == {0: 20}
    assert anonymous_nodes(7, Range(START, START + PAGE, frozenset(), resident_pages=1), None, FRAMES, root, PAGE) == {}


@pytest.mark.parametrize("most", [4, 3])
def test_zero_pages_are_counted_page_by_page_where_the_kernel_does_not_scan(tmp_path: Path, most: int) -> None:
    frame = zero_frame()
    if not frame:
        pytest.skip("needs CAP_SYS_ADMIN: pagemap shows no frames")
    (tmp_path / "proc/7").mkdir(parents=True)
    entries = array("Q", [PRESENT | frame, PRESENT | SOFT_DIRTY | frame, PRESENT | frame + 1, 0])
    (tmp_path / "proc/7/pagemap").write_bytes(entries.tobytes())
    with Pagemap(7, tmp_path) as pagemap:
        item = Range(0, 4 * PAGE, frozenset({"mg"}), anonymous_pages=1)
        # More pages than are to be looked at: that isn't known, which is not none.
        assert zero_mappings(pagemap, [item], PAGE, most) == (2 if most == 4 else None)
        assert own_parts(pagemap, item, PAGE, sparse=True) == ((0, 4 * PAGE),)


def test_a_private_mapping_of_a_file_on_this_kernel(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(64 * PAGE_SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE) as memory:
        for page in range(64):
            memory[page * PAGE_SIZE]
        for page in range(0, 64, 8):
            memory[page * PAGE_SIZE] = page
        start, pid = syscalls.address_of(memory), os.getpid()
        (item,) = (item for item in read_ranges(pid, page_size=PAGE_SIZE) if item.start == start)
        frames = read_frame_map(Path("/"), PAGE_SIZE)
        found = anonymous_nodes(pid, item, numa_ranges(pid).get(start), frames, Path("/"), PAGE_SIZE)
    assert (item.resident_pages, item.anonymous_pages, sum(found.values())) == (64, 8, 8)
