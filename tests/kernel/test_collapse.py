# SPDX-License-Identifier: GPL-2.0-or-later
"""Huge pages given back: to a process whose huge pages were split, and with what KSM has merged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import KSMD_IS_RUNNING, Collapse, CollapsedProcess, CollapseResult
from ksmd_ctl.kernel import collapse, syscalls
from ksmd_ctl.kernel.collapse import FORBIDDEN, TWICE, make_huge, need_support
from ksmd_ctl.kernel.proc_pid import start_time_ticks
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from tests.kernel.test_detection import scan
from tests.kernel.test_zero_pages import huge_holders, khugepaged_asleep

__all__ = ["khugepaged_asleep"]

BLOCKS = 8

_HOLDER = """
import ctypes, mmap, sys
blocks, lines = int(sys.argv[1]), sys.argv[2:]
libc = ctypes.CDLL(None, use_errno=True)
# Where all memory may be huge pages, only that of the test does.
for line in open("/proc/self/maps"):
    words = line.split()
    if words[1] == "rw-p" and (len(words) < 6 or words[5] == "[heap]"):
        first, last = (int(word, 16) for word in words[0].split("-"))
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 15)
area = mmap.mmap(-1, (blocks + 1) << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
start = -(-base >> 21) << 21
first = (start - base) >> 12
def advise(advice, page=0, pages=blocks * 512):
    if libc.madvise(ctypes.c_void_p(start + page * 4096), ctypes.c_size_t(pages * 4096), advice):
        sys.exit("madvise failed")
def write(pages, value=None):
    for page in pages:
        at = (first + page) * 4096
        area[at : at + 8] = (page + 1 if value is None else value).to_bytes(8, "little")
for line in lines:
    exec(line)
print(flush=True)
for line in sys.stdin:
    exec(line)
    print(flush=True)
"""
#: Small pages only, as a split leaves them, and no huge page yet.
SMALL = "advise(15); write(range(blocks * 512)); advise(14)"


class Holder:
    """A process with memory in blocks."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.id = ProcessId(process.pid, start_time_ticks(process.pid))

    def do(self, line: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "\n"


@contextmanager
def holder(*lines: str, blocks: int = BLOCKS) -> Iterator[Holder]:
    words = [sys.executable, "-I", "-S", "-c", _HOLDER, str(blocks), *lines]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "\n"
            yield Holder(process)
        finally:
            process.kill()


@pytest.fixture
def supported() -> None:
    try:
        need_support()
    except (Absent, Denied) as error:
        pytest.skip(str(error))


def made(one: Holder, **more: object) -> CollapsedProcess:
    (found,) = make_huge(replace(Collapse(one.id), **more)).processes  # type: ignore[arg-type]
    return found


@pytest.mark.usefixtures("supported", "khugepaged_asleep")
def test_small_pages_become_huge_ones_and_nothing_else_changes() -> None:
    with holder(SMALL) as one:
        planned = made(one, dry_run=True)
        assert (planned.huge_before, planned.huge_after, planned.blocks, planned.pages) == (0, BLOCKS, BLOCKS, 0)
        found = made(one)
        assert found == planned
        assert found.name.startswith("python")
        again = made(one)
        assert (again.huge_before, again.huge_after, again.blocks, again.left) == (BLOCKS, BLOCKS, 0, {})
        one.do(
            "assert all(area[(first + page) * 4096 :][:8] == (page + 1).to_bytes(8, 'little') for page in (0, 4095))"
        )


@pytest.mark.usefixtures("supported", "khugepaged_asleep")
@pytest.mark.parametrize(("keep", "huge", "pages"), [(32, 1, 31), (33, 2, 63), (512, 4, 31 + 32 + 511), (1, 0, 0)])
def test_blocks_for_which_a_huge_page_takes_much_stay_small(keep: int, huge: int, pages: int) -> None:
    # Of three blocks 31, 32 and 511 pages are empty, and of the others all.
    ranges = "[*range(31, 512), *range(512 + 32, 1024), 1024]"
    with holder(f"advise(15); write({ranges}); advise(14)") as one:
        found = made(one, keep_pages=keep)
        huge = min(huge, 3)
        assert (found.blocks, found.huge_after, found.pages, found.kept) == (huge, huge, pages, 3 - huge)
        assert found.left == {}


@pytest.mark.usefixtures("supported")
def test_where_huge_pages_are_not_allowed_there_are_none() -> None:
    with holder("advise(15); write(range(blocks * 512))") as one:
        found = made(one)
        assert (found.blocks, found.huge_after) == (0, 0)
        assert list(found.left) == [FORBIDDEN]
        assert found.left[FORBIDDEN] >= BLOCKS


@pytest.mark.usefixtures("supported", "khugepaged_asleep")
def test_a_floor_that_can_not_be_kept_leaves_everything() -> None:
    with holder(SMALL) as one:
        for dry_run in (True, False):
            found = made(one, floor_bytes=1 << 50, dry_run=dry_run)
            assert (found.blocks, found.huge_after) == (0, 0)
            ((cause, blocks),) = found.left.items()
            assert "above the floor" in cause
            assert blocks == BLOCKS


@pytest.mark.usefixtures("supported", "khugepaged_asleep")
def test_it_can_be_stopped_and_tells_what_was_done() -> None:
    with holder(SMALL, blocks=40) as one:
        looks = 0

        def stop() -> bool:
            nonlocal looks
            looks += 1
            return looks > 2

        result = make_huge(Collapse(one.id), stop=stop)
        assert result.stopped == "it was asked to stop"
        assert 0 < result.processes[0].huge_after < 40


def fails(monkeypatch: pytest.MonkeyPatch, refuse: Callable[[int, int], int]) -> None:
    """Have the call fail with the errno that `refuse` gives for address and length, 0 for none."""
    real = syscalls.process_madvise

    def call(pidfd: int, address: int, length: int, advice: int) -> int:
        if number := refuse(address, length):
            raise OSError(number, os.strerror(number))
        return real(pidfd, address, length, advice)

    monkeypatch.setattr(syscalls, "process_madvise", call)


@pytest.mark.usefixtures("supported", "khugepaged_asleep")
@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EBUSY, errno.EINVAL, errno.EIO])
def test_one_block_that_is_refused_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with holder(SMALL) as one:
        refused: list[int] = []

        def refuse(address: int, length: int) -> int:
            if not refused:
                refused.append(address + (2 << 21))
            return number if address <= refused[0] < address + length else 0

        monkeypatch.setattr(collapse, "need_support", lambda: None)
        fails(monkeypatch, refuse)
        found = made(one)
        assert (found.blocks, found.huge_after) == (BLOCKS - 1, BLOCKS - 1)
        assert list(found.left.values()) == [1]


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [(errno.EINVAL, Absent, "Linux 6.1"), (errno.ENOSYS, Absent, "Linux 6.1"), (errno.EPERM, Denied, "CAP_SYS_NICE")],
)
def test_what_a_kernel_or_user_lacks(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Absent | Denied], hint: str
) -> None:
    fails(monkeypatch, lambda *_: number)
    with pytest.raises(kind) as caught:
        make_huge(Collapse(ProcessId(os.getpid(), start_time_ticks(os.getpid()))))
    assert hint in caught.value.hint


