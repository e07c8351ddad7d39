# SPDX-License-Identifier: GPL-2.0-or-later
"""What a configuration says once it is read: plain values, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.knobs import Knob, KnobValue

__all__ = ["STEERED", "AtStop", "Config", "Heal", "OnDrift", "PolicyName", "Want", "parse_address"]


class PolicyName(StrEnum):
    """Where the wanted values of the knobs come from."""

    OBSERVE = "observe"
    FIXED = "fixed"
    KSMTUNED = "ksmtuned"
    KERNEL = "kernel"
    ADAPTIVE = "adaptive"

    @property
    def writes(self) -> bool:
        """Whether knobs are written at all."""
        return self is not PolicyName.OBSERVE

    @property
    def steers(self) -> bool:
        """Whether it finds values of its own for the knobs of `STEERED`."""
        return self not in (PolicyName.OBSERVE, PolicyName.FIXED)


#: What a policy that steers decides about; ``[knobs]`` may name the others only.
STEERED: frozenset[Knob] = frozenset(
    {
        Knob.RUN,
        Knob.PAGES_TO_SCAN,
        Knob.SLEEP_MILLISECS,
        Knob.SMART_SCAN,
        Knob.ADVISOR_MODE,
        Knob.ADVISOR_MAX_CPU,
        Knob.ADVISOR_MIN_PAGES_TO_SCAN,
        Knob.ADVISOR_MAX_PAGES_TO_SCAN,
        Knob.ADVISOR_TARGET_SCAN_TIME,
    }
)


class Heal(StrEnum):
    """When a kind of healing acts that writes knobs for a while."""

    ADAPTIVE = "adaptive"
    ON = "on"
    OFF = "off"

    def acts(self, policy: PolicyName) -> bool:
        """Whether it does under a policy; never where nothing is written."""
        return (
            policy is PolicyName.ADAPTIVE
            if self is Heal.ADAPTIVE
            else self is Heal.ON and policy is not PolicyName.OBSERVE
        )


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

    :ivar knobs: what ``[knobs]`` names; held under every policy but ``observe``
    :ivar files: the files that were read, in their order
    :ivar unused: tables and keys that only another policy uses, each with its file
    """

    policy: PolicyName
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
    unused: tuple[str, ...] = ()
    metrics_names: tuple[str, ...] = ()
    floor_bytes: int = 128 << 20
    headroom_share: float = 0.25
    batch_latency: float = 0.01
    max_pressure: float = 0.2
    census_interval: float = 300.0
    census_cpu_share: float = 0.001
    adaptive_max_cpu: float = 0.8
    adaptive_idle_cpu: float = 0.005
    adaptive_worth: int = 1000
    adaptive_max_cpu_pressure: float = 0.8
    kernel_target_scan_time: int = 200
    kernel_max_cpu: float = 0.7
    kernel_min_pages_to_scan: int = 500
    kernel_max_pages_to_scan: int = 30000
    ksmtuned_interval: float = 60.0
    ksmtuned_npages_boost: int = 300
    ksmtuned_npages_decay: int = 50
    ksmtuned_npages_min: int = 64
    ksmtuned_npages_max: int = 1250
    ksmtuned_sleep_millisecs: int = 10
    ksmtuned_thres_coef: float = 0.2
    ksmtuned_thres_const_bytes: int = 2 << 30
    heal_smart_scan: Heal = Heal.ADAPTIVE
    heal_swapin: Heal = Heal.ADAPTIVE
    heal_advisor: bool = True
    heal_twins: bool = False

    def holds(self, knob: Knob) -> bool:
        """Whether the service holds or steers a knob."""
        return self.policy.writes and (knob in self.knobs or (self.policy.steers and knob in STEERED))


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``ADDRESS:PORT``; an IPv6 address stands in brackets.

    :raises ValueError: the text is not of that form
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or not (port.isascii() and port.isdigit()) or (":" in host and not bracketed):
        raise ValueError(f"{text!r} is not ADDRESS:PORT (an IPv6 address stands in brackets)")
    if len(port) > 5 or int(port) > 65535:
        raise ValueError(f"{port[:40]} is not a port: at most 65535")
    return (host[1:-1] if bracketed else host), int(port)
