# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import errno
import itertools
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import NoSuchProcess, Refused
from ksmd_ctl.host.memory import ProcessId, Range
from ksmd_ctl.host.operation import Unshare, UnsharedPart, UnshareResult
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.kernel import switching
from ksmd_ctl.kernel.architecture import Call, architecture
from ksmd_ctl.kernel.detection import open_reader
from ksmd_ctl.kernel.injection import Injected
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.process_counts import KsmCounts, read_counts
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import holds_pages, mappings
from ksmd_ctl.kernel.switching import LATER, state, switch
from ksmd_ctl.kernel.syscalls import MADV_MERGEABLE, MADV_UNMERGEABLE
from ksmd_ctl.kernel.unshare import AGAIN
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.kernel.switched import Target, compiled, in_child, started
from tests.kernel.test_detection import filled, scan
from tests.kernel.test_injection import DONE

_PRCTL, _MADVISE = architecture().prctl, architecture().madvise
NOTHING = "nothing was to be done"


@pytest.fixture
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with started(compiled(tmp_path_factory.getbasetemp()), "spin", "500") as found:
        yield found


def mergeable(pid: int) -> list[Range]:
    return [item for item in mappings(pid) if item.mergeable]


def switched(request: Switch) -> SwitchResult:
    """In this process: its one thread waits for nothing else, and nothing of it stays attached."""
    return switch(request, sleep=lambda _: None)


def test_on_and_off(target: Target) -> None:
    on = switched(Switch(target.process, True))
    assert (on.before, on.after, on.method) == (False, True, Method.INJECT)
    if DONE:
        # Before 6.4.
        assert on.left == (LATER,)
        assert on.how.startswith("madvise of ")
    else:
        assert on.left == ()
        assert on.how == "prctl(PR_SET_MEMORY_MERGE)"
    assert on.mergeable_bytes == sum(item.end - item.start for item in mergeable(target.process.pid)) > 16 << 20
    assert 0 < on.stopped_seconds < 10
    assert state(Switch(target.process, False)) == (on.name, True) == ("switched", True)
    again = switched(Switch(target.process, True))
    assert (again.before, again.after) == (True, True)
    part = mergeable(target.process.pid)[0]
    same = switched(Switch(target.process, True, ((part.start, part.end),)))
    assert (same.after, same.how, same.stopped_seconds) == (True, NOTHING, 0)
    off = switched(Switch(target.process, False))
    assert (off.before, off.after, off.left, off.mergeable_bytes) == (True, False, (), 0)
    same = switched(Switch(target.process, False))
    assert (same.before, same.after) == (False, False)
    if read_counts(target.process.pid).merge_any is not None:
        # Where the kernel tells that prctl is off, too, it is not stopped for that.
        assert (same.how, same.stopped_seconds) == (NOTHING, 0)
    assert mergeable(target.process.pid) == []
    assert read_counts(target.process.pid).merge_any in (False, None)
    assert target.end().startswith("0 errors")


def test_only_some_addresses(target: Target) -> None:
    item = max(mappings(target.process.pid), key=lambda item: item.anonymous_pages)
    part = (item.start + 8 * PAGE_SIZE, item.start + 108 * PAGE_SIZE)
    on = switched(Switch(target.process, True, (part,)))
    assert (on.how, on.after, on.mergeable_bytes, on.left) == ("madvise of 1 mapping", True, 100 * PAGE_SIZE, ())
    assert [(item.start, item.end) for item in mergeable(target.process.pid)] == [part]
    hole = (part[0] + 10 * PAGE_SIZE, part[0] + 20 * PAGE_SIZE)
    off = switched(Switch(target.process, False, (hole,)))
    assert (off.before, off.after, off.left) == (True, False, ())
    assert [(item.start, item.end) for item in mergeable(target.process.pid)] == [
        (part[0], hole[0]),
        (hole[1], part[1]),
    ]
    # All of its memory: what madvise made mergeable goes, too.
    assert switched(Switch(target.process, False)).after is False
    assert mergeable(target.process.pid) == []


def test_nothing_of_it_could_merge(target: Target) -> None:
    with pytest.raises(Refused, match="nothing there can be merged"):
        switched(Switch(target.process, True, ((1 << 20, 2 << 20),)))
    assert not mergeable(target.process.pid)


def test_processes_that_are_none(target: Target) -> None:
    with pytest.raises(NoSuchProcess):
        switched(Switch(ProcessId(target.process.pid, target.process.start_time_ticks + 1), True))
    with pytest.raises(Refused, match="it is a kernel thread"):
        switched(Switch(ProcessId(2, start_time_ticks(2)), True))


