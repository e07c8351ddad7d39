# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted as unrealised besides twins: copies that swap made, and what an advisor at a crawl leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.control.unrealised import ADVISOR, KHUGEPAGED, Apart, Copies, LookAtContents
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.host.sample import Reading, Sample

# -- copies ------------------------------------------------------------------------------------------------


def copies(*steps: tuple[int, int]) -> list[int | None]:
    """What is said after each sample: full_scans, and ksm_swpin_copy."""
    found, said = Copies(), []
    for number, (scans, copied) in enumerate(steps):
        found = found.step(Sample(float(number), {"full_scans": scans, "ksm_swpin_copy": copied}))
        said.append(found.pages)
    return said


def test_copies_count_until_ksmd_has_passed_them_twice() -> None:
    # The first sample only shows where the counter is.
    steps = [(0, 70), (1, 5070), (2, 5070), (3, 5170), (4, 5170), (5, 5170), (6, 5170)]
    assert copies(*steps) == [0, 5000, 5000, 5100, 100, 100, 0]


def test_where_ksmd_stands_still_they_stay() -> None:
    assert copies((4, 0), (4, 300), *[(4, 300)] * 50)[-1] == 300


def test_scans_that_begin_anew() -> None:
    assert copies((90, 0), (91, 300), (0, 300), (1, 300), (2, 300), (3, 300)) == [0, 300, 300, 300, 300, 0]


def test_a_kernel_that_does_not_count_them() -> None:
    assert Copies().step(Sample(1.0, {"full_scans": 3})).pages is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000)), min_size=1, max_size=40))
def test_never_more_than_were_copied_in_the_last_three_scans(steps: list[tuple[int, int]]) -> None:
    found, scans, copied, seen = Copies(), 10, 0, []
    for number, (passed, more) in enumerate(steps):
        scans, copied = scans + passed, copied + (more if number else 0)
        found = found.step(Sample(float(number), {"full_scans": scans, "ksm_swpin_copy": copied}))
        seen.append((scans, more if number else 0))
        assert found.pages == sum(pages for when, pages in seen if scans < when + 3)
        assert len(found.waiting) <= 3


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


def left(found: Apart) -> dict[str, int | None]:
    return dict(found.pages)


def test_contents_are_compared_while_it_crawls_and_not_otherwise() -> None:
    assert Apart().step(crawling(), 0.01)[1] == LookAtContents(1 << 16)
    assert Apart().step(crawling(), 0.0)[1] is None
    before = Apart(pages={ADVISOR: 70, KHUGEPAGED: None})
    assert left(before.step(crawling(), 0.0)[0])[ADVISOR] == 70
    for more in ({"advisor_mode": "none"}, {"run": 0}, {"pages_to_scan": 600}):
        after, look = before.step(crawling(**more), 0.01)
        assert (left(after), look) == ({ADVISOR: 0, KHUGEPAGED: None}, None)
    # Without an advisor nobody asks what it leaves.
    assert left(before.step(Sample(1.0, {"run": 1, "pages_to_scan": 10}), 0.01)[0])[ADVISOR] is None


def test_what_is_apart_counts_where_the_scan_does_not_come_to_it_soon() -> None:
    # 500 pages a second: 400 s are 200,000 pages.
    slow = DuplicatePages(200_001, 65_536, 7000, False, 0.3)
    assert left(Apart().took(slow, crawling(), 0.01, 60.0)) == {ADVISOR: 7000, KHUGEPAGED: None}
    soon = DuplicatePages(200_000, 65_536, 7000, False, 0.3)
    assert left(Apart().took(soon, crawling(), 0.01, 60.0))[ADVISOR] == 0
    assert left(Apart().took(slow, crawling(pages_to_scan=0), 0.01, 60.0))[ADVISOR] == 7000


def test_a_look_is_paid_for_by_waiting() -> None:
    after = Apart().took(DuplicatePages(200_000, 65_536, 7000, False, 3.0), crawling(), 0.01, 60.0)
    assert after.due == 400.0
    assert after.step(Sample(399.0, CRAWL), 0.01)[1] is None
    assert after.step(Sample(400.0, CRAWL), 0.01)[1] is not None
    # What costs little is looked at for as long as may be.
    cheap = Apart().took(DuplicatePages(200_000, 65_536, 7000, False, 0.06), crawling(), 0.01, 60.0)
    assert (cheap.due, cheap.frames) == (160.0, 655_360)


def test_a_look_that_fails_leaves_nothing_known() -> None:
    after = Apart(pages={ADVISOR: 7, KHUGEPAGED: 0}).took(None, crawling(), 0.01, 60.0)
    assert (left(after), after.due) == ({ADVISOR: None, KHUGEPAGED: 0}, 160.0)


# -- khugepaged --------------------------------------------------------------------------------------------


def huge(seconds: float, made: int, split: int, **more: Reading) -> Sample:
    return Sample(seconds, {"run": 1, "thp_collapse_alloc": made, "thp_split_page": split} | more)


def after_ten_seconds(made: int, split: int, **more: Reading) -> tuple[Apart, LookAtContents | None]:
    found, look = Apart().step(huge(0.0, 500, 700), 0.01)
    assert look is None
    return found.step(huge(10.0, 500 + made, 700 + split, **more), 0.01)


def test_contents_are_compared_while_huge_pages_come_and_go() -> None:
    found, look = after_ten_seconds(17, 40)
    assert look == LookAtContents(1 << 16)
    churning = huge(11.0, 517, 740)
    found = found.took(DuplicatePages(20_000, 16_000, 900, True, 0.1), churning, 0.01, 60.0)
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
    found = found.took(DuplicatePages(500_000, 65_536, 900, False, 0.1), crawling(), 0.01, 60.0)
    assert left(found)[ADVISOR] == 900
    assert left(found)[KHUGEPAGED] == 0


def test_a_kernel_without_huge_pages() -> None:
    found = Apart().step(Sample(0.0, {"run": 1}), 0.01)[0].step(Sample(20.0, {"run": 1}), 0.01)[0]
    assert left(found)[KHUGEPAGED] is None
