# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess, Rejected
from ksmd_ctl.host.memory import KsmDetection, ProcessId, Range
from ksmd_ctl.host.operation import Progress, Unshare, UnsharePart, UnshareResult
from ksmd_ctl.kernel import headroom, libnuma, syscalls, unshare
from ksmd_ctl.kernel.detection import PageReader, State, Window, choose, probe
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.kernel.unshare import MAXIMUM_RUN_PAGES, Breaker
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.fakes.unsharing import unshare_one, unshared_one
from tests.kernel.test_detection import filled, scan, states

pytestmark = pytest.mark.ksm


@pytest.fixture
def detection() -> KsmDetection:
    try:
        return choose(probe())
    except Absent as error:
        pytest.skip(str(error))


def run(detection: KsmDetection, request: Unshare, **more: object) -> UnshareResult:
    with PageReader(detection) as reader:
        return unshare.unshare(request, reader=reader, **more)  # type: ignore[arg-type]


def frames(process: RegionProcess, start: int, pages: int) -> list[int]:
    with Pagemap(process.id.pid) as pagemap:
        return frames_of(pagemap.read(start, pages))


def merged_pages(detection: KsmDetection, process: RegionProcess) -> int:
    with PageReader(detection) as reader:
        return sum(state == State.KSM for _, state in states(reader, process).values())


def stopped(ksm: Path) -> bool:
    return (ksm / "run").read_text().strip() == "0"


@pytest.fixture
def process(ksm_host: Path) -> Iterator[RegionProcess]:
    with spawn("test-unshare") as found:
        yield found


def mergeable(process: RegionProcess, contents: Sequence[bytes | None]) -> int:
    start = process.map(len(contents))
    process.advise(start, len(contents), mergeable=True)
    process.store(start, contents)
    return start


def test_a_kernel_on_which_it_changes_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before 4.12: what can't be read is written as zero."""

    def clearing(_pid: int, _local: int, remote: int, _length: int) -> int:
        syscalls.store(remote, b"\0")
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(syscalls, "process_vm_writev", clearing)
    with pytest.raises(Absent, match="changes memory on this kernel"):
        Breaker()


