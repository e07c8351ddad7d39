# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess
from ksmd_ctl.host.memory import HomeRange, KsmDetection, Range
from ksmd_ctl.kernel import syscalls
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.inventory import inventory_of
from ksmd_ctl.kernel.kpageflags import Bit
from ksmd_ctl.kernel.pagemap import (
    EXCLUSIVE,
    FILE,
    PRESENT,
    SWAPPED,
    Pagemap,
    all_have,
    anonymous_nodes,
    any_has,
    frame_limits,
    frames_of,
    own_parts,
)
from ksmd_ctl.kernel.processes import Surveyor
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import NumaRange, numa_ranges, read_ranges
from ksmd_ctl.kernel.topology import read_frame_map
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_processes import FRAMES, MERGED, stat
from tests.kernel.test_ranges import TOPOLOGY
from tests.kernel.trees import node, write_tree

_NUMBERS = st.integers(1, (1 << 55) - 1)


@given(st.lists(st.tuples(st.booleans(), _NUMBERS, st.integers(0, 63))))
def test_an_entry_has_a_frame_if_it_is_present_whatever_its_other_bits(pages: list[tuple[bool, int, int]]) -> None:
    # A swap slot in the same bits is not a frame; bits 55 to 61 say other things.
    entries = [(PRESENT if there else SWAPPED) | other << 55 | frame for there, frame, other in pages]
    assert frames_of(array("Q", entries)) == [frame if there else 0 for there, frame, _ in pages]


@given(st.integers(0, 1100), st.sets(st.integers(0, 1099), max_size=2), st.sampled_from([PRESENT, PRESENT | EXCLUSIVE]))
def test_whether_all_entries_have_some_bits(count: int, without: set[int], bits: int) -> None:
    entries = array("Q", [PRESENT | EXCLUSIVE | 5]) * count
    for index in without:
        if index < count:
            entries[index] &= ~EXCLUSIVE
    assert all_have(entries, bits) is all(entry & bits == bits for entry in entries)
    assert any_has(entries, EXCLUSIVE) is any(entry & EXCLUSIVE for entry in entries)
    assert not any_has(entries, FILE)


@given(st.lists(st.tuples(st.sampled_from([PRESENT, PRESENT | EXCLUSIVE, SWAPPED]), _NUMBERS), max_size=6))
def test_limits_of_frames_are_told_only_where_they_are_right(pages: list[tuple[int, int]]) -> None:
    found = frame_limits(array("Q", [bits | frame for bits, frame in pages]))
    if {bits for bits, _ in pages} in ({PRESENT}, {PRESENT | EXCLUSIVE}):
        assert found == (min(frame for _, frame in pages), max(frame for _, frame in pages))
    else:
        assert found is None


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=40), st.data())
def test_any_part_of_a_file_is_read_as_it_stands(words: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(words) - 1))
    count = data.draw(st.integers(0, len(words) + 3))
    with tempfile.TemporaryDirectory() as folder:
        process = Path(folder) / "proc/7"
        process.mkdir(parents=True)
        (process / "pagemap").write_bytes(array("Q", words).tobytes())
        with Pagemap(7, Path(folder)) as pagemap:
            assert list(pagemap.read(first * 4096, count)) == words[first : first + count]


def test_pages_without_frames_mean_a_missing_privilege(tmp_path: Path) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    entries = array("Q", [0, SWAPPED | 5, PRESENT, PRESENT | 9, 0, PRESENT])
    (tmp_path / "proc/7/pagemap").write_bytes(entries.tobytes())
    with Pagemap(7, tmp_path) as pagemap:
        assert pagemap.read_frames(0, 2) == entries[:2]
        assert pagemap.read_frames(2 * 4096, 2) == entries[2:4]
        with pytest.raises(Denied, match="without their frames") as caught:
            pagemap.read_frames(4 * 4096, 2)
        assert "CAP_SYS_ADMIN" in caught.value.hint


def test_no_process_and_no_pagemap_are_two_things(tmp_path: Path) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    with pytest.raises(Absent, match=r"pagemap.*does not have it"):
        Pagemap(7, tmp_path)
    with pytest.raises(NoSuchProcess, match="process 8"):
        Pagemap(8, tmp_path)


