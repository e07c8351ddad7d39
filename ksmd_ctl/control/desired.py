# SPDX-License-Identifier: GPL-2.0-or-later
"""What the knobs shall be (`ksmd_ctl.control.governor` makes it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ksmd_ctl.config.model import OnDrift, Want
from ksmd_ctl.knobs import Knob

__all__ = ["Desired"]


@dataclass(frozen=True, slots=True)
class Desired:
    """The knobs to hold, and what to do when somebody else changes one. Knobs that aren't named are left alone."""

    knobs: Mapping[Knob, Want] = field(default_factory=dict)
    on_drift: OnDrift = OnDrift.ENFORCE
