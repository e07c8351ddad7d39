# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path
from random import Random

from ksmd_ctl.config.model import Config
from tests.fuzz.chance import every
from tests.fuzz.configurations import made_up, read


def fuzz(path: Path, count: int, seed: int) -> int:
    """Read so many; how many were good."""
    good: list[Config] = []

    def item(chance: Random) -> None:
        if (config := read(made_up(chance), path)) is not None:
            good.append(config)

    every(count, seed, item)
    return len(good)


def test_made_up_configurations_are_read_or_refused(tmp_path: Path) -> None:
    # Neither all of them nor none, or it would be no test.
    assert 30 < fuzz(tmp_path / "c.toml", 1500, 1) < 1200
