# SPDX-License-Identifier: GPL-2.0-or-later
"""How far a burst is, what it gained, when its scan ends, and what scans cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.backlog import INITIAL_HIT_RATES, Backlog, Kind
from ksmd_ctl.policies.burst import HUGE_PAGE_WORTH, Burst, ScanCosts, scan_progress
from ksmd_ctl.policies.scan_rate import ScanMode


def sample(time: float, **readings: float) -> Sample:
    base = {"full_scans": 10, "pages_sharing": 1000, "pages_shared": 100, "pages_unshared": 5000, "pages_volatile": 0}
    return Sample(time, {**base, "ksmd_cpu_seconds": 1.0, "thp_split_page": 5, **readings})


START = sample(100.0)
PAGES = dict.fromkeys(Kind, 100.0)
BURST = Burst(START, START, START, PAGES, Kind.NEW, "something has come")


def test_a_quick_scan_and_the_full_scans_after_it() -> None:
    assert BURST.text(START) == "something has come; quick scan"
    after = sample(101.0, full_scans=12)
    assert BURST.scans(after) == 2
    assert BURST.text(after) == "something has come; quick scan, 2 scans done"
    assert not BURST.full_scans_done(sample(109.0, full_scans=99))
    full = replace(BURST, full_since=after, full_scans=2)
    assert full.text(after).startswith("something has come; full scan, 2")
    assert [full.full_scans_done(sample(102.0, full_scans=scans)) for scans in (11, 13, 14)] == [False, False, True]


def test_full_scans_that_nobody_counts_and_that_begin_again() -> None:
    assert BURST.scans(Sample(101.0, {})) is None
    assert (BURST.scans(sample(101.0, full_scans=0)) or 0) < 0


def test_ksmd_is_starved_once_it_got_far_too_little_of_a_cpu_for_half_a_second() -> None:
    burst = BURST
    # A fifth of a second with all of its share, then none for as long as others run.
    for time, used in ((100.2, 1.16), (100.4, 1.16), (100.6, 1.17)):
        burst = burst.step(sample(time, ksmd_cpu_seconds=used), 0.8)
        assert not burst.starved
    burst = burst.step(sample(100.8, ksmd_cpu_seconds=1.17), 0.8)
    assert burst.starved
    # As an ordinary task it gets its share, which is no reason to make it an idle one again in the same burst.
    assert burst.step(sample(101.0, ksmd_cpu_seconds=1.33), 0.8).starved


def test_ksmd_that_is_to_take_little_or_whose_time_is_unknown_is_not_starved() -> None:
    slow = BURST.step(sample(101.0, ksmd_cpu_seconds=1.06), 0.2)
    assert not slow.starved
    assert BURST.step(sample(101.0, ksmd_cpu_seconds=1.06), 0.8).starved
    assert not BURST.step(Sample(101.0, {"full_scans": 10}), 0.8).starved


def test_the_outcome() -> None:
    end = sample(104.5, full_scans=14, pages_sharing=5000, ksmd_cpu_seconds=2.5, thp_split_page=15)
    outcome = BURST.outcome(end)
    assert (outcome.took, outcome.used, outcome.merged, outcome.split) == (4.5, 1.5, 4000, 10)
    assert outcome.gained == 4000 - 10 * HUGE_PAGE_WORTH
    assert outcome.text() == (
        "the last burst merged 4,000 pages in 4.5 s, 1.5 s of ksmd's time, and split 10 huge pages, each of which "
        "counts as 32 lost"
    )
    assert BURST.found(end) == 4000


def test_zeroes_that_splits_free_are_gained() -> None:
    start = sample(100.0, nr_anon_pages=50_000)
    begun = replace(BURST, start=start)
    end = sample(101.0, nr_anon_pages=50_000 - 30_660 - 60, pages_sharing=1060, thp_split_page=65)
    outcome = begun.step(end).outcome(end)
    assert (outcome.merged, outcome.split, outcome.freed) == (60, 60, 30_660)
    assert outcome.gained == 60 + 30_660 - 60 * HUGE_PAGE_WORTH
    assert outcome.text().endswith("and split 60 huge pages, which freed 30,660 pages of zeroes")
    # Memory that programs gave back is none of it: no more than the splits can have freed.
    less = sample(101.0, nr_anon_pages=0, thp_split_page=6)
    assert begun.step(less).outcome(less).freed == 512
    assert begun.step(sample(101.0, nr_anon_pages=0)).freed == 0


def test_smaller_huge_pages_count_as_parts_of_one() -> None:
    """thp_split_page counts none of 64 KiB."""
    start = sample(100.0, nr_anon_pages=50_000, split_folio_pages=5 * 512)
    begun = replace(BURST, start=start)
    end = sample(101.0, nr_anon_pages=50_000 - 1_500 - 100, pages_sharing=1100, split_folio_pages=5 * 512 + 2048)
    outcome = begun.step(end).outcome(end)
    assert (outcome.merged, outcome.split, outcome.freed) == (100, 4, 1_500)
    few = begun.outcome(sample(101.0, split_folio_pages=5 * 512 + 32))
    assert "huge pages" not in few.text()
    assert few.gained == -2


def test_pages_of_zeroes_that_ksmd_replaces_are_gained() -> None:
    end = sample(101.0, ksm_zero_pages=700)
    assert BURST.gained(end) == 700


def test_what_came_apart_meanwhile_is_no_gain() -> None:
    outcome = BURST.outcome(Sample(101.0, {"pages_sharing": 400}))
    assert (outcome.merged, outcome.pages, outcome.used) == (-600, 0, None)
    assert outcome.text() == "the last burst merged 0 pages in 1.0 s"


def test_written_pages_that_merge_again_are_gained() -> None:
    """When the burst begins, pages_sharing still counts them."""
    begun = replace(BURST, unnoticed=600.0)
    met = sample(100.1, pages_sharing=400, pages_volatile=600)
    assert begun.gained(met) == 0
    assert begun.gained(sample(100.2, pages_sharing=900, pages_volatile=100)) == 500


def test_who_leaves_takes_nothing_from_what_was_found_and_merged() -> None:
    """Records of processes that ended are dropped in the burst, for ksmd comes to them only then."""
    left = sample(100.1, pages_sharing=200, pages_unshared=2000)
    burst = BURST.step(left).step(sample(100.2, pages_sharing=900, pages_unshared=7000))
    end = sample(100.3, pages_sharing=900, pages_unshared=7000)
    assert burst.found(end) == 5700
    assert burst.gained(end) == 700
    assert burst.outcome(end).pages == 700
    assert burst.pending_gain(end, 100.0).merged == 200


def test_pages_that_are_written_are_not_gone() -> None:
    written = sample(100.1, pages_sharing=200, pages_shared=20, pages_unshared=5000, pages_volatile=880)
    burst = BURST.step(written)
    assert (burst.found(written), burst.gained(written)) == (0, -800)


def test_written_pages_are_judged_by_what_stays_merged() -> None:
    pending = BURST.pending_gain(sample(104.0, pages_sharing=9000), 100.0)
    assert pending.at == 164.0
    assert pending.gained(sample(164.0, pages_sharing=3000)) == 2000


def scanning(time: float, scanned: float, skipped: float = 0.0, known: float = 10_000) -> Sample:
    base = {"pages_shared": 0, "pages_sharing": 0, "pages_volatile": 0, "pages_unshared": known}
    return Sample(time, {**base, "pages_scanned": scanned, "pages_skipped": skipped})


def burst(start: Sample, scan: Sample) -> Burst:
    return Burst(start, scan, scan, PAGES, Kind.NEW, "something has come")


def test_pages_that_smart_scan_skips_are_behind_it_as_well() -> None:
    assert scan_progress(scanning(0, 500), scanning(1, 1500, 4000)) == 0.5
    assert scan_progress(scanning(0, 500), scanning(1, 50_000)) == 1.0
    assert scan_progress(scanning(0, 500), scanning(1, 1500, known=0)) is None
    assert scan_progress(scanning(0, 500), Sample(1, {"pages_scanned": 1500})) is None


def test_a_scan_that_began_in_the_background_ends_at_the_speed_of_the_burst() -> None:
    scan, start = scanning(0, 0), scanning(100, 4000)
    assert burst(start, scan).remaining(scanning(100, 4000), 1.0) == pytest.approx((0.6, 1.0))
    # In a tenth of a second 30 % of it.
    assert burst(start, scan).remaining(scanning(100.1, 6000, 1000), 1.0) == pytest.approx((0.1, 1 / 3))


def test_pages_that_smart_scan_scanned_and_that_had_changed_stand_for_those_that_it_skipped() -> None:
    scan = sample(100.0, pages_skipped=1000)
    begun = replace(BURST, start=scan, scan=scan)
    end = sample(101.0, full_scans=11, pages_skipped=4000, pages_volatile=3400, pages_unshared=1600)
    # 2,000 were scanned, of which 400 had changed; 3,000 were skipped.
    assert begun.changed_pages(end) == 400 + 600
    # New ones are no changed ones.
    new = sample(101.0, full_scans=11, pages_volatile=900, pages_unshared=5000)
    assert BURST.step(new).changed_pages(new) == 0


def test_little_progress_says_little() -> None:
    start = scanning(100, 4000)
    assert burst(start, start).remaining(scanning(100.5, 6000), 3.0) == pytest.approx((2.4, 3.0))


def test_without_progress_the_clock_has_to_do() -> None:
    start = Sample(100, {})
    assert burst(start, start).remaining(Sample(101, {}), 3.0) == (2.0, 3.0)


def test_costs_are_learned_by_mode() -> None:
    costs = ScanCosts()
    before, after = sample(0.0), sample(1.0, full_scans=12, ksmd_cpu_seconds=1.122)
    measured = costs.measured(ScanMode.QUICK, before, after)
    assert measured.page[ScanMode.QUICK] == pytest.approx((1.5e-6 + 1e-5) / 2)
    assert measured.page[ScanMode.FULL] == costs.page[ScanMode.FULL]
    assert measured.scan(ScanMode.FULL, 6100) == pytest.approx(6100 * 3e-6)


@pytest.mark.parametrize("readings", [{"ksmd_cpu_seconds": 1.04}, {"full_scans": 10}, {"ksmd_cpu_seconds": 0.5}])
def test_costs_stay_where_nothing_can_be_told(readings: dict[str, float]) -> None:
    after = sample(1.0, **{"full_scans": 12, "ksmd_cpu_seconds": 3.0, **readings})
    assert ScanCosts().measured(ScanMode.QUICK, sample(0.0), after) == ScanCosts()


def test_a_burst_for_what_seldom_merges_is_expected_to_end_with_the_quick_scan() -> None:
    now = sample(0.0)
    usual = ScanCosts().burst(Backlog(before=now, swapped=1000.0), now)
    assert usual == pytest.approx(6100 * (1.5e-6 + 3e-6))
    seldom = Backlog(before=now, swapped=1000.0, hit_rates={**INITIAL_HIT_RATES, Kind.SWAPPED: 0.2})
    assert ScanCosts().burst(seldom, now) == pytest.approx(6100 * (1.5e-6 + 0.2 * 3e-6))


def test_time_that_no_page_can_cost_is_a_walk_and_counts_for_a_burst() -> None:
    costs = ScanCosts().measured(ScanMode.QUICK, sample(0.0), sample(5.0, full_scans=12, ksmd_cpu_seconds=4.0))
    assert costs.walk == pytest.approx(1.5 - 6100 * 1.5e-6)
    assert costs.page == ScanCosts().page
    now = sample(0.0)
    assert costs.scan(ScanMode.FULL, 6100) == pytest.approx(costs.walk + 6100 * 3e-6)
    assert costs.burst(Backlog(before=now, written=1000.0), now) > 2 * costs.walk
    # Later pages cost what is left; and who walked has ended where a scan takes less.
    later = costs.measured(
        ScanMode.QUICK,
        sample(0.0, pages_unshared=100_000),
        sample(5.0, pages_unshared=100_000, full_scans=11, ksmd_cpu_seconds=2.7),
    )
    assert later.walk == costs.walk
    assert later.page[ScanMode.QUICK] < 3e-6
    assert costs.measured(
        ScanMode.QUICK, sample(0.0), sample(5.0, full_scans=12, ksmd_cpu_seconds=1.2)
    ).walk == pytest.approx(0.1)
