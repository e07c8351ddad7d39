# SPDX-License-Identifier: GPL-2.0-or-later
"""The stable tree: KSM pages by content, a tree a node, and what to do with those on the wrong node.

This is what the seed, "ksm: make !merge_across_nodes migration safe", is about. A stable node whose
page was migrated is *misplaced*: it is linked in the tree of the node that the page came from. It is
found by its own rmap_items (cmp_and_merge_page) or by another page's search, and goes to migrate_nodes;
from there stable_tree_search puts it into the tree of the node where its page is now.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from ksmd_ctl.engine.memory import Page
from ksmd_ctl.engine.rbtree import (
    RbRoot,
    rb_erase,
    rb_insert_color,
    rb_link_node,
    rb_replace_node,
)
from ksmd_ctl.engine.state import Ksm, get_kpfn_nid, page_stable_node
from ksmd_ctl.engine.structs import (
    NONE,
    STABLE,
    UNSTABLE,
    DupList,
    Head,
    RmapItem,
    StableNode,
    hlist_add_head,
    hlist_del,
    is_stable_node_chain,
)

__all__ = [
    "BUSY",
    "Busy",
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
    "stable_tree_append",
    "stable_tree_insert",
    "stable_tree_search",
]


class Busy(Enum):
    """What stable_tree_search returns where the match is locked by somebody: ``ERR_PTR(-EBUSY)``."""

    BUSY = "busy"


BUSY: Final = Busy.BUSY


def get_ksm_page(ksm: Ksm, stable_node: StableNode) -> Page | None:
    """The page of a stable node, or None where it is gone; then the node is removed (semantics 7.3).

    No reference keeps the page, so the node looks through a keyhole whether the frame that it
    remembers still holds a page that points back to it.
    """
    page = ksm.memory.pfn_to_page(stable_node.kpfn)
    if page is not None and page.stable_node is stable_node:
        return page
    remove_node_from_stable_tree(ksm, stable_node)
    return None


def stable_node_chain_add_dup(ksm: Ksm, dup: StableNode, chain: StableNode) -> None:
    """Put a node at the front of a chain (semantics 1.9, 10.8)."""
    assert chain.dups is not None
    dup.head = Head.DUP
    dup.chain = chain
    chain.dups.add_head(dup)
    ksm.stable_node_dups += 1


def stable_node_dup_del(ksm: Ksm, stable_node: StableNode) -> None:
    """Take a node out of its chain or its tree (semantics 3.1, 10.10)."""
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


# The end of an exile: off migrate_nodes, into the tree of a node or a chain in it.
def _take_back(ksm: Ksm, stable_node: StableNode, nid: int) -> None:
    ksm.migrate_nodes.remove(stable_node)
    stable_node.head = Head.TREE
    stable_node.nid = nid


def alloc_stable_node_chain(ksm: Ksm, dup: StableNode, root: RbRoot[StableNode]) -> StableNode:
    """Put a chain in the place of a node, which becomes its first dup (semantics 4.17)."""
    chain = ksm.alloc_stable_node(-1, -1)
    chain.dups = DupList()
    chain.chain_prune_time = ksm.now_ns // 1_000_000
    ksm.stable_node_chains += 1
    rb_replace_node(dup, chain, root)
    stable_node_chain_add_dup(ksm, dup, chain)
    return chain


def free_stable_node_chain(ksm: Ksm, chain: StableNode, root: RbRoot[StableNode]) -> None:
    """Erase a chain that has no dups any more (semantics 10.7)."""
    rb_erase(chain, root)
    chain.head = Head.FREED
    ksm.stable_node_chains -= 1


def remove_node_from_stable_tree(ksm: Ksm, stable_node: StableNode) -> None:
    """Delete a node: its rmap_items stay, in no tree, until they are scanned (semantics 7.4).

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
    """Whether a node's page may get a further mapping (semantics 4.0)."""
    if not ksm.profile.chains:
        return True
    length = stable_node.rmap_hlist_len
    return length > 0 and length + offset < ksm.max_page_sharing