def test_any_other_error_is_of_a_kernel_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is mapped where it is tried.
    fails(monkeypatch, lambda *_: errno.ENOMEM)
    need_support()


def test_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse, "need_support", lambda: None)
    with holder() as one:
        id = one.id
    with pytest.raises(NoSuchProcess):
        make_huge(Collapse(id))


@pytest.mark.usefixtures("supported")
def test_a_unit_without_processes_has_no_result() -> None:
    assert make_huge(Collapse(None, "no-such-unit.service")) == CollapseResult(())


@pytest.mark.ksm
@pytest.mark.usefixtures("supported", "khugepaged_asleep")
def test_what_merging_split_becomes_huge_again_once_ksmd_does_not_split_it_again(ksm_host: Path) -> None:
    pages = 4 * 512
    with huge_holders("huge", pages) as both:
        scan(ksm_host, 5)
        assert [one.huge_bytes() for one in both] == [0, 0]
        one = both[0]
        request = Collapse(ProcessId(one.process.pid, start_time_ticks(one.process.pid)), keep_pages=512)
        frames = len(one.frames())
        (ksm_host / "run").write_text("1")
        (found,) = make_huge(request).processes
        assert (found.blocks, found.left) == (0, {KSMD_IS_RUNNING: 4})
        (ksm_host / "run").write_text("0")
        # What is merged at least 32 pages of is kept.
        (found,) = make_huge(replace(request, keep_pages=32)).processes
        assert (found.blocks, found.kept) == (0, 4)
        (found,) = make_huge(request).processes
        if found.left:
            # Kernels that do not free zeroes merge them: one page many times in a block.
            assert found.left == {TWICE: 4}
            (ksm_host / "run").write_text("2")
            (found,) = make_huge(request).processes
        assert (found.blocks, found.huge_after, found.left) == (4, 4, {})
        assert one.huge_bytes() == pages * PAGE_SIZE
        assert len(one.frames()) == pages
        assert found.pages >= pages - frames
