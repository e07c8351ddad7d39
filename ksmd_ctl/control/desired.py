# SPDX-License-Identifier: GPL-2.0-or-later
"""What the knobs shall be, out of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ksmd_ctl.config.model import Config, OnDrift, Policy, Want
from ksmd_ctl.knobs import Knob

__all__ = ["Desired", "desired"]


@dataclass(frozen=True, slots=True)
class Desired:
    """The knobs to hold, and what to do when somebody else changes one. Knobs that aren't named are left alone."""

    knobs: Mapping[Knob, Want] = field(default_factory=dict)
    on_drift: OnDrift = OnDrift.ENFORCE


def desired(config: Config) -> Desired:
    """What a configuration asks for; ``policy = "observe"`` asks for nothing."""
    return Desired(config.knobs if config.policy is Policy.FIXED else {}, config.on_drift)
