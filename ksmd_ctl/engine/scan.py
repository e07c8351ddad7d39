# SPDX-License-Identifier: GPL-2.0-or-later
"""ksmd: the walk over all registered memory, and what it does with each page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, PFN_NID_SHIFT, Page
from ksmd_ctl.engine.merge import (
    break_cow,
    same_huge_page,
    try_to_merge_two_pages,
    try_to_merge_with_ksm_page,
    try_to_merge_with_zero_page,
)
from ksmd_ctl.engine.mm import split_huge_page
from ksmd_ctl.engine.registry import mm_slot_free
from ksmd_ctl.engine.state import (
    KSM_RUN_MERGE,
    KSM_RUN_OFFLINE,
    NONE,
    NULL_STABLE_NODE,
    AdvisorCtx,
    AdvisorMode,
    Head,
    Ksm,
    MmSlot,
    RmapItem,
    calc_checksum,
    folio_stable_node,
)
from ksmd_ctl.engine.trees import (
    BUSY,
    exile,
    is_listed_on,
    is_page_sharing_candidate,
    ksm_get_folio,
    remove_rmap_item_from_tree,
    stable_node_dup_del,
    stable_tree_append,
    stable_tree_insert,
    stable_tree_search,
    unstable_tree_search_insert,
)

_DEFAULT_PAGES_TO_SCAN: Final = 100
_EWMA_WEIGHT: Final = 30
_ADVISOR_MIN_CPU: Final = 10


# -- ksmd --------------------------------------------------------------------------------------------------------


def ksmd_should_run(ksm: Ksm) -> bool:
    """Merging is on, an mm is registered, and no memory is going offline."""
    run = ksm.run & KSM_RUN_MERGE and not ksm.run & KSM_RUN_OFFLINE
    return bool(run) and ksm.mm_head.next is not ksm.mm_head


def ksm_scan_thread(ksm: Ksm, batch: Callable[[int], int], time_ns: int, most_pages: int) -> int:
    """ksmd until a time: batches and sleeps, as its knobs say (engine.md 2.1).

    :param batch: does a batch of so many pages, which takes time; returns how many it scanned
    :param most_pages: stop early, between two batches, once so many pages were scanned
    :return: how many were
    """
    scanned = 0
    while ksm.now_ns < time_ns and scanned < most_pages:
        if not ksmd_should_run(ksm) or ksm.wakes_ns >= time_ns:
            ksm.now_ns = time_ns
        else:
            ksm.now_ns = max(ksm.now_ns, ksm.wakes_ns)
            scanned += batch(ksm.pages_to_scan)
            ksm.wakes_ns = ksm.now_ns + max(ksm.sleep_millisecs * 1_000_000, 50_000)
    return scanned


def ksm_do_scan(ksm: Ksm, scan_npages: int) -> int:
    """One batch of at most so many pages, never beyond the end of a full scan (engine.md 2.2); how many it was."""
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


def scan_get_next_rmap_item(ksm: Ksm) -> Iterator[tuple[RmapItem, Page]]:
    """Step the cursor from page to page.

    The kernel calls this once a page; here a batch is one generator, which is faster. It ends where the kernel
    returns NULL: at the end of the full scan, or where no mm is registered. Address spaces may change between two
    batches, not between two pages of one.
    """
    scan = ksm.scan
    head = ksm.mm_head
    if head.next is head:
        return
    slot = scan.mm_slot
    if slot is head:
        advisor_start_scan(ksm)
        if not ksm.merge_across_nodes:
            # No search meets exiles whose pages are gone (engine.md 2.5).
            for stable_node in ksm.migrate_nodes:
                ksm_get_folio(ksm, stable_node)
        for nid in range(ksm.nr_node_ids):
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
            _next_mm(ksm, slot)  # back to its front: all items go
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
        free_rmap_item(ksm, rmap_item)
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
        free_rmap_item(ksm, rmap_item)


def free_rmap_item(ksm: Ksm, rmap_item: RmapItem) -> None:
    """Count an rmap_item no more; its links go, so that it keeps nothing alive."""
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
    """Try to merge one page: with the stable tree, else with a partner in the unstable tree (engine.md 3)."""
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
            elif is_listed_on(ksm, rmap_item, stable_node):
                return  # 3.2
        max_page_sharing_bypass = not is_page_sharing_candidate(ksm, stable_node)
    elif ksm.profile.checksum_first:
        remove_rmap_item_from_tree(ksm, rmap_item)
        if _checksum_changed(page, rmap_item):
            return
        if not try_to_merge_with_zero_page(ksm, rmap_item, page):
            return

    kpage = stable_tree_search(ksm, page)
    if kpage is page and stable_node is not None and is_listed_on(ksm, rmap_item, stable_node):
        return  # an exile that was put back, reached through a listed item: 3.5

    remove_rmap_item_from_tree(ksm, rmap_item)
    if kpage is BUSY:
        return
    if kpage is not None:
        if not try_to_merge_with_ksm_page(ksm, rmap_item, page, kpage):
            node = folio_stable_node(kpage)
            assert node is not None
            stable_tree_append(ksm, rmap_item, node, max_page_sharing_bypass)
        return

    if not ksm.profile.checksum_first:
        if _checksum_changed(page, rmap_item):
            return
        if not try_to_merge_with_zero_page(ksm, rmap_item, page):
            return

    found = unstable_tree_search_insert(ksm, rmap_item, page)
    if found is None:
        return
    tree_rmap_item, tree_page = found
    if try_to_merge_two_pages(ksm, rmap_item, page, tree_rmap_item, tree_page) is None:
        if same_huge_page(page, tree_page):
            split_huge_page(ksm, page)  # for the next scan
        return
    stable_node = stable_tree_insert(ksm, page)
    if stable_node is None:
        break_cow(ksm, tree_rmap_item)
        break_cow(ksm, rmap_item)
        return
    stable_tree_append(ksm, tree_rmap_item, stable_node, False)
    stable_tree_append(ksm, rmap_item, stable_node, False)


# Whether a page changed since it was last looked at, which is remembered: 3.9, 3.13.
def _checksum_changed(page: Page, rmap_item: RmapItem) -> bool:
    checksum = calc_checksum(page.content)
    if rmap_item.oldchecksum == checksum:
        return False
    rmap_item.oldchecksum = checksum
    return True


# -- the scan-time advisor: pages_to_scan from the length of the last full scan (engine.md 13) ------------------------


def set_advisor_defaults(ksm: Ksm) -> None:
    """What switching the mode does to pages_to_scan (engine.md 13.6, 13.7)."""
    if ksm.advisor is AdvisorMode.NONE:
        ksm.pages_to_scan = _DEFAULT_PAGES_TO_SCAN
    else:
        ksm.advisor_ctx = AdvisorCtx()
        ksm.pages_to_scan = ksm.advisor_min_pages_to_scan


def advisor_start_scan(ksm: Ksm) -> None:
    """A full scan begins."""
    if ksm.advisor is AdvisorMode.SCAN_TIME:
        ksm.advisor_ctx.start_scan_ns = ksm.now_ns


def advisor_stop_scan(ksm: Ksm) -> None:
    """A full scan has ended."""
    if ksm.advisor is AdvisorMode.SCAN_TIME:
        scan_time_advisor(ksm)


def scan_time_advisor(ksm: Ksm) -> None:
    """Evaluate: whole numbers, truncated as the kernel does (engine.md 13.1 to 13.5).

    The CPU time is that since the last evaluation, and at the first one since ksmd was born.
    """
    ctx = ksm.advisor_ctx
    scan_time = max(1, (ksm.now_ns - ctx.start_scan_ns) // 1_000_000_000)
    cpu_ms = (ksm.cpu_ns - ctx.cpu_time_ns) // 1_000_000
    cpu_percent = max(1, cpu_ms * 100 // (scan_time * 1000))
    factor = max(1, ksm.advisor_target_scan_time * 100 // scan_time)
    change = max(1, scan_time * 100 // (ctx.scan_time or scan_time))
    change = ((100 - _EWMA_WEIGHT) * ctx.change + _EWMA_WEIGHT * change) // 100
    pages = ksm.pages_to_scan * 100 // factor
    pages = pages * change // 100
    per_page_cost = max(1, ksm.pages_to_scan // cpu_percent)
    pages = min(pages, per_page_cost * ksm.advisor_max_cpu)
    pages = max(pages, per_page_cost * _ADVISOR_MIN_CPU)
    pages = min(pages, ksm.advisor_max_pages_to_scan)
    ctx.change = change
    ctx.scan_time = scan_time
    ctx.cpu_time_ns = ksm.cpu_ns
    ksm.pages_to_scan = pages & 0xFFFFFFFF
