# SPDX-License-Identifier: GPL-2.0-or-later
"""The shipped sample is the table of settings, and a configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ksmd_ctl.config
from ksmd_ctl.config.loader import load
from ksmd_ctl.config.model import SETTINGS
from ksmd_ctl.host.knobs import KNOBS, Knob

ROOT = Path(__file__).parents[2]
SHIPPED = Path(ksmd_ctl.config.__file__).with_name("ksmd-ctl.toml")


def test_the_shipped_file_is_the_generated_one() -> None:
    words = [sys.executable, "packaging/man/sample.py"]
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert SHIPPED.read_text() == made, "python3 packaging/man/sample.py > ksmd_ctl/config/ksmd-ctl.toml"


def test_as_shipped_it_says_what_no_file_says(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    shipped, nothing = load(str(SHIPPED)), load(str(empty))
    for setting in SETTINGS:
        assert getattr(shipped, setting.name) == getattr(nothing, setting.name)
    assert shipped.knobs == {}


def test_uncommented_it_is_good_and_holds_every_knob_at_its_default(tmp_path: Path) -> None:
    everything = tmp_path / "all.toml"
    text = re.sub(r"^#(?=\S)", "", SHIPPED.read_text(), flags=re.MULTILINE)
    everything.write_text(text.replace('policy = "observe"', 'policy = "fixed"'))
    config = load(str(everything))
    defaults = {knob: spec.default for knob, spec in KNOBS.items()} | {Knob.KSMD_CPUS: "housekeeping"}
    assert {knob: want.value for knob, want in config.knobs.items()} == defaults


def test_it_explains_how_to_switch_merging_on() -> None:
    text = " ".join(line.removeprefix("#").strip() for line in SHIPPED.read_text().splitlines())
    assert 'set policy = "adaptive"' in text
    assert "Merging crosses every boundary" in text
