# SPDX-License-Identifier: GPL-2.0-or-later
"""/sys/kernel/mm/ksm: what the files show, what they take, how they refuse (engine.md 11), and un-merging all.

Refusals are OSError with the errno that the kernel's write would return. A file that the profile lacks is ENOENT, one
that can only be read EACCES. While memory is going offline, writers of run, merge_across_nodes and max_page_sharing
wait in the kernel; here nobody could end the wait, so they get EAGAIN.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Final

from ksmd_ctl.engine.mm import break_ksm
from ksmd_ctl.engine.rbtree import RbRoot
from ksmd_ctl.engine.registry import mm_slot_free
from ksmd_ctl.engine.scan import remove_trailing_rmap_items, set_advisor_defaults
from ksmd_ctl.engine.state import (
    KSM_RUN_OFFLINE,
    KSM_RUN_STOP,
    KSM_RUN_UNMERGE,
    NULL_STABLE_NODE,
    AdvisorMode,
    Ksm,
    StableNode,
)
from ksmd_ctl.engine.trees import free_stable_node_chain, ksm_get_folio, remove_node_from_stable_tree

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


def wait_while_offlining(ksm: Ksm, name: str) -> None:
    """Refuse, where a kernel waits (engine.md 14.14)."""
    if ksm.run & KSM_RUN_OFFLINE:
        raise _refuse(errno.EAGAIN, name, "memory is going offline")


# -- un-merging all ----------------------------------------------------------------------------------------------


def remove_stable_node(ksm: Ksm, stable_node: StableNode) -> int:
    """Delete a node whose page nobody maps; -EBUSY where somebody does (engine.md 11.4)."""
    page = ksm_get_folio(ksm, stable_node)
    if page is None:
        return 0  # ksm_get_folio removed it
    if page.mapcount:
        return -errno.EBUSY
    page.stable_node = NULL_STABLE_NODE
    remove_node_from_stable_tree(ksm, stable_node)
    return 0


def remove_stable_node_chain(ksm: Ksm, stable_node: StableNode, root: RbRoot[StableNode]) -> bool:
    """remove_stable_node for a node, or for all dups of a chain; True where one is mapped, which ends it."""
    if stable_node.dups is None:
        return bool(remove_stable_node(ksm, stable_node))
    if any(remove_stable_node(ksm, dup) for dup in stable_node.dups):
        return True
    free_stable_node_chain(ksm, stable_node, root)
    return False


def remove_all_stable_nodes(ksm: Ksm) -> int:
    """Delete all nodes; -EBUSY where some are still mapped. The rest goes in any case (engine.md 11.4)."""
    err = 0
    for root in ksm.root_stable_tree[: ksm.nr_node_ids]:
        while root.rb_node is not None:
            if remove_stable_node_chain(ksm, root.rb_node, root):
                err = -errno.EBUSY
                break  # on to the next tree
    for stable_node in ksm.migrate_nodes:
        err = remove_stable_node(ksm, stable_node) or err
    return err


def unmerge_and_remove_all_rmap_items(ksm: Ksm, nid: int) -> Iterator[int]:
    """``run`` = 2: break every KSM page, free every rmap_item, restart full_scans at 0 (engine.md 11.2).

    Yields the number of pages gone through where it may be interrupted, as a signal interrupts the kernel: closed
    there, or out of memory, it leaves un-merged what it reached.

    :param nid: the node that the writer of ``run`` prefers: copies come from there (14.2)
    :raises OSError: ENOMEM, no node has room for the copies
    """
    try:
        slot = ksm.mm_head.next
        while slot is not ksm.mm_head:
            ksm.scan.mm_slot = slot
            mm = slot.mm
            assert mm is not None
            for vma in [] if mm.exited else mm.vmas:
                if vma.mergeable and vma.anon_vma is not None:
                    break_ksm(ksm, vma, vma.start, vma.end, nid)
                    yield len(vma.ptes)
            remove_trailing_rmap_items(ksm, slot)
            after = slot.next
            ksm.scan.mm_slot = after
            if mm.exited:
                mm_slot_free(slot)
            slot = after
        remove_all_stable_nodes(ksm)
        ksm.scan.seqnr = 0
    finally:
        ksm.scan.mm_slot = ksm.mm_head


# -- the files ---------------------------------------------------------------------------------------------------


def run_store(ksm: Ksm, text: str, nid: int) -> Iterator[int]:
    """``run``: 0 stop, 1 merge, 2 un-merge all (engine.md 11.1, 11.2).

    Yields as unmerge_and_remove_all_rmap_items does; closed before its end, it leaves ``run`` at 0.
    """
    flags = _parse_einval("run", text, _U32)
    if flags > KSM_RUN_UNMERGE:
        raise _refuse(errno.EINVAL, "run", f"{flags} is not one of 0, 1, 2")
    wait_while_offlining(ksm, "run")
    if ksm.run == flags:
        return
    ksm.run = flags
    if flags & KSM_RUN_UNMERGE:
        try:
            yield from unmerge_and_remove_all_rmap_items(ksm, nid)
        except (OSError, GeneratorExit):
            ksm.run = KSM_RUN_STOP
            raise


def merge_across_nodes_store(ksm: Ksm, text: str) -> None:
    """``merge_across_nodes``: only while nothing is merged (engine.md 11.4 to 11.6)."""
    name = "merge_across_nodes"
    knob = _parse(name, text, 0, _ULONG)
    if knob > 1:
        raise _refuse(errno.EINVAL, name, f"{knob} is not 0 or 1")
    wait_while_offlining(ksm, name)
    if ksm.merge_across_nodes == knob:
        return
    _refuse_while_merged(ksm, name)
    if len(ksm.root_stable_tree) == 1 and ksm.memory.nr_node_ids > 1:
        # The first change: a tree a node; the one unstable tree becomes node 0's.
        more = ksm.memory.nr_node_ids - 1
        ksm.root_stable_tree += [RbRoot() for _ in range(more)]
        ksm.root_unstable_tree += [RbRoot() for _ in range(more)]
    ksm.merge_across_nodes = knob
    ksm.nr_node_ids = 1 if knob else ksm.memory.nr_node_ids


def max_page_sharing_store(ksm: Ksm, text: str) -> None:
    """``max_page_sharing``: at least 2, and only while nothing is merged (engine.md 11.7)."""
    name = "max_page_sharing"
    knob = _parse(name, text, -_INT - 1, _INT)
    if knob < 2:
        raise _refuse(errno.EINVAL, name, f"{knob} is less than 2")
    if ksm.max_page_sharing == knob:
        return
    wait_while_offlining(ksm, name)
    _refuse_while_merged(ksm, name)
    ksm.max_page_sharing = knob


def _refuse_while_merged(ksm: Ksm, name: str) -> None:
    if ksm.pages_shared or remove_all_stable_nodes(ksm):
        raise _refuse(errno.EBUSY, name, "pages are merged")


def sleep_millisecs_store(ksm: Ksm, text: str) -> None:
    """``sleep_millisecs``: a change wakes ksmd, since 4.20 (docs/findings.md: F9)."""
    msecs = _parse_einval("sleep_millisecs", text, _U32)
    if ksm.sleep_millisecs != msecs:
        ksm.wakes_ns = ksm.now_ns
    ksm.sleep_millisecs = msecs


def pages_to_scan_store(ksm: Ksm, text: str) -> None:
    """``pages_to_scan``: the advisor's while it is on (engine.md 11.8)."""
    if ksm.advisor is not AdvisorMode.NONE:
        raise _refuse(errno.EINVAL, "pages_to_scan", "the advisor sets it")
    ksm.pages_to_scan = _parse_einval("pages_to_scan", text, _U32)


