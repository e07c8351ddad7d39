# SPDX-License-Identifier: GPL-2.0-or-later
"""The stable trees with their chains, migrate_nodes, and the unstable trees.

A stable node whose page was migrated is *misplaced*: it is linked in the tree of the node that the page came from.
Its own rmap_items (cmp_and_merge_page) or another page's search find it and put it on migrate_nodes ("exile" it);
from there stable_tree_search puts it into the tree of the node where its page is now. That is the subject of the
kernel's commit "ksm: make !merge_across_nodes migration safe".
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from ksmd_ctl.engine.memory import PAGE_SHIFT, Page
from ksmd_ctl.engine.mm import find_mergeable_vma
from ksmd_ctl.engine.rbtree import RbRoot, rb_erase, rb_insert_color, rb_link_node, rb_replace_node
from ksmd_ctl.engine.state import (
    NONE,
    STABLE,
    UNSTABLE,
    Head,
    Ksm,
    NodeList,
    RmapItem,
    StableNode,
    folio_stable_node,
    get_kpfn_nid,
    hlist_add_head,
    hlist_del,
    page_to_nid,
)

#: What stands for a node of a stable tree: the node that is in the tree now, the node to compare with, its page.
Found = tuple[StableNode, StableNode | None, Page | None]


class Busy(Enum):
    """``ERR_PTR(-EBUSY)``."""

    BUSY = "busy"


BUSY: Final = Busy.BUSY


# -- a stable node's life ----------------------------------------------------------------------------------------


def ksm_get_folio(ksm: Ksm, stable_node: StableNode) -> Page | None:
    """The page of a stable node, or None where it is gone; then the node is removed (engine.md 7.3).

    No reference keeps the page: the frame that the node remembers has to hold a page that points back to the node.
    ``get_ksm_page`` in older kernels.
    """
    page = ksm.memory.pfn_to_page(stable_node.kpfn)
    if page is not None and page.stable_node is stable_node:
        return page
    remove_node_from_stable_tree(ksm, stable_node)
    return None


def remove_node_from_stable_tree(ksm: Ksm, stable_node: StableNode) -> None:
    """Delete a node: its rmap_items stay, in no tree, until they are scanned (engine.md 7.4).

    Their heads stay too, in every release.
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
    ksm.free_stable_node(stable_node)


def is_listed_on(ksm: Ksm, rmap_item: RmapItem, stable_node: StableNode) -> bool:
    """Whether an rmap_item's head is a stable node: the kernel compares addresses, also of one that was freed (C9)."""
    head = rmap_item.head
    if head is stable_node:
        return True
    if not isinstance(head, StableNode) or head.head is not Head.FREED or stable_node.serial <= head.freed_before:
        return False
    ksm.heads_in_doubt += 1
    return head.address == stable_node.address


def remove_rmap_item_from_tree(ksm: Ksm, rmap_item: RmapItem) -> None:
    """Take an rmap_item off its stable node's list, or out of the unstable tree (engine.md 7.1, 6.7)."""
    if rmap_item.state == STABLE:
        stable_node = rmap_item.head
        assert stable_node is not None
        if ksm_get_folio(ksm, stable_node) is None:
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
        # An item of the previous scan is in a tree that was emptied since.
        age = (ksm.scan.seqnr - rmap_item.seqnr) & 0xFF
        assert age <= 1, f"{rmap_item!r} missed {age} scans"
        if age == 0:
            rb_erase(rmap_item, ksm.root_unstable_tree[rmap_item.nid])
        ksm.pages_unshared -= 1
        rmap_item.state = NONE


def is_page_sharing_candidate(ksm: Ksm, stable_node: StableNode, offset: int = 0) -> bool:
    """Whether a node's page may get a further mapping (engine.md 4.0).

    :param offset: mappings that it gets before; with one this is ``__is_page_sharing_candidate``
    """
    if not ksm.profile.chains:
        return True
    length = stable_node.rmap_hlist_len
    return length > 0 and length + offset < ksm.max_page_sharing


# -- chains and exiles -------------------------------------------------------------------------------------------


