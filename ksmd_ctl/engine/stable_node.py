# SPDX-License-Identifier: GPL-2.0-or-later
"""Stable nodes: how long they live, what hangs on them, chains of copies, and migrate_nodes."""

from __future__ import annotations

from ksmd_ctl.engine.memory import Page
from ksmd_ctl.engine.rbtree import RbRoot, rb_erase, rb_replace_node
from ksmd_ctl.engine.state import Ksm
from ksmd_ctl.engine.structs import (
    NONE,
    STABLE,
    UNSTABLE,
    DupList,
    Head,
    RmapItem,
    StableNode,
    hlist_del,
)

__all__ = [
    "alloc_stable_node_chain",
    "chain",
    "chain_prune",
    "exile",
    "free_stable_node_chain",
    "get_ksm_page",
    "is_page_sharing_candidate",
    "remove_node_from_stable_tree",
    "remove_rmap_item_from_tree",
    "stable_node_chain_add_dup",
    "stable_node_dup",
    "stable_node_dup_del",
    "unexile",
]


def get_ksm_page(ksm: Ksm, stable_node: StableNode) -> Page | None:
    """The page of a stable node, or None where it is gone; then the node is removed (engine.md 7.3).

    No reference keeps the page, so the node looks through a keyhole whether the frame that it
    remembers still holds a page that points back to it.
    """
    page = ksm.memory.pfn_to_page(stable_node.kpfn)
    if page is not None and page.stable_node is stable_node:
        return page
    remove_node_from_stable_tree(ksm, stable_node)
    return None


def stable_node_chain_add_dup(ksm: Ksm, dup: StableNode, chain: StableNode) -> None:
    """Put a node at the front of a chain (engine.md 1.9, 10.8)."""
    assert chain.dups is not None
    dup.head = Head.DUP
    dup.chain = chain
    chain.dups.add_head(dup)
    ksm.stable_node_dups += 1


def stable_node_dup_del(ksm: Ksm, stable_node: StableNode) -> None:
    """Take a node out of its chain or its tree (engine.md 3.1, 10.10)."""
    chain = stable_node.chain
    if chain is not None:
        assert chain.dups is not None
        chain.dups.remove(stable_node)
        stable_node.chain = None
        ksm.stable_node_dups -= 1
    else:
        rb_erase(stable_node, ksm.root_stable_tree[stable_node.nid])


def exile(ksm: Ksm, stable_node: StableNode) -> None:
    """Put a node that is in no tree any more on migrate_nodes."""
    stable_node.head = Head.MIGRATE_NODES
    ksm.migrate_nodes.add_head(stable_node)


def unexile(ksm: Ksm, stable_node: StableNode, nid: int) -> None:
    """Take a node off migrate_nodes, for the tree of a node or a chain in it."""
    ksm.migrate_nodes.remove(stable_node)
    stable_node.head = Head.TREE
    stable_node.nid = nid


def alloc_stable_node_chain(ksm: Ksm, dup: StableNode, root: RbRoot[StableNode]) -> StableNode:
    """Put a chain in the place of a node, which becomes its first dup (engine.md 4.17)."""
    chain = ksm.alloc_stable_node(-1, -1)
    chain.dups = DupList()
    chain.chain_prune_time = ksm.now_ns // 1_000_000
    ksm.stable_node_chains += 1
    rb_replace_node(dup, chain, root)
    stable_node_chain_add_dup(ksm, dup, chain)
    return chain


def free_stable_node_chain(ksm: Ksm, chain: StableNode, root: RbRoot[StableNode]) -> None:
    """Erase a chain that has no dups any more (engine.md 10.7)."""
    rb_erase(chain, root)
    chain.head = Head.FREED
    ksm.stable_node_chains -= 1


def remove_node_from_stable_tree(ksm: Ksm, stable_node: StableNode) -> None:
    """Delete a node: its rmap_items stay, in no tree, until they are scanned (engine.md 7.4).

    Their heads stay too: no release clears them here. A node is never mistaken for an older one at
    the same address, as it might be in a kernel.
    """
    item = stable_node.hlist
    while item is not None:
        after = item.hlist_next
        if after is not None:
            ksm.pages_sharing -= 1
        else:
            ksm.pages_shared -= 1
        item.mm.ksm_merging_pages -= 1
        item.state = NONE
        item = after
    stable_node.hlist = None
    stable_node.rmap_hlist_len = 0
    if stable_node.head is Head.MIGRATE_NODES:
        ksm.migrate_nodes.remove(stable_node)
    else:
        stable_node_dup_del(ksm, stable_node)
    stable_node.head = Head.FREED


