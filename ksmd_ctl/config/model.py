# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: one table, `Config`, has each setting's type, default and explanation.

The shipped sample and the manual page are made from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from ksmd_ctl.config.domains import DOMAIN_SECTION, EACH_ITS_OWN, DomainMode, Domains, OnViolation
from ksmd_ctl.config.values import (
    ADDRESS,
    FLAG,
    GROUP,
    HOST_NAMES,
    PATH,
    SOCKET_PATH,
    TEXT,
    Type,
    choice,
    count,
    seconds,
    share,
)
from ksmd_ctl.host.knobs import KSMD_KNOBS, SYSFS_KNOBS, Knob, KnobValue
from ksmd_ctl.host.memory import LEAST_FLOOR_BYTES
from ksmd_ctl.tomltext import shown

T = TypeVar("T")


class PolicyName(StrEnum):
    """Where the wanted values of the knobs come from."""

    OBSERVE = "observe"
    FIXED = "fixed"
    KSMTUNED = "ksmtuned"
    KUBEVIRT = "kubevirt"
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
    """When a kind of recovery acts that writes knobs for a while."""

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
    :ivar unknown: why the value is not known, empty where it is
    """

    value: KnobValue
    optional: bool = False
    origin: str = ""
    unknown: str = ""


def _heal(value: object) -> Heal:
    if isinstance(value, bool):
        return Heal.ON if value else Heal.OFF
    if value == Heal.ADAPTIVE.value:
        return Heal.ADAPTIVE
    raise ValueError(f"{shown(value)} is not true, false or {Heal.ADAPTIVE.value!r}")


_HEALING = Type(_heal, ('  true, false, or "adaptive": only with policy = "adaptive"',))


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

    :ivar knobs: what ``[knobs]`` and ``[ksmd]`` name; held under every policy but ``observe``
    :ivar files: the files that were read, in their order
    :ivar unused: tables and keys that only another policy uses, each with its file
    :ivar domains: None where no file has a table ``[domains]``; its settings are below, too
    :ivar digest: of all settings, whichever files they are in; empty where no loader has made it
    """

    knobs: Mapping[Knob, Want] = dataclasses.field(default_factory=dict)
    files: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    domains: Domains | None = None
    digest: str = ""
    policy: PolicyName = _setting(
        "policy",
        choice(
            {
                PolicyName.OBSERVE: "watch and report; write no knob (after another policy, restore its knobs)",
                PolicyName.FIXED: "hold what [knobs] and [ksmd] name, and only that",
                PolicyName.ADAPTIVE: "recommended: ksmd scans fast while there are pages to merge, and rests "
                "otherwise; `ksmd-ctl status --explain` says why. [adaptive] has the limits",
                PolicyName.KERNEL: "use the kernel's scan-time advisor, or do its work here if the kernel has none or "
                "it has become very slow. [kernel] has the goal and limits",
                PolicyName.KSMTUNED: "use ksmtuned's formula: merge when memory is short, and faster the longer it is. "
                "[ksmtuned] has the quantities",
                PolicyName.KUBEVIRT: "use the rules of KubeVirt's virt-handler. [kubevirt] has the quantities",
            }
        ),
        PolicyName.OBSERVE,
        "Where the wanted values of the knobs come from.",
    )
    adaptive_max_cpu: float = _setting(
        "adaptive.max_cpu",
        share(0.01),
        0.8,
        "The greatest share of one CPU that ksmd takes, on average over some seconds.",
    )
    adaptive_idle_cpu: float = _setting(
        "adaptive.idle_cpu",
        share(0.0005),
        0.005,
        "The share of one CPU that ksmd takes in the long run if there is nothing new to merge.",
    )
    adaptive_worth: int = _setting(
        "adaptive.worth",
        count(0, 1 << 30, "pages"),
        1000,
        "The least number of pages that a second of ksmd's CPU time has to save; otherwise ksmd rests.",
    )
    adaptive_max_cpu_pressure: float = _setting(
        "adaptive.max_cpu_pressure",
        share(0.01),
        0.8,
        "If some task waits for a CPU for a greater share of the time than this (/proc/pressure/cpu), ksmd takes "
        "at most a quarter of max_cpu. The same holds for memory and [limits] max_pressure, unless merging "
        "relieves it.",
    )
    kernel_target_scan_time: int = _setting(
        "kernel.target_scan_time",
        count(1, 1 << 32, "seconds"),
        200,
        "The intended duration of a full scan (advisor_target_scan_time).",
    )
    kernel_max_cpu: float = _setting(
        "kernel.max_cpu", share(0.01), 0.7, "The greatest share of one CPU that ksmd takes (advisor_max_cpu)."
    )
    kernel_min_pages_to_scan: int = _setting(
        "kernel.min_pages_to_scan",
        count(1, 1 << 32, "pages"),
        500,
        "The first value of pages_to_scan (advisor_min_pages_to_scan).",
    )
    kernel_max_pages_to_scan: int = _setting(
        "kernel.max_pages_to_scan",
        count(1, 1 << 32, "pages"),
        30000,
        "The greatest value of pages_to_scan (advisor_max_pages_to_scan).",
    )
    ksmtuned_interval: float = _setting(
        "ksmtuned.interval", seconds(1, 86400), 60.0, "How often it decides (KSM_MONITOR_INTERVAL)."
    )
    ksmtuned_npages_boost: int = _setting(
        "ksmtuned.npages_boost",
        count(0, 1 << 30, "pages"),
        300,
        "pages_to_scan increases by this while memory is short (KSM_NPAGES_BOOST).",
    )
    ksmtuned_npages_decay: int = _setting(
        "ksmtuned.npages_decay",
        count(0, 1 << 30, "pages"),
        50,
        "pages_to_scan decreases by this while memory is not short (KSM_NPAGES_DECAY, without its minus sign).",
    )
    ksmtuned_npages_min: int = _setting(
        "ksmtuned.npages_min", count(1, 1 << 30, "pages"), 64, "The least value of pages_to_scan (KSM_NPAGES_MIN)."
    )
    ksmtuned_npages_max: int = _setting(
        "ksmtuned.npages_max", count(1, 1 << 30, "pages"), 1250, "The greatest value of pages_to_scan (KSM_NPAGES_MAX)."
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
    kubevirt_interval: float = _setting("kubevirt.interval", seconds(1, 86400), 180.0, "How often it decides.")
    kubevirt_pages_boost: int = _setting(
        "kubevirt.pages_boost",
        count(0, 1 << 30, "pages"),
        300,
        "pages_to_scan increases by this while memory is short (kubevirt.io/ksm-pages-boost-override).",
    )
    kubevirt_pages_decay: int = _setting(
        "kubevirt.pages_decay",
        count(-(1 << 30), 0, "pages"),
        -50,
        "pages_to_scan changes by this while memory is not short (kubevirt.io/ksm-pages-decay-override).",
    )
    kubevirt_pages_min: int = _setting(
        "kubevirt.pages_min",
        count(0, 1 << 30, "pages"),
        64,
        "If pages_to_scan would become less than this, ksmd is stopped (kubevirt.io/ksm-pages-min-override).",
    )
    kubevirt_pages_max: int = _setting(
        "kubevirt.pages_max",
        count(1, 1 << 30, "pages"),
        1250,
        "The greatest value of pages_to_scan (kubevirt.io/ksm-pages-max-override).",
    )
    kubevirt_pages_init: int = _setting(
        "kubevirt.pages_init",
        count(0, 1 << 30, "pages"),
        100,
        "pages_to_scan when ksmd is started (kubevirt.io/ksm-pages-init-override).",
    )
    kubevirt_sleep_ms_baseline: int = _setting(
        "kubevirt.sleep_ms_baseline",
        count(1, 1 << 20, "milliseconds"),
        100,
        "How long ksmd sleeps between batches while 16 GiB are in use; less with more, but not less than a tenth of it "
        "(kubevirt.io/ksm-sleep-ms-baseline-override).",
    )
    kubevirt_free_percent: float = _setting(
        "kubevirt.free_percent",
        share(0),
        0.2,
        "Memory is short when no more than this share of it is available (kubevirt.io/ksm-free-percent-override, "
        "which is a share, too).",
    )
    heal_smart_scan: Heal = _setting(
        "healing.smart_scan",
        _HEALING,
        Heal.ADAPTIVE,
        "Switch smart_scan off for a few full scans if it may have kept pages unmerged. With smart_scan on, equal "
        "pages that are never scanned in the same full scan are never merged: up to a fifth of what pairs of "
        "processes could share.",
    )
    heal_swapin: Heal = _setting(
        "healing.swapin",
        _HEALING,
        Heal.ADAPTIVE,
        "Scan faster for two full scans when merged pages come back from swap: swapping in makes a copy for each "
        "mapping.",
    )
    heal_zero_pages: Heal = _setting(
        "healing.zero_pages",
        _HEALING,
        Heal.ADAPTIVE,
        "Hold use_zero_pages at 1, unless [knobs] names it or [domains] holds it at 0. With 0, a kernel since 6.12 may "
        "split only one huge page with pages of zeroes in each full scan, and frees these so slowly.",
    )
    heal_advisor: bool = _setting(
        "healing.advisor",
        FLAG,
        True,
        'With policy = "kernel": switch the kernel\'s advisor off if it makes ksmd very slow, and do its work here.',
    )
    heal_twins: bool = _setting(
        "healing.twins",
        FLAG,
        False,
        "If two KSM pages on one node have the same content, un-merge one of them, so that ksmd merges it with "
        "the other.",
    )
    floor_bytes: int = _setting(
        "limits.floor_bytes",
        count(LEAST_FLOOR_BYTES, 1 << 50, "bytes"),
        128 << 20,
        "Memory that has to stay free on the host and on each node. A change that would leave less is refused.",
    )
    headroom_share: float = _setting(
        "limits.headroom_share",
        share(0.01),
        0.25,
        "The share of the free memory above the floor that may be used before free memory is read again.",
    )
    batch_latency: float = _setting(
        "limits.batch_latency",
        seconds(0.0005, 1),
        0.01,
        "The longest time that one call may stop a process while its pages are un-merged or moved.",
    )
    max_pressure: float = _setting(
        "limits.max_pressure",
        share(0.001),
        0.2,
        "Un-merging pauses while some task waits for memory for a greater share of the time than this "
        "(/proc/pressure/memory), and is abandoned if the pressure stays.",
    )
    census_interval: float = _setting(
        "census.interval",
        seconds(5, 86400),
        300.0,
        "How often nodes and processes are surveyed. Nothing is counted again while nothing is merged.",
    )
    census_cpu_share: float = _setting(
        "census.cpu_share",
        share(0, 0.5),
        0.001,
        "The greatest share of one CPU that surveys take. On a large host KSM pages are counted in a sample, so "
        "that the share holds; if a survey still costs more, surveys are less frequent. A count takes at most 60 "
        "s of CPU time, whatever share and interval allow. 0: only on request.",
    )
    domains_mode: DomainMode = _setting(
        "domains.mode",
        choice(
            {
                DomainMode.REPORT: "look for memory that is shared across domains, and say so; change nothing",
                DomainMode.NODES: "separate domains by their nodes: hold merge_across_nodes = 0 and use_zero_pages = "
                "0, and check that members can only allocate on their domain's nodes",
            }
        ),
        DomainMode.REPORT,
        "What is done about domains.",
    )
    domains_unmatched: str = _setting(
        "domains.unmatched",
        TEXT,
        EACH_ITS_OWN,
        'The domain of processes that belong to none. "each its own": each virtual machine and each unit is a domain '
        'of its own; "each namespace": so are namespaces of pods, with all of theirs.',
    )
    domains_on_violation: OnViolation = _setting(
        "domains.on_violation",
        choice(
            {
                OnViolation.REPORT: "say so",
                OnViolation.UNMERGE: "bring pages home of processes that are not confined, too, after each audit",
                OnViolation.STOP: "that, and hold run at 0 until all are isolated",
            }
        ),
        OnViolation.REPORT,
        'What is done with mode = "nodes" while a domain is not isolated.',
    )
    history_days: int = _setting(
        "history.days",
        count(0, 366, "days"),
        31,
        "How long events and samples are kept. 0: there is no history.",
    )
    history_max_bytes: int = _setting(
        "history.max_bytes",
        count(1 << 20, 1 << 30, "bytes"),
        16 << 20,
        "How large the history may become; what is oldest goes then, decisions of the policy first.",
        reloadable=False,
    )
    switch_allow: bool = _setting(
        "switch.allow",
        FLAG,
        False,
        "Members of socket_write_group may have the service switch merging on or off for processes and virtual "
        "machines (`ksmd-ctl merge`). Otherwise only root may, and does it without the service.",
    )
    switch_keep: bool = _setting(
        "switch.keep",
        FLAG,
        False,
        "Switch off again what `ksmd-ctl merge off` has switched off, when it has started again and is mergeable. "
        "Otherwise that is reported. It needs allow.",
    )
    sample_interval: float = _setting(
        "service.sample_interval",
        seconds(0.1, 3600),
        1.0,
        "How often the host is sampled. Drift is corrected within two samples.",
    )
    at_stop: AtStop = _setting(
        "service.at_stop",
        choice(
            {
                AtStop.RESTORE: "restore the knobs to their values from before the start of the service; if that needs "
                "un-merging (merge_across_nodes, max_page_sharing), report it instead",
                AtStop.LEAVE: "leave the knobs as they are",
                AtStop.STOP_SCANNING: "write run = 0 and leave the other knobs; merged pages stay merged",
            }
        ),
        AtStop.RESTORE,
        "What happens to the knobs when the service is stopped. A restart or an upgrade is not a stop. Knobs that "
        "a person has set with `ksmd-ctl set` stay, unless they are declared here.",
    )
    on_drift: OnDrift = _setting(
        "service.on_drift",
        choice(
            {
                OnDrift.ENFORCE: "set it again, at most 10 times in 10 minutes; then leave it and report it",
                OnDrift.OBSERVE: "leave it and report it",
            }
        ),
        OnDrift.ENFORCE,
        "What happens when somebody else changes a held knob.",
    )
    metrics_listen: str = _setting(
        "service.metrics_listen",
        ADDRESS,
        "127.0.0.1:19753",
        "The address of the metrics. The default can be reached by all users of this host, and from nowhere else. "
        "There is no authentication: use another address only on a network that you trust.",
        reloadable=False,
    )
    metrics_names: tuple[str, ...] = _setting(
        "service.metrics_names",
        HOST_NAMES,
        (),
        "Further host names in requests for the metrics, beside localhost. Requests for an address are always "
        "answered, and requests for other names never, so that a foreign web page can't read the metrics by DNS "
        "rebinding.",
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
        "Members of this group may connect to the control socket and read, besides root and the service itself. "
        "The service must be a member, too (SupplementaryGroups= in the unit). Default: the service's own group, "
        "ksmd-ctl.",
        reloadable=False,
    )
    socket_write_group: str = _setting(
        "service.socket_write_group",
        GROUP,
        "",
        "Members of this group may also change something, besides root and the service itself. This gives no "
        "right to connect: they must be in socket_group as well.",
        reloadable=False,
    )
    runtime_directory: str = _setting(
        "service.runtime_directory",
        PATH,
        "/run/ksmd-ctl",
        "The folder of the lock that prevents a second instance.",
        reloadable=False,
    )
    state_directory: str = _setting(
        "service.state_directory",
        PATH,
        "/var/lib/ksmd-ctl",
        "The folder where the first values of the knobs and those from before the start are stored, so that a "
        "crash does not lose them.",
        reloadable=False,
    )
    broker_socket: str = _setting(
        "service.broker_socket",
        SOCKET_PATH,
        "/run/ksmd-ctl-broker.socket",
        "The socket of the privileged part (ksmd-ctl-broker.socket). Not used if the service runs as root.",
        reloadable=False,
    )

    @property
    def holds_zero_pages(self) -> bool:
        """Whether use_zero_pages is held at 1, as the policy's recovery and not as ``[knobs]`` names it."""
        return self.heal_zero_pages.acts(self.policy) and Knob.USE_ZERO_PAGES not in self.knobs

    @property
    def chooses_scheduling(self) -> bool:
        """Whether the policy chooses ksmd's scheduling class, as ``[ksmd]`` does not name it."""
        return self.policy is PolicyName.ADAPTIVE and Knob.KSMD_SCHEDULING not in self.knobs

    def holds(self, knob: Knob) -> bool:
        """Whether the service holds or steers a knob."""
        steered = self.policy.steers and knob in STEERED
        chosen = {Knob.USE_ZERO_PAGES: self.holds_zero_pages, Knob.KSMD_SCHEDULING: self.chooses_scheduling}
        return self.policy.writes and (steered or knob in self.knobs or chosen.get(knob, False))


KNOB_SECTION = "knobs"
KSMD_SECTION = "ksmd"

#: The tables that name knobs, and the knob of each key.
KNOB_KEYS: Mapping[str, Mapping[str, Knob]] = {
    KNOB_SECTION: {knob.value: knob for knob in SYSFS_KNOBS},
    KSMD_SECTION: {knob.value.removeprefix("ksmd_"): knob for knob in KSMD_KNOBS},
}

#: As a value of ``[ksmd] cpus``: CPUs that are not isolated and to which no virtual CPU is pinned.
HOUSEKEEPING = "housekeeping"


def knob_path(knob: Knob) -> str:
    """A knob as messages name its key: ``TABLE.KEY``."""
    if knob in KSMD_KNOBS:
        return f"{KSMD_SECTION}.{knob.value.removeprefix('ksmd_')}"
    return f"{KNOB_SECTION}.{knob}"


#: The tables in the order of the sample; the empty name is for what stands before the first one.
SECTIONS = (
    "",
    KNOB_SECTION,
    KSMD_SECTION,
    "adaptive",
    "kernel",
    "ksmtuned",
    "kubevirt",
    "healing",
    "limits",
    "census",
    DOMAIN_SECTION,
    "history",
    "switch",
    "service",
)

#: Pairs of settings of which the first must not be greater than the second.
ORDERED = (
    ("adaptive_idle_cpu", "adaptive_max_cpu"),
    ("kernel_min_pages_to_scan", "kernel_max_pages_to_scan"),
    ("ksmtuned_npages_min", "ksmtuned_npages_max"),
    ("kubevirt_pages_min", "kubevirt_pages_init"),
    ("kubevirt_pages_init", "kubevirt_pages_max"),
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
