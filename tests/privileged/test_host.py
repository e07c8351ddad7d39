# SPDX-License-Identifier: GPL-2.0-or-later
"""The running kernel as a host: on fake trees, and on the kernel that is there."""

from __future__ import annotations

import mmap
import os
import platform
import time
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, Denied, ExitCode, NoSuchProcess, ReadError, Rejected, TimedOut
from ksmd_ctl.host.fields import FIELDS, FIELDS_BY_NAME
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import KNOBS, KSMD_KNOBS, Knob, KnobValue
from ksmd_ctl.host.memory import ProcessClass, ProcessId
from ksmd_ctl.host.operation import Move, finish, readable
from ksmd_ctl.host.sample import HostKind, NodeMemory, Writer
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.privileged.host import KernelHost, open_kernel_host
from tests.fakes.ksmfs import FILES_6_1, FILES_6_12, FakeKsmFs
from tests.fakes.unsharing import unshare_one

PAGE = os.sysconf("SC_PAGE_SIZE")


def write(host: KernelHost, knob: Knob, value: KnobValue) -> KnobValue:
    return finish(host.write(knob, value, 30), 60)


def test_a_sample_has_every_field_in_the_order_of_the_table(tmp_path: Path) -> None:
    host = open_kernel_host(FakeKsmFs(tmp_path).root)
    sample = host.sample()
    assert list(sample.readings) == [field.name for field in FIELDS]
    assert all(not isinstance(reading, ReadError) for reading in sample.readings.values())
    assert sample.nodes == {0: NodeMemory(8 << 30, 4 << 30)}
    host.close()
    assert host.sample().readings == sample.readings
    host.close()


@pytest.mark.parametrize("files", [FILES_6_1, None])
def test_what_a_kernel_lacks_is_absent_in_a_sample(tmp_path: Path, files: dict[str, str] | None) -> None:
    host = open_kernel_host(FakeKsmFs(tmp_path, files=files, ksmd_pid=None).root)
    readings = host.sample().readings
    absent = {name for name, reading in readings.items() if isinstance(reading, Absent)}
    assert absent == {*FILES_6_12, "ksmd_cpu_seconds", "ksmd_wait_seconds", *KSMD_KNOBS} - set(files or ())
    assert set(readings) == set(FIELDS_BY_NAME)
    host.close()


def test_a_sample_of_nothing_at_all_raises_nothing(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, files=None, nodes={}, ksmd_pid=None)
    for name in ("vmstat", "meminfo", "pressure/memory", "pressure/cpu"):
        (fake.proc / name).unlink()
    host = open_kernel_host(fake.root)
    sample = host.sample()
    assert {type(reading) for reading in sample.readings.values()} == {Absent}
    assert sample.nodes == {}
    host.close()


def test_without_numa_all_memory_is_node_0(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, nodes={})
    fake.memory(1000, 400, 700)
    host = open_kernel_host(fake.root)
    assert host.sample().nodes == {0: NodeMemory(1000 << 10, 400 << 10)}
    host.close()


def test_unknown_nodes_are_not_made_up(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    fake.write(tmp_path / "sys/devices/system/node/online", "?\n")
    host = open_kernel_host(fake.root)
    assert host.sample().nodes == {}
    host.close()


def test_who_it_is(tmp_path: Path) -> None:
    identity = open_kernel_host(FakeKsmFs(tmp_path, release="6.1.0-x").root).identity
    assert (identity.kind, identity.release, identity.simulated) == (HostKind.KERNEL, "6.1.0-x", False)
    assert identity.boot_id == "00000000-0000-4000-8000-000000000001"
    own = open_kernel_host().identity
    assert own.release == platform.release()
    assert own.page_size_bytes == os.sysconf("SC_PAGE_SIZE")
    assert len(own.boot_id) == 36


def test_it_is_a_host() -> None:
    for name in (name for name in vars(Host) if not name.startswith("_")):
        assert hasattr(KernelHost, name), name


def test_a_tree_without_procfs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Absent):
        open_kernel_host(tmp_path)


def test_its_clock_is_the_monotonic_one() -> None:
    host = open_kernel_host()
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    assert before <= host.sample().time_seconds <= host.clock()
    host.close()


def test_the_advisor_is_a_writer(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    host = open_kernel_host(fake.root)
    assert finish(host.writers()) == ()
    fake.set("advisor_mode", "none [scan-time]")
    fake.add_process(77, "ksmtuned")
    assert finish(host.writers()) == (Writer("ksmtuned", 77), Writer("advisor", None))
    fake.garble("advisor_mode")
    assert finish(host.writers()) == (Writer("ksmtuned", 77),)
    host.close()


def test_a_knob_that_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, files=FILES_6_1)
    host = open_kernel_host(fake.root)
    with pytest.raises(Absent) as caught:
        write(host, Knob.SMART_SCAN, 0)
    assert caught.value.exit_code is ExitCode.LACKING
    host.close()


