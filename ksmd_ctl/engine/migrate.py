# SPDX-License-Identifier: GPL-2.0-or-later
"""Who maps a KSM page, and what depends on that: migration (engine.md 9), swapping out, memory offlining."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Final

from ksmd_ctl.engine.memory import PAGE_SHIFT, PFN_NID_SHIFT, Memory, MemoryNode, Page, SwapEntry, ZeroPte
from ksmd_ctl.engine.merge import same_huge_page
from ksmd_ctl.engine.mm import Mm, Vma
from ksmd_ctl.engine.rbtree import RbRoot, rb_first, rb_next
from ksmd_ctl.engine.state import KSM_RUN_OFFLINE, Ksm, StableNode, folio_stable_node, folio_test_ksm, page_to_nid
from ksmd_ctl.engine.trees import free_stable_node_chain, remove_node_from_stable_tree

#: The status of an address that move_pages said nothing about.
NOT_WRITTEN: Final = -1000


def rmap_walk_ksm(page: Page) -> list[tuple[Vma, int]]:
    """The mappings of a KSM page that can be found from its node's rmap_items (engine.md 9.7).

    First those listed, then the same addresses in what was forked from them since. A mapping that no
    listed rmap_item leads to is not found.
    """
    stable_node = folio_stable_node(page)
    found: dict[tuple[Vma, int], None] = {}
    if stable_node is None:
        return []
    for rmap_item in stable_node.items():
        address = rmap_item.address
        assert rmap_item.anon_vma is not None
        for vma in rmap_item.anon_vma.vmas:
            if vma.start <= address < vma.end:
                index = (address - vma.start) >> PAGE_SHIFT
                if vma.ptes[index] is page:
                    found[vma, index] = None
    return list(found)


def folio_migrate_ksm(page: Page) -> None:
    """Tell the stable node that its page has another frame, and nothing else (engine.md 9.1).

    The tree can't be touched here: a node whose page changed its memory node is misplaced until ksmd finds out.
    ``ksm_migrate_page`` in older kernels.
    """
    stable_node = folio_stable_node(page)
    if stable_node is not None:
        stable_node.kpfn = page.pfn


def migrate_page(ksm: Ksm, page: Page, nid: int) -> bool:
    """Move a page to a node; False where it can't be moved now (-EAGAIN).

    References that no page table explains prevent it, and so does a mapping that is not found.
    """
    memory = ksm.memory
    held = memory.pinned | memory.locked
    if page in held or (page.folio is not None and not held.isdisjoint(page.folio.pages)):
        return False
    if folio_test_ksm(page) and len(rmap_walk_ksm(page)) < page.mapcount:
        return False
    if page.folio is not None:
        pages = [each for each in page.folio.pages if each.mapcount]
        room = memory.nodes[nid].capacity - memory.nodes[nid].used
        return room >= len(pages) and all(memory.move_frame(each, nid) for each in pages)
    if not memory.move_frame(page, nid):
        return False
    folio_migrate_ksm(page)
    return True


# What add_page_for_migration says of an address: a page to queue, or a status.
def _to_queue(mm: Mm, address: int, nid: int, move_all: bool, queued: list[Page]) -> Page | int:
    vma = mm.vma_lookup(address)
    if vma is None:
        return -errno.EFAULT
    entry = vma.ptes[(address - vma.start) >> PAGE_SHIFT]
    if isinstance(entry, ZeroPte):
        return -errno.EFAULT
    if not isinstance(entry, Page):
        return -errno.ENOENT
    if page_to_nid(entry) == nid:
        return nid
    if entry.mapcount > 1 and not move_all:
        return -errno.EACCES
    if entry in queued or any(same_huge_page(entry, page) for page in queued):
        return -errno.EBUSY  # isolated already, by an alias: C36
    return entry


def move_pages(ksm: Ksm, mm: Mm, addresses: Sequence[int], nid: int, *, move_all: bool) -> tuple[int, list[int]]:
    """move_pages(2) of one process to one node, MPOL_MF_MOVE_ALL or MPOL_MF_MOVE.

    :return: what the call returns, and a status an address: the node, -errno, or NOT_WRITTEN
    :raises OSError: ENODEV, the node does not exist or has no memory; EACCES, the process's cpuset does not have it
    """
    if not 0 <= nid < ksm.memory.nr_node_ids or not ksm.memory.nodes[nid].online:
        raise OSError(errno.ENODEV, f"node {nid} does not exist")
    if addresses and mm.mems_allowed is not None and nid not in mm.mems_allowed:
        raise OSError(errno.EACCES, f"the cpuset of {mm.name} does not have node {nid}")
    status = [NOT_WRITTEN] * len(addresses)
    queued: list[Page] = []
    places: list[int] = []

    def flush() -> int:
        failed = 0
        for page, place in zip(queued, places, strict=True):
            if migrate_page(ksm, page, nid):
                status[place] = nid
            else:
                failed += 1
                if ksm.profile.move_again_status:
                    status[place] = -errno.EAGAIN
        if failed and not ksm.profile.move_again_status:
            for place in places:
                status[place] = NOT_WRITTEN
        queued.clear()
        places.clear()
        return 0 if ksm.profile.move_again_status else failed

    for place, address in enumerate(addresses):
        found = _to_queue(mm, address, nid, move_all, queued)
        if isinstance(found, Page):
            queued.append(found)
            places.append(place)
            continue
        status[place] = found
        failed = flush()
        if failed:
            return failed + len(addresses) - place - 1, status
    return flush(), status


def swap_out_page(memory: Memory, mms: Iterable[Mm], page: Page) -> bool:
    """Put an entry for swap in place of every mapping of a page; its stable node goes stale (engine.md 14.9).

    :param mms: all address spaces
    :return: False where a mapping is not found, or something else holds the page
    """
    if folio_test_ksm(page):
        mappings = rmap_walk_ksm(page)
    else:
        vmas = [vma for mm in mms for vma in mm.vmas]
        mappings = [(vma, index) for vma in vmas for index, entry in enumerate(vma.ptes) if entry is page]
    if page.mapcount != len(mappings) or page in memory.pinned:
        return False
    swapped = SwapEntry(page.content, len(mappings))
    for vma, index in mappings:
        vma.ptes[index] = swapped
        memory.unmap(page)
    return True


# -- memory going offline: ksm_memory_callback (engine.md 14.14) -----------------------------------------------------


def mem_going_offline(ksm: Ksm) -> None:
    """MEM_GOING_OFFLINE: ksmd is stopped."""
    ksm.run |= KSM_RUN_OFFLINE


def mem_cancel_offline(ksm: Ksm) -> None:
    """MEM_CANCEL_OFFLINE: the memory stays."""
    ksm.run &= ~KSM_RUN_OFFLINE


def mem_offline(ksm: Ksm, node: MemoryNode) -> None:
    """MEM_OFFLINE: the memory of a node is gone."""
    start_pfn = node.nid << PFN_NID_SHIFT
    ksm_check_stable_tree(ksm, start_pfn, start_pfn + (1 << PFN_NID_SHIFT))
    node.online = False
    ksm.run &= ~KSM_RUN_OFFLINE


def ksm_check_stable_tree(ksm: Ksm, start_pfn: int, end_pfn: int) -> None:
    """Delete the nodes that still point into a range of frames that is gone."""
    for root in ksm.root_stable_tree[: ksm.nr_node_ids]:
        node = rb_first(root)
        while node is not None:
            if stable_node_chain_remove_range(ksm, node, start_pfn, end_pfn, root):
                node = rb_first(root)
            else:
                after = rb_next(node)
                assert after is None or isinstance(after, StableNode)
                node = after
    for stable_node in ksm.migrate_nodes:
        stable_node_dup_remove_range(ksm, stable_node, start_pfn, end_pfn)


def stable_node_chain_remove_range(
    ksm: Ksm, stable_node: StableNode, start_pfn: int, end_pfn: int, root: RbRoot[StableNode]
) -> bool:
    """ksm_check_stable_tree for a node of the tree; whether the tree was rebalanced."""
    if stable_node.dups is None:
        return stable_node_dup_remove_range(ksm, stable_node, start_pfn, end_pfn)
    for dup in stable_node.dups:
        stable_node_dup_remove_range(ksm, dup, start_pfn, end_pfn)
    if len(stable_node.dups):
        return False
    free_stable_node_chain(ksm, stable_node, root)
    return True


def stable_node_dup_remove_range(ksm: Ksm, stable_node: StableNode, start_pfn: int, end_pfn: int) -> bool:
    """ksm_check_stable_tree for one node; whether it was deleted."""
    if not start_pfn <= stable_node.kpfn < end_pfn:
        return False
    remove_node_from_stable_tree(ksm, stable_node)
    return True
