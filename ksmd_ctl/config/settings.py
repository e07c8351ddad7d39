# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table of settings. The loader, its errors and the shipped sample are renderings of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from ksmd_ctl.config.model import AtStop, Heal, OnDrift, PolicyName, Want, parse_address
from ksmd_ctl.fields import FIELDS_BY_NAME
from ksmd_ctl.kernel.bounds import LEAST_FLOOR_BYTES
from ksmd_ctl.knobs import KNOBS, Knob, KnobValue, parse_wanted
from ksmd_ctl.tomltext import shown

__all__ = ["KNOB_SECTION", "ORDERED", "SECTIONS", "SETTINGS", "SETTINGS_BY_KEY", "Setting", "parse_knob"]

KNOB_SECTION = "knobs"

_HOST_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63}){0,127}")


class Type(Protocol):
    """How a value reads."""

    def parse(self, value: object) -> object:
        """The checked value.

        :raises ValueError: it is none; the text says what would be
        """

    def lines(self) -> tuple[str, ...]:
        """What may stand here, for the sample."""


@dataclass(frozen=True, slots=True)
class Choice:
    meanings: Mapping[StrEnum, str]

    def parse(self, value: object) -> object:
        for choice in self.meanings:
            if value == choice.value:
                return choice
        raise ValueError(f"{shown(value)} is not one of {', '.join(self.meanings)}")

    def lines(self) -> tuple[str, ...]:
        width = max(map(len, self.meanings)) + 2
        return tuple(f"  {chr(34) + choice + chr(34):{width}}  {text}" for choice, text in self.meanings.items())


@dataclass(frozen=True, slots=True)
class Seconds:
    minimum: float
    maximum: float

    def parse(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{shown(value)} is not a number of seconds")
        # Written so that nan fails it.
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"{value} is not between {self.minimum:g} and {self.maximum:g} seconds")
        return float(value)

    def lines(self) -> tuple[str, ...]:
        return (f"  seconds, {self.minimum:g} to {self.maximum:g}",)


@dataclass(frozen=True, slots=True)
class Count:
    minimum: int
    maximum: int
    unit: str

    def parse(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{shown(value)} is not a whole number of {self.unit}")
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"{value} is not between {self.minimum} and {self.maximum} {self.unit}")
        return value

    def lines(self) -> tuple[str, ...]:
        return (f"  {self.unit}, {self.minimum} to {self.maximum}",)


