# SPDX-License-Identifier: GPL-2.0-or-later
"""Which host it is, and what one tick sees of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ksmd_ctl.errors import ReadError
from ksmd_ctl.host.knobs import Knob, KnobValue

Reading = int | float | str | ReadError
"""What reading a field gave: its value, or the error that says why there is none."""


class HostKind(StrEnum):
    KERNEL = "kernel"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Which host this is.

    :ivar release: the kernel's release, or the engine's profile
    :ivar boot_id: changes with each boot; what was found before belongs to it
    """

    kind: HostKind
    release: str
    page_size_bytes: int
    boot_id: str

    @property
    def simulated(self) -> bool:
        return self.kind is HostKind.ENGINE


@dataclass(frozen=True, slots=True)
class Writer:
    """Somebody else who is known to write the knobs.

    :ivar name: the program's or the unit's name (ksmtuned, momd, virt-handler, ...), or ``advisor``
    :ivar pid: its process, None for the kernel's own advisor
    :ivar units: the systemd units on this host that have to be stopped for it to end, the one that it runs in first
    """

    name: str
    pid: int | None = None
    units: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """One NUMA node's memory in bytes, from /sys/devices/system/node/nodeN/meminfo."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All that one tick reads, and all that decisions and renderings see.

    :ivar time_seconds: `Host.clock` when it was taken
    :ivar readings: by field name (`ksmd_ctl.host.fields`)
    :ivar nodes: memory of each node, by node number
    """

    time_seconds: float
    readings: Mapping[str, Reading]
    nodes: Mapping[int, NodeMemory] = field(default_factory=dict)

    def value(self, name: str) -> int | float | str:
        """A field's value.

        :raises ReadError: there is none, and why
        """
        reading = self.readings[name]
        if isinstance(reading, ReadError):
            raise reading
        return reading

    def number(self, name: str) -> int | float | None:
        """A field's value where it is a number; None where there is none, for arithmetic on what is there."""
        reading = self.readings.get(name)
        return reading if isinstance(reading, int | float) else None

    def knob(self, knob: Knob) -> KnobValue | None:
        """A knob's value, None where it can't be had."""
        reading = self.readings.get(knob)
        return reading if isinstance(reading, int | str) else None
