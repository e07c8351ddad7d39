# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted as not merged while the advisor is at its slowest, or khugepaged undoes what ksmd does."""

from __future__ import annotations

from ksmd_ctl.daemon.missed_savings import ADVISOR, KHUGEPAGED, BlockedMerging
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.host.sample import Reading, Sample

# -- the advisor -------------------------------------------------------------------------------------------

CRAWL: dict[str, Reading] = {
    "run": 1,
    "advisor_mode": "scan-time",
    "pages_to_scan": 10,
    "sleep_millisecs": 20,
    "advisor_min_pages_to_scan": 500,
    "advisor_target_scan_time": 200,
    "pages_shared": 0,
    "pages_sharing": 0,
    "pages_unshared": 50,
    "pages_volatile": 0,
}


def crawling(**more: Reading) -> Sample:
    return Sample(100.0, CRAWL | more)


def left(found: BlockedMerging) -> dict[str, int | None]:
    return dict(found.pages)


def test_contents_are_compared_while_it_crawls_and_not_otherwise() -> None:
    assert BlockedMerging().step(crawling(), 0.01)[1] == 1 << 16
    assert BlockedMerging().step(crawling(), 0.0)[1] is None
    before = BlockedMerging(pages={ADVISOR: 70, KHUGEPAGED: None})
    assert left(before.step(crawling(), 0.0)[0])[ADVISOR] == 70
    for more in ({"advisor_mode": "none"}, {"run": 0}, {"pages_to_scan": 600}):
        after, look = before.step(crawling(**more), 0.01)
        assert (left(after), look) == ({ADVISOR: 0, KHUGEPAGED: None}, None)
    # Without an advisor nobody asks what it leaves.
    assert left(before.step(Sample(1.0, {"run": 1, "pages_to_scan": 10}), 0.01)[0])[ADVISOR] is None


def test_duplicates_count_where_the_scan_does_not_come_to_it_soon() -> None:
    # 500 pages a second: 400 s are 200,000 pages.
    slow = DuplicatePages(200_001, 65_536, 7000, False, 0.3)
    assert left(BlockedMerging().on_result(slow, crawling(), 0.01, 60.0)) == {ADVISOR: 7000, KHUGEPAGED: None}
    soon = DuplicatePages(200_000, 65_536, 7000, False, 0.3)
    assert left(BlockedMerging().on_result(soon, crawling(), 0.01, 60.0))[ADVISOR] == 0
    assert left(BlockedMerging().on_result(slow, crawling(pages_to_scan=0), 0.01, 60.0))[ADVISOR] == 7000


def test_a_look_is_paid_for_by_waiting() -> None:
    after = BlockedMerging().on_result(DuplicatePages(200_000, 65_536, 7000, False, 3.0), crawling(), 0.01, 60.0)
    assert after.due == 400.0
    assert after.step(Sample(399.0, CRAWL), 0.01)[1] is None
    assert after.step(Sample(400.0, CRAWL), 0.01)[1] is not None
    # What costs little is looked at for as long as may be.
    cheap = BlockedMerging().on_result(DuplicatePages(200_000, 65_536, 7000, False, 0.06), crawling(), 0.01, 60.0)
    assert (cheap.due, cheap.frames) == (160.0, 655_360)


def test_a_look_that_fails_leaves_nothing_known() -> None:
    after = BlockedMerging(pages={ADVISOR: 7, KHUGEPAGED: 0}).on_result(None, crawling(), 0.01, 60.0)
    assert (left(after), after.due) == ({ADVISOR: None, KHUGEPAGED: 0}, 160.0)


# -- khugepaged --------------------------------------------------------------------------------------------


def huge(seconds: float, made: int, split: int, **more: Reading) -> Sample:
    return Sample(seconds, {"run": 1, "thp_collapse_alloc": made, "thp_split_page": split} | more)


def after_ten_seconds(made: int, split: int, **more: Reading) -> tuple[BlockedMerging, int | None]:
    found, look = BlockedMerging().step(huge(0.0, 500, 700), 0.01)
    assert look is None
    return found.step(huge(10.0, 500 + made, 700 + split, **more), 0.01)


def test_contents_are_compared_while_huge_pages_come_and_go() -> None:
    found, look = after_ten_seconds(17, 40)
    assert look == 1 << 16
    churning = huge(11.0, 517, 740)
    found = found.on_result(DuplicatePages(20_000, 16_000, 900, True, 0.1), churning, 0.01, 60.0)
    assert left(found) == {ADVISOR: None, KHUGEPAGED: 900}
    # Between two counts it stays, and then it is over.
    assert left(found.step(huge(15.0, 520, 750), 0.01)[0])[KHUGEPAGED] == 900
    assert left(found.step(huge(21.0, 525, 750), 0.01)[0])[KHUGEPAGED] == 0


def test_at_the_rate_of_khugepaged_itself_nothing_is_lost() -> None:
    for made, split in ((16, 100), (100, 16), (0, 0)):
        found, look = after_ten_seconds(made, split)
        assert (left(found), look) == ({ADVISOR: None, KHUGEPAGED: 0}, None)
    assert after_ten_seconds(100, 100, run=0)[1] is None


def test_the_crawl_explains_all_of_it_where_both_are_there() -> None:
    found, look = after_ten_seconds(100, 100, **{name: value for name, value in CRAWL.items() if name != "run"})
    assert look is not None
    found = found.on_result(DuplicatePages(500_000, 65_536, 900, False, 0.1), crawling(), 0.01, 60.0)
    assert left(found)[ADVISOR] == 900
    assert left(found)[KHUGEPAGED] == 0


def test_a_kernel_without_huge_pages() -> None:
    found = BlockedMerging().step(Sample(0.0, {"run": 1}), 0.01)[0].step(Sample(20.0, {"run": 1}), 0.01)[0]
    assert left(found)[KHUGEPAGED] is None