@dataclass(frozen=True, slots=True)
class Flag:
    def parse(self, value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError(f"{shown(value)} is not true or false")
        return value

    def lines(self) -> tuple[str, ...]:
        return ("  true or false",)


@dataclass(frozen=True, slots=True)
class Healing:
    """When a kind of healing acts."""

    def parse(self, value: object) -> object:
        if isinstance(value, bool):
            return Heal.ON if value else Heal.OFF
        if value == Heal.ADAPTIVE.value:
            return Heal.ADAPTIVE
        raise ValueError(f"{shown(value)} is not true, false or {Heal.ADAPTIVE.value!r}")

    def lines(self) -> tuple[str, ...]:
        return ('  true, false, or "adaptive": exactly under policy = "adaptive"',)


@dataclass(frozen=True, slots=True)
class Share:
    minimum: float
    maximum: float = 1

    def parse(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{shown(value)} is not a number")
        # Written so that nan fails it.
        if not self.minimum <= value <= self.maximum:
            raise ValueError(f"{value} is not between {self.minimum:g} and {self.maximum:g}")
        return float(value)

    def lines(self) -> tuple[str, ...]:
        return (f"  a share, {self.minimum:g} to {self.maximum:g}",)


@dataclass(frozen=True, slots=True)
class Address:
    def parse(self, value: object) -> object:
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} is not a text of the form ADDRESS:PORT")
        if value:
            parse_address(value)
        return value

    def lines(self) -> tuple[str, ...]:
        return ('  "ADDRESS:PORT", "[IPV6]:PORT", or "" for none',)


@dataclass(frozen=True, slots=True)
class HostNames:
    def parse(self, value: object) -> object:
        if not isinstance(value, list):
            raise ValueError(f"{shown(value)} is not a list of host names")
        for name in value:
            if not isinstance(name, str) or not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{shown(name)} is not a host name (without a port)")
        return tuple(name.lower() for name in value)

    def lines(self) -> tuple[str, ...]:
        return ('  a list of host names, as in ["host.example"]',)


@dataclass(frozen=True, slots=True)
class Path:
    #: sun_path of struct sockaddr_un takes 107 bytes and a NUL (unix(7)).
    socket: bool = False

    def parse(self, value: object) -> object:
        if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
            raise ValueError(f"{shown(value)} is not an absolute path")
        if self.socket and len(value.encode()) > 107:
            raise ValueError(f"{shown(value)} is too long for a socket: at most 107 bytes")
        return value

    def lines(self) -> tuple[str, ...]:
        return ("  an absolute path" + (", at most 107 bytes" if self.socket else ""),)


@dataclass(frozen=True, slots=True)
class Group:
    def parse(self, value: object) -> object:
        if not isinstance(value, str) or any(letter.isspace() or letter in ":,\0" for letter in value):
            raise ValueError(f"{shown(value)} is not the name of a group")
        return value

    def lines(self) -> tuple[str, ...]:
        return ('  the name of a group, or "" for none',)


@dataclass(frozen=True, slots=True)
class Setting:
    """One key.

    :ivar section: the table it stands in, empty for the top of the file
    :ivar default: as it would stand in the file
    :ivar reloadable: takes effect on a reload (SIGHUP); otherwise only at the next start
    :ivar field: its name in `Config`, where that is not the key
    """

    section: str
    key: str
    type: Type
    default: object
    help: str
    reloadable: bool = True
    field: str = ""

    @property
    def name(self) -> str:
        """What `ksmd_ctl.config.model.Config` calls it."""
        return self.field or self.key


SECTIONS: tuple[str, ...] = (
    "",
    KNOB_SECTION,
    "adaptive",
    "kernel",
    "ksmtuned",
    "healing",
    "limits",
    "census",
    "service",
)

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "",
        "policy",
        Choice(
            {
                PolicyName.OBSERVE: "watch and report; write no knob (after another policy, what that one held goes "
                "back)",
                PolicyName.FIXED: "hold the knobs that [knobs] names, and only those",
                PolicyName.ADAPTIVE: "recommended: have ksmd work where pages still get merged, and rest where none "
                "do; `ksmd-ctl status --explain` says why. [adaptive] has its limits",
                PolicyName.KERNEL: "the kernel's own advisor (advisor_mode = scan-time), or what it does, done here "
                "where the kernel has none or leaves ksmd at a crawl; [kernel]",
                PolicyName.KSMTUNED: "ksmtuned's formula: merge when memory gets short, and faster the longer that "
                "lasts; [ksmtuned]",
            }
        ),
        "observe",
        "Where the wanted values of the knobs come from.",
    ),
    Setting(
        "adaptive",
        "max_cpu",
        Share(0.01),
        0.8,
        "The share of one CPU that ksmd takes at most, on average over some seconds.",
        field="adaptive_max_cpu",
    ),
    Setting(
        "adaptive",
        "idle_cpu",
        Share(0.0005),
        0.005,
        "The share of one CPU that ksmd takes where there is nothing new to merge.",
        field="adaptive_idle_cpu",
    ),
    Setting(
        "adaptive",
        "worth",
        Count(0, 1 << 30, "pages"),
        1000,
        "How many pages a second of ksmd's CPU time has to save, or ksmd goes back to idle_cpu.",
        field="adaptive_worth",
    ),
    Setting(
        "adaptive",
        "max_cpu_pressure",
        Share(0.01),
        0.8,
        "While some task waits for a CPU for a greater share of the time than this (/proc/pressure/cpu), ksmd takes a "
        "quarter of max_cpu at most; [limits] max_pressure says the same of memory, unless merging relieves that.",
        field="adaptive_max_cpu_pressure",
    ),
    Setting(
        "kernel",
        "target_scan_time",
        Count(1, 1 << 32, "seconds"),
        200,
        "Duration of a full scan that is aimed at (advisor_target_scan_time).",
        field="kernel_target_scan_time",
    ),
    Setting(
        "kernel",
        "max_cpu",
        Share(0.01),
        0.7,
        "The share of one CPU that ksmd takes at most (advisor_max_cpu).",
        field="kernel_max_cpu",
    ),
    Setting(
        "kernel",
        "min_pages_to_scan",
        Count(1, 1 << 32, "pages"),
        500,
        "pages_to_scan to begin with (advisor_min_pages_to_scan).",
        field="kernel_min_pages_to_scan",
    ),
    Setting(
        "kernel",
        "max_pages_to_scan",
        Count(1, 1 << 32, "pages"),
        30000,
        "pages_to_scan to stay under (advisor_max_pages_to_scan).",
        field="kernel_max_pages_to_scan",
    ),
    Setting(
        "ksmtuned",
        "interval",
        Seconds(1, 86400),
        60,
        "How often it decides (KSM_MONITOR_INTERVAL).",
        field="ksmtuned_interval",
    ),
    Setting(
        "ksmtuned",
        "npages_boost",
        Count(0, 1 << 30, "pages"),
        300,
        "What pages_to_scan grows by while memory is short (KSM_NPAGES_BOOST).",
        field="ksmtuned_npages_boost",
    ),
    Setting(
        "ksmtuned",
        "npages_decay",
        Count(0, 1 << 30, "pages"),
        50,
        "What pages_to_scan shrinks by while it is not (KSM_NPAGES_DECAY, without its minus sign).",
        field="ksmtuned_npages_decay",
    ),
    Setting(
        "ksmtuned",
        "npages_min",
        Count(1, 1 << 30, "pages"),
        64,
        "pages_to_scan at least (KSM_NPAGES_MIN).",
        field="ksmtuned_npages_min",
    ),
    Setting(
        "ksmtuned",
        "npages_max",
        Count(1, 1 << 30, "pages"),
        1250,
        "pages_to_scan at most (KSM_NPAGES_MAX).",
        field="ksmtuned_npages_max",
    ),
    Setting(
        "ksmtuned",
        "sleep_millisecs",
        Count(1, 1 << 20, "milliseconds"),
        10,
        "How long ksmd sleeps between batches on a host with 16 GiB; less with more memory, but not less than 10 ms "
        "(KSM_SLEEP_MSEC).",
        field="ksmtuned_sleep_millisecs",
    ),
    Setting(
        "ksmtuned",
        "thres_coef",
        Share(0),
        0.2,
        "Memory is short when less than this share of it is free (KSM_THRES_COEF, which is in percent).",
        field="ksmtuned_thres_coef",
    ),
    Setting(
        "ksmtuned",
        "thres_const_bytes",
        Count(0, 1 << 50, "bytes"),
        2 << 30,
        "Memory is short when less than this is free, if that is more than thres_coef (KSM_THRES_CONST, in MiB there).",
        field="ksmtuned_thres_const_bytes",
    ),
    Setting(
        "healing",
        "smart_scan",
        Healing(),
        "adaptive",
        "Switch smart_scan off for a few full scans when pages may be locked out by it. With it on, equal pages whose "
        "turns never meet are never merged: up to a fifth of what pairs of processes could share.",
        field="heal_smart_scan",
    ),
    Setting(
        "healing",
        "swapin",
        Healing(),
        "adaptive",
        "Scan faster for two full scans when merged pages come back from swap, which copies them for each mapping.",
        field="heal_swapin",
    ),
    Setting(
        "healing",
        "advisor",
        Flag(),
        True,
        'Under policy = "kernel": switch the kernel\'s advisor off where it leaves ksmd at a crawl, and do its work '
        "here.",
        field="heal_advisor",
    ),
    Setting(
        "healing",
        "twins",
        Flag(),
        False,
        "Un-merge one of two KSM pages with the same content that ended up on one node, so that ksmd merges it into "
        "the other one.",
        field="heal_twins",
    ),
    Setting(
        "limits",
        "floor_bytes",
        Count(LEAST_FLOOR_BYTES, 1 << 50, "bytes"),
        128 << 20,
        "What has to stay free on the host and on every node. A change that would leave less is refused.",
    ),
    Setting(
        "limits",
        "headroom_share",
        Share(0.01),
        0.25,
        "How much of what is free above the floor may be taken before it is looked at anew.",
    ),
    Setting(
        "limits",
        "batch_latency",
        Seconds(0.0005, 1),
        0.01,
        "How long one call may keep a process from its memory while its pages are un-merged or moved.",
    ),
    Setting(
        "limits",
        "max_pressure",
        Share(0.001),
        0.2,
        "Un-merging pauses while some task waits for memory for a greater share of the time than this "
        "(/proc/pressure/memory), and is abandoned where that doesn't pass.",
    ),
    Setting(
        "census",
        "interval",
        Seconds(5, 86400),
        300,
        "How often nodes and processes are looked at. What nobody merges is not counted again.",
        field="census_interval",
    ),
    Setting(
        "census",
        "cpu_share",
        Share(0, 0.5),
        0.001,
        "The share of one CPU that looking may take. On a large host KSM pages are counted in a sample that fits it, "
        "and where looking costs more all the same, it is done less often. A count takes at most 60 s of "
        "CPU, whatever share and interval allow. 0: only when somebody asks.",
        field="census_cpu_share",
    ),
    Setting(
        "service",
        "sample_interval",
        Seconds(0.1, 3600),
        1,
        "How often the host is looked at. Drift is put right within two of these.",
    ),
    Setting(
        "service",
        "at_stop",
        Choice(
            {
                AtStop.RESTORE: "put the knobs back to what they were before the service was started, as far as that "
                "needs no un-merging; merge_across_nodes and max_page_sharing are reported where it would",
                AtStop.LEAVE: "leave the knobs as they are",
                AtStop.STOP_SCANNING: "write run = 0 and leave the others; what is merged stays merged",
            }
        ),
        "restore",
        "What happens to the knobs when the service is stopped. A restart or an upgrade is no stop. Knobs that a "
        "person has set with `ksmd-ctl set` and that are not declared here stay.",
    ),
    Setting(
        "service",
        "on_drift",
        Choice(
            {
                OnDrift.ENFORCE: "put it back, at most 10 times within 10 minutes, then leave it alone and say so",
                OnDrift.OBSERVE: "leave it alone and say so",
            }
        ),
        "enforce",
        "What happens when somebody else changes a held knob.",
    ),
    Setting(
        "service",
        "metrics_listen",
        Address(),
        "127.0.0.1:19753",
        "Where Prometheus finds the metrics. Only this host can reach the default, with all its users. Nothing asks "
        "who is there: give it another address only on a network that you trust.",
        reloadable=False,
    ),
    Setting(
        "service",
        "metrics_names",
        HostNames(),
        [],
        "Names under which the metrics are asked for, beside localhost. Addresses are always answered, and other names "
        "never, so that no web page from elsewhere can have its own name lead here.",
    ),
    Setting(
        "service",
        "socket",
        Path(socket=True),
        "/run/ksmd-ctl/socket",
        "The control socket, for `ksmd-ctl status` and the other commands.",
        reloadable=False,
    ),
    Setting(
        "service",
        "socket_group",
        Group(),
        "",
        "Whose members may connect to the control socket and read, besides root and the service itself. The service "
        "must be in it, too (SupplementaryGroups= in the unit). None named: the service's own group, ksmd-ctl.",
        reloadable=False,
    ),
    Setting(
        "service",
        "socket_write_group",
        Group(),
        "",
        "Whose members may also change something, besides root and the service itself. It gives no right to connect: "
        "they need that of socket_group as well.",
        reloadable=False,
    ),
    Setting(
        "service",
        "runtime_directory",
        Path(),
        "/run/ksmd-ctl",
        "Where the lock is that keeps a second instance away.",
        reloadable=False,
    ),
    Setting(
        "service",
        "state_directory",
        Path(),
        "/var/lib/ksmd-ctl",
        "Where the knobs as they were at first and before the start are kept, so that a crash doesn't lose them.",
        reloadable=False,
    ),
    Setting(
        "service",
        "broker_socket",
        Path(socket=True),
        "/run/ksmd-ctl-broker.socket",
        "Where the privileged part listens (ksmd-ctl-broker.socket). Not used when the service runs as root.",
        reloadable=False,
    ),
)

