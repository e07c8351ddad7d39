# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenario files that are nearly those of the library, and that are nothing of the sort."""

from __future__ import annotations

import tomllib
from pathlib import Path
from random import Random
from typing import Any

from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.errors import ConfigError, Refused
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.scenario.format import LIBRARY, load, parse, text_of
from ksmd_ctl.scenario.host_steps import Batch, Scan
from ksmd_ctl.scenario.model import Scenario
from ksmd_ctl.scenario.runner import run
from ksmd_ctl.scenario.session import engine_for
from tests.fuzz.chance import mutated, noise, to_toml, value, well_said

__all__ = ["carry_out", "made_up", "read"]

_FILES = tuple(path.read_bytes() for path in sorted(LIBRARY.rglob("*.toml")))
_DOCUMENTS = tuple(tomllib.loads(data.decode()) for data in _FILES)
#: A file may ask for years of work.
_MOST_PAGES = 20_000


def made_up(chance: Random) -> bytes:
    """The bytes of a scenario file."""
    kind = chance.randrange(6)
    if kind == 0:
        return noise(chance, chance.choice(_FILES))
    if kind == 1:
        # Steps of one, on regions of another.
        document: Any = {**chance.choice(_DOCUMENTS)}
        other = chance.choice(_DOCUMENTS)
        for key in chance.sample(sorted(other), chance.randrange(1, len(other))):
            document[key] = other[key]
    else:
        document = chance.choice(_DOCUMENTS)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        document = mutated(chance, document)
    if kind == 3 and isinstance(steps := document.get("step"), list):
        document["step"] = [*steps, {chance.choice(_STEPS): value(chance)}]
    text = to_toml(document).encode()
    return noise(chance, text) if chance.random() < 0.1 else text


_STEPS = sorted({key for document in _DOCUMENTS for step in document["step"] for key in step})


def read(data: bytes, path: Path) -> Scenario | None:
    """The scenario in it; None where the reader says what is wrong.

    :raises AssertionError: it says so in a way that is of no use (`well_said`)
    """
    path.write_bytes(data)
    try:
        scenario = load(path)
    except ConfigError as error:
        well_said(error)
        return None
    # What was read can be written, and says the same then.
    again = parse(text_of(scenario))
    assert text_of(again) == text_of(scenario)
    return scenario


def carry_out(scenario: Scenario, chance: Random) -> bool:
    """Run it on the engine, if that is no work of hours; whether it was."""
    pages = sum(len(region.pages) for region in scenario.regions)
    scans = sum(step.times for step in scenario.steps if isinstance(step, Scan))
    batches = sum(step.size for step in scenario.steps if isinstance(step, Batch))
    if pages * (1 + scans + len(scenario.steps)) + batches > _MOST_PAGES:
        return False
    profile = chance.choice(sorted(PROFILES))
    lab = engine_for(profile, 4)
    try:
        run(scenario, lab, profile)
    except Refused:
        return False
    assert lab.read(Knob.RUN) in (0, 1, 2)
    return True
