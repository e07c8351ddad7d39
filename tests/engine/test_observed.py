# SPDX-License-Identifier: GPL-2.0-or-later
"""Each profile against what its kernel did: observed/*.json, measured on running kernels.

A kernel ran every file of scenarios/ at least twice in a guest with several nodes, always with the same
outcome. A group of pages that share a frame is written as the frame's node, `k` where it is a KSM page,
and the pages' names. 6.12 calls every anonymous page a KSM page, so `k` is left out there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ksmd_ctl.engine.profile import PROFILES
from tests.engine.scenario_runner import Run, run_file
from tests.engine.validate import validate

HERE = Path(__file__).parent
SCENARIOS = sorted(path.stem for path in (HERE / "scenarios").glob("*.toml"))
#: What a newer kernel is held to where none was observed: that nothing changed since.
OBSERVED = {"4.1": "4.1", "4.10": "4.10", "5.10": "5.10", "6.1": "6.1", "6.12": "6.12", "7.2": "6.12"}


def pages(observation: dict[str, Any], ksm_flag: bool) -> list[str]:
    """An observation's groups as they are recorded."""
    ksm = set(observation["ksm"]) if ksm_flag else set()
    return [
        f"{observation['nodes'][group[0]]}{'k' if group[0] in ksm else ''} {' '.join(group)}"
        for group in observation["groups"]
    ]


def run(scenario: str, profile: str) -> Run:
    return run_file(HERE / "scenarios" / f"{scenario}.toml", PROFILES[profile], validate)


@pytest.mark.parametrize("profile", OBSERVED)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_profile_does_what_its_kernel_did(scenario: str, profile: str) -> None:
    recorded = json.loads((HERE / "observed" / f"{OBSERVED[profile]}.json").read_text())
    kernel = recorded["scenarios"][scenario]
    engine = run(scenario, profile)
    for label, observation in kernel["observations"].items():
        seen = engine.observations[label]
        assert seen["counters"] == observation["counters"], label
        assert pages(seen, recorded["ksm_flag"]) == observation["pages"], label
    assert engine.observations.keys() == kernel["observations"].keys()
    assert engine.scans == kernel["scans"]
    assert engine.events == kernel["events"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_seed_keeps_what_must_hold(scenario: str) -> None:
    seen = run(scenario, "seed").observations
    assert seen


def test_every_observed_scenario_is_there() -> None:
    for profile in set(OBSERVED.values()):
        recorded = json.loads((HERE / "observed" / f"{profile}.json").read_text())
        assert sorted(recorded["scenarios"]) == SCENARIOS
