# SPDX-License-Identifier: GPL-2.0-or-later
"""The structures of mm/ksm.c: stable_node, rmap_item, mm_slot, and the cursor."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Final

from ksmd_ctl.engine.rbtree import RbNode

if TYPE_CHECKING:
    from ksmd_ctl.engine.mm import AnonVma, Mm

__all__ = [
    "NONE",
    "NULL_STABLE_NODE",
    "STABLE",
    "UNSTABLE",
    "DupList",
    "Head",
    "KsmScan",
    "MmSlot",
    "RmapItem",
    "StableNode",
    "hlist_add_head",
    "hlist_del",
    "is_stable_node_chain",
]

#: Where an rmap_item is: in no tree, in the unstable tree, or on a stable node's list (UNSTABLE_FLAG
#: and STABLE_FLAG of its address, engine.md 1.4).
NONE: Final = 0
UNSTABLE: Final = 1
STABLE: Final = 2


class Head(Enum):
    """Where a stable node is: the ``head`` that the seed lays over the parent link (engine.md 1.2)."""

    #: linked into the stable tree of its nid
    TREE = "tree"
    #: on migrate_nodes, pending placement in the proper tree: exiled
    MIGRATE_NODES = "migrate_nodes"
    #: one of the dups of a chain (STABLE_NODE_DUP_HEAD)
    DUP = "dup"
    #: it was freed
    FREED = "freed"


class StableNode(RbNode):
    """``struct ksm_stable_node``: a KSM page, or the chain of several with one content.

    :ivar head: where it is
    :ivar kpfn: the frame of its page: a number, no reference is held (engine.md 1.2)
    :ivar nid: the tree that it is or was last linked in; not that of kpfn where it is misplaced
    :ivar hlist: its rmap_items, the newest first
    :ivar rmap_hlist_len: how many they are
    :ivar chain: of a dup, its chain
    :ivar dups: of a chain, its dups; None of any other node
    :ivar chain_prune_time: of a chain, when all its dups were last walked, in milliseconds
    :ivar serial: names it for people; never used again, unlike a kernel's address
    """

    __slots__ = (
        "chain",
        "chain_prune_time",
        "dups",
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
        self.dups: DupList | None = None
        self.chain_prune_time = 0
        self.serial = serial

    def __repr__(self) -> str:
        if self.dups is not None:
            return f"<chain {self.serial} of {len(self.dups)}>"
        return (
            f"<stable_node {self.serial} {self.head.value} nid {self.nid} kpfn {self.kpfn:#x} "
            f"items {self.rmap_hlist_len}>"
        )

    def items(self) -> Iterator[RmapItem]:
        """Its rmap_items from the front of the list."""
        item = self.hlist
        while item is not None:
            yield item
            item = item.hlist_next


#: The back link of a KSM page that belongs to no stable node.
NULL_STABLE_NODE: Final = StableNode(-1, -1, -1)


# What RmapItem lays its unions over; a class of its own, so that the slot exists when they are made.
class _RmapItemNode(RbNode):
    __slots__ = ("nid",)


_RMAP_ITEM_SLOTS = (
    "address",
    "age",
    "mm",
    "oldchecksum",
    "remaining_skips",
    "rmap_list",
    "seqnr",
    "state",
)


class RmapItem(_RmapItemNode):
    """``struct ksm_rmap_item``: one page address of one mm that ksmd has seen (engine.md 1.4).

    As in the kernel, the links into the unstable tree and those into a stable node's list are a union
    (``head`` lies over the parent link, the list over the children), and so are ``nid`` and
    ``anon_vma``. It is kept here for it shows: an item with a dangling head (C9) forgets it when it
    enters the unstable tree.

    :ivar mm: the address space
    :ivar address: of the page
    :ivar oldchecksum: of the content when last looked at
    :ivar state: NONE, UNSTABLE or STABLE
    :ivar seqnr: of the scan that put it in the unstable tree, its low 8 bits
    :ivar nid: which unstable tree it is in
    :ivar anon_vma: the VMAs to look for its page's mappings in, while it is on a stable node's list
    :ivar head: the stable node on whose list it is
    :ivar age: smart scan: how often it was met
    :ivar remaining_skips: smart scan: how often it is still passed over
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
        state = ("none", "unstable", "stable")[self.state]
        return f"<rmap_item {self.mm.name}:{self.address:#x} {state}>"


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


class DupList:
    """A list of stable nodes that grows at its front: a chain's dups, or migrate_nodes.

    A dict holds it, its last key being the front.
    """

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[StableNode, None] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: StableNode) -> bool:
        return node in self._nodes

    def __iter__(self) -> Iterator[StableNode]:
        """From the front; over a copy, so that nodes may be deleted on the way."""
        return iter(list(reversed(self._nodes)))

    def first(self) -> StableNode | None:
        """The front, None where the list is empty."""
        return next(reversed(self._nodes), None)

    def add_head(self, node: StableNode) -> None:
        """Put a node at the front."""
        self._nodes[node] = None

    def remove(self, node: StableNode) -> None:
        """Take a node out."""
        del self._nodes[node]


class MmSlot:
    """``struct ksm_mm_slot``: a registered mm with its rmap_items (engine.md 1.6).

    The slots are a ring that goes through a sentinel, ksm_mm_head, whose mm is None.
    """

    __slots__ = ("mm", "next", "prev", "rmap_list")

    def __init__(self, mm: Mm | None) -> None:
        self.mm = mm
        self.rmap_list: RmapItem | None = None
        self.next: MmSlot = self
        self.prev: MmSlot = self

    def insert_before(self, place: MmSlot) -> None:
        """``list_add_tail``: into the ring, just before a place."""
        self.prev = place.prev
        self.next = place
        place.prev.next = self
        place.prev = self

    def insert_after(self, place: MmSlot) -> None:
        """``list_add``: into the ring, just after a place."""
        self.insert_before(place.next)

    def unlink(self) -> None:
        """``list_del``: out of the ring."""
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


def is_stable_node_chain(node: StableNode) -> bool:
    """Whether a node of the tree is the header of a chain."""
    return node.dups is not None
