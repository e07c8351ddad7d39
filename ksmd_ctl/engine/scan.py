# SPDX-License-Identifier: GPL-2.0-or-later
"""ksmd: the walk over all registered memory, and what it does with each page."""

from __future__ import annotations

from collections.abc import Iterator

from ksmd_ctl.engine.advisor import advisor_start_scan, advisor_stop_scan
from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, PFN_NID_SHIFT, Page
from ksmd_ctl.engine.merge import (
    break_cow,
    try_to_merge_two_pages,
    try_to_merge_with_ksm_page,
    try_to_merge_with_zero_page,
)
from ksmd_ctl.engine.registry import mm_slot_free
from ksmd_ctl.engine.stable import BUSY, stable_tree_append, stable_tree_insert, stable_tree_search
from ksmd_ctl.engine.stable_node import (
    exile,
    get_ksm_page,
    is_page_sharing_candidate,
    remove_rmap_item_from_tree,
    stable_node_dup_del,
)
from ksmd_ctl.engine.state import Ksm, calc_checksum, page_stable_node
from ksmd_ctl.engine.structs import NONE, NULL_STABLE_NODE, Head, MmSlot, RmapItem
from ksmd_ctl.engine.unstable import unstable_tree_search_insert

__all__ = [
    "cmp_and_merge_page",
    "get_next_rmap_item",
    "ksm_do_scan",
    "prune_migrate_nodes",
    "remove_trailing_rmap_items",
    "scan_get_next_rmap_item",
    "should_skip_rmap_item",
    "skip_age",
]


def ksm_do_scan(ksm: Ksm, scan_npages: int) -> int:
    """One batch: so many pages at most, never beyond the end of a full scan (engine.md 2.2).

    :return: how many pages were scanned
    """
    scanned = 0
    if scan_npages <= 0:
        return scanned
    for rmap_item, page in scan_get_next_rmap_item(ksm):
        cmp_and_merge_page(ksm, page, rmap_item)
        scanned += 1
        if scanned == scan_npages:
            break
    ksm.pages_scanned += scanned
    return scanned


def prune_migrate_nodes(ksm: Ksm) -> None:
    """Drop exiles whose pages are gone, which nobody's search would brush past (engine.md 2.5)."""
    for stable_node in ksm.migrate_nodes:
        get_ksm_page(ksm, stable_node)


def scan_get_next_rmap_item(ksm: Ksm) -> Iterator[tuple[RmapItem, Page]]:
    """Step the cursor to the next page, again and again for as long as a batch asks.

    What the kernel returns call by call is yielded here one by one. Nothing may change an address
    space between two pages of a batch; between two batches everything may. It ends where the kernel
    returns nothing: at the end of the full scan, or where no mm is registered.
    """
    scan = ksm.scan
    head = ksm.mm_head
    if head.next is head:
        return
    slot = scan.mm_slot
    if slot is head:
        advisor_start_scan(ksm)
        if not ksm.merge_across_nodes:
            prune_migrate_nodes(ksm)
        for nid in range(ksm.nr_trees):
            ksm.root_unstable_tree[nid].rb_node = None
        slot = head.next
        _next_mm(ksm, slot)
    smart_scan = ksm.smart_scan
    while slot is not head:
        mm = slot.mm
        assert mm is not None
        if not mm.exited:
            for vma in mm.vmas[mm.first_vma(scan.address) :]:
                if not vma.mergeable:
                    continue
                scan.address = max(scan.address, vma.start)
                if vma.anon_vma is None:
                    scan.address = vma.end
                    continue
                link = scan.rmap_list
                ptes = vma.ptes
                address = scan.address
                for index in range((address - vma.start) >> PAGE_SHIFT, len(ptes)):
                    page = ptes[index]
                    if not isinstance(page, Page):
                        continue
                    address = vma.start + (index << PAGE_SHIFT)
                    rmap_item = link.rmap_list
                    if rmap_item is None or rmap_item.address != address:
                        rmap_item = get_next_rmap_item(ksm, slot, link, address)
                    scan.rmap_list = link = rmap_item
                    if smart_scan and should_skip_rmap_item(ksm, page, rmap_item):
                        continue
                    scan.address = address + PAGE_SIZE
                    yield rmap_item, page
                scan.address = vma.end
        else:
            _next_mm(ksm, slot)  # the cursor back to the front: all items go
        remove_trailing_rmap_items(ksm, scan.rmap_list)
        after = slot.next
        scan.mm_slot = after
        if scan.address == 0:
            # No mergeable VMA was seen, or the mm is exiting: 2.8.
            mm_slot_free(slot)
        slot = after
        if slot is not head:
            _next_mm(ksm, slot)
    advisor_stop_scan(ksm)
    scan.seqnr += 1


# The cursor at the front of an mm.
def _next_mm(ksm: Ksm, slot: MmSlot) -> None:
    ksm.scan.mm_slot = slot
    ksm.scan.address = 0
    ksm.scan.rmap_list = slot


