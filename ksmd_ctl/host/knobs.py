# SPDX-License-Identifier: GPL-2.0-or-later
"""The writable files of /sys/kernel/mm/ksm, and how the kernel schedules ksmd: what each takes, and how it reads.

Source: mm/ksm.c (6.12), one ``*_store`` function a knob, and Documentation/admin-guide/mm/ksm.rst; for ksmd, sched(7).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.errors import Absent, Denied, HostError, Rejected, errno_text
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.cpus import parse_cpus

KnobValue = int | str

#: OR-ed into what ``run`` reads while memory is going offline: KSM_RUN_OFFLINE.
RUN_OFFLINE = 4

_U32 = 2**32 - 1
_INT = 2**31 - 1
_ULONG = 2**64 - 1
# Python converts no number of more than 4,300 digits; no knob takes one of more than these.
_MOST_DIGITS = 40


class Knob(StrEnum):
    """What root may set: a file, under its sysfs name, or how ksmd is scheduled (`KSMD_KNOBS`)."""

    RUN = "run"
    PAGES_TO_SCAN = "pages_to_scan"
    SLEEP_MILLISECS = "sleep_millisecs"
    MERGE_ACROSS_NODES = "merge_across_nodes"
    USE_ZERO_PAGES = "use_zero_pages"
    MAX_PAGE_SHARING = "max_page_sharing"
    STABLE_NODE_CHAINS_PRUNE_MILLISECS = "stable_node_chains_prune_millisecs"
    SMART_SCAN = "smart_scan"
    ADVISOR_MODE = "advisor_mode"
    ADVISOR_MAX_CPU = "advisor_max_cpu"
    ADVISOR_MIN_PAGES_TO_SCAN = "advisor_min_pages_to_scan"
    ADVISOR_MAX_PAGES_TO_SCAN = "advisor_max_pages_to_scan"
    ADVISOR_TARGET_SCAN_TIME = "advisor_target_scan_time"
    KSMD_CPUS = "ksmd_cpus"
    KSMD_SCHEDULING = "ksmd_scheduling"
    KSMD_NICE = "ksmd_nice"


#: The scheduling of the kernel thread ksmd: sched_setaffinity(2), sched_setscheduler(2), setpriority(2).
KSMD_KNOBS = (Knob.KSMD_CPUS, Knob.KSMD_SCHEDULING, Knob.KSMD_NICE)

#: The files of /sys/kernel/mm/ksm.
SYSFS_KNOBS = tuple(knob for knob in Knob if knob not in KSMD_KNOBS)


@dataclass(frozen=True, slots=True)
class KnobSpec:
    """What a knob takes.

    :ivar minimum: the least number that the kernel takes
    :ivar maximum: the greatest one
    :ivar default: the kernel's value at boot
    :ivar unit: of the number, empty for switches and counts of nothing
    :ivar choices: for a knob of words, the words; then minimum and maximum say nothing
    :ivar cpus: it is a list of CPUs; the default is empty, because it depends on the host
    :ivar blocks: the write takes ksm_thread_mutex, so it waits for a batch that runs and for offlining
    :ivar needs_unmerge: changing it is EBUSY as long as a page is merged
    :ivar since: the kernel release that brought it
    """

    minimum: int
    maximum: int
    default: KnobValue
    unit: str
    since: str
    choices: tuple[str, ...] = ()
    cpus: bool = False
    blocks: bool = False
    needs_unmerge: bool = False

    @property
    def words(self) -> bool:
        """Whether its values are texts."""
        return self.cpus or bool(self.choices)


KNOBS: dict[Knob, KnobSpec] = {
    Knob.RUN: KnobSpec(0, 2, 0, "", "2.6.32", blocks=True),
    Knob.PAGES_TO_SCAN: KnobSpec(0, _U32, 100, "pages", "2.6.32"),
    Knob.SLEEP_MILLISECS: KnobSpec(0, _U32, 20, "milliseconds", "2.6.32"),
    Knob.MERGE_ACROSS_NODES: KnobSpec(0, 1, 1, "", "3.9", blocks=True, needs_unmerge=True),
    Knob.USE_ZERO_PAGES: KnobSpec(0, 1, 0, "", "4.11"),
    Knob.MAX_PAGE_SHARING: KnobSpec(2, _INT, 256, "mappings", "4.13", blocks=True, needs_unmerge=True),
    Knob.STABLE_NODE_CHAINS_PRUNE_MILLISECS: KnobSpec(0, _U32, 2000, "milliseconds", "4.13"),
    Knob.SMART_SCAN: KnobSpec(0, 1, 1, "", "6.7"),
    Knob.ADVISOR_MODE: KnobSpec(0, 0, "none", "", "6.8", choices=("none", "scan-time")),
    Knob.ADVISOR_MAX_CPU: KnobSpec(0, _U32, 70, "percent", "6.8"),
    Knob.ADVISOR_MIN_PAGES_TO_SCAN: KnobSpec(0, _ULONG, 500, "pages", "6.8"),
    Knob.ADVISOR_MAX_PAGES_TO_SCAN: KnobSpec(0, _ULONG, 30000, "pages", "6.8"),
    Knob.ADVISOR_TARGET_SCAN_TIME: KnobSpec(1, _ULONG, 200, "seconds", "6.8"),
    # A kernel thread may use all CPUs that are not isolated; nice: mm/ksm.c:ksm_scan_thread.
    Knob.KSMD_CPUS: KnobSpec(0, 0, "", "", "2.6.32", cpus=True),
    Knob.KSMD_SCHEDULING: KnobSpec(0, 0, "other", "", "2.6.32", choices=("other", "batch", "idle")),
    Knob.KSMD_NICE: KnobSpec(-20, 19, 5, "", "2.6.32"),
}


def parse_value(knob: Knob, text: str) -> KnobValue:
    """The value in the text that the kernel shows for a knob.

    A knob of words shows all of them with the active one in brackets: ``none [scan-time]``.

    :raises ValueError: the text is not of the knob's form
    """
    text = text.strip()
    if not KNOBS[knob].choices:
        # Not int(): it takes "1_0", "+1" and other scripts' digits, which no kernel prints.
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"{text[:40]!r} is not a number")
        return int(text)
    active = [word[1:-1] for word in text.split() if word[0] == "[" and word[-1] == "]"]
    if len(active) != 1 or not active[0]:
        raise ValueError(f"{text[:40]!r} does not have exactly one word in brackets")
    return active[0]


def format_value(value: KnobValue) -> str:
    """The text to write for a value."""
    return str(value)


def takes_text(knob: Knob) -> str:
    """What a knob takes, as a phrase."""
    spec = KNOBS[knob]
    if spec.cpus:
        return "a list of CPUs, as in 0,2-3"
    if spec.choices:
        return f"one of {', '.join(spec.choices)}"
    if (spec.minimum, spec.maximum) == (0, 1):
        return "0 or 1"
    return f"a whole number from {spec.minimum} to {spec.maximum}"


def parse_wanted(knob: Knob, value: object) -> KnobValue:
    """A value that a person wants a knob to have, from a configuration or a command line.

    Numbers may come as text; switches also as true and false.

    :raises ValueError: the knob does not take it; the text says what it takes
    """
    spec = KNOBS[knob]
    if spec.cpus:
        # On a command line a single CPU comes as a number.
        return ranges_text(parse_cpus(str(value) if isinstance(value, int) and not isinstance(value, bool) else value))
    if spec.choices:
        if value in spec.choices:
            return str(value)
        raise ValueError(f"{value!r} is not one of {', '.join(spec.choices)}")
    if isinstance(value, bool):
        if spec.maximum != 1:
            raise ValueError(f"{value} is not a number")
        return int(value)
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) <= _MOST_DIGITS:
        # A number with a sign is never taken, and -0 is not below 0.
        if value[0] == "-" and not int(value):
            raise ValueError(f"{value!r} is not a whole number without a sign")
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"{str(value)[:40]!r} is not a whole number")
    if not spec.minimum <= value <= spec.maximum:
        raise ValueError(f"{value} is not between {spec.minimum} and {spec.maximum}")
    return value


def same_value(knob: Knob, found: KnobValue, wanted: KnobValue) -> bool:
    """Whether a knob that reads `found` has the value `wanted`: ``run`` shows KSM_RUN_OFFLINE on top of it."""
    if knob is Knob.RUN and isinstance(found, int):
        found &= ~RUN_OFFLINE
    return found == wanted


def write_error(knob: Knob, value: KnobValue, error: OSError, path: str = "") -> HostError:
    """What a failed write means: `Absent`, `Denied` or `Rejected`, with what can be done about it."""
    number = error.errno or 0
    what = f"writing {format_value(value)} to {knob}"
    why, hint = errno_text(number), ""
    kind: type[HostError] = Rejected
    if number in (errno.ENOENT, errno.ENOTDIR):
        kind, why = Absent, f"this kernel does not have it (it came with {KNOBS[knob].since})"
    elif number in (errno.EACCES, errno.EPERM):
        kind, hint = Denied, "only root writes the knobs: run as root, or through the service"
    elif number == errno.EROFS:
        kind = Denied
        hint = (
            "the unit needs BindPaths=/sys/kernel/mm/ksm; a container needs the host's /sys/kernel/mm/ksm mounted "
            "writable at the same path, also a privileged one (docs/container.md)"
        )
    elif number == errno.EBUSY and KNOBS[knob].needs_unmerge:
        why = f"pages are merged, {errno_text(number)}"
        hint = "it needs a transaction that un-merges all pages first: ksmd-ctl set"
    elif number == errno.EINTR:
        hint = "a signal stopped it half way: ksmd is stopped now, and some pages are still merged"
    elif number == errno.ENOMEM:
        hint = "un-merging needs memory for each merged page; what was not reached is still merged"
    return kind(what, why, hint=hint, path=path, value=value, errno=number)
