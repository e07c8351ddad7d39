# SPDX-License-Identifier: GPL-2.0-or-later
"""How far a burst is, and what it brought."""

from __future__ import annotations

from dataclasses import replace

from ksmd_ctl.control.policies.burst import HUGE_PAGE_WORTH, Burst
from ksmd_ctl.control.policies.debts import PRIORS
from ksmd_ctl.host.sample import Sample


def sample(time: float, **readings: float) -> Sample:
    base = {"full_scans": 10, "pages_sharing": 1000, "pages_shared": 100, "pages_unshared": 5000, "pages_volatile": 0}
    return Sample(time, {**base, "ksmd_cpu_seconds": 1.0, "thp_split_page": 5, **readings})


START = sample(100.0)
BURST = Burst(START, START, START, PRIORS, 0, "something has come")


def test_it_peeks_and_looks() -> None:
    assert BURST.text(START) == "something has come; quick check"
    after = sample(101.0, full_scans=12)
    assert BURST.scans(after) == 2
    assert BURST.text(after) == "something has come; quick check, 2 full scans done"
    assert not BURST.looked(sample(109.0, full_scans=99))
    looking = replace(BURST, looking=after, looks=2)
    assert looking.text(after).startswith("something has come; look at all pages, 2")
    assert [looking.looked(sample(102.0, full_scans=scans)) for scans in (11, 13, 14)] == [False, False, True]


def test_full_scans_that_nobody_counts_and_that_begin_again() -> None:
    assert BURST.scans(Sample(101.0, {})) is None
    assert (BURST.scans(sample(101.0, full_scans=0)) or 0) < 0


def test_what_it_brought() -> None:
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
    outcome = begun.met(end).outcome(end)
    assert (outcome.merged, outcome.split, outcome.freed) == (60, 60, 30_660)
    assert outcome.gained == 60 + 30_660 - 60 * HUGE_PAGE_WORTH
    assert outcome.text().endswith("and split 60 huge pages, which freed 30,660 pages of zeroes")
    # Memory that programs gave back is none of it: no more than the splits can have freed.
    less = sample(101.0, nr_anon_pages=0, thp_split_page=6)
    assert begun.met(less).outcome(less).freed == 511
    assert begun.met(sample(101.0, nr_anon_pages=0)).freed == 0


def test_pages_of_zeroes_that_ksmd_replaces_are_gained() -> None:
    end = sample(101.0, ksm_zero_pages=700)
    assert BURST.gained(end) == 700


def test_what_came_apart_meanwhile_is_no_gain() -> None:
    outcome = BURST.outcome(Sample(101.0, {"pages_sharing": 400}))
    assert (outcome.merged, outcome.pages, outcome.used) == (-600, 0, None)
    assert outcome.text() == "the last burst merged 0 pages in 1.0 s"


def test_who_leaves_takes_nothing_from_what_was_found_and_merged() -> None:
    """Records of processes that ended are dropped in the burst, for ksmd comes to them only then."""
    left = sample(100.1, pages_sharing=200, pages_unshared=2000)
    burst = BURST.met(left).met(sample(100.2, pages_sharing=900, pages_unshared=7000))
    end = sample(100.3, pages_sharing=900, pages_unshared=7000)
    assert burst.found(end) == 5700
    assert burst.gained(end) == 700
    assert burst.outcome(end).pages == 700
    assert burst.verdict(end, PRIORS).merged == 200


def test_pages_that_are_written_are_not_gone() -> None:
    written = sample(100.1, pages_sharing=200, pages_shared=20, pages_unshared=5000, pages_volatile=880)
    burst = BURST.met(written)
    assert (burst.found(written), burst.gained(written)) == (0, -800)


def test_a_verdict_is_on_what_stays() -> None:
    verdict = BURST.verdict(sample(104.0, pages_sharing=9000), PRIORS)
    assert verdict.at == 164.0
    assert verdict.gained(sample(164.0, pages_sharing=3000)) == 2000
