# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, NoSuchProcess
from ksmd_ctl.host.memory import Range
from ksmd_ctl.kernel import syscalls, zero_pages
from ksmd_ctl.kernel.pagemap import PRESENT, SOFT_DIRTY, Pagemap, frames_of, zero_frame
from ksmd_ctl.kernel.process_counts import read_counts
from ksmd_ctl.kernel.procfs import find_kernel_thread
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import read_ranges
from ksmd_ctl.kernel.zero_pages import NO_HUGE_PAGES, ZeroPages, count_zero_pages, splits_free_zeroes
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_detection import scan
from tests.service.running import until

MERGEABLE = frozenset({"mg"})
SMALL_ONLY = MERGEABLE | {NO_HUGE_PAGES}
KHUGEPAGED = Path("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs")
MANY = 1 << 40


@contextmanager
def mapped(size: int) -> Iterator[int]:
    """So much address space of our own, without huge pages."""
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_NORESERVE
    start = syscalls.mmap(0, size, syscalls.PROT_READ | syscalls.PROT_WRITE, flags)
    try:
        syscalls.madvise(start, size, syscalls.MADV_NOHUGEPAGE)
        yield start
    finally:
        syscalls.munmap(start, size)


def own(ranges: list[Range], most: int = MANY) -> ZeroPages:
    with Pagemap(os.getpid()) as pagemap:
        return count_zero_pages(pagemap, ranges, most)


# -- counting ------------------------------------------------------------------------------------------------


def test_what_was_only_read_maps_the_zero_page_wherever_it_lies() -> None:
    size, per_gib = 3 << 30, (1 << 30) // PAGE_SIZE
    with mapped(size) as start, Pagemap(os.getpid()) as pagemap:
        try:
            list(pagemap.scan(start, start + size, wanted=1))
        except Absent as error:
            pytest.skip(str(error))
        # On both sides of where one call ends and the next begins, too.
        for page in (2, 7001, per_gib - 1, per_gib, 2 * per_gib, 3 * per_gib - 1):
            syscalls.load(start + page * PAGE_SIZE, 1)
        for page in (0, 7000, per_gib + 1):
            syscalls.store(start + page * PAGE_SIZE, b"x")
        assert own([Range(start, start + size, MERGEABLE)]) == ZeroPages(6, 0)
        assert own([Range(start, start + size, SMALL_ONLY)]) == ZeroPages(6, 6)
        first = Range(start, start + 3 * PAGE_SIZE, MERGEABLE)
        assert own([first, Range(first.end, start + size, SMALL_ONLY)]) == ZeroPages(6, 5)
        # What is written is a page of its own, also where it holds zeroes again.
        syscalls.store(start + 2 * PAGE_SIZE, bytes(PAGE_SIZE))
        assert own([Range(start, start + size, MERGEABLE)]) == ZeroPages(5, 0)
    assert own([]) == ZeroPages(0, 0)


def test_zero_pages_in_more_runs_than_one_call_gives() -> None:
    count = 10_000
    with mapped(2 * count * PAGE_SIZE) as start:
        for page in range(0, 2 * count, 2):
            syscalls.load(start + page * PAGE_SIZE, 1)
        item = Range(start, start + 2 * count * PAGE_SIZE, MERGEABLE)
        try:
            assert own([item], 0) == ZeroPages(count, 0)
        except Absent as error:
            pytest.skip(str(error))


