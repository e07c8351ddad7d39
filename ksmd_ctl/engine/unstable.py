# SPDX-License-Identifier: GPL-2.0-or-later
"""The unstable tree: pages that may find a partner, by content, rebuilt in each full scan.

Its pages are not write-protected, so the tree may be out of order; what is compared is always what the
pages hold now (engine.md 6.6).
"""

from __future__ import annotations

from ksmd_ctl.engine.memory import PAGE_SHIFT, Page
from ksmd_ctl.engine.merge import find_mergeable_vma
from ksmd_ctl.engine.rbtree import rb_insert_color, rb_link_node
from ksmd_ctl.engine.state import Ksm, get_kpfn_nid, page_to_nid
from ksmd_ctl.engine.structs import UNSTABLE, RmapItem

__all__ = ["unstable_tree_search_insert"]


def unstable_tree_search_insert(ksm: Ksm, rmap_item: RmapItem, page: Page) -> tuple[RmapItem, Page] | None:
    """Search the unstable tree for a page with the same content, or insert the rmap_item (engine.md 6).

    :return: the partner's rmap_item and page; None where there is none. Then the rmap_item was
        inserted, unless the walk ended early: at a page that is gone (6.1), at the page itself (6.2),
        or at a partner that has moved to another node since (6.3)
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