def is_stable_node_chain(node: StableNode) -> bool:
    """Whether a node of the tree is the header of a chain."""
    return node.dups is not None


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
    """Put a node that is in no tree any more on migrate_nodes; a list_add in the kernel."""
    stable_node.head = Head.MIGRATE_NODES
    ksm.migrate_nodes.add_head(stable_node)


def unexile(ksm: Ksm, stable_node: StableNode, nid: int) -> None:
    """Take a node off migrate_nodes, for the tree of a node or a chain in it; a list_del in the kernel."""
    ksm.migrate_nodes.remove(stable_node)
    stable_node.head = Head.TREE
    stable_node.nid = nid


def alloc_stable_node_chain(ksm: Ksm, dup: StableNode, root: RbRoot[StableNode]) -> StableNode:
    """Put a chain in the place of a node, which becomes its first dup (engine.md 4.17)."""
    chain = ksm.alloc_stable_node(-1, -1)
    chain.dups = NodeList()
    chain.chain_prune_time = ksm.now_ns // 1_000_000
    ksm.stable_node_chains += 1
    rb_replace_node(dup, chain, root)
    stable_node_chain_add_dup(ksm, dup, chain)
    return chain


def free_stable_node_chain(ksm: Ksm, chain: StableNode, root: RbRoot[StableNode]) -> None:
    """Erase a chain that has no dups any more (engine.md 10.7)."""
    rb_erase(chain, root)
    ksm.free_stable_node(chain)
    ksm.stable_node_chains -= 1


def stable_node_dup(ksm: Ksm, chain: StableNode, root: RbRoot[StableNode], prune: bool) -> Found:
    """Choose the dup that stands for a chain (engine.md 10.4 to 10.7).

    It is the candidate with most rmap_items, but the first candidate unless a prune is due; where there is no
    candidate, the first dup, for comparison only.

    :return: the node in the tree is the dup itself where the chain collapsed
    """
    now = ksm.now_ns // 1_000_000
    if prune and now < chain.chain_prune_time + ksm.stable_node_chains_prune_millisecs:
        prune = False
    elif prune:
        chain.chain_prune_time = now
    dups = chain.dups
    assert dups is not None
    found: StableNode | None = None
    tree_page: Page | None = None
    candidate = False
    for dup in dups:
        page = ksm_get_folio(ksm, dup)
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
        ksm.free_stable_node(chain)
        ksm.stable_node_chains -= 1
        ksm.stable_node_dups -= 1
        return found, found, tree_page
    elif next(iter(dups)) is not found and is_page_sharing_candidate(ksm, found, 1):
        dups.remove(found)
        dups.add_head(found)
    return chain, found, tree_page


def chain_prune(ksm: Ksm, stable_node: StableNode, root: RbRoot[StableNode], prune: bool = True) -> Found:
    """What stands for a node on a search's path; walks all of a chain when that is due (engine.md 10.5)."""
    if stable_node.dups is None:
        return stable_node, stable_node, ksm_get_folio(ksm, stable_node)
    return stable_node_dup(ksm, stable_node, root, prune)


def chain(ksm: Ksm, stable_node: StableNode, root: RbRoot[StableNode]) -> Found:
    """As chain_prune, on an insertion's path: nothing is pruned for its age."""
    return chain_prune(ksm, stable_node, root, prune=False)


# -- the stable trees --------------------------------------------------------------------------------------------


