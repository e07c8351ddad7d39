# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to all of KSM at once: un-merging, clearing the stable tree, memory going offline."""

from __future__ import annotations

from collections.abc import Iterator

from ksmd_ctl.engine.merge import unmerge_ksm_pages
from ksmd_ctl.engine.rbtree import RbRoot, rb_first, rb_next
from ksmd_ctl.engine.registry import mm_slot_free
from ksmd_ctl.engine.scan import remove_trailing_rmap_items
from ksmd_ctl.engine.stable_node import free_stable_node_chain, get_ksm_page, remove_node_from_stable_tree
from ksmd_ctl.engine.state import KSM_RUN_OFFLINE, Ksm
from ksmd_ctl.engine.structs import NULL_STABLE_NODE, StableNode

__all__ = [
    "ksm_check_stable_tree",
    "ksm_going_offline",
    "ksm_offline_done",
    "remove_all_stable_nodes",
    "remove_stable_node",
    "remove_stable_node_chain",
    "unmerge_and_remove_all_rmap_items",
]


def remove_stable_node(ksm: Ksm, stable_node: StableNode) -> bool:
    """Delete a node whose page nobody maps; False where somebody does (engine.md 11.4)."""
    page = get_ksm_page(ksm, stable_node)
    if page is None:
        return True  # get_ksm_page removed it
    if page.mapcount:
        return False
    page.stable_node = NULL_STABLE_NODE
    remove_node_from_stable_tree(ksm, stable_node)
    return True


def remove_stable_node_chain(ksm: Ksm, stable_node: StableNode, root: RbRoot[StableNode]) -> bool:
    """remove_stable_node for a node or for all dups of a chain, up to the first that is mapped."""
    if stable_node.dups is None:
        return remove_stable_node(ksm, stable_node)
    if not all(remove_stable_node(ksm, dup) for dup in stable_node.dups):
        return False
    free_stable_node_chain(ksm, stable_node, root)
    return True


def remove_all_stable_nodes(ksm: Ksm) -> bool:
    """Delete all nodes; False where some are still mapped. The rest goes in any case (11.4)."""
    done = True
    for root in ksm.root_stable_tree[: ksm.nr_trees]:
        while root.rb_node is not None:
            if not remove_stable_node_chain(ksm, root.rb_node, root):
                done = False
                break  # on to the next tree
    for stable_node in ksm.migrate_nodes:
        if not remove_stable_node(ksm, stable_node):
            done = False
    return done


def unmerge_and_remove_all_rmap_items(ksm: Ksm, nid: int) -> Iterator[int]:
    """``run`` = 2: break every KSM page, free every rmap_item, restart full_scans at 0 (11.2).

    Yields the number of pages gone through each time it may be interrupted, as a signal interrupts the
    kernel: closed there, or out of memory, it leaves un-merged what it reached.

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
                    unmerge_ksm_pages(ksm, vma, nid)
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


def ksm_going_offline(ksm: Ksm) -> None:
    """MEM_GOING_OFFLINE: ksmd and the stores that take its mutex wait (engine.md 14.14)."""
    ksm.run |= KSM_RUN_OFFLINE


def ksm_offline_done(ksm: Ksm) -> None:
    """The end of MEM_OFFLINE, and all of MEM_CANCEL_OFFLINE."""
    ksm.run &= ~KSM_RUN_OFFLINE


def ksm_check_stable_tree(ksm: Ksm, start_pfn: int, end_pfn: int) -> None:
    """MEM_OFFLINE: delete the nodes that still point into a range that is gone (engine.md 14.14)."""

    def remove_range(stable_node: StableNode) -> bool:
        if not start_pfn <= stable_node.kpfn < end_pfn:
            return False
        remove_node_from_stable_tree(ksm, stable_node)
        return True

    for root in ksm.root_stable_tree[: ksm.nr_trees]:
        node = rb_first(root)
        while node is not None:
            if node.dups is None:
                rebalanced = remove_range(node)
            else:
                for dup in node.dups:
                    remove_range(dup)
                rebalanced = not len(node.dups)
                if rebalanced:
                    free_stable_node_chain(ksm, node, root)
            if rebalanced:
                node = rb_first(root)
            else:
                after = rb_next(node)
                assert after is None or isinstance(after, StableNode)
                node = after
    for stable_node in ksm.migrate_nodes:
        remove_range(stable_node)
