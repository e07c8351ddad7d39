# SPDX-License-Identifier: GPL-2.0-or-later
"""The structures and the static variables of mm/ksm.c."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from ksmd_ctl.engine.memory import PAGE_SIZE, PFN_NID_SHIFT, ZERO_CONTENT, Memory, Page
from ksmd_ctl.engine.profile import Profile
from ksmd_ctl.engine.rbtree import RbNode, RbRoot

if TYPE_CHECKING:
    from ksmd_ctl.engine.mm import AnonVma, Mm

KSM_RUN_STOP: Final = 0
KSM_RUN_MERGE: Final = 1
KSM_RUN_UNMERGE: Final = 2
KSM_RUN_OFFLINE: Final = 4

#: sizeof(struct ksm_rmap_item), for the profit formulas (engine.md 1.5).
RMAP_ITEM_SIZE: Final = 64

#: Where an rmap_item is: in no tree, in the unstable tree (UNSTABLE_FLAG), or on a stable node's list (STABLE_FLAG).
NONE: Final = 0
UNSTABLE: Final = 1
STABLE: Final = 2


class Head(Enum):
    """Where a stable node is: the ``head`` that the kernel lays over the parent link (engine.md 1.2)."""

    #: linked into the stable tree of its nid
    TREE = "tree"
    #: exiled: on migrate_nodes, until it is placed in the tree of its page's node
    MIGRATE_NODES = "migrate_nodes"
    #: one of the dups of a chain (STABLE_NODE_DUP_HEAD)
    DUP = "dup"
    #: freed
    FREED = "freed"


class StableNode(RbNode):
    """``struct ksm_stable_node``: a KSM page, or the chain of several with one content.

    :ivar kpfn: the frame of its page: a number, no reference is held (engine.md 1.2)
    :ivar nid: the tree that it is or was last linked in; not that of kpfn where it is misplaced
    :ivar hlist: its rmap_items, the newest first
    :ivar chain: of a dup, its chain
    :ivar dups: of a chain, its dups; None of any other node
    :ivar chain_prune_time: of a chain, when all its dups were last walked, in milliseconds
    :ivar serial: its number in the state document, never used again
    :ivar address: used again if `Ksm.reuse_addresses`
    :ivar freed_before: of a freed one, the serial of the last node that was there before
    """

    __slots__ = (
        "address",
        "chain",
        "chain_prune_time",
        "dups",
        "freed_before",
        "head",
        "hlist",
        "kpfn",
        "nid",
        "rmap_hlist_len",
        "serial",
    )

    if TYPE_CHECKING:
        rb_parent: StableNode | None
        rb_left: StableNode | None
        rb_right: StableNode | None

    def __init__(self, kpfn: int, nid: int, serial: int) -> None:
        super().__init__()
        self.head = Head.TREE
        self.kpfn = kpfn
        self.nid = nid
        self.hlist: RmapItem | None = None
        self.rmap_hlist_len = 0
        self.chain: StableNode | None = None
        self.dups: NodeList | None = None
        self.chain_prune_time = 0
        self.serial = serial
        self.address = serial
        self.freed_before = 0

    def __repr__(self) -> str:
        return f"<stable_node {self.serial} {self.head.value} nid {self.nid} kpfn {self.kpfn:#x}>"

    def items(self) -> Iterator[RmapItem]:
        """Its rmap_items, from the front of the list."""
        item = self.hlist
        while item is not None:
            yield item
            item = item.hlist_next


#: The back link of a KSM page that belongs to no stable node.
NULL_STABLE_NODE: Final = StableNode(-1, -1, -1)


# A class of its own, so that the slot exists when RmapItem lays anon_vma over it.
class _RmapItemNode(RbNode):
    __slots__ = ("nid",)


# By this name mypy does not hold it against the names that are laid over other slots.
_RMAP_ITEM_SLOTS = ("address", "age", "mm", "oldchecksum", "remaining_skips", "rmap_list", "seqnr", "state")


class RmapItem(_RmapItemNode):
    """``struct ksm_rmap_item``: one page address of one mm that ksmd has seen (engine.md 1.4).

    As in the kernel, the links into the unstable tree and those into a stable node's list are a union, and so are
    ``nid`` and ``anon_vma``. The union has effects: an item with a dangling ``head`` (C9) forgets it when it enters
    the unstable tree.

    :ivar oldchecksum: of the content when last looked at
    :ivar seqnr: the low 8 bits of the scan that put it in the unstable tree
    :ivar nid: the unstable tree that it is in
    :ivar anon_vma: the VMAs that may map its page, while it is on a stable node's list
    :ivar head: the stable node on whose list it is
    :ivar age: smart_scan: how often the page was met
    :ivar remaining_skips: smart_scan: how often it will still be skipped
    :ivar rmap_list: the next item of its mm, ascending by address
    """

    __slots__ = _RMAP_ITEM_SLOTS

    if TYPE_CHECKING:
        rb_parent: RmapItem | None
        rb_left: RmapItem | None
        rb_right: RmapItem | None
        head: StableNode | None
        hlist_next: RmapItem | None
        hlist_prev: RmapItem | None
        nid: int
        anon_vma: AnonVma | None
    else:
        head = RbNode.rb_parent
        hlist_next = RbNode.rb_left
        hlist_prev = RbNode.rb_right
        anon_vma = _RmapItemNode.nid

    def __init__(self, mm: Mm, address: int, rmap_list: RmapItem | None) -> None:
        self.rb_parent = self.rb_left = self.rb_right = None
        self.rb_color = 0
        self.mm = mm
        self.address = address
        self.oldchecksum = 0
        self.state = NONE
        self.seqnr = 0
        self.nid = 0
        self.age = 0
        self.remaining_skips = 0
        self.rmap_list = rmap_list

    def __repr__(self) -> str:
        return f"<rmap_item {self.mm.name}:{self.address:#x} {('none', 'unstable', 'stable')[self.state]}>"


def hlist_add_head(item: RmapItem, stable_node: StableNode) -> None:
    """Put an rmap_item at the front of a stable node's list (engine.md 1.9)."""
    first = stable_node.hlist
    item.hlist_next = first
    item.hlist_prev = None
    if first is not None:
        first.hlist_prev = item
    stable_node.hlist = item


