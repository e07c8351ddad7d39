# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksmd_ctl.errors import NoSuchProcess, Rejected
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import readable
from ksmd_ctl.kernel import libnuma
from ksmd_ctl.kernel.proc_pid import Held, parse_stat, start_time_ticks
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.scenario.regions import RegionProcess, can_collapse, spawn

A, B = b"a" * PAGE_SIZE, b"b" * PAGE_SIZE


@pytest.fixture
def process() -> Iterator[RegionProcess]:
    with spawn("test-region") as found:
        yield found


def _numa_maps(process: RegionProcess, start: int) -> str:
    text = Path(f"/proc/{process.id.pid}/numa_maps").read_text()
    match = re.search(rf"^{start:x} (.*)$", text, re.MULTILINE)
    assert match
    return match[1]


def test_pages_hold_what_was_stored_and_untouched_ones_stay_so(process: RegionProcess) -> None:
    start = process.map(4)
    process.store(start, [A, None, B])
    assert process.load(start, 4) == (A, b"", B, b"")
    process.discard(start, 1)
    assert process.load(start, 3) == (b"", b"", B)
    process.unmap(start + 2 * PAGE_SIZE, 1)
    assert process.load(start, 4) == (b"", b"", b"", b"")


def test_maps_ascend_and_stay_mappings_of_their_own(process: RegionProcess) -> None:
    starts = [process.map(3) for _ in range(5)]
    assert starts == sorted(starts)
    maps = Path(f"/proc/{process.id.pid}/maps").read_text()
    for start in starts:
        assert f"\n{start:x}-{start + 3 * PAGE_SIZE:x} rw-p 00000000 00:00 0" in "\n" + maps


def test_advice_shows_in_the_flags(process: RegionProcess) -> None:
    start = process.map(2)

    def flags() -> set[str]:
        smaps = Path(f"/proc/{process.id.pid}/smaps").read_text()
        match = re.search(rf"^{start:x}-.*?^VmFlags: (.*?)$", smaps, re.MULTILINE | re.DOTALL)
        assert match
        return set(match[1].split())

    assert "mg" not in flags()
    process.advise(start, 2, mergeable=True)
    assert {"mg", "nh"} <= flags()
    process.advise(start, 2, mergeable=False)
    assert "mg" not in flags()
    process.protect(start, 2, writable=False)
    assert "wr" not in flags()


def test_what_is_not_one_of_the_maps_is_refused_and_harms_nothing(process: RegionProcess) -> None:
    start = process.map(2)
    for wrong in (start + PAGE_SIZE, start - PAGE_SIZE, 0):
        with pytest.raises(Rejected, match="not in one of the maps"):
            process.store(wrong, [A, A])
    process.store(start, [A, B])
    assert process.load(start, 2) == (A, B)


@pytest.mark.skipif(not libnuma.available(), reason="no NUMA (libnuma.so.1, and a kernel with CONFIG_NUMA)")
def test_a_map_is_bound_to_its_node_or_not_made() -> None:
    with spawn("test-region", prefer=0) as process:
        bound, free = process.map(1, node=0), process.map(1)
        assert _numa_maps(process, bound).startswith("bind:0")
        assert _numa_maps(process, free).startswith("prefer:0")
        with pytest.raises(Rejected) as caught:
            process.map(1, node=1000)
        assert caught.value.errno == errno.EINVAL
        assert process.map(1) > free


def test_a_fork_has_the_memory_and_goes_its_own_way(process: RegionProcess) -> None:
    start = process.map(2)
    process.store(start, [A, B])
    with process.fork() as child:
        assert child.id != process.id
        child.store(start, [B])
        assert child.load(start, 2) == (B, B)
        assert process.load(start, 2) == (A, B)
        process.exit()
        assert child.load(start, 2) == (B, B)
        with child.fork() as grandchild:
            assert grandchild.load(start, 2) == (B, B)
    with pytest.raises(NoSuchProcess):
        process.load(start, 1)


def test_mremap_moves_what_is_left_to_an_address_above_all_others(process: RegionProcess) -> None:
    start, other = process.map(4), process.map(1)
    process.store(start, [A, B, A, None])
    process.unmap(start + PAGE_SIZE, 1)
    # Two mappings by now.
    process.protect(start + 2 * PAGE_SIZE, 1, writable=False)
    moved = process.mremap(start, 4)
    assert moved > other
    assert process.load(moved, 4) == (A, b"", A, b"")
    assert process.load(start, 4) == (b"",) * 4
    process.store(moved, [B])
    with pytest.raises(Rejected, match="not in one of the maps"):
        process.store(moved + PAGE_SIZE, [A])
    assert process.map(1) > moved


def test_reading_maps_the_zero_page_where_nothing_was(process: RegionProcess) -> None:
    start = process.map(2)
    process.store(start, [A])
    process.read(start, 2)
    assert process.load(start, 2) == (A, bytes(PAGE_SIZE))