def get_next_rmap_item(ksm: Ksm, slot: MmSlot, link: RmapItem | MmSlot, address: int) -> RmapItem:
    """The rmap_item of an address, a new one if need be; frees those before it (engine.md 2.7)."""
    rmap_item = link.rmap_list
    while rmap_item is not None and rmap_item.address < address:
        link.rmap_list = rmap_item.rmap_list
        remove_rmap_item_from_tree(ksm, rmap_item)
        _free_rmap_item(ksm, rmap_item)
        rmap_item = link.rmap_list
    if rmap_item is not None and rmap_item.address == address:
        return rmap_item
    mm = slot.mm
    assert mm is not None
    rmap_item = RmapItem(mm, address, rmap_item)
    link.rmap_list = rmap_item
    ksm.rmap_items += 1
    mm.ksm_rmap_items += 1
    return rmap_item


def remove_trailing_rmap_items(ksm: Ksm, link: RmapItem | MmSlot) -> None:
    """Free all rmap_items from a link on (engine.md 2.8)."""
    while (rmap_item := link.rmap_list) is not None:
        link.rmap_list = rmap_item.rmap_list
        remove_rmap_item_from_tree(ksm, rmap_item)
        _free_rmap_item(ksm, rmap_item)


# Links are cleared so that what is freed can't keep anything alive.
def _free_rmap_item(ksm: Ksm, rmap_item: RmapItem) -> None:
    assert rmap_item.state == NONE
    ksm.rmap_items -= 1
    rmap_item.mm.ksm_rmap_items -= 1
    rmap_item.rb_parent = rmap_item.rb_left = rmap_item.rb_right = rmap_item.rmap_list = None


def skip_age(age: int) -> int:
    """How often a page of an age is passed over next (engine.md 12.3)."""
    if age <= 3:
        return 1
    if age <= 5:
        return 2
    if age <= 8:
        return 4
    return 8


def should_skip_rmap_item(ksm: Ksm, page: Page, rmap_item: RmapItem) -> bool:
    """Whether smart_scan passes over a page this time; counts its age (engine.md 12.1, 12.2)."""
    if page.stable_node is not None:
        return False
    age = rmap_item.age
    if age != 0xFF:
        rmap_item.age = age + 1
    if age < 3:
        return False
    if rmap_item.remaining_skips == 0:
        rmap_item.remaining_skips = skip_age(age)
        return False
    ksm.pages_skipped += 1
    rmap_item.remaining_skips -= 1
    remove_rmap_item_from_tree(ksm, rmap_item)
    return True


def cmp_and_merge_page(ksm: Ksm, page: Page, rmap_item: RmapItem) -> None:
    """Try to merge one page: with the stable tree, else with a partner in the unstable tree (3)."""
    stable_node = page.stable_node
    if stable_node is NULL_STABLE_NODE:
        stable_node = None
    max_page_sharing_bypass = False
    if stable_node is not None:
        # get_kpfn_nid, spelled out: this is all that happens to most merged pages.
        nid = 0 if ksm.merge_across_nodes else stable_node.kpfn >> PFN_NID_SHIFT
        head = stable_node.head
        if head is not Head.MIGRATE_NODES:
            if nid != stable_node.nid:
                stable_node_dup_del(ksm, stable_node)  # misplaced: 3.1
                exile(ksm, stable_node)
            elif rmap_item.head is stable_node:
                return  # 3.2
        max_page_sharing_bypass = not is_page_sharing_candidate(ksm, stable_node)
    elif ksm.profile.checksum_first:
        remove_rmap_item_from_tree(ksm, rmap_item)
        if _checksum_changed(page, rmap_item):
            return
        if try_to_merge_with_zero_page(ksm, rmap_item, page):
            return

    kpage = stable_tree_search(ksm, page)
    if kpage is page and rmap_item.head is stable_node:
        return  # an exile that was put back, reached through a listed item: 3.5

    remove_rmap_item_from_tree(ksm, rmap_item)
    if kpage is BUSY:
        return
    if kpage is not None:
        if try_to_merge_with_ksm_page(ksm, rmap_item, page, kpage):
            node = page_stable_node(kpage)
            assert node is not None
            stable_tree_append(ksm, rmap_item, node, max_page_sharing_bypass)
        return

    if not ksm.profile.checksum_first:
        if _checksum_changed(page, rmap_item):
            return
        if try_to_merge_with_zero_page(ksm, rmap_item, page):
            return

    found = unstable_tree_search_insert(ksm, rmap_item, page)
    if found is not None:
        _merge_pair(ksm, rmap_item, page, *found)


# Whether a page changed since it was last looked at, which is remembered: 3.9, 3.13.
def _checksum_changed(page: Page, rmap_item: RmapItem) -> bool:
    checksum = calc_checksum(page.content)
    if rmap_item.oldchecksum == checksum:
        return False
    rmap_item.oldchecksum = checksum
    return True


# A partner was found in the unstable tree: 3.11.
def _merge_pair(ksm: Ksm, rmap_item: RmapItem, page: Page, tree_rmap_item: RmapItem, tree_page: Page) -> None:
    huge = ksm.memory.huge
    same_huge = page in huge and huge.get(tree_page) is huge[page]
    if not try_to_merge_two_pages(ksm, rmap_item, page, tree_rmap_item, tree_page):
        if same_huge and ksm.profile.split_later and page not in ksm.memory.locked:
            ksm.memory.split_huge_page(page)
        return
    stable_node = stable_tree_insert(ksm, page)
    if stable_node is None:
        break_cow(ksm, tree_rmap_item)
        break_cow(ksm, rmap_item)
        return
    stable_tree_append(ksm, tree_rmap_item, stable_node, False)
    stable_tree_append(ksm, rmap_item, stable_node, False)