def hlist_del(item: RmapItem, stable_node: StableNode) -> None:
    """Take an rmap_item off a stable node's list."""
    before, after = item.hlist_prev, item.hlist_next
    if before is None:
        stable_node.hlist = after
    else:
        before.hlist_next = after
    if after is not None:
        after.hlist_prev = before


class NodeList:
    """A list of stable nodes that grows at its front: the dups of a chain, or migrate_nodes."""

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[StableNode, None] = {}  # its last key is the front

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: StableNode) -> bool:
        return node in self._nodes

    def __iter__(self) -> Iterator[StableNode]:
        """From the front; over a copy, so that nodes may be deleted on the way."""
        return iter(list(reversed(self._nodes)))

    def add_head(self, node: StableNode) -> None:
        """Put a node at the front."""
        self._nodes[node] = None

    def remove(self, node: StableNode) -> None:
        """Take a node out."""
        del self._nodes[node]


class MmSlot:
    """``struct ksm_mm_slot``: a registered mm with its rmap_items (engine.md 1.6).

    The slots are a ring through a sentinel, ksm_mm_head, whose mm is None.
    """

    __slots__ = ("mm", "next", "prev", "rmap_list")

    def __init__(self, mm: Mm | None) -> None:
        self.mm = mm
        self.rmap_list: RmapItem | None = None
        self.next: MmSlot = self
        self.prev: MmSlot = self

    def insert_before(self, place: MmSlot) -> None:
        """``list_add_tail``."""
        self.prev = place.prev
        self.next = place
        place.prev.next = self
        place.prev = self

    def unlink(self) -> None:
        """``list_del``."""
        self.prev.next = self.next
        self.next.prev = self.prev
        self.prev = self.next = self


class KsmScan:
    """``struct ksm_scan``: the one cursor (engine.md 1.7).

    :ivar mm_slot: the slot being scanned, or the sentinel between two scans
    :ivar address: the next address to look at
    :ivar rmap_list: what holds the link to the next rmap_item: the item before it, or the slot
    :ivar seqnr: full scans done, which is what full_scans shows
    """

    __slots__ = ("address", "mm_slot", "rmap_list", "seqnr")

    def __init__(self, head: MmSlot) -> None:
        self.mm_slot = head
        self.address = 0
        self.rmap_list: RmapItem | MmSlot = head
        self.seqnr = 0