def stable_tree_search(ksm: Ksm, page: Page) -> Page | Busy | None:
    """Search the stable tree of a page's node for a page with its content (engine.md 4).

    A KSM page comes here where its rmap_item is not listed yet, or where its node is exiled. An exile that finds its
    content nowhere is slotted in there, with all its mappings.

    :return: the page to merge with; the page itself where it is a KSM page that has its place; BUSY; None where there
        is nothing to merge with
    """
    page_node = folio_stable_node(page)
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
    ksm: Ksm, page: Page, page_node: StableNode | None, stable_node: StableNode, dup: StableNode, nid: int
) -> Page | Busy | None:
    root = ksm.root_stable_tree[nid]
    if ksm.profile.chains:
        if page_node is not None and page.mapcount > 1:
            # chain_append: an exile with several mappings becomes a further copy of its content (4.12, 4.17).
            if dup is stable_node:
                stable_node = alloc_stable_node_chain(ksm, dup, root)
            unexile(ksm, page_node, nid)
            stable_node_chain_add_dup(ksm, page_node, stable_node)
            return page if is_page_sharing_candidate(ksm, page_node) else None
        if not is_page_sharing_candidate(ksm, dup):
            return None  # all are full: 4.13
    tree_page = ksm.memory.pfn_to_page(dup.kpfn)
    assert tree_page is not None  # ksm_get_folio had it, and nothing ran since
    if ksm.profile.trylock_busy and tree_page in ksm.memory.locked:
        return BUSY
    if get_kpfn_nid(ksm, dup.kpfn) == dup.nid:
        return tree_page
    # replace: the match is misplaced and is exiled; an exile takes its place (4.7, 4.8, 4.16).
    if page_node is not None:
        unexile(ksm, page_node, nid)
    if page_node is not None and dup is stable_node:
        rb_replace_node(dup, page_node, root)
    else:
        stable_node_dup_del(ksm, dup)
        if page_node is not None:
            stable_node_chain_add_dup(ksm, page_node, stable_node)
    exile(ksm, dup)
    return page if page_node is not None and is_page_sharing_candidate(ksm, page_node) else None


def stable_tree_insert(ksm: Ksm, kpage: Page) -> StableNode | None:
    """Give a new KSM page its node in the stable tree (engine.md 10.2).

    :return: the node; None where it can't be inserted, and then both mappings have to be broken
    """
    nid = get_kpfn_nid(ksm, kpage.pfn)
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
    stable_node = ksm.alloc_stable_node(kpage.pfn, nid)
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

    :param max_page_sharing_bypass: it may go over the limit, because the page was forked (10.9)
    """
    stable_node.rmap_hlist_len += 1
    assert max_page_sharing_bypass or not ksm.profile.chains or stable_node.rmap_hlist_len <= ksm.max_page_sharing
    if stable_node.hlist is not None:
        ksm.pages_sharing += 1
    else:
        ksm.pages_shared += 1
    hlist_add_head(rmap_item, stable_node)
    rmap_item.head = stable_node
    rmap_item.state = STABLE
    rmap_item.mm.ksm_merging_pages += 1


# -- the unstable trees ------------------------------------------------------------------------------------------


def unstable_tree_search_insert(ksm: Ksm, rmap_item: RmapItem, page: Page) -> tuple[RmapItem, Page] | None:
    """Search the unstable tree for a page with the same content, or insert the rmap_item (engine.md 6).

    The tree's pages are not write-protected, so it may be out of order: what pages hold now is compared (6.6).

    :return: the partner's rmap_item and page; None where there is none. Then the rmap_item was inserted, unless the
        walk ended early: at a page that is gone (6.1), at the page itself (6.2), or at a partner that has moved to
        another node since (6.3)
    """
    nid = get_kpfn_nid(ksm, page.pfn)
    root = ksm.root_unstable_tree[nid]
    content = page.content
    parent: RmapItem | None = None
    left = False
    new = root.rb_node
    while new is not None:
        # What follows is get_mergeable_page; a call for each node would cost as much as the rest.
        address = new.address
        vma = new.mm.last_vma
        if vma is None or not vma.start <= address < vma.end or new.mm.exited or not vma.mergeable:
            vma = find_mergeable_vma(new.mm, address)
            if vma is None:
                return None
        tree_page = vma.ptes[(address - vma.start) >> PAGE_SHIFT]
        if not isinstance(tree_page, Page) or tree_page is page:
            return None
        parent = new
        tree_content = tree_page.content
        if content is tree_content:
            if not ksm.merge_across_nodes and page_to_nid(tree_page) != nid:
                return None
            return new, tree_page
        if content < tree_content:
            left = True
            new = new.rb_left
        else:
            left = False
            new = new.rb_right
    rmap_item.state = UNSTABLE
    rmap_item.seqnr = ksm.scan.seqnr & 0xFF
    rmap_item.nid = nid
    rb_link_node(rmap_item, parent, left, root)
    rb_insert_color(rmap_item, root)
    ksm.pages_unshared += 1
    return None
