# SPDX-License-Identifier: GPL-2.0-or-later
"""What a configuration says once it is read: plain values, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.knobs import Knob, KnobValue

__all__ = ["AtStop", "Config", "OnDrift", "Policy", "Want", "parse_address"]


class Policy(StrEnum):
    """Where the wanted values of the knobs come from."""

    OBSERVE = "observe"
    FIXED = "fixed"


class AtStop(StrEnum):
    """What happens to the knobs when the service is stopped for good."""

    RESTORE = "restore"
    LEAVE = "leave"
    STOP_SCANNING = "stop-scanning"


class OnDrift(StrEnum):
    """What happens to a held knob that somebody else changed."""

    ENFORCE = "enforce"
    OBSERVE = "observe"


@dataclass(frozen=True, slots=True)
class Want:
    """The value that a knob shall have.

    :ivar optional: a kernel without the knob is no error
    :ivar origin: the file that says so
    """

    value: KnobValue
    optional: bool = False
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration; the field names are the keys (`ksmd_ctl.config.settings`).

    :ivar knobs: what ``[knobs]`` names; held only under ``policy = "fixed"``
    :ivar files: the files that were read, in their order
    """

    policy: Policy
    sample_interval: float
    at_stop: AtStop
    on_drift: OnDrift
    metrics_listen: str
    socket: str
    socket_group: str
    socket_write_group: str
    runtime_directory: str
    state_directory: str
    broker_socket: str
    knobs: Mapping[Knob, Want]
    files: tuple[str, ...] = ()
    floor_bytes: int = 128 << 20
    headroom_share: float = 0.25
    batch_latency: float = 0.01
    max_pressure: float = 0.2
    census_interval: float = 300.0
    census_cpu_share: float = 0.001


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``ADDRESS:PORT``; an IPv6 address stands in brackets.

    :raises ValueError: the text is not of that form
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or not (port.isascii() and port.isdigit()) or (":" in host and not bracketed):
        raise ValueError(f"{text!r} is not ADDRESS:PORT (an IPv6 address stands in brackets)")
    if int(port) > 65535:
        raise ValueError(f"{port} is not a port: at most 65535")
    return (host[1:-1] if bracketed else host), int(port)
