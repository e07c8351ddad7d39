# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: one table, `Config`, has each setting's type, default and explanation.

The loader, the shipped sample and the manual page are made from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from ksmd_ctl.config.values import (
    ADDRESS,
    FLAG,
    GROUP,
    HOST_NAMES,
    PATH,
    SOCKET_PATH,
    Type,
    choice,
    count,
    seconds,
    share,
)
from ksmd_ctl.host.memory import LEAST_FLOOR_BYTES
from ksmd_ctl.knobs import Knob, KnobValue
from ksmd_ctl.tomltext import shown

T = TypeVar("T")


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


def _heal(value: object) -> Heal:
    if isinstance(value, bool):
        return Heal.ON if value else Heal.OFF
    if value == Heal.ADAPTIVE.value:
        return Heal.ADAPTIVE
    raise ValueError(f"{shown(value)} is not true, false or {Heal.ADAPTIVE.value!r}")


_HEALING = Type(_heal, ('  true, false, or "adaptive": exactly under policy = "adaptive"',))


def _setting(key: str, kind: Type, default: T, text: str, *, reloadable: bool = True) -> T:
    """A field of `Config`.

    :param key: as in a file: ``TABLE.KEY``, or ``KEY`` before the first table
    :param reloadable: a reload (SIGHUP) puts it in force; otherwise only the next start does
    """
    section, _, name = key.rpartition(".")
    found: T = dataclasses.field(
        default=default,
        metadata={"section": section, "key": name, "type": kind, "help": text, "reloadable": reloadable},
    )
    return found


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration; without arguments, the defaults.

    :ivar knobs: what ``[knobs]`` names; held under every policy but ``observe``
    :ivar files: the files that were read, in their order
    :ivar unused: tables and keys that only another policy uses, each with its file
    """

    knobs: Mapping[Knob, Want] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    policy: PolicyName = _setting(
        "policy",
        choice(
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
        PolicyName.OBSERVE,
        "Where the wanted values of the knobs come from.",
    )
    adaptive_max_cpu: float = _setting(
        "adaptive.max_cpu",
        share(0.01),
        0.8,
        "The share of one CPU that ksmd takes at most, on average over some seconds.",
    )
    adaptive_idle_cpu: float = _setting(
        "adaptive.idle_cpu",
        share(0.0005),
        0.005,
        "The share of one CPU that ksmd takes where there is nothing new to merge.",
    )
    adaptive_worth: int = _setting(
        "adaptive.worth",
        count(0, 1 << 30, "pages"),
        1000,
        "How many pages a second of ksmd's CPU time has to save, or ksmd goes back to idle_cpu.",
    )
    adaptive_max_cpu_pressure: float = _setting(
        "adaptive.max_cpu_pressure",
        share(0.01),
        0.8,
        "While some task waits for a CPU for a greater share of the time than this (/proc/pressure/cpu), ksmd "
        "takes a quarter of max_cpu at most; [limits] max_pressure says the same of memory, unless merging "
        "relieves that.",
    )
    kernel_target_scan_time: int = _setting(
        "kernel.target_scan_time",
        count(1, 1 << 32, "seconds"),
        200,
        "Duration of a full scan that is aimed at (advisor_target_scan_time).",
    )
    kernel_max_cpu: float = _setting(
        "kernel.max_cpu", share(0.01), 0.7, "The share of one CPU that ksmd takes at most (advisor_max_cpu)."
    )
    kernel_min_pages_to_scan: int = _setting(
        "kernel.min_pages_to_scan",
        count(1, 1 << 32, "pages"),
        500,
        "pages_to_scan to begin with (advisor_min_pages_to_scan).",
    )
    kernel_max_pages_to_scan: int = _setting(
        "kernel.max_pages_to_scan",
        count(1, 1 << 32, "pages"),
        30000,
        "pages_to_scan to stay under (advisor_max_pages_to_scan).",
    )
    ksmtuned_interval: float = _setting(
        "ksmtuned.interval", seconds(1, 86400), 60.0, "How often it decides (KSM_MONITOR_INTERVAL)."
    )
    ksmtuned_npages_boost: int = _setting(
        "ksmtuned.npages_boost",
        count(0, 1 << 30, "pages"),
        300,
        "What pages_to_scan grows by while memory is short (KSM_NPAGES_BOOST).",
    )
    ksmtuned_npages_decay: int = _setting(
        "ksmtuned.npages_decay",
        count(0, 1 << 30, "pages"),
        50,
        "What pages_to_scan shrinks by while it is not (KSM_NPAGES_DECAY, without its minus sign).",
    )
    ksmtuned_npages_min: int = _setting(
        "ksmtuned.npages_min", count(1, 1 << 30, "pages"), 64, "pages_to_scan at least (KSM_NPAGES_MIN)."
    )
    ksmtuned_npages_max: int = _setting(
        "ksmtuned.npages_max", count(1, 1 << 30, "pages"), 1250, "pages_to_scan at most (KSM_NPAGES_MAX)."
    )
    ksmtuned_sleep_millisecs: int = _setting(
        "ksmtuned.sleep_millisecs",
        count(1, 1 << 20, "milliseconds"),
        10,
        "How long ksmd sleeps between batches on a host with 16 GiB; less with more memory, but not less than 10 "
        "ms (KSM_SLEEP_MSEC).",
    )
    ksmtuned_thres_coef: float = _setting(
        "ksmtuned.thres_coef",
        share(0),
        0.2,
        "Memory is short when less than this share of it is free (KSM_THRES_COEF, which is in percent).",
    )
    ksmtuned_thres_const_bytes: int = _setting(
        "ksmtuned.thres_const_bytes",
        count(0, 1 << 50, "bytes"),
        2 << 30,
        "Memory is short when less than this is free, if that is more than thres_coef (KSM_THRES_CONST, in MiB there).",
    )
    heal_smart_scan: Heal = _setting(
        "healing.smart_scan",
        _HEALING,
        Heal.ADAPTIVE,
        "Switch smart_scan off for a few full scans when pages may be locked out by it. With it on, equal pages "
        "whose turns never meet are never merged: up to a fifth of what pairs of processes could share.",
    )
    heal_swapin: Heal = _setting(
        "healing.swapin",
        _HEALING,
        Heal.ADAPTIVE,
        "Scan faster for two full scans when merged pages come back from swap, which copies them for each mapping.",
    )
    heal_advisor: bool = _setting(
        "healing.advisor",
        FLAG,
        True,
        'Under policy = "kernel": switch the kernel\'s advisor off where it leaves ksmd at a crawl, and do its '
        "work here.",
    )
    heal_twins: bool = _setting(
        "healing.twins",
        FLAG,
        False,
        "Un-merge one of two KSM pages with the same content that ended up on one node, so that ksmd merges it "
        "into the other one.",
    )
    floor_bytes: int = _setting(
        "limits.floor_bytes",
        count(LEAST_FLOOR_BYTES, 1 << 50, "bytes"),
        128 << 20,
        "What has to stay free on the host and on every node. A change that would leave less is refused.",
    )
    headroom_share: float = _setting(
        "limits.headroom_share",
        share(0.01),
        0.25,
        "How much of what is free above the floor may be taken before it is looked at anew.",
    )
    batch_latency: float = _setting(
        "limits.batch_latency",
        seconds(0.0005, 1),
        0.01,
        "How long one call may keep a process from its memory while its pages are un-merged or moved.",
    )
    max_pressure: float = _setting(
        "limits.max_pressure",
        share(0.001),
        0.2,
        "Un-merging pauses while some task waits for memory for a greater share of the time than this "
        "(/proc/pressure/memory), and is abandoned where that doesn't pass.",
    )
    census_interval: float = _setting(
        "census.interval",
        seconds(5, 86400),
        300.0,
        "How often nodes and processes are looked at. What nobody merges is not counted again.",
    )
    census_cpu_share: float = _setting(
        "census.cpu_share",
        share(0, 0.5),
        0.001,
        "The share of one CPU that looking may take. On a large host KSM pages are counted in a sample that fits "
        "it, and where looking costs more all the same, it is done less often. A count takes at most 60 s of CPU, "
        "whatever share and interval allow. 0: only when somebody asks.",
    )
    sample_interval: float = _setting(
        "service.sample_interval",
        seconds(0.1, 3600),
        1.0,
        "How often the host is looked at. Drift is put right within two of these.",
    )
    at_stop: AtStop = _setting(
        "service.at_stop",
        choice(
            {
                AtStop.RESTORE: "put the knobs back to what they were before the service was started, as far as that "
                "needs no un-merging; merge_across_nodes and max_page_sharing are reported where it would",
                AtStop.LEAVE: "leave the knobs as they are",
                AtStop.STOP_SCANNING: "write run = 0 and leave the others; what is merged stays merged",
            }
        ),
        AtStop.RESTORE,
        "What happens to the knobs when the service is stopped. A restart or an upgrade is no stop. Knobs that a "
        "person has set with `ksmd-ctl set` and that are not declared here stay.",
    )
    on_drift: OnDrift = _setting(
        "service.on_drift",
        choice(
            {
                OnDrift.ENFORCE: "put it back, at most 10 times within 10 minutes, then leave it alone and say so",
                OnDrift.OBSERVE: "leave it alone and say so",
            }
        ),
        OnDrift.ENFORCE,
        "What happens when somebody else changes a held knob.",
    )
    metrics_listen: str = _setting(
        "service.metrics_listen",
        ADDRESS,
        "127.0.0.1:19753",
        "Where Prometheus finds the metrics. Only this host can reach the default, with all its users. Nothing "
        "asks who is there: give it another address only on a network that you trust.",
        reloadable=False,
    )
    metrics_names: tuple[str, ...] = _setting(
        "service.metrics_names",
        HOST_NAMES,
        (),
        "Names under which the metrics are asked for, beside localhost. Addresses are always answered, and other "
        "names never, so that no web page from elsewhere can have its own name lead here.",
    )
    socket: str = _setting(
        "service.socket",
        SOCKET_PATH,
        "/run/ksmd-ctl/socket",
        "The control socket, for `ksmd-ctl status` and the other commands.",
        reloadable=False,
    )
    socket_group: str = _setting(
        "service.socket_group",
        GROUP,
        "",
        "Whose members may connect to the control socket and read, besides root and the service itself. The "
        "service must be in it, too (SupplementaryGroups= in the unit). None named: the service's own group, "
        "ksmd-ctl.",
        reloadable=False,
    )
    socket_write_group: str = _setting(
        "service.socket_write_group",
        GROUP,
        "",
        "Whose members may also change something, besides root and the service itself. It gives no right to "
        "connect: they need that of socket_group as well.",
        reloadable=False,
    )
    runtime_directory: str = _setting(
        "service.runtime_directory",
        PATH,
        "/run/ksmd-ctl",
        "Where the lock is that keeps a second instance away.",
        reloadable=False,
    )
    state_directory: str = _setting(
        "service.state_directory",
        PATH,
        "/var/lib/ksmd-ctl",
        "Where the knobs as they were at first and before the start are kept, so that a crash doesn't lose them.",
        reloadable=False,
    )
    broker_socket: str = _setting(
        "service.broker_socket",
        SOCKET_PATH,
        "/run/ksmd-ctl-broker.socket",
        "Where the privileged part listens (ksmd-ctl-broker.socket). Not used when the service runs as root.",
        reloadable=False,
    )

    def holds(self, knob: Knob) -> bool:
        """Whether the service holds or steers a knob."""
        return self.policy.writes and (knob in self.knobs or (self.policy.steers and knob in STEERED))


KNOB_SECTION = "knobs"

#: The tables in the order of the sample; the empty name is for what stands before the first one.
SECTIONS = ("", KNOB_SECTION, "adaptive", "kernel", "ksmtuned", "healing", "limits", "census", "service")

#: Pairs of settings of which the first must not be greater than the second.
ORDERED = (
    ("adaptive_idle_cpu", "adaptive_max_cpu"),
    ("kernel_min_pages_to_scan", "kernel_max_pages_to_scan"),
    ("ksmtuned_npages_min", "ksmtuned_npages_max"),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.

    :ivar name: its field in `Config`
    :ivar default: as a file would have it
    """

    name: str
    default: object
    section: str
    key: str
    type: Type
    help: str
    reloadable: bool

    @property
    def path(self) -> str:
        """As messages name it."""
        return f"{self.section}.{self.key}" if self.section else self.key


def _written(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.value if isinstance(value, StrEnum) else value


SETTINGS = tuple(
    Setting(field.name, _written(field.default), **field.metadata)
    for field in dataclasses.fields(Config)
    if field.metadata
)
SETTINGS_BY_KEY = {(setting.section, setting.key): setting for setting in SETTINGS}
SETTINGS_BY_NAME = {setting.name: setting for setting in SETTINGS}
