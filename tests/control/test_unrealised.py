# SPDX-License-Identifier: GPL-2.0-or-later
"""What is counted as unrealised besides twins: copies that swap made, and what an advisor at a crawl leaves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.control.unrealised import Copies, Crawl, LookAtContents
from ksmd_ctl.host.memory import Likeness
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


def test_contents_are_compared_while_it_crawls_and_not_otherwise() -> None:
    assert Crawl().step(crawling(), 0.01)[1] == LookAtContents(1 << 16)
    assert Crawl().step(crawling(), 0.0)[1] is None
    for more in ({"advisor_mode": "none"}, {"run": 0}, {"pages_to_scan": 600}):
        after, look = Crawl(apart=70).step(crawling(**more), 0.01)
        assert (after.apart, look) == (0, None)
    # Without an advisor nobody asks what it leaves.
    assert Crawl().step(Sample(1.0, {"run": 1, "pages_to_scan": 10}), 0.01)[0].apart is None


def test_what_is_apart_counts_where_the_scan_does_not_come_to_it_soon() -> None:
    # 500 pages a second: 400 s are 200,000 pages.
    slow = Likeness(200_001, 65_536, 7000, False, 0.3)
    assert Crawl().took(slow, crawling(), 0.01, 60.0).apart == 7000
    assert Crawl().took(Likeness(200_000, 65_536, 7000, False, 0.3), crawling(), 0.01, 60.0).apart == 0
    assert Crawl().took(slow, crawling(pages_to_scan=0), 0.01, 60.0).apart == 7000


def test_a_look_is_paid_for_by_waiting() -> None:
    after = Crawl().took(Likeness(200_000, 65_536, 7000, False, 3.0), crawling(), 0.01, 60.0)
    assert after.due == 400.0
    assert after.step(Sample(399.0, CRAWL), 0.01) == (after, None)
    assert after.step(Sample(400.0, CRAWL), 0.01)[1] is not None
    # What costs little is looked at for as long as may be.
    cheap = Crawl().took(Likeness(200_000, 65_536, 7000, False, 0.06), crawling(), 0.01, 60.0)
    assert (cheap.due, cheap.frames) == (160.0, 655_360)


def test_a_look_that_fails_leaves_nothing_known() -> None:
    after = Crawl(apart=7).took(None, crawling(), 0.01, 60.0)
    assert (after.apart, after.due) == (None, 160.0)