def advisor_mode_store(ksm: Ksm, text: str) -> None:
    """``advisor_mode``: switching it sets pages_to_scan (engine.md 13.6, 13.7)."""
    try:
        mode = AdvisorMode(text.removesuffix("\n"))
    except ValueError:
        raise _refuse(errno.EINVAL, "advisor_mode", f"{text!r} is no mode") from None
    if ksm.advisor is not mode:
        ksm.advisor = mode
        set_advisor_defaults(ksm)


def advisor_target_scan_time_store(ksm: Ksm, text: str) -> None:
    """``advisor_target_scan_time``: seconds, not 0."""
    value = _parse_einval("advisor_target_scan_time", text, _ULONG)
    if value == 0:
        raise _refuse(errno.EINVAL, "advisor_target_scan_time", "0 is no time")
    ksm.advisor_target_scan_time = value


# A plain number: `most` is of the type that is parsed, `mask` of the type of the variable.
def _number_store(name: str, most: int, mask: int = _ULONG) -> Callable[[Ksm, str], None]:
    return lambda ksm, text: setattr(ksm, name, _parse_einval(name, text, most) & mask)


def _switch_store(name: str) -> Callable[[Ksm, str], None]:
    return lambda ksm, text: setattr(ksm, name, _parse_bool(name, text))


_STORES: Final[dict[str, Callable[[Ksm, str], None]]] = {
    "pages_to_scan": pages_to_scan_store,
    "sleep_millisecs": sleep_millisecs_store,
    "merge_across_nodes": merge_across_nodes_store,
    "max_page_sharing": max_page_sharing_store,
    "use_zero_pages": _switch_store("use_zero_pages"),
    "smart_scan": _switch_store("smart_scan"),
    "stable_node_chains_prune_millisecs": _number_store("stable_node_chains_prune_millisecs", _U32),
    "advisor_mode": advisor_mode_store,
    "advisor_max_cpu": _number_store("advisor_max_cpu", _ULONG, _U32),
    "advisor_min_pages_to_scan": _number_store("advisor_min_pages_to_scan", _ULONG),
    "advisor_max_pages_to_scan": _number_store("advisor_max_pages_to_scan", _ULONG),
    "advisor_target_scan_time": advisor_target_scan_time_store,
}


def counters(ksm: Ksm) -> dict[str, int]:
    """The files that can only be read, and KSM's lines of /proc/vmstat, as far as the profile has them."""
    renamed = {"full_scans": ksm.scan.seqnr, "ksm_zero_pages": ksm.zero_pages, "ksm_swpin_copy": ksm.swpin_copy}
    names = (*ksm.profile.counters, *ksm.profile.vmstat)
    return {name: renamed[name] if name in renamed else getattr(ksm, name) for name in names}


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
    if name == "run":
        for _pages in run_store(ksm, text, nid):
            pass
    else:
        _STORES[name](ksm, text)
