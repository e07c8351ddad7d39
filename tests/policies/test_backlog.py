# SPDX-License-Identifier: GPL-2.0-or-later
"""The backlog: candidates, hit rates that are learned and forgotten, and when a burst begins."""

from __future__ import annotations

from dataclasses import replace

from ksmd_ctl.host.sample import Reading, Sample
from ksmd_ctl.policies.backlog import INITIAL_HIT_RATES, Backlog, Backoff, Candidate, Kind, Looks


def sample(now: float, **readings: Reading) -> Sample:
    base: dict[str, Reading] = {
        "nr_anon_pages": 10_000,
        "pages_shared": 0,
        "pages_sharing": 0,
        "pages_unshared": 0,
        "pages_volatile": 0,
        "cow_ksm": 0,
        "ksm_swpin_copy": 0,
    }
    return Sample(now, base | readings)


def test_growth_is_a_candidate_and_freed_memory_is_not() -> None:
    backlog = Backlog().step(sample(0)).step(sample(1, nr_anon_pages=12_000))
    assert backlog.pages[Kind.NEW] == 2000
    assert backlog.gain == 1000
    freed = backlog.step(sample(2, nr_anon_pages=9_000)).step(sample(3, nr_anon_pages=10_500))
    assert freed.pages[Kind.NEW] == 1500


def test_merging_and_unmerging_are_no_growth() -> None:
    backlog = Backlog().step(sample(0))
    merged = sample(1, nr_anon_pages=6_000, pages_sharing=4_000)
    assert backlog.step(merged).pages[Kind.NEW] == 0
    assert Backlog().step(merged).step(sample(2)).pages[Kind.NEW] == 0


def test_a_merged_page_that_is_written_counts_once() -> None:
    """It is a new anonymous page, and pages_sharing counts it until ksmd meets it."""
    before = {"nr_anon_pages": 6_000, "pages_sharing": 4_000, "pages_shared": 100}
    backlog = Backlog().step(sample(0, **before)).step(sample(1, **before | {"nr_anon_pages": 7_000}, cow_ksm=1_000))
    assert (backlog.pages[Kind.NEW], backlog.pages[Kind.WRITTEN], backlog.unnoticed) == (0, 1_000, 1_000)
    met = {"nr_anon_pages": 7_000, "pages_sharing": 3_000, "pages_shared": 100, "pages_volatile": 1_000}
    met_all = backlog.step(sample(2, **met, cow_ksm=1_000))
    assert (met_all.pages[Kind.NEW], met_all.pages[Kind.WRITTEN], met_all.unnoticed) == (0, 1_000, 0)
    # Merged pages whose process ended are dropped with their records: they are not the written ones.
    ended = backlog.step(sample(2, nr_anon_pages=7_000, pages_sharing=3_000, pages_shared=100, cow_ksm=1_000))
    assert ended.unnoticed == 1_000


def test_the_other_kinds() -> None:
    backlog = Backlog().step(sample(0)).step(sample(1, pages_unshared=700, cow_ksm=30, ksm_swpin_copy=5))
    assert backlog.pages == {
        Kind.NEW: 0,
        Kind.FOUND: 700,
        Kind.WRITTEN: 30,
        Kind.SWAPPED: 5,
        Kind.LASTING: 0,
        Kind.CHANGED: 0,
    }
    assert backlog.candidates[1] == Candidate(Kind.FOUND, 700, 0.5)
    assert backlog.main.kind is Kind.FOUND
    assert not any(backlog.scanned(10_000, 700).pages.values())
    ignoring = Backlog(count_swap=False).step(sample(0)).step(sample(1, ksm_swpin_copy=5))
    assert ignoring.pages[Kind.SWAPPED] == 0


def test_a_hit_rate_follows_what_is_found_and_is_forgotten_slowly() -> None:
    backlog = Backlog().step(sample(0))
    for _ in range(5):
        backlog = backlog.learned(Kind.NEW, 1000, 0)
    assert backlog.hit_rates[Kind.NEW] < 0.01
    assert all(rate == INITIAL_HIT_RATES[kind] for kind, rate in backlog.hit_rates.items() if kind is not Kind.NEW)
    assert backlog.step(sample(3600)).hit_rates[Kind.NEW] == 2 * backlog.hit_rates[Kind.NEW]
    assert backlog.step(sample(36_000)).hit_rates[Kind.NEW] == INITIAL_HIT_RATES[Kind.NEW]
    better = backlog.learned(Kind.NEW, 1000, 900)
    assert better.hit_rates[Kind.NEW] > 0.5
    # A high one stays until something else is found.
    assert better.step(sample(36_000)).hit_rates[Kind.NEW] == better.hit_rates[Kind.NEW]


def test_unknown_counters_give_no_candidates() -> None:
    nothing = Backlog().step(Sample(0, {})).step(Sample(1, {}))
    assert not any(nothing.pages.values())
    assert nothing.text() == "nothing new"


def test_lasting_pages_have_their_own_hit_rate() -> None:
    backlog = Backlog().step(sample(0))
    for _ in range(6):
        backlog = backlog.learned(Kind.NEW, 1000, 0)
    for second in range(1, 16):
        # It comes, while others come and go.
        backlog = backlog.step(sample(second, nr_anon_pages=30_000 + 50_000 * (second % 2)))
        if second < 5:
            assert backlog.pages[Kind.LASTING] == 0
    assert backlog.pages[Kind.LASTING] == 20_000
    assert backlog.main.kind is Kind.LASTING
    assert backlog.gain == 10_000
    assert backlog.text() == "20,000 new anonymous pages that stay (recent hit rate 50 %)"
    assert backlog.step(sample(16)).pages[Kind.LASTING] == 0