def test_every_real_pseudo_file_can_be_read_again_from_its_start() -> None:
    host = open_kernel_host()
    first, second = host.sample(), host.sample()
    host.close()
    for name, reading in first.readings.items():
        assert type(reading) is type(second.readings[name]), name
        assert not isinstance(reading, ReadError) or isinstance(reading, Absent), name
    assert first.value("mem_total_bytes") == second.value("mem_total_bytes")
    assert first.nodes
    for number, memory in first.nodes.items():
        assert second.nodes[number].total_bytes == memory.total_bytes


# -- what other modules of the kernel find out, through the host -------------------------------------------


def own_id() -> ProcessId:
    return ProcessId(os.getpid(), start_time_ticks(os.getpid()))


@pytest.mark.parametrize("run", [0, 5])
def test_the_nodes_of_a_tree(tmp_path: Path, run: int) -> None:
    fake = FakeKsmFs(tmp_path, nodes={})
    fake.set("run", run)
    host = open_kernel_host(fake.root)
    topology = host.topology()
    assert [(node.number, node.memory_bytes) for node in topology.nodes] == [(0, 8 << 30)]
    assert (topology.numa, topology.going_offline) == (False, run == 5)
    host.close()


def test_the_nodes_of_this_machine_have_memory_in_the_sample() -> None:
    host = open_kernel_host()
    nodes = host.sample().nodes
    for node in host.topology().with_memory():
        assert nodes[node.number].total_bytes > 0
    host.close()


def test_the_mappings_of_a_process_that_is_told_from_others() -> None:
    host = open_kernel_host()
    own = own_id()
    here = id(host)
    assert any(mapping.start <= here < mapping.end for mapping in host.ranges(own))
    with pytest.raises(NoSuchProcess):
        host.ranges(ProcessId(own.pid, own.start_time_ticks + 1))
    host.close()


def test_a_move_that_cannot_be_is_refused_by_the_other_process() -> None:
    host = open_kernel_host()
    own = own_id()
    with pytest.raises(NoSuchProcess):
        finish(host.move(Move(ProcessId(own.pid, own.start_time_ticks + 1), 0), 60), 90)
    with pytest.raises(Rejected, match="no such node"):
        finish(host.move(Move(own, 1023), 60), 90)
    host.close()


def test_memory_that_is_there_already_is_not_moved() -> None:
    host = open_kernel_host()
    if len(host.topology().nodes) > 1:
        pytest.skip("needs a machine with one NUMA node; tests/guest moves between several")
    found = finish(host.move(Move(own_id(), 0, everything=True), 60), 90)
    assert found.moved == 0
    assert found.already > 100
    host.close()


# -- this host's KSM ---------------------------------------------------------------------------------------