def test_a_process_whose_main_thread_has_ended() -> None:
    """It runs and has memory; /proc/PID/smaps has nothing of it."""
    code = (
        "import ctypes, os, signal, threading\n"
        "threading.Thread(target=signal.pause).start()\n"
        "print(os.getpid(), flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with started(sys.executable, "-c", code) as target:
        until = time.monotonic() + 10
        while target.status("State")[0] != "Z" and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(Refused, match="its main thread has ended"):
            switched(Switch(target.process, True))


def test_to_whom_it_is_not_allowed(target: Target) -> None:
    code = (
        "import sys; from ksmd_ctl.kernel.switching import switch; from ksmd_ctl.host.switching import Switch\n"
        "from ksmd_ctl.host.memory import ProcessId; from ksmd_ctl.errors import Denied\n"
        "try: switch(Switch(ProcessId(int(sys.argv[1]), int(sys.argv[2])), True))\n"
        "except Denied as error: print(error); print(error.hint)"
    )
    if os.geteuid() != 0:
        pytest.skip("needs root")
    who = target.process
    ran = subprocess.run(
        [sys.executable, "-c", code, str(who.pid), str(who.start_time_ticks)],
        user=65534,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PYTHONPATH": str(Path(switching.__file__).parents[2]), "PATH": os.environ["PATH"]},
    )
    if "Permission denied" in ran.stderr:
        pytest.skip("nobody may not read the package")
    assert "CAP_SYS_PTRACE" in ran.stdout.splitlines()[1], ran
    assert not mergeable(who.pid)


@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_a_real_monitor(sandbox: str) -> None:
    """With QEMU's own seccomp filter, and without."""
    if (qemu := shutil.which("qemu-system-x86_64")) is None:
        pytest.skip("needs qemu-system-x86")
    command = [qemu, "-machine", "q35,accel=tcg,mem-merge=off", "-m", "64", "-display", "none", "-nodefaults", "-S"]
    with subprocess.Popen(
        [*command, "-sandbox", sandbox, "-monitor", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as machine:
        try:
            assert machine.stdout
            # Its first words come when it is there.
            assert select.select([machine.stdout], [], [], 60)[0]
            process = ProcessId(machine.pid, start_time_ticks(machine.pid))

            def run() -> None:
                for on in (True, False) * 3:
                    found = switch(Switch(process, on))
                    assert (found.after, found.left) == (on, (LATER,) if on and DONE else ())

            assert in_child(run) == 0
            out, _ = machine.communicate(b"info status\nquit\n", timeout=60)
            assert b"paused" in out
            assert machine.returncode == 0
        finally:
            machine.kill()


# -- what the kernel has, or has not -------------------------------------------------------------------------


class Kernel:
    """A process's mappings, and calls that are made by it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranges: Sequence[Range], prctl: int = 0) -> None:
        self.ranges = list(ranges)
        self.prctl = prctl
        self.calls: list[Call] = []
        self.failing: dict[int, int] = {}
        monkeypatch.setattr(switching, "inject", self.inject)
        monkeypatch.setattr(switching, "need_traceable", lambda *_: None)
        monkeypatch.setattr(switching, "mappings", lambda *_: tuple(self.ranges))

    def inject(self, process: ProcessId, calls: Sequence[Call], *, root: Path) -> Injected:
        # Two calls a stop.
        return Injected(tuple(self.made(call) for call in calls[:2]), 0.001 * len(self.calls))

    def made(self, call: Call) -> int:
        if call == (_MADVISE, 0, 0, MADV_UNMERGEABLE):
            return 0
        self.calls.append(call)
        if call[0] == _PRCTL:
            if self.prctl == 0:
                self.advise(0, 1 << 60, on=bool(call[2]))
            return self.prctl
        _, start, length, advice = call
        if start in self.failing:
            return self.failing[start]
        self.advise(start, start + length, on=advice == MADV_MERGEABLE)
        return 0

    def advise(self, start: int, end: int, *, on: bool) -> None:
        found = []
        for item in self.ranges:
            cuts = sorted({item.start, item.end, *(at for at in (start, end) if item.start < at < item.end)})
            for first, last in itertools.pairwise(cuts):
                inside = start <= first and last <= end and not item.flags & {"sh"}
                flags = (item.flags | {"mg"} if on else item.flags - {"mg"}) if inside else item.flags
                found.append(Range(first, last, flags, anonymous_pages=1, ksm_pages=0))
        self.ranges = found


def own() -> ProcessId:
    return ProcessId(os.getpid(), start_time_ticks(os.getpid()))


def private(start: int, end: int, *flags: str) -> Range:
    return Range(start << 20, end << 20, frozenset({"rd", "wr", *flags}), anonymous_pages=1, ksm_pages=0)


def test_a_kernel_without_the_prctl(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [private(1, 2), private(4, 6), private(7, 8, "sh")], prctl=-errno.EINVAL)
    found = switched(Switch(own(), True))
    assert kernel.calls[1:] == [(_MADVISE, 1 << 20, 1 << 20, 12), (_MADVISE, 4 << 20, 2 << 20, 12)]
    assert (found.how, found.after, found.left) == ("madvise of 2 mappings", True, (LATER,))
    off = switched(Switch(own(), False))
    assert (off.how, off.after, off.left) == ("madvise of 2 mappings", False, ())


def test_a_mapping_that_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [private(1, 2), private(4, 6)], prctl=-errno.EINVAL)
    kernel.failing = {4 << 20: -errno.EACCES}
    found = switched(Switch(own(), True))
    assert found.after is None
    assert found.left == ("400000-600000: madvise: EACCES (Permission denied)", LATER)


def test_large_memory_is_taken_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [private(0, 3000, "mg")])
    monkeypatch.setattr(switching, "read_counts", lambda *_: KsmCounts())
    found = switched(Switch(own(), False))
    advised = [call for call in kernel.calls if call[0] == _MADVISE]
    assert max(length for _, _, length, _ in advised) == 2 << 20
    assert sum(length for _, _, length, _ in advised) == 3000 << 20
    assert {call[3] for call in advised} == {MADV_UNMERGEABLE}
    # prctl comes last: it looks at whatever is mergeable still.
    assert kernel.calls[-1][:3] == (_PRCTL, 67, 0)
    assert (found.how, found.after, found.left) == ("madvise of 1 mapping, prctl(PR_SET_MEMORY_MERGE)", False, ())


def test_no_room_leaves_the_memory_mergeable(monkeypatch: pytest.MonkeyPatch) -> None:
    item = Range(1 << 20, 2 << 20, frozenset({"wr", "mg"}), anonymous_pages=9, ksm_pages=9)
    kernel = Kernel(monkeypatch, [item])
    asked: list[Unshare] = []

    def unshare(request: Unshare, **_: object) -> UnshareResult:
        asked.append(request)
        return UnshareResult((UnsharedPart(3, {"no memory on the host above the floor": 6}),))

    monkeypatch.setattr(switching, "unshare", unshare)
    monkeypatch.setattr(switching, "reader_or_none", lambda _: nullcontext(object()))
    with pytest.raises(Refused, match="no memory on the host above the floor"):
        switch(Switch(own(), False, floor_bytes=77))
    assert (asked[0].floor_bytes, asked[0].parts[0].ranges) == (77, (((1 << 20), (2 << 20)),))
    assert kernel.calls == []


def test_room_that_is_used_up_midway_leaves_the_rest_mergeable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was switched until then stays so, and the pages that were un-merged are those of all groups."""
    monkeypatch.setattr(switching, "_GROUP_BYTES", 1 << 20)
    item = private(16, 20, "mg")
    kernel = Kernel(monkeypatch, [Range(item.start, item.end, item.flags, anonymous_pages=900, ksm_pages=900)])
    outcomes = [
        UnshareResult((UnsharedPart(250, {AGAIN: 6}),)),
        UnshareResult((UnsharedPart(40, {}), UnsharedPart(60, {}))),
        UnshareResult((UnsharedPart(7, {"no memory on node 1 above the floor": 249}),)),
    ]
    asked: list[Unshare] = []

    def unshare(request: Unshare, **_: object) -> UnshareResult:
        asked.append(request)
        return outcomes.pop(0)

    monkeypatch.setattr(switching, "unshare", unshare)
    monkeypatch.setattr(switching, "reader_or_none", lambda _: nullcontext(object()))
    found = switched(Switch(own(), False))
    assert found.unmerged_pages == 250 + 100 + 7
    assert found.left == ("512 pages of address space: no memory on node 1 above the floor",)
    assert found.after is None
    assert [(one.start >> 20, one.end >> 20) for one in kernel.ranges if one.mergeable] == [(18, 20)]
    # Nobody asks the kernel to un-merge the rest without room, as prctl would.
    assert [(call[0], call[1] >> 20) for call in kernel.calls] == [(_MADVISE, 16), (_MADVISE, 17)]
    assert [one.parts[0].ranges[0][0] >> 20 for one in asked] == [16, 17, 18]


def test_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, [private(1, 2, "mg"), private(3, 4, "mg")])
    found = switch(Switch(own(), False), stop=lambda: True)
    assert (kernel.calls, found.after) == ([], True)
    assert found.left == ("512 pages of address space: it was asked to stop",)


def test_a_stop_while_pages_are_un_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    item = private(16, 20, "mg")
    kernel = Kernel(monkeypatch, [Range(item.start, item.end, item.flags, anonymous_pages=900, ksm_pages=900)])
    stopped: list[bool] = []

    def unshare(_: Unshare, **__: object) -> UnshareResult:
        stopped.append(True)
        return UnshareResult((UnsharedPart(7, {}),), stopped="it was asked to stop")

    monkeypatch.setattr(switching, "unshare", unshare)
    monkeypatch.setattr(switching, "reader_or_none", lambda _: nullcontext(object()))
    found = switch(Switch(own(), False), stop=lambda: bool(stopped))
    assert (kernel.calls, found.after, found.unmerged_pages) == ([], True, 7)
    assert (found.how, found.left) == ("nothing was switched", ("1,024 pages of address space: it was asked to stop",))


def test_who_begins_to_trace_it_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something was done it is told, and what is left; else it is an error."""
    monkeypatch.setattr(switching, "_GROUP_BYTES", 1 << 20)
    kernel = Kernel(monkeypatch, [private(16, 20, "mg")])
    traced = Refused("having process 1 make a system call", "strace (pid 7) traces it")

    def inject(process: ProcessId, calls: Sequence[Call], *, root: Path) -> Injected:
        if len(kernel.calls) == done:
            raise traced
        return kernel.inject(process, calls, root=root)

    monkeypatch.setattr(switching, "inject", inject)
    done = 2
    found = switched(Switch(own(), False))
    assert (found.after, found.left) == (None, ("512 pages of address space: strace (pid 7) traces it",))
    kernel.ranges, kernel.calls, done = [private(16, 20, "mg")], [], 0
    with pytest.raises(Refused, match="strace"):
        switched(Switch(own(), False))


pages = st.integers(1, 1 << 20).map(lambda number: number * PAGE_SIZE)


@given(st.lists(st.tuples(pages, pages), max_size=30))
def test_groups_and_pieces_are_the_whole(found: list[tuple[int, int]]) -> None:
    parts, at = [], 0
    for gap, length in found:
        parts.append((at + gap, at + gap + length))
        at += gap + length
    whole = [page for group in switching._groups(parts) for page in group]
    assert sum(end - start for start, end in whole) == sum(end - start for start, end in parts)
    assert all(any(first <= start < end <= last for first, last in parts) for start, end in whole)
    assert whole == sorted(whole)
    groups = list(switching._groups(parts))
    assert len(groups) <= 17
    assert all(length <= 32 << 20 for start, end in switching._pieces(whole) for length in (end - start,))
    assert sum(end - start for start, end in switching._pieces(whole)) == sum(end - start for start, end in whole)


# -- with ksmd -----------------------------------------------------------------------------------------------


@pytest.mark.ksm
def test_what_is_switched_off_has_its_contents_and_merges_no_more(ksm_host: Path) -> None:
    contents = [filled(number % 20) for number in range(1500)]
    with spawn("test-switch") as process, spawn("test-switch-other") as other:
        # With the same contents, which stay mergeable: ksmd has work, and a partner for each page.
        beside = other.map(1500)
        other.advise(beside, 1500, mergeable=True)
        other.store(beside, contents)
        start = process.map(1500)
        process.store(start, contents)
        assert in_child(lambda: check(process, on=True)) == 0
        scan(ksm_host, 4)
        assert merged(process) > 1000
        assert in_child(lambda: check(process, on=False)) == 0
        assert merged(process) == 0
        scan(ksm_host, 20)
        assert merged(process) == 0
        assert merged(other) > 1000
        assert process.load(start, 1500) == tuple(contents)


def check(process: RegionProcess, *, on: bool) -> None:
    found = switch(Switch(process.id, on))
    assert (found.after, found.left) == (on, (LATER,) if on and DONE else ())


def merged(process: RegionProcess) -> int:
    """By frames."""
    with open_reader() as reader:
        ranges = [item for item in mappings(process.id.pid) if holds_pages(item)]
        return sum(len(window.merged()) for window in reader.windows(process.id.pid, ranges))


@pytest.mark.ksm
def test_while_ksmd_is_at_it(ksm_host: Path, target: Target) -> None:
    """Its memory has 64 contents, so ksmd merges it at once, again and again, and signals come all the time."""
    (ksm_host / "pages_to_scan").write_text("10000")
    (ksm_host / "sleep_millisecs").write_text("1")
    (ksm_host / "run").write_text("1")

    def run() -> None:
        for number in range(8):
            found = switch(Switch(target.process, number % 2 == 0))
            on = number % 2 == 0
            assert (found.after, found.left) == (on, (LATER,) if on and DONE else ()), found
            time.sleep(0.3)

    assert in_child(run) == 0
    assert not mergeable(target.process.pid)
    assert target.end().startswith("0 errors")