def written(pages: float) -> Backlog:
    """So many merged pages have been written, of which a quarter is believed to merge."""
    return Backlog(before=Sample(0.0, {}), written=pages, hit_rates={**INITIAL_HIT_RATES, Kind.WRITTEN: 0.25})


def test_a_backlog_that_has_settled_is_scanned() -> None:
    backoff = Backoff().step(10.0, written(8000), 1.0, 1000)
    assert backoff.pending_since == 10.0
    assert not backoff.over(10.9)
    assert backoff.over(11.0)
    assert "waiting for more pages to appear" in backoff.text(10.0, written(8000), 1.0, 1000)
    assert backoff.begun().pending_since is None


def test_what_grows_is_waited_for_but_not_for_long() -> None:
    backoff, now = Backoff(), 0.0
    while not backoff.over(now):
        now += 0.5
        backoff = backoff.step(now, written(8000 * (1 + now)), 1.0, 1000)
        assert now < 10
    assert backoff.pending_since == 0.5
    assert now == 4.5
    slow = Backoff().step(1.0, written(8000), 1.0, 1000).step(2.0, written(8300), 1.0, 1000)
    assert slow.over(2.0)


def test_what_is_not_worth_its_cost_waits() -> None:
    backlog = written(8000)
    assert Backoff().step(1.0, backlog, 2.0, 1000).pending_since is not None
    assert Backoff().step(1.0, backlog, 2.1, 1000).pending_since is None
    assert "not worth 2.1 s of ksmd's time" in Backoff().text(1.0, backlog, 2.1, 1000)
    assert Backoff().step(1.0, written(511), 0.0, 1000).pending_since is None
    begun = Backoff().step(1.0, backlog, 2.0, 1000)
    assert begun.step(2.0, written(0), 2.0, 1000).pending_since is None


def test_pages_for_which_bursts_fail_time_and_again_wait() -> None:
    good = written(80_000)
    bad = replace(good, hit_rates={**INITIAL_HIT_RATES, Kind.WRITTEN: 0.05})
    waits = Backoff().ended(100.0, Kind.WRITTEN, 1.0, paid=False)
    assert waits.until == 120.0
    assert waits.step(119.0, good, 1.0, 1000).pending_since == 119.0
    assert waits.step(119.0, bad, 1.0, 1000).pending_since is None
    assert "bursts for such pages did not pay" in waits.text(119.0, bad, 1.0, 1000)
    assert waits.step(120.0, bad, 1.0, 1000).pending_since == 120.0
    assert replace(waits, kind=Kind.NEW).step(119.0, bad, 1.0, 1000).pending_since == 119.0


def test_a_longer_burst_that_did_not_pay_delays_the_next_one_longer() -> None:
    def wait(used: float | None, *, paid: bool = False) -> float:
        return Backoff().ended(100.0, Kind.WRITTEN, used, paid=paid).until - 100.0

    assert [wait(0.01), wait(1.0), wait(10.0), wait(None)] == [1.0, 20.0, 60.0, 1.0]
    assert wait(10.0, paid=True) == 0.0


def rested(rest: float, pages: float, written: float, *, seconds: float, cost: float = 0.1) -> bool:
    """Whether a look is due after so many seconds, in the first five of which so much happened."""
    looks = Looks(sample(0), rest)
    for second in (1.0, seconds):
        backlog = Backlog(before=sample(second), written=written)
        looks = looks.step(sample(second, nr_anon_pages=10_000 + pages), backlog)
    return looks.due(sample(seconds))


def test_a_look_follows_a_sign_once_ksmd_has_rested() -> None:
    assert rested(10.0, 64, 0, seconds=11.0)
    assert rested(10.0, -64, 0, seconds=11.0)
    assert rested(10.0, 0, 16, seconds=11.0)
    assert not rested(10.0, 64, 16, seconds=9.0)
    assert not rested(10.0, 63, 15, seconds=11.0)
    # It may become a backlog that is worth a burst.
    assert not rested(1.0, 512, 0, seconds=5.0)
    assert not Looks().due(sample(9999))


def test_without_a_sign_there_is_a_look_an_hour() -> None:
    assert not rested(10.0, 0, 0, seconds=3599.0)
    assert rested(10.0, 0, 0, seconds=3600.0)
    assert Looks(sample(0)).text(sample(3600), Backlog()) == "a look after 60.0 min"


def test_looks_that_bring_nothing_become_rare() -> None:
    looks, rests = Looks(sample(0)), []
    for _ in range(8):
        looks = looks.ended(sample(0), 0.1, 0.005, paid=False, look=True)
        rests.append(looks.rest_seconds)
    assert rests == [20, 40, 80, 160, 300, 300, 300, 300]
    assert looks.ended(sample(0), 0.1, 0.005, paid=True, look=True).rest_seconds == 10
    assert looks.ended(sample(0), 0.1, 0.005, paid=True, look=False).rest_seconds == 10
    # A burst for pages that came has its own back-off.
    assert Looks(sample(0), 40).ended(sample(0), 0.1, 0.005, paid=False, look=False).rest_seconds == 40
    # On a large host they take no more than a tenth of a CPU, and idle_cpu in the end.
    assert looks.ended(sample(0), 8.0, 0.005, paid=True, look=True).rest_seconds == 80
    for _ in range(8):
        looks = looks.ended(sample(0), 8.0, 0.005, paid=False, look=True)
    assert looks.rest_seconds == 1600
