# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging would save on this host, told while ksmd is off, is what ksmd then reaches."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ksmd_ctl.host.estimate import Estimate, Outcome, Rules, Stage
from ksmd_ctl.kernel import estimate, estimate_targets
from ksmd_ctl.kernel.contents import merge_rules
from ksmd_ctl.kernel.estimate import Look
from ksmd_ctl.kernel.estimate_targets import find_targets
from ksmd_ctl.kernel.pace import Pace
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of, zero_frame
from ksmd_ctl.kernel.proc_pid import LeftOut
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.kernel.reading import killable_reads
from ksmd_ctl.kernel.zero_pages import splits_free_zeroes
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.kernel.stuck import stuck_process
from tests.kernel.test_detection import filled, scan
from tests.kernel.test_unshare import mergeable

pytestmark = pytest.mark.ksm

ZERO = bytes(PAGE_SIZE)


@pytest.fixture
def processes(ksm_host: Path) -> Iterator[tuple[RegionProcess, RegionProcess]]:
    (ksm_host / "run").write_text("0")
    with spawn("test-estimate-1") as one, spawn("test-estimate-2") as other:
        yield one, other


class Looking:
    """One look, and all that it told."""

    def __init__(self, *, more: bool = False, only: Sequence[int] = (), share: float = 1.0, **options: object) -> None:
        self.left_out = LeftOut()
        targets = find_targets(lambda process: not only or process.id.pid in only, self.left_out, more=more)
        rules = Rules(merge_rules(Path("/")).max_page_sharing)
        self.pace = Pace(share)
        options = {"interval_seconds": 0.05, **options}
        self.look = Look(targets, rules, self.pace, left_out=self.left_out, more=more, **options)  # type: ignore[arg-type]
        self.owners = {target.process.id.pid: number for number, target in enumerate(targets)}
        self.told: list[Estimate] = []

    def all(self) -> Looking:
        for one in self.look.estimates():
            self.told.append(one)
        return self

    @property
    def final(self) -> Estimate:
        return self.told[-1]


def outcome(found: Estimate, *, zero: bool = False, across: bool = True) -> Outcome:
    return next(one for one in found.outcomes if (one.merge_across_nodes, one.use_zero_pages) == (across, zero))


def counters(ksm: Path) -> tuple[int, int, int]:
    shared, sharing, zero = (
        int((ksm / name).read_text()) for name in ("pages_shared", "pages_sharing", "ksm_zero_pages")
    )
    return shared, sharing, zero


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("limit", [256, 8])
def test_ksmd_reaches_it(
    ksm_host: Path, processes: tuple[RegionProcess, RegionProcess], zero: bool, limit: int
) -> None:
    one, other = processes
    (ksm_host / "use_zero_pages").write_text(str(int(zero)))
    (ksm_host / "max_page_sharing").write_text(str(limit))
    mergeable(one, [*(filled(number) for number in range(1, 301)), *[filled(1)] * 50, *[ZERO] * 40, None])
    mergeable(other, [*(filled(number) for number in range(201, 501)), ZERO])
    only = [process.id.pid for process in processes]
    found = Looking(only=only).all()
    assert [told.stage for told in found.told] == [Stage.READ, Stage.FINAL]
    expected = outcome(found.final, zero=zero)
    assert found.final.pages == 691
    assert expected.freed.found == expected.freed.low == expected.freed.high
    if limit == 256:
        # A hundred that both have, fifty more of one of the first, and zeroes.
        assert expected.freed.found == 100 + 50 + (41 if zero else 40)
    parts = [found.final.owners[found.owners[process.id.pid]] for process in (one, other)]
    assert sum(part.pages for part in parts) == 691
    scan(ksm_host, 4)
    assert counters(ksm_host) == (expected.pages_shared, expected.pages_sharing, expected.zero_pages)
    profit = int((ksm_host / "general_profit").read_text())
    assert profit == (expected.pages_sharing + expected.zero_pages) * PAGE_SIZE - expected.items * 64
    # With everything merged it is the same, and known to be there already.
    again = Looking(only=only).all().final
    merged = outcome(again)
    if not zero:
        assert (merged.pages_shared, merged.pages_sharing) == (expected.pages_shared, expected.pages_sharing)
        assert again.merged_pages == expected.pages_sharing