@pytest.mark.skipif(not can_collapse(), reason="no MADV_COLLAPSE")
def test_collapse_makes_huge_pages_of_whole_blocks(process: RegionProcess) -> None:
    def huge_kb() -> int:
        smaps = Path(f"/proc/{process.id.pid}/smaps").read_text()
        return sum(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("AnonHugePages"))

    process.map(3)
    start = process.map(1024)
    assert start % (1 << 21) == 0
    process.store(start, [A] * 600)
    before = huge_kb()
    assert process.collapse(start, 1024) == (True, True)
    assert huge_kb() == before + 4096
    assert process.load(start + 599 * PAGE_SIZE, 2) == (A, bytes(PAGE_SIZE))
    process.map(1)
    assert process.mremap(start, 1024) % (1 << 21) == 0
    assert huge_kb() == before + 4096


def test_exec_keeps_pid_and_name_and_nothing_else(process: RegionProcess) -> None:
    start = process.map(2)
    process.store(start, [A, B])
    process.advise(start, 2, mergeable=True)
    before = process.id
    with process.fork() as child:
        for one in (child, process):
            one.exec()
            assert one.load(start, 2) == (b"", b"")
            assert one.map(2) == start
            one.store(start, [B, A])
            assert one.load(start, 2) == (B, A)
            assert " mg" not in Path(f"/proc/{one.id.pid}/smaps").read_text()
        with Held(before) as held:
            held.verify()
        assert Path(f"/proc/{before.pid}/comm").read_text() == "test-region\n"
        # A child outlives the process that it was forked from, also after an exec.
        process.exit()
        assert child.load(start, 1) == (B,)


def test_churn_counts_rounds_and_loses_nothing(process: RegionProcess) -> None:
    start = process.map(4)
    process.begin_churn(start, 4)
    while not (rounds := int.from_bytes(_peek(process, start), sys.byteorder)):
        pass
    done, lost = process.end_churn()
    assert done >= rounds
    assert lost == 0
    assert [int.from_bytes(page[:8], sys.byteorder) for page in process.load(start, 4)] == [done] * 4


def _peek(process: RegionProcess, address: int) -> bytes:
    with open(f"/proc/{process.id.pid}/mem", "rb", buffering=0) as file:
        return os.pread(file.fileno(), 8, address)


def test_exit_is_over_when_it_returns(process: RegionProcess) -> None:
    pid = process.id.pid
    process.exit()
    process.exit()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("busy", [False, True])
def test_no_process_outlives_a_caller_that_is_killed(busy: bool) -> None:
    script = """
import json, sys, time
from ksmd_ctl.scenario.regions import spawn
first = spawn("test-region")
start = first.map(16)
child = first.fork()
if json.loads(sys.argv[1]):
    first.begin_churn(start, 16)
    child.begin_churn(start, 16)
print(json.dumps([first.id.pid, child.id.pid]), flush=True)
time.sleep(600)
"""
    caller = subprocess.Popen([sys.executable, "-c", script, json.dumps(busy)], stdout=subprocess.PIPE, text=True)
    assert caller.stdout
    descriptors = [os.pidfd_open(pid) for pid in json.loads(caller.stdout.readline())]
    try:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        for descriptor in descriptors:
            assert readable(descriptor, 30), "it is still there"
    finally:
        caller.stdout.close()
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize(
    "do",
    [
        lambda process: process.map(1),
        lambda process: process.load(0, 1),
        lambda process: process.fork(),
        lambda process: process.begin_churn(0, 1),
    ],
    ids=["map", "load", "fork", "churn"],
)
def test_one_that_was_killed_has_ended_whatever_it_is_asked(
    process: RegionProcess, do: Callable[[RegionProcess], object]
) -> None:
    os.kill(process.id.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.id.pid, os.WEXITED | os.WNOWAIT)
    for _ in range(2):
        with pytest.raises(NoSuchProcess, match="it has ended"):
            do(process)


def test_a_process_is_its_pid_and_its_start(process: RegionProcess) -> None:
    with Held(process.id) as held:
        held.verify()
        process.exit()
        with pytest.raises(NoSuchProcess, match="has exited"):
            held.verify()
    with pytest.raises(NoSuchProcess, match="gone"), Held(process.id):
        pass
    own = ProcessId(os.getpid(), start_time_ticks(os.getpid()))
    with pytest.raises(NoSuchProcess, match="belongs to another"), Held(ProcessId(own.pid, own.start_time_ticks - 1)):
        pass


@pytest.mark.parametrize("name", ["a b", ") R 1 (", "x) S 2 3", ""])
def test_a_name_may_hold_anything(name: str) -> None:
    line = f"12 ({name}) S 1 " + " ".join(str(field) for field in range(5, 53))
    found, fields = parse_stat(line.encode())
    assert found == name
    assert fields[22 - 3] == b"22"


@pytest.mark.parametrize("line", [b"", b"12 (x) S 1 2 3", b"nonsense"])
def test_other_lines_are_an_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a stat line"):
        parse_stat(line)