def stable_node_dup(
    ksm: Ksm, chain: StableNode, root: RbRoot[StableNode], prune: bool
) -> tuple[StableNode, StableNode | None, Page | None]:
    """Choose the dup that stands for a chain (semantics 10.4 to 10.7).

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


def stable_tree_search(ksm: Ksm, page: Page) -> Page | Busy | None:
    """Search the stable tree of a page's node for a page with its content (semantics 4).

    A KSM page comes here where its rmap_item is not listed yet, or where its node is exiled. An exile
    that finds its content nowhere is slotted in there, with all its mappings.

    :return: the page to merge with; the page itself where it is a KSM page that has its place; BUSY;
        None where there is nothing to merge with
    """
    page_node = page_stable_node(page)
    if page_node is not None and page_node.head is not Head.MIGRATE_NODES:
        return page  # a KSM page that was forked: 4.1
    nid = get_kpfn_nid(ksm, page.pfn)
    root = ksm.root_stable_tree[nid]
    content = page.content
    again = True
    while again:
        again = False
        parent: StableNode | None = None
        left = False
        new = root.rb_node
        while new is not None:
            stable_node, dup, tree_page = chain_prune(ksm, new, root)
            if dup is None or tree_page is None:
                # A stale node was removed, which may have rebalanced the tree: 4.3, 4.11.
                if not ksm.profile.stale_restart:
                    return None
                again = True
                break
            parent = stable_node
            if content is tree_page.content:
                return _match(ksm, page, page_node, stable_node, dup, nid)
            left = content < tree_page.content
            new = stable_node.rb_left if left else stable_node.rb_right
    if page_node is None:
        return None
    _take_back(ksm, page_node, nid)  # slot-in: 4.6, 4.15
    rb_link_node(page_node, parent, left, root)
    rb_insert_color(page_node, root)
    return page if is_page_sharing_candidate(ksm, page_node) else None


# The search found the page's content: at stable_node, in its dup where that is a chain.
def _match(
    ksm: Ksm,
    page: Page,
    page_node: StableNode | None,
    stable_node: StableNode,
    dup: StableNode,
    nid: int,
) -> Page | Busy | None:
    if ksm.profile.chains:
        if page_node is not None and page.mapcount > 1:
            return _chain_append(ksm, page, page_node, stable_node, dup, nid)
        if not is_page_sharing_candidate(ksm, dup):
            return None  # all are full: 4.13
    tree_page = ksm.memory.pfn_to_page(dup.kpfn)
    assert tree_page is not None  # get_ksm_page had it, and nothing ran since
    if ksm.profile.trylock_busy and tree_page in ksm.memory.locked:
        return BUSY
    if get_kpfn_nid(ksm, dup.kpfn) != dup.nid:
        return _replace(ksm, page, page_node, stable_node, dup, nid)
    return tree_page


# The match is misplaced: it is exiled, and the page's own node, if it has one, takes its place
# (4.7, 4.8, 4.16).
def _replace(
    ksm: Ksm,
    page: Page,
    page_node: StableNode | None,
    stable_node: StableNode,
    dup: StableNode,
    nid: int,
) -> Page | None:
    root = ksm.root_stable_tree[nid]
    if page_node is not None:
        _take_back(ksm, page_node, nid)
        if dup is stable_node:
            rb_replace_node(dup, page_node, root)
        else:
            stable_node_dup_del(ksm, dup)
            stable_node_chain_add_dup(ksm, page_node, stable_node)
    else:
        stable_node_dup_del(ksm, dup)
    exile(ksm, dup)
    if page_node is not None and is_page_sharing_candidate(ksm, page_node):
        return page
    return None


# An exile with several mappings becomes a further copy of its content: 4.12, 4.17.
def _chain_append(
    ksm: Ksm,
    page: Page,
    page_node: StableNode,
    stable_node: StableNode,
    dup: StableNode,
    nid: int,
) -> Page | None:
    if dup is stable_node:
        stable_node = alloc_stable_node_chain(ksm, dup, ksm.root_stable_tree[nid])
    _take_back(ksm, page_node, nid)
    stable_node_chain_add_dup(ksm, page_node, stable_node)
    return page if is_page_sharing_candidate(ksm, page_node) else None


def stable_tree_insert(ksm: Ksm, kpage: Page) -> StableNode | None:
    """Give a new KSM page its node in the stable tree (semantics 10.2).

    :return: the node; None where it can't be inserted, and then both mappings have to be broken
    """
    kpfn = kpage.pfn
    nid = get_kpfn_nid(ksm, kpfn)
    root = ksm.root_stable_tree[nid]
    content = kpage.content
    match: StableNode | None = None
    again = True
    while again:
        again = False
        parent: StableNode | None = None
        left = False
        new = root.rb_node
        while new is not None:
            stable_node, dup, tree_page = chain(ksm, new, root)
            if dup is None or tree_page is None:
                if not ksm.profile.stale_restart:
                    return None
                again = True
                break
            parent = stable_node
            if content is tree_page.content:
                if not ksm.profile.chains:
                    return None  # C19
                match = stable_node
                break
            left = content < tree_page.content
            new = stable_node.rb_left if left else stable_node.rb_right
    stable_node = ksm.alloc_stable_node(kpfn, nid)
    if match is None:
        rb_link_node(stable_node, parent, left, root)
        rb_insert_color(stable_node, root)
    else:
        if not is_stable_node_chain(match):
            match = alloc_stable_node_chain(ksm, match, root)
        stable_node_chain_add_dup(ksm, stable_node, match)
    kpage.stable_node = stable_node
    return stable_node


def stable_tree_append(ksm: Ksm, rmap_item: RmapItem, stable_node: StableNode, max_page_sharing_bypass: bool) -> None:
    """Put an rmap_item on a stable node's list (semantics 8.1).

    :param max_page_sharing_bypass: it may go over the limit, for the page was forked (10.9)
    """
    stable_node.rmap_hlist_len += 1
    assert max_page_sharing_bypass or not ksm.profile.chains or stable_node.rmap_hlist_len <= ksm.max_page_sharing, (
        f"{stable_node!r} is over the limit"
    )
    if stable_node.hlist is not None:
        ksm.pages_sharing += 1
    else:
        ksm.pages_shared += 1
    hlist_add_head(rmap_item, stable_node)
    rmap_item.head = stable_node
    rmap_item.state = STABLE
    rmap_item.mm.ksm_merging_pages += 1