def test_huge_pages(ksm_host: Path, processes: tuple[RegionProcess, RegionProcess]) -> None:
    if splits_free_zeroes() is not True:
        pytest.skip("this kernel's splits of huge pages free no zeroes, or it has no huge pages")
    blocks = 4
    for number, process in enumerate(processes):
        pages = 512 * (blocks + 1)
        start = process.map(pages)
        start += -start % (512 * PAGE_SIZE)
        contents = [
            filled(1 + page) if page % 5 < 2 else ZERO if page % 5 == 2 else filled(100_000 * (number + 1) + page)
            for page in range(512 * blocks)
        ]
        process.store(start, contents)
        if process.collapse(start, 512 * blocks) != (True,) * blocks:
            pytest.skip("no huge pages were to be had")
        process.advise(start, 512 * blocks, mergeable=True)
    pids = [process.id.pid for process in processes]
    frames = distinct_frames(pids)
    expected = outcome(Looking(only=pids).all().final)
    zeroes = sum(page % 5 == 2 for page in range(512 * blocks))
    assert expected.split_zero_pages == 2 * zeroes
    scan(ksm_host, 4)
    assert frames - distinct_frames(pids) == expected.freed.found
    assert counters(ksm_host)[:2] == (expected.pages_shared, expected.pages_sharing)


