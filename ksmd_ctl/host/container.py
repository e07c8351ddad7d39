# SPDX-License-Identifier: GPL-2.0-or-later
"""What a container hides of its host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ksmd_ctl.errors import HostError


class Hidden(StrEnum):
    """What of the host a container needs, and may lack."""

    PROCESSES = "processes"
    KNOBS = "knobs"
    LIMITS = "limits"


@dataclass(frozen=True, slots=True)
class Container:
    """The container that this process is in.

    :ivar hidden: what can't be seen or written from here, each with what to do about it
    :ivar systemd: whether systemd can be asked from here
    """

    hidden: Mapping[Hidden, HostError] = field(default_factory=dict)
    systemd: bool = False