def test_a_process_that_exits_under_an_open_file_is_noticed() -> None:
    with spawn("test-pagemap") as process:
        start = process.map(2)
        process.store(start, [b"x" * PAGE_SIZE, None])
        with Pagemap(process.id.pid) as pagemap:
            present, absent = pagemap.read(start, 2)
            assert present & PRESENT
            assert not absent & PRESENT
            process.exit()
            with pytest.raises(NoSuchProcess):
                pagemap.read(start, 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_somebody_elses_process_is_not_ours_to_look_at() -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setresuid(65534, 65534, 65534)
            Pagemap(1)
        except Denied as error:
            code = 0 if "CAP_SYS_PTRACE" in error.hint else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_anonymous_pages_are_found_among_holes_and_zero_pages() -> None:
    size = 64 << 30
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
    start = syscalls.mmap(0, size, syscalls.PROT_READ | syscalls.PROT_WRITE, flags)
    try:
        syscalls.madvise(start, size, syscalls.MADV_NOHUGEPAGE)
        for page in (0, 1, 7000, 7020):
            syscalls.store(start + page * PAGE_SIZE, b"x")
        # Read and never written: the zero page.
        for page in (2, 7001, 9000):
            syscalls.load(start + page * PAGE_SIZE, 1)
        with Pagemap(os.getpid()) as pagemap:
            try:
                found = list(pagemap.populated(start, start + size))
            except Absent as error:
                pytest.skip(str(error))
            joined = list(pagemap.populated(start, start + size, 19 * PAGE_SIZE))
    finally:
        syscalls.munmap(start, size)
    pages = [((first - start) // PAGE_SIZE, (last - start) // PAGE_SIZE) for first, last in found]
    assert pages == [(0, 2), (7000, 7001), (7020, 7021)]
    assert [((first - start) // PAGE_SIZE, (last - start) // PAGE_SIZE) for first, last in joined] == [
        (0, 2),
        (7000, 7021),
    ]


def test_more_regions_than_one_call_gives() -> None:
    count = 10_000
    memory = mmap.mmap(-1, 2 * count * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = syscalls.address_of(memory)
    syscalls.madvise(start, len(memory), syscalls.MADV_NOHUGEPAGE)
    for page in range(0, 2 * count, 2):
        syscalls.store(start + page * PAGE_SIZE, b"x")
    with Pagemap(os.getpid()) as pagemap:
        try:
            found = list(pagemap.populated(start, start + len(memory)))
        except Absent as error:
            pytest.skip(str(error))
    expected = [start + page * PAGE_SIZE for page in range(0, 2 * count, 2)]
    assert found == [(address, address + PAGE_SIZE) for address in expected]


def test_a_file_that_is_no_pagemap_can_not_be_scanned(tmp_path: Path) -> None:
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/pagemap").write_bytes(bytes(64))
    with Pagemap(7, tmp_path) as pagemap:
        with pytest.raises(Absent, match="scanned"):
            list(pagemap.populated(0, 8 * 4096))
        # Then a mapping is looked at as a whole, however few pages it has.
        item = Range(0, 8 * 4096, frozenset({"mg"}), anonymous_pages=1)
        assert own_parts(pagemap, item, sparse=True) == ((0, 8 * 4096),)


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
    with PageReader(KsmDetection.KPAGEFLAGS, root) as reader:
        surveyor = Surveyor(TOPOLOGY, FRAMES, reader, root=root)
        processes = surveyor.all()
        inventory = inventory_of(processes, surveyor, TOPOLOGY, None, 0, root)
    (found,) = processes
    assert (found.resident_bytes, found.file_bytes) == (20 * PAGE, 4076 * PAGE)
    assert (found.home, found.remote_pages, found.nodes) == (0, 0, {0: 5})
    (memory,) = inventory.memories
    assert memory.ranges == (HomeRange(START, START + 4096 * PAGE, 0, {0: 20}, 5),)


def test_where_frames_are_not_shown_the_cpu_decides(tmp_path: Path) -> None:
    (found,) = Surveyor(TOPOLOGY, FRAMES, None, root=snapshot(tmp_path, frames=False)).all()
    assert (found.home, found.resident_bytes) == (0, 20 * PAGE)


def test_anonymous_pages_of_a_mixed_mapping_by_node(tmp_path: Path) -> None:
    root = snapshot(tmp_path)
    (item,), numa = read_ranges(7, root), numa_ranges(7, root)

    def nodes(found: NumaRange | None) -> dict[int, int]:
        return dict(anonymous_nodes(7, item, found, FRAMES, root))

    assert nodes(numa[START]) == {0: 20}
    # Without pages of files numa_maps tells it all; without NUMA there is one node.
    assert nodes(NumaRange(START, "default", frozenset(), {0: 12, 1: 8}, 20)) == {0: 12, 1: 8}
    assert nodes(None) == {0: 20}
    assert anonymous_nodes(7, Range(START, START + PAGE, frozenset(), resident_pages=1), None, FRAMES, root) == {}


def test_a_private_mapping_of_a_file_on_this_kernel(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(64 * PAGE_SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE) as memory:
        for page in range(64):
            memory[page * PAGE_SIZE]
        for page in range(0, 64, 8):
            memory[page * PAGE_SIZE] = page
        start, pid = syscalls.address_of(memory), os.getpid()
        (item,) = (item for item in read_ranges(pid) if item.start == start)
        frames = read_frame_map()
        found = anonymous_nodes(pid, item, numa_ranges(pid).get(start), frames, Path("/"))
    assert (item.resident_pages, item.anonymous_pages, sum(found.values())) == (64, 8, 8)
