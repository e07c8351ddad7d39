# SPDX-License-Identifier: GPL-2.0-or-later
"""Merging two pages into one (engine.md 5). As in the kernel, 0 says that it was done and -EFAULT that it was not."""

from __future__ import annotations

import errno

from ksmd_ctl.engine.memory import PAGE_SHIFT, PAGE_SIZE, ZERO_CONTENT, Page, ZeroPte
from ksmd_ctl.engine.mm import Vma, break_ksm, find_mergeable_vma, split_huge_page
from ksmd_ctl.engine.state import NULL_STABLE_NODE, Ksm, RmapItem, folio_test_ksm
from ksmd_ctl.engine.trees import remove_rmap_item_from_tree


def break_cow(ksm: Ksm, rmap_item: RmapItem) -> None:
    """Undo what was just merged at an rmap_item."""
    vma = find_mergeable_vma(rmap_item.mm, rmap_item.address)
    if vma is not None:
        break_ksm(ksm, vma, rmap_item.address, rmap_item.address + PAGE_SIZE, ksm.ksmd_nid)


def write_protect_page(ksm: Ksm, page: Page) -> int:
    """See to it that nobody can write to a page (engine.md 5.3).

    References that the page tables don't explain prevent it. So does a KSM page: its address in the VMA is looked up
    by its anon_vma, and it has none. The commit message of `seed` has no such limit.
    """
    if folio_test_ksm(page) and not ksm.profile.remerge:
        return -errno.EFAULT
    return -errno.EFAULT if page in ksm.memory.pinned else 0


def replace_page(ksm: Ksm, vma: Vma, index: int, page: Page, kpage: Page) -> None:
    """Map kpage where page is mapped, and free page with its last mapping (engine.md 5.5)."""
    kpage.mapcount += 1
    vma.ptes[index] = kpage
    ksm.memory.unmap(page)


def try_to_merge_one_page(ksm: Ksm, vma: Vma, address: int, page: Page, kpage: Page | None) -> int:
    """Map a KSM page in place of a page with the same content, or make the page itself one.

    :param kpage: the page to map; None to upgrade the page, whose back link is then null
    """
    if page is kpage:
        return 0  # a KSM page that was forked: 5.2
    index = (address - vma.start) >> PAGE_SHIFT
    if page in ksm.memory.locked or not split_huge_page(ksm, page):
        return -errno.EFAULT
    # The split may have given the page back.
    if vma.ptes[index] is not page or write_protect_page(ksm, page):
        return -errno.EFAULT
    if kpage is None:
        page.stable_node = NULL_STABLE_NODE
        return 0
    if page.content is not kpage.content:
        return -errno.EFAULT
    replace_page(ksm, vma, index, page, kpage)
    return 0


def try_to_merge_with_zero_page(ksm: Ksm, rmap_item: RmapItem, page: Page) -> int:
    """Map the zero page in place of a page of zeroes (engine.md 3.10, 5.6).

    :return: 0 also where the page is no candidate any more
    """
    if not ksm.use_zero_pages or rmap_item.oldchecksum != ksm.zero_checksum:
        return -errno.EFAULT
    vma = find_mergeable_vma(rmap_item.mm, rmap_item.address)
    if vma is None:
        return 0
    if page in ksm.memory.locked or not split_huge_page(ksm, page):
        return -errno.EFAULT
    index = (rmap_item.address - vma.start) >> PAGE_SHIFT
    if vma.ptes[index] is not page or write_protect_page(ksm, page) or page.content is not ZERO_CONTENT:
        return -errno.EFAULT
    if ksm.profile.zero_counted:
        vma.ptes[index] = ZeroPte.KSM
        ksm.zero_pages += 1
        vma.mm.ksm_zero_pages += 1
    else:
        vma.ptes[index] = ZeroPte.ZERO
    ksm.memory.unmap(page)
    return 0


def try_to_merge_with_ksm_page(ksm: Ksm, rmap_item: RmapItem, page: Page, kpage: Page | None) -> int:
    """try_to_merge_one_page for an rmap_item, which is taken out of its tree where that succeeds."""
    vma = find_mergeable_vma(rmap_item.mm, rmap_item.address)
    if vma is None:
        return -errno.EFAULT
    err = try_to_merge_one_page(ksm, vma, rmap_item.address, page, kpage)
    if err:
        return err
    remove_rmap_item_from_tree(ksm, rmap_item)  # nid lies over anon_vma: 1.4
    rmap_item.anon_vma = vma.anon_vma
    return 0


def same_huge_page(page: Page, other: Page) -> bool:
    """Whether both are part of one huge page. Held twice, it can't be split."""
    return page.folio is not None and page.folio is other.folio


def try_to_merge_two_pages(
    ksm: Ksm, rmap_item: RmapItem, page: Page, tree_rmap_item: RmapItem, tree_page: Page
) -> Page | None:
    """Make the page being scanned a KSM page and map it in place of its partner (engine.md 5.4).

    :return: the KSM page, None where they were not merged
    """
    if same_huge_page(page, tree_page) or try_to_merge_with_ksm_page(ksm, rmap_item, page, None):
        return None
    if try_to_merge_with_ksm_page(ksm, tree_rmap_item, tree_page, page):
        break_cow(ksm, rmap_item)
        return None
    return page
