# SPDX-License-Identifier: GPL-2.0-or-later
"""Configurations that somebody might write, and that nobody would."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import KNOB_SECTION, SECTIONS, SETTINGS, Config
from ksmd_ctl.errors import ConfigError
from ksmd_ctl.host.knobs import KNOBS
from tests.fuzz.chance import mutated, noise, to_toml, value, well_said

__all__ = ["made_up", "read"]

ROOT = Path(__file__).parents[2]

# Its settings are comments: without the marks it is a configuration that says everything.
_SAMPLE = (ROOT / "ksmd_ctl/config/ksmd-ctl.toml").read_text()
_SAID = re.sub(r"^#(?=\S)", "", _SAMPLE, flags=re.MULTILINE)
_TEXTS = tuple(text.encode() for text in (_SAMPLE, _SAID, (ROOT / "examples/demo.toml").read_text()))


def _good() -> dict[str, Any]:
    document: dict[str, Any] = {}
    for setting in SETTINGS:
        place = document.setdefault(setting.section, {}) if setting.section else document
        place[setting.key] = setting.default
    # The default makes no use of knobs.
    document["policy"] = "fixed"
    document[KNOB_SECTION] = {knob.value: spec.default for knob, spec in KNOBS.items()}
    return document


_GOOD = _good()


def made_up(chance: Random) -> bytes:
    """The bytes of a configuration file."""
    kind = chance.randrange(4)
    if kind == 0:
        return noise(chance, chance.choice(_TEXTS))
    if kind == 1:
        # Any value for any setting, a few at a time, so that not all is lost at the first one.
        document: dict[str, Any] = {section: {} for section in SECTIONS if section}
        for setting in chance.sample(SETTINGS, chance.randrange(1, 5)):
            place = document[setting.section] if setting.section else document
            place[setting.key] = setting.default if chance.random() < 0.3 else value(chance)
        for knob in chance.sample(list(KNOBS), chance.randrange(4)):
            wanted = KNOBS[knob].default if chance.random() < 0.3 else value(chance)
            document[KNOB_SECTION][knob.value] = wanted if chance.random() < 0.7 else {"value": wanted}
        return to_toml(document).encode()
    changed = _GOOD
    for _ in range(chance.choice((1, 1, 2, 3))):
        changed = mutated(chance, changed)
        if not isinstance(changed, dict):
            return str(changed).encode(errors="replace")
    text = to_toml(changed).encode()
    return noise(chance, text) if kind == 2 else text


def read(data: bytes, path: Path) -> Config | None:
    """What the loader makes of it; None where it says what is wrong.

    :raises AssertionError: it says so in a way that is of no use (`well_said`)
    """
    path.write_bytes(data)
    try:
        config = load(str(path))
    except ConfigError as error:
        well_said(error)
        return None
    assert all(type(getattr(config, setting.name)) is type(setting.type.parse(setting.default)) for setting in SETTINGS)
    return config
