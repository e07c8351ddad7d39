# SPDX-License-Identifier: GPL-2.0-or-later
"""Merging two pages into one, and breaking them apart again (engine.md 5)."""

from __future__ import annotations

from ksmd_ctl.engine.fault import unshare_fault
from ksmd_ctl.engine.memory import PAGE_SHIFT, ZERO_CONTENT, Page, ZeroPte
from ksmd_ctl.engine.mm import Mm, Vma
from ksmd_ctl.engine.stable_node import remove_rmap_item_from_tree
from ksmd_ctl.engine.state import Ksm, page_ksm
from ksmd_ctl.engine.structs import NULL_STABLE_NODE, RmapItem

__all__ = [
    "break_cow",
    "break_ksm",
    "find_mergeable_vma",
    "get_mergeable_page",
    "try_to_merge_one_page",
    "try_to_merge_two_pages",
    "try_to_merge_with_ksm_page",
    "try_to_merge_with_zero_page",
    "unmerge_ksm_pages",
    "write_protect_page",
]


def find_mergeable_vma(mm: Mm, address: int) -> Vma | None:
    """The VMA at an address, where KSM may work on it."""
    if mm.exited:
        return None
    vma = mm.vma_lookup(address)
    if vma is None or not vma.mergeable or vma.anon_vma is None:
        return None
    return vma


def get_mergeable_page(rmap_item: RmapItem) -> Page | None:
    """The page that is mapped at an rmap_item's address now (engine.md 6.1)."""
    vma = find_mergeable_vma(rmap_item.mm, rmap_item.address)
    if vma is None:
        return None
    entry = vma.ptes[(rmap_item.address - vma.start) >> PAGE_SHIFT]
    return entry if isinstance(entry, Page) else None


def break_ksm(ksm: Ksm, vma: Vma, address: int, nid: int) -> None:
    """Give a mapping a page of its own where it maps a KSM page; touches no other page."""
    entry = vma.ptes[(address - vma.start) >> PAGE_SHIFT]
    if entry is ZeroPte.KSM or (isinstance(entry, Page) and page_ksm(entry)):
        unshare_fault(ksm, vma, address, nid)


def break_cow(ksm: Ksm, rmap_item: RmapItem) -> None:
    """Undo what was just merged at an rmap_item."""
    vma = find_mergeable_vma(rmap_item.mm, rmap_item.address)
    if vma is not None:
        break_ksm(ksm, vma, rmap_item.address, ksm.ksmd_nid)


def unmerge_ksm_pages(ksm: Ksm, vma: Vma, nid: int) -> None:
    """Break all KSM pages of a VMA; their rmap_items wait for ksmd's next pass (engine.md 8.6).

    :raises OSError: ENOMEM, no node has room for the copies
    """
    for index, entry in enumerate(vma.ptes):
        if entry is not None:
            break_ksm(ksm, vma, vma.start + (index << PAGE_SHIFT), nid)


def write_protect_page(ksm: Ksm, page: Page) -> bool:
    """Whether nobody can write to a page any more (engine.md 5.3).

    References that the page tables don't explain prevent it. So does a KSM page: its address in the
    VMA is looked up by its anon_vma, and it has none. The seed's description has no such limit.
    """
    if page_ksm(page) and not ksm.profile.remerge:
        return False
    return page not in ksm.memory.pinned


# Map kpage where page is mapped, and free page with its last mapping (engine.md 5.5).
def _replace_page(ksm: Ksm, vma: Vma, index: int, page: Page, kpage: Page) -> None:
    kpage.mapcount += 1
    vma.ptes[index] = kpage
    ksm.memory.unmap(page)


# A huge page has to be split first, which may fail while the partner in the same huge page is held.
def _split_for_merge(ksm: Ksm, page: Page, held: Page | None) -> bool:
    if page in ksm.memory.huge:
        partner = held is not None and ksm.memory.huge.get(held) is ksm.memory.huge[page]
        if partner and not ksm.profile.split_held:
            return False
        ksm.memory.split_huge_page(page)
    return True


def try_to_merge_one_page(
    ksm: Ksm, vma: Vma, address: int, page: Page, kpage: Page | None, held: Page | None = None
) -> bool:
    """Map a KSM page in place of a page with the same content, or make the page itself one.

    :param kpage: the page to map; None to upgrade the page, whose back link is then null
    :param held: another page that the caller holds
    :return: whether it was done
    """
    if page is kpage:
        return True  # a KSM page that was forked: 5.2
    if page in ksm.memory.locked or not _split_for_merge(ksm, page, held):
        return False
    index = (address - vma.start) >> PAGE_SHIFT
    if vma.ptes[index] is not page or not write_protect_page(ksm, page):
        return False
    if kpage is None:
        page.stable_node = NULL_STABLE_NODE
        return True
    if page.content is not kpage.content:
        return False
    _replace_page(ksm, vma, index, page, kpage)
    return True


def try_to_merge_with_zero_page(ksm: Ksm, rmap_item: RmapItem, page: Page) -> bool:
    """Map the zero page in place of a page of zeroes (engine.md 3.10, 5.6).

    :return: True where that was done, or where the page is no candidate any more
    """
    if not ksm.use_zero_pages or rmap_item.oldchecksum != ksm.zero_checksum:
        return False
    vma = find_mergeable_vma(rmap_item.mm, rmap_item.address)
    if vma is None:
        return True
    if page in ksm.memory.locked or not _split_for_merge(ksm, page, None):
        return False
    if not write_protect_page(ksm, page) or page.content is not ZERO_CONTENT:
        return False
    index = (rmap_item.address - vma.start) >> PAGE_SHIFT
    if ksm.profile.zero_counted:
        vma.ptes[index] = ZeroPte.KSM
        ksm.zero_pages += 1
        vma.mm.ksm_zero_pages += 1
    else:
        vma.ptes[index] = ZeroPte.ZERO
    ksm.memory.unmap(page)
    return True


def try_to_merge_with_ksm_page(
    ksm: Ksm, rmap_item: RmapItem, page: Page, kpage: Page | None, held: Page | None = None
) -> bool:
    """try_to_merge_one_page for an rmap_item, which is taken out of its tree where that succeeds."""
    vma = find_mergeable_vma(rmap_item.mm, rmap_item.address)
    if vma is None:
        return False
    if not try_to_merge_one_page(ksm, vma, rmap_item.address, page, kpage, held):
        return False
    remove_rmap_item_from_tree(ksm, rmap_item)  # nid lies over anon_vma: 1.4
    rmap_item.anon_vma = vma.anon_vma
    return True


def try_to_merge_two_pages(
    ksm: Ksm, rmap_item: RmapItem, page: Page, tree_rmap_item: RmapItem, tree_page: Page
) -> bool:
    """Make the page being scanned a KSM page and map it in place of its partner (engine.md 5.4)."""
    if not try_to_merge_with_ksm_page(ksm, rmap_item, page, None, tree_page):
        return False
    if try_to_merge_with_ksm_page(ksm, tree_rmap_item, tree_page, page):
        return True
    break_cow(ksm, rmap_item)
    return False
