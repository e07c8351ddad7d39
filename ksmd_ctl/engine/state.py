# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of KSM: what mm/ksm.c has as static variables, and small functions on it."""

from __future__ import annotations

from enum import Enum
from typing import Final

from ksmd_ctl.engine.memory import PAGE_SIZE, PFN_NID_SHIFT, ZERO_CONTENT, Memory, Page
from ksmd_ctl.engine.profile import Profile
from ksmd_ctl.engine.rbtree import RbRoot
from ksmd_ctl.engine.structs import (
    NULL_STABLE_NODE,
    DupList,
    KsmScan,
    MmSlot,
    RmapItem,
    StableNode,
)

__all__ = [
    "KSM_RUN_MERGE",
    "KSM_RUN_OFFLINE",
    "KSM_RUN_STOP",
    "KSM_RUN_UNMERGE",
    "RMAP_ITEM_SIZE",
    "AdvisorCtx",
    "AdvisorMode",
    "Ksm",
    "calc_checksum",
    "get_kpfn_nid",
    "page_ksm",
    "page_stable_node",
    "page_to_nid",
]

KSM_RUN_STOP: Final = 0
KSM_RUN_MERGE: Final = 1
KSM_RUN_UNMERGE: Final = 2
KSM_RUN_OFFLINE: Final = 4

#: Bytes that a kernel spends on an rmap_item, for the profit formulas (engine.md 1.5).
RMAP_ITEM_SIZE: Final = 64


class AdvisorMode(Enum):
    """The words of ``advisor_mode``."""

    NONE = "none"
    SCAN_TIME = "scan-time"


class AdvisorCtx:
    """``struct advisor_ctx``: what the scan-time advisor remembers of the scan before."""

    __slots__ = ("change", "cpu_time_ns", "scan_time", "start_scan_ns")

    def __init__(self) -> None:
        self.start_scan_ns = 0
        self.scan_time = 0
        self.change = 0
        self.cpu_time_ns = 0


class Ksm:
    """mm/ksm.c's variables, without their ``ksm_`` and ``ksm_thread_``.

    Time is the owner's: ``now_ns`` and ``cpu_ns`` are set from outside.

    :ivar now_ns: the time since boot
    :ivar cpu_ns: the CPU time that ksmd used since boot
    :ivar ksmd_nid: the node whose memory ksmd gets where no VMA policy says another
    :ivar root_stable_tree: a tree a node once merge_across_nodes was 0, until then one (11.5)
    :ivar nr_trees: how many of the trees are in use: ``ksm_nr_node_ids``
    """

    def __init__(self, memory: Memory, profile: Profile) -> None:
        self.memory = memory
        self.profile = profile
        self.now_ns = 0
        self.cpu_ns = 0
        self.ksmd_nid = 0

        self.root_stable_tree: list[RbRoot[StableNode]] = [RbRoot()]
        self.root_unstable_tree: list[RbRoot[RmapItem]] = [RbRoot()]
        self.nr_trees = 1
        self.migrate_nodes = DupList()
        self.mm_head = MmSlot(None)
        self.scan = KsmScan(self.mm_head)
        self.zero_checksum = calc_checksum(ZERO_CONTENT)
        self.serial = 0

        self.run = KSM_RUN_STOP
        self.pages_to_scan = 100
        self.sleep_millisecs = 20
        self.merge_across_nodes = 1
        self.use_zero_pages = False
        self.max_page_sharing = 256
        self.stable_node_chains_prune_millisecs = 2000
        self.smart_scan = profile.smart_scan
        self.advisor = AdvisorMode.NONE
        self.advisor_ctx = AdvisorCtx()
        self.advisor_max_cpu = 70
        self.advisor_min_pages_to_scan = 500
        self.advisor_max_pages_to_scan = 30000
        self.advisor_target_scan_time = 200

        self.pages_shared = 0
        self.pages_sharing = 0
        self.pages_unshared = 0
        self.rmap_items = 0
        self.stable_node_chains = 0
        self.stable_node_dups = 0
        self.zero_pages = 0
        self.pages_skipped = 0
        self.pages_scanned = 0
        self.cow_ksm = 0
        self.swpin_copy = 0

    @property
    def pages_volatile(self) -> int:
        """Items that are neither merged nor in the unstable tree (engine.md 8.3)."""
        others = self.pages_shared + self.pages_sharing + self.pages_unshared
        return max(0, self.rmap_items - others)

    @property
    def general_profit(self) -> int:
        """Bytes saved less bytes of rmap_items (engine.md 8.4)."""
        saved = (self.pages_sharing + self.zero_pages) * PAGE_SIZE
        return saved - self.rmap_items * RMAP_ITEM_SIZE

    def alloc_stable_node(self, kpfn: int, nid: int) -> StableNode:
        """A new stable node, in no tree yet."""
        self.serial += 1
        return StableNode(kpfn, nid, self.serial)


def calc_checksum(content: bytes) -> int:
    """The checksum that tells whether a page changed since the last scan (engine.md 14.16).

    Only equality over time matters. The kernel computes 32 bits of jhash2 or xxhash each time; here
    it is 32 bits of the hash that Python keeps with the bytes.
    """
    return hash(content) & 0xFFFFFFFF


def get_kpfn_nid(ksm: Ksm, kpfn: int) -> int:
    """The tree that a frame belongs to (engine.md 1.8)."""
    return 0 if ksm.merge_across_nodes else kpfn >> PFN_NID_SHIFT


def page_to_nid(page: Page) -> int:
    """The node that a page is on."""
    return page.pfn >> PFN_NID_SHIFT


def page_ksm(page: Page) -> bool:
    """``PageKsm``."""
    return page.stable_node is not None


def page_stable_node(page: Page) -> StableNode | None:
    """A KSM page's stable node, None of any other page and of a KSM page that has none."""
    stable_node = page.stable_node
    return None if stable_node is NULL_STABLE_NODE else stable_node
