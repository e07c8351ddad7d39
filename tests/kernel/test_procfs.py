# SPDX-License-Identifier: GPL-2.0-or-later
"""vmstat, memory, pressure, and which process is ksmd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, ReadError, Unparsable, Unreadable
from ksmd_ctl.host.fields import FIELDS, Source
from ksmd_ctl.host.sample import NodeMemory, Reading
from ksmd_ctl.kernel.procfs import (
    HostFiles,
    NodeFiles,
    find_ksmd,
    labelled_number,
    split_pages,
)
from ksmd_ctl.kernel.pseudofile import PseudoFile, read_file
from tests.fakes.ksmfs import FakeKsmFs

FILES = {
    Source.VMSTAT: "vmstat",
    Source.MEMINFO: "meminfo",
    Source.PRESSURE: "pressure/memory",
    Source.CPU_PRESSURE: "pressure/cpu",
}


@pytest.fixture
def fake(tmp_path: Path) -> FakeKsmFs:
    return FakeKsmFs(tmp_path)


def sample(fake: FakeKsmFs) -> tuple[dict[str, Reading], NodeMemory | None]:
    readings: dict[str, Reading] = {}
    files = HostFiles(fake.root)
    memory = files.sample(readings)
    files.close()
    return readings, memory


def test_everything_is_found(fake: FakeKsmFs) -> None:
    fake.memory(1000, 300, 700)
    readings, memory = sample(fake)
    assert readings == {
        "ksm_swpin_copy": 13,
        "cow_ksm": 14,
        "thp_split_page": 12,
        "split_folio_pages": 12 * 512,
        "thp_collapse_alloc": 11,
        "nr_anon_pages": 5000,
        "pressure_some_seconds": 1.5,
        "pressure_full_seconds": 0.25,
        "cpu_pressure_some_seconds": 1.5,
        "mem_total_bytes": 1000 * 1024,
        "mem_available_bytes": 700 * 1024,
    }
    assert memory == NodeMemory(1000 * 1024, 300 * 1024)


@pytest.mark.parametrize("source", list(FILES))
def test_a_file_that_is_missing_unreadable_or_garbage(fake: FakeKsmFs, source: Source) -> None:
    names = {field.name for field in FIELDS if field.source is source}
    if source is Source.VMSTAT:
        # Without a count of the largest ones those of all sizes are not known.
        names.add("split_folio_pages")
    path = fake.proc / FILES[source]
    for kind in (Absent, Unreadable, Unparsable):
        if kind is Absent:
            path.unlink()
        elif kind is Unreadable:
            fake.make_directory(path)
        else:
            path.rmdir()
            text = "".join(f"{name} many\n" for name in (*names, "some", "full", "MemTotal:", "MemAvailable:"))
            fake.write(path, text)
        readings, _ = sample(fake)
        for name, reading in readings.items():
            assert type(reading) is kind if name in names else not isinstance(reading, ReadError), name
    errors = [readings[name] for name in names]
    assert len({id(error) for error in errors}) == len(names)


def test_a_line_that_the_kernel_lacks_is_absent(fake: FakeKsmFs) -> None:
    fake.write(fake.proc / "vmstat", "xcow_ksm 1\ncow_ksm_x 2\nthp_split_page 3\n")
    readings, _ = sample(fake)
    assert type(readings["cow_ksm"]) is Absent
    assert type(readings["ksm_swpin_copy"]) is Absent
    assert readings["thp_split_page"] == 3


def test_splits_of_every_size_are_counted(tmp_path: Path) -> None:
    assert split_pages(tmp_path) is None
    fake = FakeKsmFs(tmp_path)
    huge = tmp_path / "sys/kernel/mm/transparent_hugepage"
    assert split_pages(tmp_path) == 12 * 512
    fake.write(huge / "hugepages-64kB/stats/split", "256\n")
    assert split_pages(tmp_path) == sample(fake)[0]["split_folio_pages"] == 12 * 512 + 256 * 16
    # A kernel that counts those of the largest size alone (before 6.11).
    for name in ("64kB", "2048kB"):
        (huge / f"hugepages-{name}/stats/split").unlink()
    assert split_pages(tmp_path) == 12 * 512
    fake.write(huge / "hugepages-64kB/stats/split", "?\n")
    assert split_pages(tmp_path) is None
    assert type(sample(fake)[0]["split_folio_pages"]) is Unparsable
    fake.write(fake.proc / "vmstat", "thp_split_pmd 5\n")
    assert split_pages(tmp_path) is None
    assert type(sample(fake)[0]["split_folio_pages"]) is Absent


def test_vmstat_may_be_longer_than_a_buffer(fake: FakeKsmFs) -> None:
    filler = "".join(f"nr_filler_{number} 0\n" for number in range(4000))
    fake.write(fake.proc / "vmstat", f"{filler}cow_ksm 77\n")
    assert sample(fake)[0]["cow_ksm"] == 77


def test_changes_are_seen_through_the_open_files(fake: FakeKsmFs) -> None:
    files = HostFiles(fake.root)
    readings: dict[str, Reading] = {}
    files.sample(readings)
    fake.write(fake.proc / "vmstat", "cow_ksm 1000\n")
    files.sample(readings)
    assert readings["cow_ksm"] == 1000
    files.close()


# -- ksmd --------------------------------------------------------------------------------------------------


def test_only_the_kernel_thread_is_ksmd(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, ksmd_pid=None)
    fake.add_process(20, "ksmd", parent=1, command=["ksmd"])
    fake.add_process(21, "ksmd", parent=1)
    fake.add_process(22, "ksmd", parent=2, command=["ksmd"])
    fake.add_process(23, "x) (ksmd) S 2 (", parent=9)
    fake.add_process(24, "kswapd0", parent=2)
    with pytest.raises(Absent):
        find_ksmd(fake.proc)
    fake.ksmd(1234)
    assert find_ksmd(fake.proc) == 1234


# -- nodes -------------------------------------------------------------------------------------------------


def test_memory_of_each_node(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, nodes={0: (1000, 100), 3: (2000, 0)})
    nodes = NodeFiles(fake.root)
    assert nodes.sample() == {0: NodeMemory(1024000, 102400), 3: NodeMemory(2048000, 0)}
    fake.set_nodes({3: (2000, 500), 11: (7, 7)})
    assert nodes.sample() == {3: NodeMemory(2048000, 512000), 11: NodeMemory(7168, 7168)}
    nodes.close()
    assert nodes.sample() is not None
    nodes.close()


def test_a_node_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, nodes={0: (1000, 100), 1: (2000, 0), 2: (3000, 0)})
    directory = tmp_path / "sys/devices/system/node"
    (directory / "node0/meminfo").unlink()
    fake.write(directory / "node1/meminfo", "Node 1 MemTotal: x kB\n")
    nodes = NodeFiles(fake.root)
    assert nodes.sample() == {2: NodeMemory(3072000, 0)}
    nodes.close()


def test_a_kernel_without_numa_has_no_nodes(tmp_path: Path) -> None:
    nodes = NodeFiles(FakeKsmFs(tmp_path, nodes={}).root)
    assert nodes.sample() is None
    nodes.close()


def test_a_garbage_list_of_nodes_is_unparsable(fake: FakeKsmFs) -> None:
    fake.write(fake.root / "sys/devices/system/node/online", "zero\n")
    nodes = NodeFiles(fake.root)
    for _ in range(2):
        with pytest.raises(Unparsable):
            nodes.sample()
    nodes.close()


# -- forms -------------------------------------------------------------------------------------------------


@given(st.binary(max_size=100))
def test_any_bytes_have_a_number_none_or_a_valueerror(data: bytes) -> None:
    for text in (data, b"a " + data, b"x 1\na " + data):
        try:
            found = labelled_number(text, b"a ")
        except ValueError:
            continue
        assert found is None or found >= 0


# -- one file ----------------------------------------------------------------------------------------------


def test_a_process_that_ends_is_absent_and_its_descriptor_given_back() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    before = len(os.listdir("/proc/self/fd"))
    file = PseudoFile(Path(f"/proc/{pid}/stat"))
    assert file.read().startswith(b"%d (" % pid)
    os.waitpid(pid, 0)
    with pytest.raises(Absent):
        file.read()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run")
    with pytest.raises(Unreadable):
        read_file(tmp_path / "run")
