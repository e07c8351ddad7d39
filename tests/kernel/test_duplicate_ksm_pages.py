# SPDX-License-Identifier: GPL-2.0-or-later
"""Twins on this machine. With one node they come about where pages of full KSM pages went away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ksmd_ctl.codec import decode, encode
from ksmd_ctl.errors import Absent, Cancelled, Denied
from ksmd_ctl.host.duplicates import DuplicateKsmPages
from ksmd_ctl.host.memory import Range
from ksmd_ctl.host.operation import finish
from ksmd_ctl.kernel import duplicate_ksm_pages
from ksmd_ctl.kernel.detection import PageReader, choose, probe
from ksmd_ctl.kernel.pagemap import Pagemap, frames_of
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.ranges import NumaRange
from ksmd_ctl.kernel.unshare import NOT_WRITABLE
from ksmd_ctl.privileged.host import KernelHost, open_kernel_host
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.fakes.unsharing import unshare_one
from tests.kernel.stuck import stuck_process
from tests.kernel.test_detection import filled, scan

LIMIT_SECONDS = 120.0


def test_which_policies_lead_away() -> None:
    def item(policy: str, *nodes: int) -> Range:
        return Range(0, PAGE_SIZE, frozenset(), policy, frozenset(nodes))

    stack = NumaRange(0, "bind", frozenset({0}), {})
    assert not duplicate_ksm_pages.leads_away(item("default"), 1)
    assert not duplicate_ksm_pages.leads_away(item("bind", 0, 1), 1)
    assert duplicate_ksm_pages.leads_away(item("prefer", 0), 1)
    assert duplicate_ksm_pages.leads_away(item("local"), 1)
    assert duplicate_ksm_pages.leads_away(item("interleave", 0, 1), 1)
    assert not duplicate_ksm_pages.leads_away(item("interleave", 1), 1)
    # What the stack has too may be the thread's own policy, which nobody asks when pages are un-merged from outside.
    assert not duplicate_ksm_pages.has_own_policy(item("bind", 0), stack)
    assert duplicate_ksm_pages.has_own_policy(item("bind", 1), stack)
    assert duplicate_ksm_pages.has_own_policy(item("bind", 0), None)


# -- this machine --------------------------------------------------------------------------------------------


@pytest.fixture
def host(ksm_host: Path) -> Iterator[KernelHost]:
    try:
        choose(probe())
    except Absent as error:
        pytest.skip(str(error))
    if not (ksm_host / "max_page_sharing").exists():
        pytest.skip("this kernel has no max_page_sharing")
    (ksm_host / "run").write_text("2")
    found = open_kernel_host()
    yield found
    found.close()


def limit(ksm: Path, pages: int) -> None:
    (ksm / "max_page_sharing").write_text(str(pages))


def mergeable(process: RegionProcess, numbers: list[int]) -> int:
    start = process.map(len(numbers))
    process.advise(start, len(numbers), mergeable=True)
    process.store(start, [filled(number) for number in numbers])
    return start


def frames(process: RegionProcess, start: int, pages: int) -> list[int]:
    with Pagemap(process.id.pid) as pagemap:
        return frames_of(pagemap.read(start, pages))


def look(host: KernelHost, most_pages: int = 10**6, budget: float = 60.0) -> DuplicateKsmPages:
    return finish(host.duplicate_ksm_pages(budget, most_pages), LIMIT_SECONDS)


def thin_out(process: RegionProcess, start: int, pages: int, keep: int) -> None:
    """Leave so many mappings of each frame."""
    found = frames(process, start, pages)
    for frame in set(found):
        for index in [index for index, other in enumerate(found) if other == frame][keep:]:
            process.discard(start + index * PAGE_SIZE, 1)


def shared(ksm: Path) -> tuple[int, int]:
    return int((ksm / "pages_shared").read_text()), int((ksm / "pages_sharing").read_text())


def scan_until(ksm: Path, expected: tuple[int, int]) -> None:
    """Full scans until the counters are as they have to be: a page that is held for a moment takes one more."""
    scan(ksm, 2)
    for _ in range(20):
        if shared(ksm) == expected:
            return
        scan(ksm, 1)
    assert shared(ksm) == expected


@pytest.mark.ksm
def test_full_pages_are_no_twins(ksm_host: Path, host: KernelHost) -> None:
    limit(ksm_host, 2)
    with spawn("test-one") as one, spawn("test-two") as two:
        for process in (one, two):
            mergeable(process, [number for number in range(50) for _ in range(4)])
        scan_until(ksm_host, (200, 200))
        found = look(host)
        assert (found.reclaimable, found.parts, found.left, found.complete) == (0, (), {}, True)
        # All are full, so none had to be read.
        assert found.frames == 0
    with spawn("test-three") as three:
        mergeable(three, [number for number in range(50) for _ in range(3)])
        scan(ksm_host, 4)
        assert look(host).reclaimable == 0


@pytest.mark.ksm
def test_what_is_left_of_full_pages_is_found_and_becomes_one_again(ksm_host: Path, host: KernelHost) -> None:
    limit(ksm_host, 4)
    contents = [number for number in range(300) for _ in range(8)]
    with spawn("test-one") as one, spawn("test-two") as two:
        start = mergeable(one, contents)
        steady = mergeable(two, list(range(10_000, 10_100)) * 3)
        scan_until(ksm_host, (700, 2000))
        thin_out(one, start, len(contents), 2)
        scan_until(ksm_host, (700, 800))
        before, lying = one.load(start, len(contents)), frames(one, start, len(contents))
        found = look(host)
        # Reading contents has un-merged nothing.
        assert frames(one, start, len(contents)) == lying
        assert decode(DuplicateKsmPages, encode(found)) == found
        assert (found.frames, found.reclaimable, found.left) == (700, 300, {})
        assert (found.part_frames, found.part_pages, found.complete) == (300, 600, True)
        assert {part.process for part in found.parts} == {one.id}
        assert found.cpu_seconds > 0
        few = look(host, 101)
        assert (few.reclaimable, few.part_frames, few.part_pages) == (300, 50, 100)
        for part in found.parts:
            result = finish(host.unshare(unshare_one(part.process, part.ranges, part.to), 60), LIMIT_SECONDS)
            assert result.left == {}
        scan_until(ksm_host, (400, 1100))
        assert (look(host).reclaimable, look(host).parts) == (0, ())
        assert one.load(start, len(contents)) == before
        assert two.load(steady, 300) == tuple(filled(number) for number in range(10_000, 10_100)) * 3


@pytest.mark.ksm
def test_what_can_not_be_un_merged_is_named(ksm_host: Path, host: KernelHost) -> None:
    limit(ksm_host, 4)
    with spawn("test-one") as one:
        start = mergeable(one, [1] * 8)
        scan_until(ksm_host, (2, 6))
        thin_out(one, start, 8, 2)
        scan_until(ksm_host, (2, 2))
        assert look(host).part_frames == 1
        one.protect(start, 8, writable=False)
        found = look(host)
        assert (found.reclaimable, found.left, found.parts) == (1, {NOT_WRITABLE: 1}, ())
        with one.fork():
            # Four mappings each now: full.
            assert look(host).reclaimable == 0


@pytest.mark.ksm
def test_what_somebody_maps_who_was_not_looked_at_is_not_un_merged(
    ksm_host: Path, host: KernelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(ksm_host, 8)
    with spawn("test-one") as one, PageReader(choose(probe())) as reader:
        start = mergeable(one, [1] * 16)
        scan_until(ksm_host, (2, 14))
        thin_out(one, start, 16, 2)
        with one.fork() as child:
            scan(ksm_host, 3)
            found = look(host)
            assert (found.reclaimable, found.part_frames, found.part_pages) == (1, 1, 4)
            assert {part.process for part in found.parts} == {one.id, child.id}
            real = duplicate_ksm_pages.mappings

            def refusing(pid: int, root: Path) -> tuple[Range, ...]:
                if pid == child.id.pid:
                    raise Denied("looking", "not ours")
                return real(pid, root)

            monkeypatch.setattr(duplicate_ksm_pages, "mappings", refusing)
            found = duplicate_ksm_pages.find_duplicate_ksm_pages(60.0, 100, reader=reader)
            assert (found.reclaimable, found.left, found.parts) == (1, {duplicate_ksm_pages.HIDDEN: 1}, ())
            with pytest.raises(Cancelled):
                duplicate_ksm_pages.find_duplicate_ksm_pages(60.0, 9, reader=reader, stop=lambda: True)


@pytest.mark.ksm
def test_without_budget_it_says_that_it_has_not_seen_everything(ksm_host: Path, host: KernelHost) -> None:
    with spawn("test-one") as one:
        mergeable(one, list(range(100)) * 2)
        scan(ksm_host, 3)
        found = look(host, budget=0.0)
        assert (found.complete, found.frames, found.reclaimable) == (False, 0, 0)


@pytest.mark.ksm
def test_a_process_that_keeps_its_readers_waiting_is_not_said_to_have_been_seen(
    ksm_host: Path, host: KernelHost, tmp_path: Path
) -> None:
    with spawn("test-one") as one:
        mergeable(one, list(range(100)) * 2)
        scan(ksm_host, 3)
        assert look(host).complete
        with stuck_process(tmp_path, "stuck-one", uid=65534):
            assert not look(host).complete