def distinct_frames(pids: Sequence[int]) -> int:
    """Frames that these have in mergeable memory, without the zero page."""
    found: set[int] = set()
    for pid in pids:
        with Pagemap(pid) as pagemap:
            for item in mappings(pid):
                if item.mergeable:
                    found.update(frames_of(pagemap.read_frames(item.start, (item.end - item.start) // PAGE_SIZE)))
    return len(found - {0, zero_frame()})


def test_what_fork_shares_is_one_page(ksm_host: Path, processes: tuple[RegionProcess, RegionProcess]) -> None:
    one, other = processes
    mergeable(one, [filled(number) for number in range(1, 31)])
    mergeable(other, [filled(number) for number in range(1, 11)])
    with one.fork() as child:
        pids = [one.id.pid, other.id.pid, child.id.pid]
        frames = distinct_frames(pids)
        final = Looking(only=pids).all().final
        expected = outcome(final)
        assert (final.pages, expected.freed.found, final.merged_pages) == (70, 10, 0)
        scan(ksm_host, 4)
        assert frames - distinct_frames(pids) == 10
        # ksmd counts what fork shared as well: so does what is told of its counters.
        assert counters(ksm_host)[:2] == (expected.pages_shared, expected.pages_sharing) == (10, 20)
        assert Looking(only=pids).all().final.merged_pages == 10


def test_where_nothing_would_be_freed_it_does_not_wait(processes: tuple[RegionProcess, RegionProcess]) -> None:
    """With an interval of a day: of contents that each page has alone, and of nobody's."""
    one, other = processes
    mergeable(one, [filled(number) for number in range(1, 11)])
    for only in ([one.id.pid], [other.id.pid]):
        found = Looking(only=only, interval_seconds=86400.0).all()
        assert [told.stage for told in found.told] == [Stage.READ, Stage.FINAL]
        assert found.look.interval_seconds == 0
        assert outcome(found.final).freed.found == 0


def test_pages_that_change_are_left_out(processes: tuple[RegionProcess, RegionProcess]) -> None:
    one, other = processes
    start = mergeable(one, [filled(number) for number in range(1, 401)])
    mergeable(other, [filled(number) for number in range(1, 401)])
    found = Looking(only=[one.id.pid, other.id.pid])
    for told in found.look.estimates():
        found.told.append(told)
        if told.stage is Stage.READ:
            one.store(start, [filled(1000 + number) for number in range(1, 101)])
    assert [round(outcome(told).freed.found) for told in found.told] == [400, 300]
    assert outcome(found.final).freed.low == outcome(found.final).freed.high
    assert found.final.stable is not None
    assert found.final.stable.pages.found == 0.75


@pytest.mark.parametrize("merged", [False, True])
def test_only_a_process_whose_pages_change_loses_them(
    ksm_host: Path, processes: tuple[RegionProcess, RegionProcess], merged: bool
) -> None:
    """The parts of all are together what is saved, also where a process has few contents that change."""
    one, other = processes
    mergeable(one, [filled(number) for number in range(1, 101)] * 2)
    mergeable(other, [filled(number) for number in range(1, 11)])
    with spawn("test-estimate-3") as third:
        start = mergeable(third, [filled(500)] * 200)
        if merged:
            scan(ksm_host, 4)
        found = Looking(only=[one.id.pid, other.id.pid, third.id.pid])
        for told in found.look.estimates():
            found.told.append(told)
            if told.stage is Stage.READ:
                third.store(start, [filled(501)] * 200)
    freed = [round(found.final.owners[found.owners[one.id.pid]].freed, 2) for one in (one, other, third)]
    assert freed == [pytest.approx(90 + 10 * 4 / 3, abs=0.1), pytest.approx(10 * 2 / 3, abs=0.1), 0]
    assert sum(freed) == pytest.approx(outcome(found.final).freed.found, abs=0.1) == 110


def test_a_process_that_ends_between_two_looks(processes: tuple[RegionProcess, RegionProcess]) -> None:
    one, other = processes
    mergeable(one, [filled(number) for number in range(1, 101)])
    mergeable(other, [filled(number) for number in range(1, 101)])
    found = Looking(only=[one.id.pid, other.id.pid])
    for told in found.look.estimates():
        found.told.append(told)
        if told.stage is Stage.READ:
            other.exit()
    assert found.look.gone == {other.id.pid}
    assert not found.left_out.errors
    # Nobody has its pages or ksmd's records of them.
    assert [(told.pages, outcome(told).items) for told in found.told] == [(200, 200), (100, 100)]
    assert found.final.owners[found.owners[other.id.pid]].items == 0
    assert [round(outcome(told).freed.found) for told in found.told] == [100, 0]


def test_of_a_process_that_ended_nothing_is_a_saving(processes: tuple[RegionProcess, RegionProcess]) -> None:
    """Also where others' pages stay, and too few of its own are looked at again to tell what changed."""
    one, other = processes
    mergeable(one, [filled(number) for number in range(1, 101)] * 2)
    mergeable(other, [filled(number) for number in range(201, 211)] * 2)
    found = Looking(only=[one.id.pid, other.id.pid])
    for told in found.look.estimates():
        found.told.append(told)
        if told.stage is Stage.READ:
            other.exit()
    parts = [found.final.owners[found.owners[process.id.pid]].freed for process in processes]
    assert parts[1] == 0
    assert sum(parts) == pytest.approx(outcome(found.final).freed.found)


def test_memory_that_nobody_marked(processes: tuple[RegionProcess, RegionProcess]) -> None:
    one, other = processes
    mergeable(one, [filled(number) for number in range(1, 101)])
    start = other.map(300)
    other.store(start, [filled(number) for number in range(50, 350)])
    pids = [one.id.pid, other.id.pid]
    assert Looking(only=pids).all().final.pages == 100
    final = Looking(more=True, only=pids).all().final
    assert outcome(final).freed.found == 0
    (more,) = [found for found in final.outcomes_with_more if found.merge_across_nodes and not found.use_zero_pages]
    assert more.freed.found >= 50
    assert final.more_pages >= 300


def test_a_sample_first_and_then_everything(
    processes: tuple[RegionProcess, RegionProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little of a CPU: an interval that narrows, never more than the share, and what is kept is a part."""
    monkeypatch.setattr(estimate, "_FIRST_SECONDS", 0.5)
    pages = 8192
    for process in processes:
        mergeable(process, [filled(number) for number in range(1, pages + 1)])
    only = [process.id.pid for process in processes]
    found = Looking(share=0.1, only=only, most_kept=4000, chance=random.Random(1), interval_seconds=0.0).all()
    stages = [told.stage for told in found.told]
    assert stages[0] is Stage.SAMPLE
    assert stages[-1] is Stage.READ
    assert found.pace.cpu_seconds <= 0.1 * found.pace.seconds * 1.02 + 0.01
    assert 0.1 < found.final.content_share < 0.5
    expected = outcome(found.final)
    assert expected.freed.low < expected.freed.found < expected.freed.high
    assert abs(expected.freed.found - pages) < 0.2 * pages
    widths = [outcome(told).freed.high - outcome(told).freed.low for told in found.told]
    assert widths == sorted(widths, reverse=True)
    # At the least what is certain, and never more than there is.
    assert all(outcome(told).freed.low <= 1.3 * pages for told in found.told)
    assert all(outcome(told).freed.high >= 0.7 * pages for told in found.told)


def test_a_content_that_many_pages_have_is_not_left_to_chance(processes: tuple[RegionProcess, RegionProcess]) -> None:
    for process in processes:
        mergeable(process, [filled(7)] * 4096 + [filled(number) for number in range(100, 4196)])
    only = [process.id.pid for process in processes]
    for seed in range(3):
        final = (
            Looking(share=0.5, only=only, most_kept=1000, chance=random.Random(seed), interval_seconds=0.0).all().final
        )
        # The heavy one alone: 8,192 pages on 32 frames. Of the others about 250 are kept, so at four standard errors:
        assert outcome(final).freed.low > 8000
        assert abs(outcome(final).freed.found - (8160 + 4096)) < 1100


def test_a_process_that_keeps_its_readers_waiting_is_named(
    processes: tuple[RegionProcess, RegionProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_targets, "killable_reads", lambda: killable_reads(timeout_seconds=0.2))
    for process in processes:
        mergeable(process, [filled(1)])
    with stuck_process(tmp_path, "stuck-one", uid=65534) as stuck:
        found = Looking(only=[process.id.pid for process in processes]).all()
    assert set(found.left_out.errors) == {getattr(stuck, "pid", stuck)}
    assert outcome(found.final).freed.found == 1


def test_nothing_changes(ksm_host: Path, processes: tuple[RegionProcess, RegionProcess]) -> None:
    """No page is faulted in, un-merged or swapped in by being looked at."""
    one, other = processes
    for process in processes:
        mergeable(process, [*(filled(number) for number in range(100)), *[None] * 100])
    scan(ksm_host, 3)
    before = [
        tuple((item.start, item.resident_pages, item.ksm_pages) for item in mappings(one.id.pid)),
        counters(ksm_host),
    ]
    Looking(more=True, only=[one.id.pid, other.id.pid]).all()
    assert before == [
        tuple((item.start, item.resident_pages, item.ksm_pages) for item in mappings(one.id.pid)),
        counters(ksm_host),
    ]


def test_while_ksmd_merges(ksm_host: Path, processes: tuple[RegionProcess, RegionProcess]) -> None:
    """Pages of which some are merged when they are read, and some are not yet, are the same pages."""
    for number_, process in enumerate(processes):
        mergeable(process, [filled(1 + page if page % 2 else 10_000 * (1 + number_) + page) for page in range(6000)])
    for name, value in (("smart_scan", 0), ("sleep_millisecs", 1), ("pages_to_scan", 100), ("run", 1)):
        (ksm_host / name).write_text(str(value))
    only = [process.id.pid for process in processes]
    seen = []
    until = time.monotonic() + 30
    while time.monotonic() < until and (not seen or seen[-1].merged_pages < 3000):
        seen.append(Looking(only=only, interval_seconds=0.0).all().final)
    assert seen[-1].merged_pages == 3000
    assert {outcome(one).freed.found for one in seen} == {3000}
    assert all(one.pages == 12_000 for one in seen)


def test_memory_that_userfaultfd_watches_is_not_read(processes: tuple[RegionProcess, RegionProcess]) -> None:
    for process in processes:
        mergeable(process, [filled(1)] * 10)
    watcher = (
        "import ctypes, mmap, os, sys, struct, fcntl\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "fd = libc.syscall(323, os.O_CLOEXEC)\n"
        "if fd < 0: sys.exit(os.strerror(ctypes.get_errno()))\n"
        "fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack('QQQ', 0xAA, 0, 0)))\n"
        "m = mmap.mmap(-1, 40960, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "m.madvise(12); m[:] = b'1' * 40960\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack('QQQQ', start, 40960, 1, 0)))\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", watcher], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as watched:
        assert watched.stdout is not None
        if watched.stdout.readline() != b"ready\n":
            pytest.skip("no userfaultfd here")
        targets = find_targets(lambda _: True, LeftOut(), more=True, pid=watched.pid)
        flagged = [item for item in mappings(watched.pid) if "um" in item.flags]
        assert len(flagged) == 1
        assert all(item.start != flagged[0].start for target in targets for item, _ in target.ranges)
        watched.kill()