def remove_rmap_item_from_tree(ksm: Ksm, rmap_item: RmapItem) -> None:
    """Take an rmap_item off its stable node's list, or out of the unstable tree (7.1, 6.7)."""
    if rmap_item.state == STABLE:
        stable_node = rmap_item.head
        assert stable_node is not None
        if get_ksm_page(ksm, stable_node) is None:
            return  # all was undone with the node
        hlist_del(rmap_item, stable_node)
        if stable_node.hlist is not None:
            ksm.pages_sharing -= 1
        else:
            ksm.pages_shared -= 1
        rmap_item.mm.ksm_merging_pages -= 1
        stable_node.rmap_hlist_len -= 1
        if ksm.profile.head_cleared:
            rmap_item.head = None
        rmap_item.state = NONE
    elif rmap_item.state == UNSTABLE:
        # An item of the scan before is in a tree that was emptied since.
        age = (ksm.scan.seqnr - rmap_item.seqnr) & 0xFF
        assert age <= 1, f"{rmap_item!r} missed {age} scans"
        if age == 0:
            rb_erase(rmap_item, ksm.root_unstable_tree[rmap_item.nid])
        ksm.pages_unshared -= 1
        rmap_item.state = NONE


def is_page_sharing_candidate(ksm: Ksm, stable_node: StableNode, offset: int = 0) -> bool:
    """Whether a node's page may get a further mapping (engine.md 4.0)."""
    if not ksm.profile.chains:
        return True
    length = stable_node.rmap_hlist_len
    return length > 0 and length + offset < ksm.max_page_sharing


def stable_node_dup(
    ksm: Ksm, chain: StableNode, root: RbRoot[StableNode], prune: bool
) -> tuple[StableNode, StableNode | None, Page | None]:
    """Choose the dup that stands for a chain (engine.md 10.4 to 10.7).

    It is the candidate with most rmap_items, but the first candidate unless a prune is due; where
    there is no candidate, the first dup, for comparison only.

    :return: what is in the tree now (the dup itself, where the chain collapsed); the dup and its page
    """
    now = ksm.now_ns // 1_000_000
    due = chain.chain_prune_time + ksm.stable_node_chains_prune_millisecs
    if prune and now < due:
        prune = False
    elif prune:
        chain.chain_prune_time = now
    dups = chain.dups
    assert dups is not None
    found: StableNode | None = None
    tree_page: Page | None = None
    candidate = False
    for dup in dups:
        page = get_ksm_page(ksm, dup)
        if page is None:
            continue
        if is_page_sharing_candidate(ksm, dup):
            if found is None or not candidate or dup.rmap_hlist_len > found.rmap_hlist_len:
                found, tree_page, candidate = dup, page, True
            if not prune:
                break
        elif found is None:
            found, tree_page = dup, page
    if found is None:
        free_stable_node_chain(ksm, chain, root)
    elif len(dups) == 1 and (ksm.profile.collapse_any_time or (prune and candidate)):
        dups.remove(found)
        found.chain = None
        found.head = Head.TREE
        rb_replace_node(chain, found, root)
        chain.head = Head.FREED
        ksm.stable_node_chains -= 1
        ksm.stable_node_dups -= 1
        return found, found, tree_page
    elif dups.first() is not found and is_page_sharing_candidate(ksm, found, 1):
        dups.remove(found)
        dups.add_head(found)
    return chain, found, tree_page


# __stable_node_chain: what stands for a node of the tree.
def _stable_node_chain(
    ksm: Ksm, stable_node: StableNode, root: RbRoot[StableNode], prune: bool
) -> tuple[StableNode, StableNode | None, Page | None]:
    if stable_node.dups is None:
        return stable_node, stable_node, get_ksm_page(ksm, stable_node)
    return stable_node_dup(ksm, stable_node, root, prune)


def chain_prune(
    ksm: Ksm, stable_node: StableNode, root: RbRoot[StableNode]
) -> tuple[StableNode, StableNode | None, Page | None]:
    """What stands for a node on a search's path; walks all of a chain when that is due (10.5).

    :return: the node that is in the tree now, the node to compare with, and its page
    """
    return _stable_node_chain(ksm, stable_node, root, True)


def chain(
    ksm: Ksm, stable_node: StableNode, root: RbRoot[StableNode]
) -> tuple[StableNode, StableNode | None, Page | None]:
    """As chain_prune, on an insertion's path: nothing is pruned for its age."""
    return _stable_node_chain(ksm, stable_node, root, False)
