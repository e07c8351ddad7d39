# SPDX-License-Identifier: GPL-2.0-or-later
"""The rehearsal of a fleet with ten hosts in one minute, and what it would have to notice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.fleet import __main__ as rehearsal
from benchmarks.fleet import queries, sums
from benchmarks.fleet.hosts import ALERTS, Ails, Pace, labels, specs
from benchmarks.fleet.prometheus import RULES, shortened
from benchmarks.steady import ROOT

PACE = Pace(100, 20, 10.0)


def test_ten_hosts_in_one_minute(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "tools/deb-program", "prometheus", "prometheus"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(done.stderr)
    outcome = rehearsal.rehearse(10, 60, 1, tmp_path)
    assert outcome.failed == []
    assert outcome.figures["targets up"] == 10
    assert outcome.figures["recording rules with the right sum"] == "39 of 39"


def test_hosts_have_addresses_of_their_own_and_each_ailment_occurs(tmp_path: Path) -> None:
    found = specs(300, 19753, tmp_path, PACE)
    assert len({one.address for one in found}) == 300
    assert {one.ails for one in found} == set(Ails) == set(ALERTS)
    assert sum(one.ails is Ails.NOTHING for one in found) > 250
    assert {len(labels(one)) for one in found} == {0, 5}
    assert {one.ails for one in specs(10, 19753, tmp_path, PACE)} == set(Ails)


def test_alerts_wait_less_and_nothing_else_is_changed() -> None:
    text = RULES.read_text()
    short = shortened(text, 20)
    changed = [(old, new) for old, new in zip(text.split("\n"), short.split("\n"), strict=True) if old != new]
    assert changed
    assert all(old.strip().startswith("for: ") and new.strip() == "for: 20s" for old, new in changed)
    assert "for: 300s" in shortened(text, 300)


@pytest.mark.parametrize(
    ("recorded", "wrong"),
    [
        ([({"cluster": "a"}, 3.0), ({}, 4.0)], 0),
        ([({"cluster": "a"}, 3.5), ({}, 4.0)], 1),
        ([({"cluster": "a"}, 3.0)], 1),
        ([({"cluster": "a"}, 3.0), ({}, 4.0), ({"cluster": "b"}, 0.0)], 1),
    ],
)
def test_a_wrong_sum_one_too_many_and_a_missing_one_are_noticed(
    recorded: list[tuple[dict[str, str], float]], wrong: int
) -> None:
    expected = {(("cluster", "a"),): 3.0, (): 4.0}
    assert len(sums.differences(recorded, expected, sums.Figure("f"))) == wrong


def test_an_empty_answer_is_wrong_only_where_all_is_exported() -> None:
    asked = [
        queries.Asked("d", "p", 'rate(ksm_cow_total{job="x"}[1m])', []),
        queries.Asked("d", "p", "ksm_run / ksm_absent", []),
        queries.Asked("d", "p", "ksm_run", [({}, 1.0)]),
    ]
    assert queries.wrongly_empty(asked, {"ksm_cow_total", "ksm_run"}) == [f"d, p: {asked[0].query}"]


def test_sums_are_those_of_the_reports(tmp_path: Path) -> None:
    hosts = specs(4, 19753, tmp_path, PACE)
    reports = {
        one.number: {
            "readings": {"run": 1, "mem_total_bytes": 100, "ksmd_cpu_seconds": 3.0},
            "derived": {"saved_bytes": 10, "saved_frames_bytes": 20 if one.number else None},
            "knobs": {"run": {"state": "drifted", "drift_total": one.number}, "smart_scan": {"state": "held"}},
        }
        for one in hosts[:3]
    }
    before = {number: {"readings": {"ksmd_cpu_seconds": 0.0}} for number in reports}
    seen = sums.Reports(reports, before, {})

    def total(figure: str) -> float:
        return sum(sums.wanted("cluster", figure, hosts, seen).values())

    assert total("ksm_saved_bytes:sum") == 50
    assert total("ksmd_ctl_up:count") == 4
    assert total("ksmd_ctl_up:sum") == 3
    assert total("ksmd_ctl_knob_drifted:sum") == 3
    assert total("ksmd_ctl_drift:increase1h") == 3
    assert total("ksm_ksmd_cpu:rate5m") == pytest.approx(9 / 300)
    assert sums.wanted("cluster", "ksm_saved:ratio", hosts, seen)[(("cluster", "east"),)] == pytest.approx(30 / 200)