def merge(host: KernelHost, memory: mmap.mmap) -> None:
    """Have 64 equal pages merged."""
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory[:] = (b"equal" * PAGE)[:PAGE] * 64
    memory.madvise(mmap.MADV_MERGEABLE)
    write(host, Knob.SLEEP_MILLISECS, 1)
    write(host, Knob.PAGES_TO_SCAN, 10000)
    write(host, Knob.RUN, 1)
    give_up = time.monotonic() + 60
    while host.sample().value("pages_sharing") != 63:
        assert time.monotonic() < give_up, "nothing merges"
        time.sleep(0.02)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample reads everything anew."""
    monkeypatch.setattr("ksmd_ctl.privileged.host.SURROUNDINGS_SECONDS", 0.0)


def test_what_is_around_ksmd_is_read_less_often(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    fake.memory(1000, 300, 700)
    host = open_kernel_host(fake.root)
    assert host.sample().value("mem_available_bytes") == 700 * 1024
    fake.memory(1000, 300, 600)
    fake.set("pages_shared", 4711)
    sample = host.sample()
    assert (sample.value("mem_available_bytes"), sample.value("pages_shared")) == (700 * 1024, 4711)
    host.close()


def test_what_is_around_ksmd_is_read_again(tmp_path: Path, fresh: None) -> None:
    fake = FakeKsmFs(tmp_path)
    host = open_kernel_host(fake.root)
    host.sample()
    fake.memory(1000, 300, 600)
    assert host.sample().value("mem_available_bytes") == 600 * 1024
    host.close()


@pytest.mark.ksm
def test_each_knob_of_this_kernel_is_written_and_put_back(ksm_host: Path) -> None:
    host = open_kernel_host()
    for knob, spec in KNOBS.items():
        try:
            before = host.read(knob)
        except Absent:
            assert not (ksm_host / knob).exists()
            continue
        if spec.cpus:
            values: list[KnobValue] = ["0"]
        elif spec.choices:
            values = [word for word in spec.choices if word != before]
        else:
            values = [spec.minimum, min(spec.maximum, 3 if spec.maximum > 3 else 1)]
        for value in values:
            assert write(host, knob, value) == value, knob
            assert host.sample().readings[knob] == value
        assert write(host, knob, before) == before
    host.close()


@pytest.mark.ksm
def test_files_that_only_the_kernel_writes_refuse_root(ksm_host: Path, tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path)
    # What a knob's own file says is tried on one that nobody may write.
    fake.link("sleep_millisecs", ksm_host / "pages_shared")
    host = open_kernel_host(fake.root)
    with pytest.raises(Denied) as caught:
        write(host, Knob.SLEEP_MILLISECS, 1)
    assert caught.value.exit_code is ExitCode.DENIED
    host.close()


@pytest.mark.ksm
def test_what_the_kernel_refuses_is_rejected_with_its_errno(ksm_host: Path) -> None:
    host, files = open_kernel_host(), KsmFs(Path("/"))
    for knob, value in ((Knob.RUN, 9), (Knob.MAX_PAGE_SHARING, 1), (Knob.PAGES_TO_SCAN, 2**32)):
        with pytest.raises(Rejected, match="EINVAL"):
            files.store(knob, value)
    files.close()
    if (ksm_host / "advisor_mode").exists():
        write(host, Knob.ADVISOR_MODE, "scan-time")
        with pytest.raises(Rejected, match="advisor_mode is scan-time"):
            write(host, Knob.PAGES_TO_SCAN, 4242)
        assert Writer("advisor") in finish(host.writers())
    host.close()


@pytest.mark.ksm
def test_a_process_with_merged_pages_is_listed(ksm_host: Path) -> None:
    host = open_kernel_host()
    with mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        merge(host, memory)
        found = {process.id: process for process in finish(host.processes(), 90).processes}
        assert own_id() in found
        process = found[own_id()]
        assert ProcessClass.MERGEABLE in process.classes
        assert process.merging_pages in (64, None)
    host.close()


@pytest.mark.ksm
def test_a_census_finds_merged_pages(ksm_host: Path) -> None:
    host = open_kernel_host()
    with mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        merge(host, memory)
        census = finish(host.survey(60.0), 300).census
        assert census is not None
        assert census.pages.keys() == {node.number for node in host.topology().with_memory()}
        assert sum(census.low.values()) <= 1 <= sum(census.high.values())
        for node, pages in census.pages.items():
            assert 0 <= census.low[node] <= pages <= census.high[node]
    host.close()


@pytest.mark.ksm
def test_pages_are_unmerged_one_process_at_a_time(ksm_host: Path, fresh: None) -> None:
    host = open_kernel_host()
    with mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        merge(host, memory)
        write(host, Knob.RUN, 0)
        before = host.sample().value("cow_ksm")
        assert isinstance(before, int)
        found = finish(host.unshare(unshare_one(own_id()), 60), 90)
        assert found.unshared >= 63
        after = host.sample().value("cow_ksm")
        assert isinstance(after, int)
        assert after - before >= 63
        assert memory[:] == (b"equal" * PAGE)[:PAGE] * 64
    host.close()


@pytest.mark.ksm
def test_merged_pages_make_merge_across_nodes_busy(ksm_host: Path, fresh: None) -> None:
    host = open_kernel_host()
    with mmap.mmap(-1, 64 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        merge(host, memory)
        sample = host.sample()
        assert sample.value("pages_shared") == 1
        before = host.read(Knob.MERGE_ACROSS_NODES)
        assert isinstance(before, int)
        with pytest.raises(Rejected, match="EBUSY") as caught:
            write(host, Knob.MERGE_ACROSS_NODES, 1 - before)
        assert "transaction" in caught.value.hint
        assert host.read(Knob.MERGE_ACROSS_NODES) == before
        assert write(host, Knob.RUN, 2) == 2
        assert host.sample().value("pages_sharing") == 0
        assert host.sample().value("cow_ksm") != sample.value("cow_ksm")
    host.close()


@pytest.mark.ksm
def test_a_deadline_stops_an_unmerge_half_way(ksm_host: Path) -> None:
    host = open_kernel_host()
    write(host, Knob.SLEEP_MILLISECS, 1)
    # Un-merging walks address space page by page: 512 GiB with one page at its end take some 8 s (6.18).
    length = 512 << 30
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    with mmap.mmap(-1, length, flags) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory[length - PAGE] = 1
        memory.madvise(mmap.MADV_MERGEABLE)
        write(host, Knob.RUN, 1)
        unmerging = host.write(Knob.RUN, 2, 0.5)
        while not unmerging.poll():
            readable(unmerging.fileno(), 60)
        if host.read(Knob.RUN) == 2:
            # A kernel that skips the holes has been quicker than the deadline.
            assert unmerging.result() == 2
        else:
            with pytest.raises(TimedOut, match=r"its deadline of 0\.5 s passed; run reads 0 now"):
                unmerging.result()
    host.close()
