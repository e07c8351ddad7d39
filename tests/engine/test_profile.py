# SPDX-License-Identifier: GPL-2.0-or-later
"""Profiles: their names, their files, and how the one for a running kernel is found."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from ksmd_ctl.engine.profile import CURRENT, PROFILES, profile, profile_for


def test_names() -> None:
    assert list(PROFILES) == ["seed", "4.1", "4.10", "5.10", "6.1", "6.12", "7.2"]
    assert all(each.name == name for name, each in PROFILES.items())
    assert CURRENT is PROFILES["7.2"]
    assert profile("6.1") is PROFILES["6.1"]
    with pytest.raises(ValueError, match=r"'5.4' is not one of seed, .*, 7.2"):
        profile("5.4")


def test_profiles_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        CURRENT.chains = False  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name in PROFILES if name not in ("seed", "4.1")])
def test_a_running_kernels_profile_is_found_by_its_files(name: str) -> None:
    features = PROFILES[name]
    files = {*features.knobs, *features.counters}
    lines = ["ksm_rmap_items"] if features.merging_pages else []
    lines += ["ksm_merge_any"] if features.process_flags else []
    assert profile_for(files, ksm_stat=lines) is features


def test_switches_that_came_together_stay_together() -> None:
    for each in PROFILES.values():
        assert not (each.head_cleared and not each.stale_restart)
        assert not (each.smart_scan and not each.zero_counted)
        assert each.trylock_busy == each.chains == each.zero_pages
    assert [name for name, each in PROFILES.items() if each.remerge] == ["seed"]
