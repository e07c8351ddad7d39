# SPDX-License-Identifier: GPL-2.0-or-later
"""ksmtuned's formula, and that its two faults are not here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.config.model import Config, PolicyName
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.policy import Policy, PolicyDecision
from ksmd_ctl.policies.policy_runner import make_policy

GIB = 1 << 30
KSMTUNED = make_policy(Config(policy=PolicyName.KSMTUNED), 4096)


def sample(now: float, total: float, free: float, anonymous: float, sharing: int = 0) -> Sample:
    return Sample(
        now,
        {
            "mem_total_bytes": int(total * GIB),
            "mem_available_bytes": int(free * GIB),
            "nr_anon_pages": int(anonymous * GIB / 4096),
            "pages_sharing": sharing,
        },
    )


def follow(policy: Policy, samples: list[Sample]) -> list[PolicyDecision]:
    said = []
    for one in samples:
        policy, decision = policy.step(one)
        said.append(decision)
    return said


def test_while_memory_is_short_it_scans_more_and_more_up_to_the_most() -> None:
    said = follow(KSMTUNED, [sample(60.0 * n, 64, 4, 56) for n in range(6)])
    assert [decision.knobs[Knob.PAGES_TO_SCAN] for decision in said] == [300, 600, 900, 1200, 1250, 1250]
    assert said[0].knobs[Knob.RUN] == 1
    # 10 ms on 16 GiB would be 2.5 on 64; 10 is the least.
    assert said[0].knobs[Knob.SLEEP_MILLISECS] == 10
    assert "4.0 GiB of 64.0 GiB are free, the threshold is 12.8 GiB" in said[0].reasons[0].text


def test_it_scans_less_when_memory_is_not_short_and_stops_when_all_would_fit() -> None:
    short, enough, fits = (64, 4, 56), (64, 20, 56), (64, 40, 20)
    said = follow(KSMTUNED, [sample(60.0 * n, *what) for n, what in enumerate([short, short, enough, enough, fits])])
    assert [decision.knobs.get(Knob.PAGES_TO_SCAN) for decision in said] == [300, 600, 550, 500, None]
    assert [decision.knobs[Knob.RUN] for decision in said] == [1, 1, 1, 1, 0]
    assert said[-1].phase == "stopped"


def test_it_decides_once_an_interval() -> None:
    said = follow(KSMTUNED, [sample(float(n), 64, 4, 56) for n in range(0, 121, 10)])
    assert [decision.knobs[Knob.PAGES_TO_SCAN] for decision in said] == [300] * 6 + [600] * 6 + [900]


def test_whatever_memory_is_called_counts_as_committed_and_merged_pages_once_a_mapping() -> None:
    (without,) = follow(KSMTUNED, [sample(0, 64, 30, 30)])
    (merged,) = follow(KSMTUNED, [sample(0, 64, 30, 30, sharing=30 * GIB // 4096)])
    assert (without.knobs[Knob.RUN], merged.knobs[Knob.RUN]) == (0, 1)


def test_the_constant_threshold_is_in_bytes() -> None:
    # 1 GiB of 4 is free: 20 % would be enough, 2 GiB are not there.
    (said,) = follow(KSMTUNED, [sample(0, 4, 1, 2.9)])
    assert said.knobs[Knob.RUN] == 1
    assert said.knobs[Knob.SLEEP_MILLISECS] == 40
    assert "memory is short" in said.reasons[0].text


def test_without_figures_it_merges_at_its_least_and_says_so() -> None:
    (said,) = follow(KSMTUNED, [Sample(0, {})])
    assert (said.knobs[Knob.RUN], said.knobs[Knob.PAGES_TO_SCAN]) == (1, 64)
    assert "can't be read" in said.reasons[0].text


@given(st.lists(st.tuples(st.floats(0.5, 4096), st.floats(0, 1), st.floats(0, 1)), max_size=40))
def test_pages_to_scan_stays_within_its_bounds(hosts: list[tuple[float, float, float]]) -> None:
    samples = [sample(60.0 * n, total, free * total, used * total) for n, (total, free, used) in enumerate(hosts)]
    for decision in follow(KSMTUNED, samples):
        pages = decision.knobs.get(Knob.PAGES_TO_SCAN, 64)
        assert isinstance(pages, int)
        assert 64 <= pages <= 1250
        assert decision.knobs[Knob.SLEEP_MILLISECS if decision.knobs[Knob.RUN] else Knob.RUN] in range(5000)
