# SPDX-License-Identifier: GPL-2.0-or-later
"""/sys/kernel/mm/ksm: what the files show, what they take, and how they refuse (engine.md 11).

Refusals are OSError with the errno that the kernel's write would return. A file that the profile lacks
is ENOENT, one that can only be read EACCES. While memory is going offline the kernel lets the writers
of run, merge_across_nodes and max_page_sharing wait; here nobody could end the wait: EAGAIN.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Final

from ksmd_ctl.engine.advisor import set_advisor_defaults
from ksmd_ctl.engine.control import remove_all_stable_nodes, unmerge_and_remove_all_rmap_items
from ksmd_ctl.engine.rbtree import RbRoot
from ksmd_ctl.engine.state import (
    KSM_RUN_OFFLINE,
    KSM_RUN_STOP,
    KSM_RUN_UNMERGE,
    AdvisorMode,
    Ksm,
)

__all__ = ["counters", "ksm_show", "ksm_store", "run_store_steps"]

_NUMBER: Final = re.compile(r"([+-]?)(\d+)\n?\Z", re.ASCII)
_BOOLS: Final = {"1": True, "y": True, "t": True, "0": False, "n": False, "f": False}
_U32: Final = 2**32 - 1
_INT: Final = 2**31 - 1
_ULONG: Final = 2**64 - 1


def _refuse(number: int, name: str, why: str) -> OSError:
    return OSError(number, f"{name}: {why} ({os.strerror(number)})")


# kstrtoul and its like: digits and at most one newline, a sign where the type has one.
def _parse(name: str, text: str, least: int, most: int) -> int:
    match = _NUMBER.match(text)
    if match is None or (match[1] == "-" and least == 0):
        raise _refuse(errno.EINVAL, name, f"{text!r} is not a number")
    value = int(match[2]) * (-1 if match[1] == "-" else 1)
    if not least <= value <= most:
        raise _refuse(errno.ERANGE, name, f"{value} does not fit")
    return value


# Where the kernel turns every failure to parse into EINVAL.
def _parse_einval(name: str, text: str, most: int) -> int:
    try:
        return _parse(name, text, 0, most)
    except OSError:
        raise _refuse(errno.EINVAL, name, f"{text!r} is not a number that it takes") from None


# kstrtobool: only the first characters count.
def _parse_bool(name: str, text: str) -> bool:
    word = text[:2].lower()
    if word[:1] == "o":
        if word in ("on", "of"):
            return word == "on"
    elif word[:1] in _BOOLS:
        return _BOOLS[word[:1]]
    raise _refuse(errno.EINVAL, name, f"{text!r} is neither yes nor no")


def _wait_while_offlining(ksm: Ksm, name: str) -> None:
    if ksm.run & KSM_RUN_OFFLINE:
        raise _refuse(errno.EAGAIN, name, "memory is going offline")


def run_store(ksm: Ksm, text: str, nid: int) -> None:
    """``run``: 0 stop, 1 merge, 2 un-merge all (engine.md 11.1, 11.2)."""
    for _pages in run_store_steps(ksm, text, nid):
        pass


def run_store_steps(ksm: Ksm, text: str, nid: int) -> Iterator[int]:
    """run_store, yielding the pages gone through; closed before its end, it leaves ``run`` at 0."""
    flags = _parse_einval("run", text, _U32)
    if flags > KSM_RUN_UNMERGE:
        raise _refuse(errno.EINVAL, "run", f"{flags} is not one of 0, 1, 2")
    _wait_while_offlining(ksm, "run")
    if ksm.run == flags:
        return
    ksm.run = flags
    if flags & KSM_RUN_UNMERGE:
        try:
            yield from unmerge_and_remove_all_rmap_items(ksm, nid)
        except (OSError, GeneratorExit):
            ksm.run = KSM_RUN_STOP
            raise


def merge_across_nodes_store(ksm: Ksm, text: str, nid: int) -> None:
    """``merge_across_nodes``: only while nothing is merged (engine.md 11.4 to 11.6)."""
    name = "merge_across_nodes"
    knob = _parse(name, text, 0, _ULONG)
    if knob > 1:
        raise _refuse(errno.EINVAL, name, f"{knob} is not 0 or 1")
    _wait_while_offlining(ksm, name)
    if ksm.merge_across_nodes == knob:
        return
    _refuse_while_merged(ksm, name)
    if len(ksm.root_stable_tree) == 1 and ksm.memory.nr_node_ids > 1:
        # The first change: a tree a node; the one unstable tree becomes node 0's.
        more = ksm.memory.nr_node_ids - 1
        ksm.root_stable_tree += [RbRoot() for _ in range(more)]
        ksm.root_unstable_tree += [RbRoot() for _ in range(more)]
    ksm.merge_across_nodes = knob
    ksm.nr_trees = 1 if knob else ksm.memory.nr_node_ids


def max_page_sharing_store(ksm: Ksm, text: str, nid: int) -> None:
    """``max_page_sharing``: at least 2, and only while nothing is merged (engine.md 11.7)."""
    name = "max_page_sharing"
    knob = _parse(name, text, -_INT - 1, _INT)
    if knob < 2:
        raise _refuse(errno.EINVAL, name, f"{knob} is less than 2")
    if ksm.max_page_sharing == knob:
        return
    _wait_while_offlining(ksm, name)
    _refuse_while_merged(ksm, name)
    ksm.max_page_sharing = knob


def _refuse_while_merged(ksm: Ksm, name: str) -> None:
    if ksm.pages_shared or not remove_all_stable_nodes(ksm):
        raise _refuse(errno.EBUSY, name, "pages are merged")


def pages_to_scan_store(ksm: Ksm, text: str, nid: int) -> None:
    """``pages_to_scan``: the advisor's while it is on (engine.md 11.8)."""
    if ksm.advisor is not AdvisorMode.NONE:
        raise _refuse(errno.EINVAL, "pages_to_scan", "the advisor sets it")
    ksm.pages_to_scan = _parse_einval("pages_to_scan", text, _U32)