def test_merged_pages_get_frames_of_their_own_and_nothing_else_changes(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    contents = [filled(number % 20) if number % 10 else None for number in range(1500)]
    start = mergeable(process, contents)
    unique = mergeable(process, [filled(10_000 + number) for number in range(50)])
    scan(ksm_host, 4)
    assert stopped(ksm_host)
    merged = merged_pages(detection, process)
    assert merged == 1350
    lonely = frames(process, unique, 50)
    seen: list[Progress] = []
    result = run(detection, unshare_one(process.id), progress=seen.append)
    assert result == unshared_one(1350, {})
    assert merged_pages(detection, process) == 0
    found = frames(process, start, 1500)
    present = [frame for frame in found if frame]
    assert len(present) == len(set(present)) == 1350
    # Untouched pages stay untouched, unique ones where they were, and every byte as it was.
    assert [bool(frame) for frame in found] == [content is not None for content in contents]
    assert frames(process, unique, 50) == lonely
    assert process.load(start, 1500) == tuple(content or b"" for content in contents)
    assert seen[-1].done == 1350
    assert run(detection, unshare_one(process.id)) == unshared_one(0, {})


@pytest.mark.parametrize("forked", [False, True])
def test_what_lies_between_merged_pages_stays_as_it_is(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection, forked: bool
) -> None:
    """Pages of the process's own are passed over in the same call; untouched ones and what fork shares are not."""
    merged, own, untouched = filled(1), 10_000, None
    contents = [(merged, filled(own + number), merged, untouched)[number % 4] for number in range(1200)]
    start = mergeable(process, contents)
    scan(ksm_host, 4)
    child = process.fork() if forked else None
    before = frames(process, start, 1200)
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return False

    try:
        assert run(detection, unshare_one(process.id), stop=count) == unshared_one(600, {})
        now = frames(process, start, 1200)
        assert len({now[number] for number in range(0, 1200, 2)}) == 600
        assert [now[number] for number in range(1, 1200, 4)] == [before[number] for number in range(1, 1200, 4)]
        assert not any(now[number] for number in range(3, 1200, 4))
        assert process.load(start, 1200) == tuple(content or b"" for content in contents)
        # Two merged pages with one of its own between them are one call; with a shared one they are two.
        assert (calls >= 600) is forked
    finally:
        if child is not None:
            child.exit()


@given(st.lists(st.tuples(st.sampled_from(list(State)), st.booleans()), min_size=1, max_size=50))
def test_kinds_of_pages(pages: list[tuple[State, bool]]) -> None:
    entries = array("Q", [(1 << 63 | 1 << 56 if own else 1 << 63) | 7 for _, own in pages])
    window = Window(Range(0, 0, frozenset()), 0, entries, [7] * len(pages), bytes(state for state, _ in pages))
    named = {State.KSM: unshare.KSM, State.UNDECIDED: unshare.OTHER_PAGE}
    expected = [named.get(state, unshare.OWN_PAGE if own else unshare.OTHER_PAGE) for state, own in pages]
    assert unshare.page_kinds(window) == b"".join(expected)
    assert window.merged() == [index for index, (state, _) in enumerate(pages) if state is State.KSM]


@pytest.mark.parametrize(("between", "runs"), [(0, 1), (1, 1), (32, 1), (33, 3)])
def test_runs_of_merged_pages(between: int, runs: int) -> None:
    states = (bytes([State.KSM]) + bytes(between)) * 3
    window = Window(Range(0, 0, frozenset()), 0, array("Q", bytes(8 * len(states))), [0] * len(states), states)
    assert window.runs() == runs


def test_several_processes_in_one_request(ksm_host: Path, process: RegionProcess, detection: KsmDetection) -> None:
    """Each has its own result, also one that is gone meanwhile."""
    starts = [mergeable(process, [filled(number % 3) for number in range(30)])]
    with spawn("test-second") as second, spawn("test-third") as third:
        starts += [mergeable(one, [filled(number % 3) for number in range(30)]) for one in (second, third)]
        scan(ksm_host, 4)
        third.exit()
        parts = tuple(UnsharePart(one.id, pages=30) for one in (process, third, second))
        result = run(detection, Unshare(parts))
        assert [part.unshared for part in result.parts] == [30, 0, 30]
        assert [part.ended for part in result.parts] == [False, True, False]
        assert second.load(starts[1], 30) == tuple(filled(number % 3) for number in range(30))


def test_ranges_limit_it_and_the_largest_run_is_one_call(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    start = mergeable(process, [filled(1)] * (MAXIMUM_RUN_PAGES + 100))
    scan(ksm_host, 4)
    with Breaker() as breaker:
        breaker.break_run(process.id.pid, start, MAXIMUM_RUN_PAGES)
        with pytest.raises(ValueError, match="between 1 and"):
            breaker.break_run(process.id.pid, start, MAXIMUM_RUN_PAGES + 1)
    found = frames(process, start, MAXIMUM_RUN_PAGES + 100)
    assert len(set(found[:MAXIMUM_RUN_PAGES])) == MAXIMUM_RUN_PAGES
    assert len(set(found[MAXIMUM_RUN_PAGES:])) == 1
    part = (start + (MAXIMUM_RUN_PAGES + 10) * PAGE_SIZE, start + (MAXIMUM_RUN_PAGES + 30) * PAGE_SIZE)
    assert run(detection, unshare_one(process.id, ranges=(part,))) == unshared_one(20, {})
    with pytest.raises(Rejected, match="nothing is mapped"):
        run(detection, unshare_one(process.id, ranges=((16, 32),)))


def test_ranges_that_were_given_back_meanwhile_keep_nothing_else_from_being_un_merged(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    start = mergeable(process, [filled(1)] * 30)
    scan(ksm_host, 4)
    there, gone = (start, start + 30 * PAGE_SIZE), (16, 32)
    parts = UnsharePart(process.id, (gone,), pages=5), UnsharePart(process.id, (gone, there), pages=35)
    first, second = run(detection, Unshare(parts)).parts
    assert (first.ended, first.unshared, first.left) == (True, 0, {})
    assert (second.ended, second.unshared, second.left) == (False, 30, {})


def test_what_only_the_process_can_write_to_is_left_and_named(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    start = mergeable(process, [filled(1)] * 30)
    scan(ksm_host, 4)
    process.protect(start + 10 * PAGE_SIZE, 10, writable=False)
    assert run(detection, unshare_one(process.id)) == unshared_one(20, {unshare.NOT_WRITABLE: 10})
    assert process.load(start, 30) == (filled(1),) * 30


def test_what_userfaultfd_watches_is_left_and_named(ksm_host: Path, detection: KsmDetection) -> None:
    # Registered for missing pages only: a write to a merged page would not wait, but nothing tells that apart.
    script = """
import ctypes, fcntl, mmap, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(323, os.O_CLOEXEC | 1)
if fd < 0:
    print("none", flush=True); sys.exit(0)
fcntl.ioctl(fd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
memory = mmap.mmap(-1, 40 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(20):
    memory[page * mmap.PAGESIZE:(page + 1) * mmap.PAGESIZE] = b"x" * mmap.PAGESIZE
memory.madvise(mmap.MADV_MERGEABLE)
view = ctypes.c_char.from_buffer(memory)
address = ctypes.addressof(view)
fcntl.ioctl(fd, 0xC020AA00, struct.pack("QQQQ", address, 10 * mmap.PAGESIZE, 1, 0))
print(address, flush=True)
sys.stdin.readline()
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the script knows the numbers of x86_64 only")
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        line = child.stdout.readline().strip()
        if line == "none":
            pytest.skip("this kernel has no userfaultfd")
        address = int(line)
        scan(ksm_host, 4)
        who = ProcessId(child.pid, _start(child.pid))
        flags = [item.flags & {"um"} for item in read_ranges(child.pid) if item.start == address]
        assert flags == [{"um"}]
        result = run(detection, unshare_one(who, ranges=((address, address + 20 * PAGE_SIZE),)))
        assert result == unshared_one(10, {unshare.WATCHED: 10})
    finally:
        child.kill()
        child.communicate()


def _start(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_contents_never_change_while_the_process_writes_to_the_same_pages(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    start = mergeable(process, [filled(0)] * 200)
    steady = mergeable(process, [filled(number // 4) for number in range(400)])
    scan(ksm_host, 3)
    # The writer makes all pages alike over and over, so ksmd, which runs on, merges them over and over.
    (ksm_host / "sleep_millisecs").write_text("0")
    (ksm_host / "run").write_text("1")
    process.begin_churn(start, 200)
    broken = 0
    try:
        for _ in range(60):
            broken += run(detection, unshare_one(process.id)).unshared
    finally:
        rounds, lost = process.end_churn()
        (ksm_host / "run").write_text("0")
    assert broken > 0
    assert rounds > 0
    assert lost == 0
    assert process.load(steady, 400) == tuple(filled(number // 4) for number in range(400))
    assert process.load(start, 200) == (rounds.to_bytes(8, sys.byteorder) + filled(0)[8:],) * 200


def test_contents_never_change_while_the_process_forks(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    contents = tuple(filled(number // 8) for number in range(800))
    start = mergeable(process, contents)
    scan(ksm_host, 4)
    children = []
    results: list[UnshareResult] = []
    request = unshare_one(process.id, latency_seconds=0.0002)
    worker = threading.Thread(target=lambda: results.append(run(detection, request)))
    worker.start()
    try:
        while worker.is_alive() and len(children) < 30:
            children.append(process.fork())
        worker.join()
        assert results[0].unshared + sum(results[0].left.values()) == 800
        # What fork shares with a child is not merged, and is not broken; what was merged is.
        for one in (process, *children):
            assert one.load(start, 800) == contents
    finally:
        worker.join()
        for child in children:
            child.exit()


def test_a_process_that_discards_and_unmaps_under_it(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    contents = tuple(filled(number // 8) for number in range(800))
    start = mergeable(process, contents)
    scan(ksm_host, 4)
    todo = list(range(790, 400, -10))

    def meanwhile() -> bool:
        if todo:
            at = todo.pop()
            (process.discard if at % 20 else process.unmap)(start + at * PAGE_SIZE, 5)
        return False

    result = run(detection, unshare_one(process.id, latency_seconds=1e-6), stop=meanwhile)
    assert not todo
    assert result.unshared + sum(result.left.values()) == 800
    assert 0 < result.left.get(unshare.GONE, 0) < 800
    found = process.load(start, 800)
    assert found[:410] == contents[:410]
    assert all(page in (b"", content, bytes(PAGE_SIZE)) for page, content in zip(found, contents, strict=True))


def test_a_process_that_exits_under_it(ksm_host: Path, process: RegionProcess, detection: KsmDetection) -> None:
    mergeable(process, [filled(number // 8) for number in range(800)])
    scan(ksm_host, 4)

    calls = 0

    def meanwhile() -> bool:
        nonlocal calls
        calls += 1
        if calls == 10:
            process.exit()
        return False

    (part,) = run(detection, unshare_one(process.id, latency_seconds=1e-6), stop=meanwhile).parts
    assert part.ended
    assert 0 < part.unshared < 800


def test_it_can_be_stopped_and_what_is_done_stays(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    mergeable(process, [filled(number // 8) for number in range(800)])
    scan(ksm_host, 4)
    calls = iter([False, True])
    result = run(detection, unshare_one(process.id), stop=lambda: next(calls))
    assert result == unshared_one(16, {}, headroom.STOPPED)
    assert merged_pages(detection, process) == 784


@pytest.mark.parametrize("pressed_until", [30.0, 1e9])
def test_it_waits_while_tasks_wait_for_memory_and_gives_up_where_that_does_not_pass(
    ksm_host: Path,
    process: RegionProcess,
    detection: KsmDetection,
    monkeypatch: pytest.MonkeyPatch,
    pressed_until: float,
) -> None:
    mergeable(process, [filled(number // 8) for number in range(800)])
    scan(ksm_host, 4)
    now, slept = 0.0, []

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        slept.append(seconds)

    monkeypatch.setattr(headroom, "memory_stalled_seconds", lambda _: 0.9 * min(now, pressed_until))
    request = Unshare((UnsharePart(process.id),), latency_seconds=1e-6, max_pressure=0.2)
    result = run(detection, request, clock=clock, sleep=sleep)
    if pressed_until < 1e9:
        assert result == unshared_one(800, {})
        # All the time that there was pressure, but for the half second in which it was found out.
        assert 25 <= sum(slept) <= 31
    else:
        assert "tasks wait for memory" in result.stopped
        assert result.unshared < 800
        assert sum(slept) == pytest.approx(headroom.MAXIMUM_PAUSE_SECONDS)


def test_a_floor_that_can_not_be_kept_leaves_everything(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    mergeable(process, [filled(number // 8) for number in range(80)])
    scan(ksm_host, 4)
    result = run(detection, unshare_one(process.id, floor_bytes=1 << 50))
    assert result.unshared == 0
    ((cause, pages),) = result.left.items()
    assert pages == 80
    assert "above the floor" in cause


def test_a_tenant_is_not_killed_in_its_cgroup(ksm_host: Path, cgroup: Path, detection: KsmDetection) -> None:
    old = (cgroup / "memory.limit_in_bytes").exists()
    limit = cgroup / ("memory.limit_in_bytes" if old else "memory.max")
    usage = cgroup / ("memory.usage_in_bytes" if old else "memory.current")
    with spawn("test-tenant") as process:
        (cgroup / "cgroup.procs").write_text(str(process.id.pid))
        contents = tuple(filled(number // 100) for number in range(4000))
        start = mergeable(process, contents)
        scan(ksm_host, 4)
        # Room for 1000 of the 4000 pages that it would have, and the reserve.
        limit.write_text(str(int(usage.read_text()) + 1000 * PAGE_SIZE + (4 << 20)))
        result = run(detection, unshare_one(process.id))
        assert 500 <= result.unshared <= 1100
        ((cause, pages),) = result.left.items()
        assert pages == 4000 - result.unshared
        assert "no memory in the memory cgroup" in cause
        assert cgroup.name in cause
        # To answer it needs memory itself, and the reserve of 4 MiB is there for that.
        for first in range(0, 500, 50):
            assert process.load(start + first * PAGE_SIZE, 50) == contents[first : first + 50]
        events = (cgroup / ("memory.oom_control" if old else "memory.events")).read_text()
        assert "oom_kill 0" in events


@pytest.mark.skipif(not libnuma.available(), reason="no NUMA (libnuma.so.1, and a kernel with CONFIG_NUMA)")
def test_a_node_that_is_not_there(ksm_host: Path, process: RegionProcess, detection: KsmDetection) -> None:
    with pytest.raises(Rejected, match="node 1000: there is no such node"):
        run(detection, unshare_one(process.id, to=1000))
    policy = libnuma.get_mempolicy()
    mergeable(process, [filled(1)] * 10)
    scan(ksm_host, 4)
    assert run(detection, unshare_one(process.id, to=0)).unshared == 10
    assert libnuma.get_mempolicy() == policy


def test_without_the_privilege_it_says_which(ksm_host: Path, process: RegionProcess) -> None:
    start = process.map(1)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setresuid(65534, 65534, 65534)
            Breaker().break_run(process.id.pid, start, 1)
        except Denied as error:
            code = 0 if "CAP_SYS_PTRACE" in error.hint else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_process_with_the_same_pid_is_not_touched(
    ksm_host: Path, process: RegionProcess, detection: KsmDetection
) -> None:
    mergeable(process, [filled(1)] * 10)
    scan(ksm_host, 4)
    with pytest.raises(NoSuchProcess, match="belongs to another process"):
        run(detection, unshare_one(ProcessId(process.id.pid, process.id.start_time_ticks - 1)))
    assert merged_pages(detection, process) == 10


def test_it_may_be_killed_at_any_moment(ksm_host: Path, process: RegionProcess, detection: KsmDetection) -> None:
    contents = tuple(filled(number // 8) for number in range(800))
    start = mergeable(process, contents)
    scan(ksm_host, 4)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        # The first word comes in the middle, and nobody reads the second.
        run(
            detection,
            unshare_one(process.id, latency_seconds=1e-6),
            progress=lambda _: os.write(writing, b"x") and None,
        )
        os._exit(0)
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert process.load(start, 800) == contents
    left = merged_pages(detection, process)
    assert run(detection, unshare_one(process.id)) == unshared_one(left, {})
