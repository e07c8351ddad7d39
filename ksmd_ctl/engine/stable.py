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
from ksmd_ctl.engine.rbtree import rb_insert_color, rb_link_node, rb_replace_node
from ksmd_ctl.engine.stable_node import (
    alloc_stable_node_chain,
    chain,
    chain_prune,
    exile,
    is_page_sharing_candidate,
    stable_node_chain_add_dup,
    stable_node_dup_del,
    unexile,
)
from ksmd_ctl.engine.state import Ksm, get_kpfn_nid, page_stable_node
from ksmd_ctl.engine.structs import STABLE, Head, RmapItem, StableNode, hlist_add_head, is_stable_node_chain

__all__ = ["BUSY", "Busy", "stable_tree_append", "stable_tree_insert", "stable_tree_search"]


class Busy(Enum):
    """What stable_tree_search returns where the match is locked by somebody: ``ERR_PTR(-EBUSY)``."""

    BUSY = "busy"


BUSY: Final = Busy.BUSY


def stable_tree_search(ksm: Ksm, page: Page) -> Page | Busy | None:
    """Search the stable tree of a page's node for a page with its content (engine.md 4).

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
    unexile(ksm, page_node, nid)  # slot-in: 4.6, 4.15
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
        unexile(ksm, page_node, nid)
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
    unexile(ksm, page_node, nid)
    stable_node_chain_add_dup(ksm, page_node, stable_node)
    return page if is_page_sharing_candidate(ksm, page_node) else None


def stable_tree_insert(ksm: Ksm, kpage: Page) -> StableNode | None:
    """Give a new KSM page its node in the stable tree (engine.md 10.2).

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
    """Put an rmap_item on a stable node's list (engine.md 8.1).

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