def advisor_mode_store(ksm: Ksm, text: str, nid: int) -> None:
    """``advisor_mode``: switching it sets pages_to_scan (engine.md 13.6, 13.7)."""
    try:
        mode = AdvisorMode(text.removesuffix("\n"))
    except ValueError:
        raise _refuse(errno.EINVAL, "advisor_mode", f"{text!r} is no mode") from None
    if ksm.advisor is not mode:
        ksm.advisor = mode
        set_advisor_defaults(ksm)


def advisor_target_scan_time_store(ksm: Ksm, text: str, nid: int) -> None:
    """``advisor_target_scan_time``: seconds, not 0."""
    value = _parse_einval("advisor_target_scan_time", text, _ULONG)
    if value == 0:
        raise _refuse(errno.EINVAL, "advisor_target_scan_time", "0 is no time")
    ksm.advisor_target_scan_time = value


# A knob that is one number without more to it.
def _number(name: str, most: int, mask: int = _ULONG) -> Callable[[Ksm, str, int], None]:
    def store(ksm: Ksm, text: str, nid: int) -> None:
        setattr(ksm, name, _parse_einval(name, text, most) & mask)

    return store


def _switch(name: str) -> Callable[[Ksm, str, int], None]:
    def store(ksm: Ksm, text: str, nid: int) -> None:
        setattr(ksm, name, _parse_bool(name, text))

    return store


_STORES: Final[dict[str, Callable[[Ksm, str, int], None]]] = {
    "run": run_store,
    "pages_to_scan": pages_to_scan_store,
    "sleep_millisecs": _number("sleep_millisecs", _U32),
    "merge_across_nodes": merge_across_nodes_store,
    "use_zero_pages": _switch("use_zero_pages"),
    "max_page_sharing": max_page_sharing_store,
    "stable_node_chains_prune_millisecs": _number("stable_node_chains_prune_millisecs", _U32),
    "smart_scan": _switch("smart_scan"),
    "advisor_mode": advisor_mode_store,
    "advisor_max_cpu": _number("advisor_max_cpu", _ULONG, _U32),
    "advisor_min_pages_to_scan": _number("advisor_min_pages_to_scan", _ULONG),
    "advisor_max_pages_to_scan": _number("advisor_max_pages_to_scan", _ULONG),
    "advisor_target_scan_time": advisor_target_scan_time_store,
}


def counters(ksm: Ksm) -> dict[str, int]:
    """The files that can only be read, and KSM's lines of /proc/vmstat, as far as the profile has them."""
    values = {
        "full_scans": ksm.scan.seqnr,
        "pages_shared": ksm.pages_shared,
        "pages_sharing": ksm.pages_sharing,
        "pages_unshared": ksm.pages_unshared,
        "pages_volatile": ksm.pages_volatile,
        "stable_node_chains": ksm.stable_node_chains,
        "stable_node_dups": ksm.stable_node_dups,
        "ksm_zero_pages": ksm.zero_pages,
        "pages_skipped": ksm.pages_skipped,
        "pages_scanned": ksm.pages_scanned,
        "general_profit": ksm.general_profit,
        "cow_ksm": ksm.cow_ksm,
        "ksm_swpin_copy": ksm.swpin_copy,
    }
    return {name: values[name] for name in (*ksm.profile.counters, *ksm.profile.vmstat)}


def ksm_show(ksm: Ksm, name: str) -> str:
    """What a file shows.

    :raises OSError: ENOENT, the profile has no such file
    """
    if name in ksm.profile.counters:
        return f"{counters(ksm)[name]}\n"
    if name not in ksm.profile.knobs:
        raise _refuse(errno.ENOENT, name, f"profile {ksm.profile.name} has no such file")
    if name == "advisor_mode":
        words = (f"[{mode.value}]" if mode is ksm.advisor else mode.value for mode in AdvisorMode)
        return " ".join(words) + "\n"
    return f"{int(getattr(ksm, name))}\n"


def ksm_store(ksm: Ksm, name: str, text: str, nid: int) -> None:
    """Write a file.

    :param nid: the node that the writer prefers, for what ``run`` = 2 has to allocate
    :raises OSError: as the kernel's write does
    """
    if name in ksm.profile.counters:
        raise _refuse(errno.EACCES, name, "can only be read")
    if name not in ksm.profile.knobs:
        raise _refuse(errno.ENOENT, name, f"profile {ksm.profile.name} has no such file")
    _STORES[name](ksm, text, nid)