class AdvisorMode(Enum):
    """The words of ``advisor_mode``."""

    NONE = "none"
    SCAN_TIME = "scan-time"


@dataclass(slots=True)
class AdvisorCtx:
    """``struct advisor_ctx``: what the scan-time advisor remembers of the previous scan."""

    start_scan_ns: int = 0
    scan_time: int = 0
    change: int = 0
    cpu_time_ns: int = 0


class Ksm:
    """The static variables of mm/ksm.c, without their prefixes ``ksm_`` and ``ksm_thread_``.

    :ivar now_ns: the time since boot, set by the owner
    :ivar cpu_ns: the CPU time that ksmd has used since boot, set by the owner
    :ivar wakes_ns: when ksmd's sleep between two batches ends
    :ivar ksmd_nid: the node whose memory ksmd gets where no VMA policy says another
    :ivar reuse_addresses: a new stable node gets the address of the one freed last, as the kernel's allocator may do it
    :ivar heads_in_doubt: how often it mattered whether it does (C9)
    :ivar root_stable_tree: one tree until merge_across_nodes was first 0, then one a node (engine.md 11.5)
    """

    def __init__(self, memory: Memory, profile: Profile) -> None:
        self.memory = memory
        self.profile = profile
        self.now_ns = 0
        self.cpu_ns = 0
        self.wakes_ns = 0
        self.ksmd_nid = 0

        self.root_stable_tree: list[RbRoot[StableNode]] = [RbRoot()]
        self.root_unstable_tree: list[RbRoot[RmapItem]] = [RbRoot()]
        self.nr_node_ids = 1
        self.migrate_nodes = NodeList()
        self.mm_head = MmSlot(None)
        self.scan = KsmScan(self.mm_head)
        self.zero_checksum = calc_checksum(ZERO_CONTENT)
        self.serial = 0
        self.reuse_addresses = False
        self.heads_in_doubt = 0
        self._freed: list[int] = []

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
        return max(0, self.rmap_items - self.pages_shared - self.pages_sharing - self.pages_unshared)

    @property
    def general_profit(self) -> int:
        """Bytes saved less bytes of rmap_items (engine.md 8.4)."""
        return (self.pages_sharing + self.zero_pages) * PAGE_SIZE - self.rmap_items * RMAP_ITEM_SIZE

    def alloc_stable_node(self, kpfn: int, nid: int) -> StableNode:
        """A new stable node, in no tree yet."""
        self.serial += 1
        stable_node = StableNode(kpfn, nid, self.serial)
        if self.reuse_addresses and self._freed:
            stable_node.address = self._freed.pop()
        return stable_node

    def free_stable_node(self, stable_node: StableNode) -> None:
        """Free a stable node; an rmap_item may still have it as its head (C9)."""
        stable_node.head = Head.FREED
        stable_node.freed_before = self.serial
        if self.reuse_addresses:
            self._freed.append(stable_node.address)


def calc_checksum(content: bytes) -> int:
    """The checksum that tells whether a page changed since the last scan (engine.md 14.16).

    Only equality over time matters, so this is 32 bits of the hash that Python keeps with the bytes.
    """
    return hash(content) & 0xFFFFFFFF


def get_kpfn_nid(ksm: Ksm, kpfn: int) -> int:
    """The tree that a frame belongs to (engine.md 1.8)."""
    return 0 if ksm.merge_across_nodes else kpfn >> PFN_NID_SHIFT


def page_to_nid(page: Page) -> int:
    """The node that a page is on."""
    return page.pfn >> PFN_NID_SHIFT


def folio_test_ksm(page: Page) -> bool:
    """Whether a page is a KSM page; ``PageKsm`` in older kernels."""
    return page.stable_node is not None


def folio_stable_node(page: Page) -> StableNode | None:
    """A KSM page's stable node; None of any other page, and of a KSM page that has none.

    ``page_stable_node`` in older kernels.
    """
    stable_node = page.stable_node
    return None if stable_node is NULL_STABLE_NODE else stable_node
