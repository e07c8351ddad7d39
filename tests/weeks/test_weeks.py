# SPDX-License-Identifier: GPL-2.0-or-later
"""A day of a load on the engine, the last hours of it constant; ``make soak`` has weeks of each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from random import Random

from tests.weeks.loads import LOADS
from tests.weeks.promises import HOUR, Promises
from tests.weeks.world import World

# Samples come seldom and ksmd takes little at rest, or this would take hours; while it is quick they come as always.
TEXT = 'policy = "adaptive"\n[service]\nsample_interval = 10\n[adaptive]\nidle_cpu = 0.0005\nmax_cpu = 0.1\n'
SEED = int(os.environ.get("KSMD_CTL_SEED") or 7)


def live(
    directory: Path, load: str, seed: int, busy_hours: float, steady_hours: float, most_apart: int, text: str
) -> str:
    """A load for so long, then nothing new: what was seen, with every promise kept.

    :param steady_hours: the first four fifths of it are for settling
    :param most_apart: frames that could be one at the end
    """
    world = World(directory, text)
    promises = Promises(world)
    began, over = time.process_time(), []

    async def course() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(LOADS[load](world, promises, Random(seed)), busy_hours * HOUR)
        world.host.wait(0.0, 0.0)
        await promises.steady(0.8 * steady_hours * HOUR, 0.2 * steady_hours * HOUR)
        over.append(True)

    world.run((busy_hours + steady_hours) * HOUR + 60, course())
    assert over
    assert promises.apart() <= most_apart, promises.apart()
    return f"{load}, seed {seed}: {promises.text()}; {time.process_time() - began:.0f} s of CPU"


def test_a_day(tmp_path: Path) -> None:
    # A few newcomers wait for the next pulse of smart_scan.
    print(live(tmp_path, "periodic", SEED, 14, 10, 64, TEXT))


def test_the_policy_is_asked_again_when_it_wants_to_be(tmp_path: Path) -> None:
    world = World(tmp_path, 'policy = "adaptive"\n[service]\nsample_interval = 3600\n')

    async def arrival() -> None:
        world.start("somebody", [f"page {index}" for index in range(3000)])

    world.run(10, arrival())
    assert world.ticks >= 4