#: Pairs of keys of which the first must not be greater than the second.
ORDERED: tuple[tuple[str, str], ...] = (
    ("adaptive_idle_cpu", "adaptive_max_cpu"),
    ("kernel_min_pages_to_scan", "kernel_max_pages_to_scan"),
    ("ksmtuned_npages_min", "ksmtuned_npages_max"),
)

SETTINGS_BY_KEY: dict[tuple[str, str], Setting] = {(setting.section, setting.key): setting for setting in SETTINGS}

KNOB_NOTES: dict[Knob, str] = {
    Knob.RUN: "Here only 0 or 1: run = 2 un-merges everything, which is a deed and not a state to hold.",
    Knob.PAGES_TO_SCAN: 'Not together with advisor_mode = "scan-time": the kernel refuses it then.',
    Knob.MERGE_ACROSS_NODES: "Can't be changed while anything is merged: pending until `ksmd-ctl set` does it.",
    Knob.MAX_PAGE_SHARING: "Can't be changed while anything is merged: pending until `ksmd-ctl set` does it.",
    Knob.ADVISOR_MODE: "On a host where ksmd has already worked, scan-time can slow it to a crawl for hours.",
}


def parse_knob(knob: Knob, value: object, origin: str) -> Want:
    """What ``[knobs]`` says of one: its value, or ``{ value = VALUE, optional = true }``.

    :raises ValueError: the knob does not take it
    """
    optional = False
    if isinstance(value, dict):
        unknown = [key for key in value if key not in ("value", "optional")]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}: only value and optional may stand here")
        if "value" not in value:
            raise ValueError("has no value")
        if not isinstance(value.get("optional", False), bool):
            raise ValueError(f"optional is true or false, not {shown(value['optional'])}")
        optional = value.get("optional", False)
        value = value["value"]
    wanted = _knob_value(knob, value)
    if knob is Knob.RUN and wanted == 2:
        raise ValueError("2 un-merges everything: only 0 and 1 can be held")
    return Want(wanted, optional, origin)


