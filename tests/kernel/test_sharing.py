# SPDX-License-Identifier: GPL-2.0-or-later
"""Who shares frames with whom on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ksmd_ctl.codec import decode, encode
from ksmd_ctl.errors import Absent
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import finish
from ksmd_ctl.host.sharing import Pair, Sharing, figures, pairs
from ksmd_ctl.kernel.detection import choose, probe
from ksmd_ctl.kernel.ranges import mappings
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.scenario.regions import RegionProcess, spawn
from tests.kernel.stuck import stuck_process
from tests.kernel.test_detection import filled, scan
from tests.kernel.test_unshare import mergeable

pytestmark = pytest.mark.ksm


@pytest.fixture(autouse=True)
def can_tell(ksm_host: Path) -> None:
    try:
        choose(probe())
    except Absent as error:
        pytest.skip(str(error))
    # On a host with several nodes pages of all of them are to be merged; that can be changed while nothing is merged.
    if (across := ksm_host / "merge_across_nodes").exists():
        (ksm_host / "run").write_text("2")
        across.write_text("1")


def look(*groups: Sequence[RegionProcess], budget: float = 60.0) -> Sharing:
    host = open_kernel_host()
    found = finish(host.sharing([[process.id for process in group] for group in groups], budget), 120.0)
    host.close()
    assert decode(Sharing, encode(found)) == found
    return found


def counts_ksm(process: RegionProcess) -> bool:
    """Whether smaps counts KSM pages (since 6.7)."""
    return any(item.ksm_pages is not None for item in mappings(process.id.pid))


def test_who_shares_what(ksm_host: Path) -> None:
    with spawn("test-one") as one, spawn("test-two") as two, spawn("test-three") as three:
        # 40 of one and two, 10 of these of three as well, 5 that one has twice.
        mergeable(one, [*(filled(number) for number in range(40)), *[filled(100 + n) for n in range(5)] * 2])
        start = mergeable(two, [*(filled(number) for number in range(40)), filled(200)])
        mergeable(three, [filled(number) for number in range(10)])
        scan(ksm_host, 3)
        found = look([one], [two], [three])
        assert found.complete
        assert (found.gone, found.unread, found.unseen_frames) == ((), (), 0)
        assert pairs(found) == (
            Pair((0, 1), 40, 40, 40, (40, 40), 0),
            Pair((0, 2), 10, 10, 10, (10, 10), 0),
            Pair((1, 2), 10, 10, 10, (10, 10), 0),
        )
        first, second, third = figures(found)
        assert (first.merged_pages, first.frames, first.own_frames, first.saved_alone_pages) == (50, 45, 5, 5)
        assert (first.leaving_costs_pages, second.leaving_costs_pages, third.leaving_costs_pages) == (30, 30, 0)
        saved = sum(one_group.saved_pages for one_group in (first, second, third))
        assert saved == pytest.approx(found.saved_pages) == pytest.approx(100 - 45)
        # As one group the first two share with the third only.
        together = look([one, two], [three])
        assert [(pair.frames, pair.pages) for pair in pairs(together)] == [(10, (20, 10))]
        # Who is in no group is unseen, and what is no longer merged is gone at once.
        assert look([one], [three]).unseen_frames == 40
        two.store(start, [filled(300 + number) for number in range(20)])
        assert [pair.frames for pair in pairs(look([one], [two]))] == [20]
        # Of ten frames only one process is left: they are KSM pages that are mapped once.
        again = figures(look([one], [two], [three]))[0]
        assert (again.merged_pages, again.frames) == ((50, 45) if counts_ksm(one) else (40, 35))


def test_what_fork_shares_is_apart(ksm_host: Path) -> None:
    with spawn("test-parent") as parent, spawn("test-other") as other:
        mergeable(parent, [filled(number) for number in range(30)])
        mergeable(other, [filled(number) for number in range(10)])
        scan(ksm_host, 3)
        with parent.fork() as child:
            (parents, others) = pairs(look([parent], [child], [other]))[:2]
            assert (parents.groups, parents.frames, parents.forked_frames) == ((0, 1), 10, 20)
            assert others.frames == 10
            assert look([parent]).unseen_frames == 10


def test_a_sample_of_much(ksm_host: Path) -> None:
    pages = 20_000
    with spawn("test-one") as one, spawn("test-two") as two:
        for process in (one, two):
            mergeable(process, [filled(number) for number in range(pages)])
        scan(ksm_host, 3)
        whole = look([one], [two])
        assert whole.complete
        (pair,) = pairs(whole)
        assert pair.frames == pages
        part = look([one], [two], budget=whole.cpu_seconds / 3)
        assert not part.complete
        for estimate in pairs(part):
            assert estimate.low <= pages <= estimate.high


def test_a_process_that_keeps_its_readers_waiting_holds_nobody_up(ksm_host: Path, tmp_path: Path) -> None:
    with spawn("test-one") as one, spawn("test-two") as two:
        for process in (one, two):
            mergeable(process, [filled(number) for number in range(20)])
        scan(ksm_host, 3)
        host = open_kernel_host()
        with stuck_process(tmp_path, "stuck-one", uid=65534) as stuck:
            groups = [[one.id], [two.id], [ProcessId(stuck, host.find(stuck).start_time_ticks)]]
            found = finish(host.sharing(groups, 60.0), 120.0)
        host.close()
        assert (found.unread, found.complete) == ((stuck,), False)
        assert [pair.frames for pair in pairs(found)] == [20]
