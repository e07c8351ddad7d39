# SPDX-License-Identifier: GPL-2.0-or-later
"""What is owed, and how yields are learned and forgotten."""

from __future__ import annotations

from ksmd_ctl.control.policies.debts import KINDS, PRIORS, Debts
from ksmd_ctl.host.sample import Reading, Sample


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


def test_growth_is_owed_and_what_was_freed_is_not() -> None:
    debts = Debts().step(sample(0)).step(sample(1, nr_anon_pages=12_000))
    assert debts.pages[0] == 2000
    assert debts.gain == 1000
    freed = debts.step(sample(2, nr_anon_pages=9_000)).step(sample(3, nr_anon_pages=10_500))
    assert freed.pages[0] == 1500


def test_merging_and_unmerging_are_no_growth() -> None:
    debts = Debts().step(sample(0))
    merged = sample(1, nr_anon_pages=6_000, pages_sharing=4_000)
    assert debts.step(merged).pages[0] == 0
    assert Debts().step(merged).step(sample(2)).pages[0] == 0


def test_the_other_kinds() -> None:
    debts = Debts().step(sample(0)).step(sample(1, pages_unshared=700, cow_ksm=30, ksm_swpin_copy=5))
    assert dict(zip(KINDS, debts.pages, strict=True)) == {
        "new": 0,
        "seen": 700,
        "written": 30,
        "swapped": 5,
        "lasting": 0,
        "changed": 0,
    }
    assert debts.main() == KINDS.index("seen")
    looked = debts.looked(10_000, 700)
    assert looked.pages == (0,) * len(KINDS)
    ignoring = Debts(mind_swap=False).step(sample(0)).step(sample(1, ksm_swpin_copy=5))
    assert ignoring.pages[3] == 0


def test_a_yield_follows_what_is_found_and_is_forgotten_slowly() -> None:
    debts = Debts().step(sample(0))
    for _ in range(5):
        debts = debts.learned(0, 1000, 0)
    assert debts.yields[0] < 0.01
    assert debts.yields[1:] == PRIORS[1:]
    assert debts.step(sample(3600)).yields[0] == 2 * debts.yields[0]
    assert debts.step(sample(36_000)).yields[0] == PRIORS[0]
    better = debts.learned(0, 1000, 900)
    assert better.yields[0] > 0.5
    # A high one stays until something else is found.
    assert better.step(sample(36_000)).yields[0] == better.yields[0]


def test_unknown_counters_owe_nothing() -> None:
    nothing = Debts().step(Sample(0, {})).step(Sample(1, {}))
    assert nothing.pages == (0,) * len(KINDS)
    assert nothing.text() == "nothing new"


def test_what_stays_has_a_yield_of_its_own() -> None:
    debts = Debts().step(sample(0))
    for _ in range(6):
        debts = debts.learned(0, 1000, 0)
    for second in range(1, 16):
        # It comes, while others come and go.
        debts = debts.step(sample(second, nr_anon_pages=30_000 + 50_000 * (second % 2)))
        if second < 5:
            assert debts.pages[4] == 0
    assert debts.pages[4] == 20_000
    assert debts.main() == KINDS.index("lasting")
    assert debts.gain == 10_000
    assert debts.text() == "20,000 new anonymous pages that stay (50 % of these merged recently)"
    assert debts.step(sample(16)).pages[4] == 0