def _knob_value(knob: Knob, value: object) -> KnobValue:
    """A value as a file has it: unlike a command line it has numbers, and one in quotes is a text."""
    spec = KNOBS[knob]
    if spec.choices:
        if value not in spec.choices:
            raise ValueError(f"{shown(value)} is not one of {', '.join(spec.choices)}")
    elif not isinstance(value, int) or (isinstance(value, bool) and spec.maximum != 1):
        number = isinstance(value, str) and value.isascii() and value.isdigit()
        raise ValueError(f"{shown(value)} is not a whole number" + (": write it without quotes" if number else ""))
    return parse_wanted(knob, value)


def knob_help(knob: Knob) -> tuple[str, ...]:
    """The lines that the sample has for a knob."""
    spec = KNOBS[knob]
    if spec.choices:
        takes = " or ".join(f'"{choice}"' for choice in spec.choices)
    elif spec.maximum == 1 or knob is Knob.RUN:
        takes = "0 or 1"
    else:
        takes = f"{spec.unit or 'a number'}, {spec.minimum} to {spec.maximum}"
    default = f'"{spec.default}"' if spec.choices else str(spec.default)
    lines = [FIELDS_BY_NAME[knob].help, f"  {takes}; the kernel's default is {default}; since Linux {spec.since}"]
    if knob in KNOB_NOTES:
        lines.append(KNOB_NOTES[knob])
    return tuple(lines)
