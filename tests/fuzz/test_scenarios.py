# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path
from random import Random

from tests.fuzz.chance import every
from tests.fuzz.scenarios import carry_out, made_up, read

#: Of those that are good, one in so many is carried out.
SHARE = 4


def fuzz(path: Path, count: int, seed: int) -> tuple[int, int]:
    """Read so many; how many were good, and how many of these were carried out."""
    good = carried = 0

    def item(chance: Random) -> None:
        nonlocal good, carried
        scenario = read(made_up(chance), path)
        if scenario is not None:
            good += 1
            if chance.randrange(SHARE) == 0:
                carried += carry_out(scenario, chance)

    every(count, seed, item)
    return good, carried


def test_made_up_scenarios_are_carried_out_or_refused(tmp_path: Path) -> None:
    good, carried = fuzz(tmp_path / "s.toml", 1500, 1)
    assert 100 < good < 1400
    assert carried > 20