def test_the_huge_zero_page_does_not_count() -> None:
    size = 4 << 20
    with mapped(size) as start:
        syscalls.madvise(start, size, syscalls.MADV_HUGEPAGE)
        inside = -(-start // (2 << 20)) * (2 << 20)
        syscalls.load(inside, 1)
        with Pagemap(os.getpid()) as pagemap:
            (entry,) = pagemap.read(inside, 1)
        if not frames_of(array("Q", [entry]))[0] or entry & ~SOFT_DIRTY == PRESENT | zero_frame():
            pytest.skip("this kernel has no huge zero page here, or shows no frames")
        assert own([Range(start, start + size, MERGEABLE)], size // PAGE_SIZE) == ZeroPages(0, 0)


@pytest.mark.parametrize("most", [4, 3])
def test_zero_pages_are_counted_page_by_page_where_the_kernel_does_not_scan(tmp_path: Path, most: int) -> None:
    frame = zero_frame()
    if not frame:
        pytest.skip("needs CAP_SYS_ADMIN: pagemap shows no frames")
    (tmp_path / "proc/7").mkdir(parents=True)
    entries = array("Q", [PRESENT | frame, PRESENT | SOFT_DIRTY | frame, PRESENT | frame + 1, 0])
    (tmp_path / "proc/7/pagemap").write_bytes(entries.tobytes())
    ranges = [Range(0, PAGE_SIZE, SMALL_ONLY), Range(PAGE_SIZE, 4 * PAGE_SIZE, MERGEABLE)]
    with Pagemap(7, tmp_path) as pagemap:
        if most == 4:
            assert count_zero_pages(pagemap, ranges, most) == ZeroPages(2, 1)
        else:
            # That isn't known, which is not none.
            with pytest.raises(Absent, match="4 pages would have to be looked at one by one") as caught:
                count_zero_pages(pagemap, ranges, most)
            assert caught.value.path == str(tmp_path / "proc/7/pagemap")
            assert caught.value.errno is not None


def test_without_frames_the_zero_page_can_not_be_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksmd_ctl.kernel.zero_pages.zero_frame", lambda: 0)
    (tmp_path / "proc/7").mkdir(parents=True)
    (tmp_path / "proc/7/pagemap").write_bytes(bytes(32))
    with Pagemap(7, tmp_path) as pagemap, pytest.raises(Denied, match="which frame is the zero page") as caught:
        count_zero_pages(pagemap, [Range(0, 4 * PAGE_SIZE, MERGEABLE)], 4)
    assert "CAP_SYS_ADMIN" in caught.value.hint


def test_a_process_that_has_exited_is_gone_and_not_without_zero_pages() -> None:
    with spawn("test-zero-pages") as process:
        start = process.map(2)
        process.store(start, [b"x" * PAGE_SIZE, None])
        ranges = [Range(start, start + 2 * PAGE_SIZE, MERGEABLE)]
        with Pagemap(process.id.pid) as pagemap:
            assert count_zero_pages(pagemap, ranges, 2) == ZeroPages(0, 0)
            process.exit()
            with pytest.raises(NoSuchProcess):
                count_zero_pages(pagemap, ranges, 2)


@given(st.integers(0, 1000), st.integers(0, 1000), st.none() | st.integers(-5, 3000))
def test_what_splits_freed_is_never_more_than_what_is_left(split: int, unsplit: int, replaced: int | None) -> None:
    found = ZeroPages(split + unsplit, unsplit).freed_by_splits(replaced)
    assert 0 <= found <= split
    assert found == split - min(split, max(0, replaced or 0))


# -- what splits of huge pages give back ---------------------------------------------------------------------

_HOLDER = """
import ctypes, mmap, sys
kind, name, pages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
huge = kind != "small"
libc = ctypes.CDLL(None, use_errno=True)
# Where all memory may be huge pages, only that of the test does.
for line in open("/proc/self/maps"):
    words = line.split()
    if words[1] == "rw-p" and (len(words) < 6 or words[5] == "[heap]"):
        first, last = (int(word, 16) for word in words[0].split("-"))
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), 15)
area = mmap.mmap(-1, (pages + 512) * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
first = -(base // 4096) % 512
start = base + first * 4096
for advice in (14 if huge else 15, 12):
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(pages * 4096), advice):
        sys.exit("madvise failed")
if len(sys.argv) > 4 and libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(pages * 4096)):
    sys.exit("mlock failed")
def write(page, number):
    at = (first + page) * 4096
    area[at : at + 16] = (page + 1).to_bytes(8, "little") + number.to_bytes(8, "little")
# Of five pages two are equal in all holders, one holds zeroes, and two are like no other. Or half of each huge page is
# zeroes, and the other half like no other.
for page in range(pages):
    if kind == "half zeroes":
        if page % 512 < 256:
            write(page, name)
        else:
            area[(first + page) * 4096] = 0
    elif page % 5 == 2:
        area[(first + page) * 4096] = 0
    else:
        write(page, 0 if page % 5 < 2 else name)
print(start, flush=True)
for line in sys.stdin:
    for page in range(2, int(line), 5):
        write(page, name)
    print("written", flush=True)
"""


@dataclass
class Holder:
    """A process with mergeable memory, of which the fifth part is zeroes."""

    process: subprocess.Popen[str]
    start: int
    pages: int

    def write(self, pages: int) -> None:
        """Write to the zeroes among so many first pages."""
        assert self.process.stdin
        assert self.process.stdout
        print(pages, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "written\n"

    @property
    def ranges(self) -> list[Range]:
        return [item for item in read_ranges(self.process.pid) if item.mergeable]

    def zero_pages(self) -> ZeroPages:
        with Pagemap(self.process.pid) as pagemap:
            return count_zero_pages(pagemap, self.ranges, self.pages + 512)

    def freed(self) -> int:
        return self.zero_pages().freed_by_splits(read_counts(self.process.pid).zero_pages)

    def frames(self) -> set[int]:
        with Pagemap(self.process.pid) as pagemap:
            return set(frames_of(pagemap.read(self.start, self.pages))) - {0, zero_frame()}

    def huge_bytes(self) -> int:
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        found = re.search(r"^AnonHugePages: +(\d+) kB$", rollup, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0


@contextmanager
def holders(kind: str, pages: int, *more: str) -> Iterator[list[Holder]]:
    with ExitStack() as stack:
        found = []
        for name in (1, 2):
            words = [sys.executable, "-I", "-S", "-c", _HOLDER, kind, str(name), str(pages), *more]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout
            found.append(Holder(process, int(process.stdout.readline()), pages))
        yield found


@contextmanager
def huge_holders(kind: str, pages: int) -> Iterator[list[Holder]]:
    """As `holders`, all of whose memory is huge pages."""
    with holders(kind, pages) as found:
        if any(one.huge_bytes() < pages * PAGE_SIZE for one in found):
            pytest.skip("not all of it could be huge pages")
        yield found


@pytest.fixture
def khugepaged_asleep(ksm_host: Path) -> Iterator[None]:
    """Awake, it makes huge pages again of what was split while a test looks.

    After `ksm_host`: not while others have this host's KSM.
    """
    try:
        before = KHUGEPAGED.read_text()
    except OSError:
        pytest.skip("this kernel has no transparent huge pages")
    with has_huge_pages():
        KHUGEPAGED.write_text("3600000")
        try:
            until("khugepaged to sleep", lambda: True if khugepaged_sleeps() else None)
            yield
        finally:
            KHUGEPAGED.write_text(before)


@contextmanager
def has_huge_pages() -> Iterator[None]:
    """Be a process with huge pages: the first one of a host would wake khugepaged (mm/khugepaged.c)."""
    size = 4 << 20
    start = syscalls.mmap(0, size, syscalls.PROT_READ | syscalls.PROT_WRITE, syscalls.MAP_PRIVATE)
    try:
        syscalls.madvise(start, size, syscalls.MADV_HUGEPAGE)
        ctypes.memset(start, 1, size)
        yield
    finally:
        syscalls.munmap(start, size)


def khugepaged_sleeps() -> bool:
    try:
        pid = find_kernel_thread(Path("/proc"), "khugepaged")
    except Absent as error:
        pytest.skip(f"{error}: /sys/kernel/mm/transparent_hugepage/enabled is never")
    return "State:\tS" in Path(f"/proc/{pid}/status").read_text()


def number(ksm: Path, name: str) -> int:
    """A counter of KSM's, 0 where this kernel doesn't have it."""
    path = ksm / name
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.ksm
@pytest.mark.usefixtures("khugepaged_asleep")
@pytest.mark.parametrize("use_zero_pages", [0, 1])
def test_what_is_saved_in_frames_is_what_is_counted_and_what_splits_freed(ksm_host: Path, use_zero_pages: int) -> None:
    frees = splits_free_zeroes()
    if frees is None:
        pytest.skip("no huge page is to be had")
    (ksm_host / "use_zero_pages").write_text(str(use_zero_pages))
    pages = 8 * 512
    with huge_holders("huge", pages) as both:
        before = len(both[0].frames() | both[1].frames())
        assert before == 2 * pages
        scan(ksm_host, 5)
        assert [one.huge_bytes() for one in both] == [0, 0]
        saved = before - len(both[0].frames() | both[1].frames())
        freed = sum(one.freed() for one in both)
        zeroes = 2 * len(range(2, pages, 5))
        if frees:
            # Whatever use_zero_pages is, ksmd finds no page of zeroes any more.
            assert (freed, number(ksm_host, "ksm_zero_pages")) == (zeroes, 0)
        elif not (ksm_host / "ksm_zero_pages").exists() and use_zero_pages:
            # Before 6.6 nothing counts those that ksmd replaces, and nothing tells them from others.
            assert freed == zeroes
        else:
            assert freed == 0
        assert saved == number(ksm_host, "pages_sharing") + number(ksm_host, "ksm_zero_pages") + freed
        # Un-merging doesn't bring them back, writing does.
        (ksm_host / "run").write_text("2")
        if frees:
            assert sum(one.freed() for one in both) == zeroes
            both[0].write(pages)
            assert [one.freed() for one in both] == [0, zeroes // 2]


@pytest.mark.ksm
@pytest.mark.usefixtures("khugepaged_asleep")
@pytest.mark.parametrize(("kind", "lock"), [("small", ()), ("huge", ("lock",))])
def test_what_ksmd_itself_replaced_is_not_what_splits_freed(ksm_host: Path, kind: str, lock: tuple[str, ...]) -> None:
    if not (ksm_host / "ksm_zero_pages").exists():
        pytest.skip("this kernel does not count what ksmd replaces by the zero page")
    (ksm_host / "use_zero_pages").write_text("1")
    pages = 2 * 512
    zeroes = len(range(2, pages, 5))
    with holders(kind, pages, *lock) as both:
        scan(ksm_host, 5)
        for one in both:
            assert read_counts(one.process.pid).zero_pages == zeroes
            assert one.zero_pages() == ZeroPages(zeroes, zeroes if kind == "small" else 0)
            assert one.freed() == 0


@pytest.mark.ksm
@pytest.mark.usefixtures("khugepaged_asleep")
@pytest.mark.parametrize("use_zero_pages", [0, 1])
def test_huge_pages_with_zeroes_are_split_one_a_scan_or_all_at_once(ksm_host: Path, use_zero_pages: int) -> None:
    if not splits_free_zeroes():
        pytest.skip("splits free no zeroes here")
    (ksm_host / "use_zero_pages").write_text(str(use_zero_pages))
    pages = 16 * 512
    with huge_holders("half zeroes", pages) as both:
        scan(ksm_host, 5)
        left = sum(one.huge_bytes() for one in both) // (512 * PAGE_SIZE)
        # Checksums are taken in the first scan. A scan may have ended before the knob was written to stop it.
        assert left == 0 if use_zero_pages else 32 - 8 <= left <= 32 - 3, left


def test_a_split_is_tried_on_memory_of_ones_own_and_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {item.start for item in read_ranges(os.getpid()) if "hg" in item.flags}
    zero_pages._tried_split.cache_clear()
    found = splits_free_zeroes()
    if found is not None:
        # What is known is not tried again.
        with monkeypatch.context() as patch:
            patch.setattr(syscalls, "mmap", lambda *_: pytest.fail("tried again"))
            assert splits_free_zeroes() is found
    assert {item.start for item in read_ranges(os.getpid()) if "hg" in item.flags} <= before
