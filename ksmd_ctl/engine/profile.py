# SPDX-License-Identifier: GPL-2.0-or-later
"""What one kernel's KSM does differently from another's, as switches.

A profile is behaviour, not a release: a running kernel's is found by the files that it has (`profile_for`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Switches of mm/ksm.c's behaviour.

    :ivar name: the command line's word for it
    :ivar kernel: a release that behaves so
    """

    name: str
    kernel: str
    #: a KSM page can be replaced by another with its content, so the mappings of an exile go over to that. No kernel
    #: does it: a KSM page has no anon_vma to look an address up with
    remerge: bool = False
    #: a search restarts at a stale node, and does not give up (4.5)
    stale_restart: bool = False
    #: an rmap_item that leaves a stable node forgets it (5.13)
    head_cleared: bool = False
    #: max_page_sharing, chains and dups (4.13)
    chains: bool = False
    #: a locked match in the stable tree is "busy", not waited for (5.0)
    trylock_busy: bool = False
    #: use_zero_pages (4.11); pages placed by it are marked, counted and un-merged (6.6)
    zero_pages: bool = False
    zero_counted: bool = False
    #: checksum and zero page come before the stable tree (6.11)
    checksum_first: bool = False
    #: a chain with one dup collapses whenever it is walked (6.11)
    collapse_any_time: bool = False
    #: pages that stay alone are looked at less often (6.7)
    smart_scan: bool = False
    #: the scan-time advisor (6.8)
    advisor: bool = False
    #: that counter, and general_profit (6.6)
    pages_scanned: bool = False
    #: per-process counters, and vmstat's cow_ksm and ksm_swpin_copy (5.19)
    merging_pages: bool = False
    #: ksm_stat's profit, zero and merging lines, and prctl (6.4)
    process_profit: bool = False
    #: ksm_stat's ksm_merge_any and ksm_mergeable lines (6.14)
    process_flags: bool = False
    #: a child starts with a copy of its parent's counters (5.19 to 6.17)
    fork_counter_copy: bool = False
    #: unsharing a page from outside clears its first byte: the write that is begun for it and fails zeroes the byte
    #: that it could not fetch (before 4.12)
    unshare_clears: bool = False
    #: splitting a huge page maps the zero page where its pages hold only zeroes (6.12; seen on no older kernel)
    split_frees_zeroes: bool = False
    #: MADV_COLLAPSE (6.1) also takes what has no writable page (6.18)
    collapse: bool = False
    collapse_read_only: bool = False
    #: a page that move_pages can't move gets -EAGAIN and the call returns 0; else its status stays as it was and the
    #: call returns how many failed (4.17)
    move_again_status: bool = True

    @property
    def knobs(self) -> tuple[str, ...]:
        """The writable files of /sys/kernel/mm/ksm."""
        names = ["run", "pages_to_scan", "sleep_millisecs", "merge_across_nodes"]
        if self.zero_pages:
            names.append("use_zero_pages")
        if self.chains:
            names += ["max_page_sharing", "stable_node_chains_prune_millisecs"]
        if self.smart_scan:
            names.append("smart_scan")
        if self.advisor:
            names += ["advisor_mode", "advisor_max_cpu", "advisor_min_pages_to_scan", "advisor_max_pages_to_scan"]
            names.append("advisor_target_scan_time")
        return tuple(names)

    @property
    def counters(self) -> tuple[str, ...]:
        """The files of /sys/kernel/mm/ksm that can only be read."""
        names = ["full_scans", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"]
        if self.chains:
            names += ["stable_node_chains", "stable_node_dups"]
        if self.zero_counted:
            names.append("ksm_zero_pages")
        if self.smart_scan:
            names.append("pages_skipped")
        if self.pages_scanned:
            names += ["pages_scanned", "general_profit"]
        return tuple(names)

    @property
    def vmstat(self) -> tuple[str, ...]:
        """KSM's lines of /proc/vmstat."""
        return ("cow_ksm", "ksm_swpin_copy") if self.merging_pages else ()


_SEED: Final = Profile(name="seed", kernel="3.9", remerge=True)
_4_1: Final = replace(_SEED, name="4.1", kernel="4.1", remerge=False, unshare_clears=True)
_4_10: Final = replace(_4_1, name="4.10", kernel="4.10", stale_restart=True)
_5_10: Final = replace(
    _4_10,
    name="5.10",
    kernel="5.10",
    head_cleared=True,
    chains=True,
    trylock_busy=True,
    zero_pages=True,
    unshare_clears=False,
    move_again_status=False,
)
_6_1: Final = replace(_5_10, name="6.1", kernel="6.1", merging_pages=True, fork_counter_copy=True, collapse=True)
_6_12: Final = replace(
    _6_1,
    name="6.12",
    kernel="6.12",
    zero_counted=True,
    checksum_first=True,
    collapse_any_time=True,
    smart_scan=True,
    advisor=True,
    pages_scanned=True,
    process_profit=True,
    fork_counter_copy=False,
    split_frees_zeroes=True,
)
_7_2: Final = replace(_6_12, name="7.2", kernel="7.2", process_flags=True, collapse_read_only=True)

#: The profile of the newest kernel that is known.
CURRENT: Final = _7_2

PROFILES: Final = MappingProxyType({each.name: each for each in (_SEED, _4_1, _4_10, _5_10, _6_1, _6_12, _7_2)})


def profile(name: str) -> Profile:
    """The profile of a name.

    :raises ValueError: there is none of that name; the text lists those that there are
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise ValueError(f"{name!r} is not one of {', '.join(PROFILES)}") from None


def profile_for(files: Collection[str], *, ksm_stat: Collection[str] = ()) -> Profile:
    """The profile of a kernel, from its files and not from its release: distributions carry changes back.

    What these don't tell is taken to be as in the older of two profiles.

    :param files: names in /sys/kernel/mm/ksm
    :param ksm_stat: names of the lines in /proc/PID/ksm_stat, empty where there is no such file
    """
    if "advisor_mode" in files:
        return _7_2 if "ksm_merge_any" in ksm_stat else _6_12
    if "max_page_sharing" in files:
        return _6_1 if ksm_stat else _5_10
    return _4_10
