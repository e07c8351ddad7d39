# SPDX-License-Identifier: GPL-2.0-or-later
"""What changes page tables: faults that allocate and copy, and what takes pages away again.

``nid`` is the node that the task at work prefers; a VMA's own policy goes before it (engine.md 14.1).
"""

from __future__ import annotations

from ksmd_ctl.engine.memory import PAGE_SHIFT, ZERO_CONTENT, Page, SwapEntry, ZeroPte
from ksmd_ctl.engine.mm import Vma
from ksmd_ctl.engine.state import Ksm, page_ksm

__all__ = ["read_fault", "unshare_fault", "write_fault", "zap_pte"]


# A new page in an entry; the old one goes only when that has succeeded.
def _set_new_page(ksm: Ksm, vma: Vma, index: int, content: bytes, nid: int) -> Page:
    page = ksm.memory.alloc_page(content, nid if vma.policy is None else vma.policy)
    vma.anon_vma_prepare()
    zap_pte(ksm, vma, index)
    vma.ptes[index] = page
    return page


def zap_pte(ksm: Ksm, vma: Vma, index: int) -> None:
    """Empty an entry: what munmap, MADV_DONTNEED and exit do to each (engine.md 14.5)."""
    entry = vma.ptes[index]
    vma.ptes[index] = None
    if isinstance(entry, Page):
        ksm.memory.unmap(entry)
    elif entry is ZeroPte.KSM:
        ksm.zero_pages -= 1
        vma.mm.ksm_zero_pages -= 1
    elif isinstance(entry, SwapEntry):
        entry.count -= 1


def read_fault(ksm: Ksm, vma: Vma, address: int, nid: int) -> bytes:
    """Read a page: touches it where it was not, brings it back where it was swapped out."""
    index = (address - vma.start) >> PAGE_SHIFT
    entry = vma.ptes[index]
    if isinstance(entry, Page):
        return entry.content
    if isinstance(entry, SwapEntry):
        return _swap_in(ksm, vma, index, entry, nid).content
    if entry is None:
        vma.ptes[index] = ZeroPte.ZERO
    return ZERO_CONTENT


# do_swap_page with ksm_might_need_to_copy: the page that came back is shared only within the family
# of address spaces that first mapped it; others get copies (engine.md 14.9).
def _swap_in(ksm: Ksm, vma: Vma, index: int, entry: SwapEntry, nid: int) -> Page:
    vma.anon_vma_prepare()
    assert vma.anon_vma is not None
    root = vma.anon_vma.root
    page = entry.page
    if page is not None and page.mapcount and entry.root is root and page.content == entry.content:
        page.mapcount += 1
        vma.ptes[index] = page
        entry.count -= 1
        return page
    if page is not None and page.mapcount:
        ksm.swpin_copy += 1
    page = _set_new_page(ksm, vma, index, entry.content, nid)
    if entry.page is None:
        entry.page, entry.root = page, root
    return page


def write_fault(ksm: Ksm, vma: Vma, address: int, content: bytes, nid: int) -> None:
    """Write a page: a KSM page and a page shared by fork are copied first (engine.md 14.1)."""
    index = (address - vma.start) >> PAGE_SHIFT
    entry = vma.ptes[index]
    if isinstance(entry, SwapEntry):
        entry = _swap_in(ksm, vma, index, entry, nid)
    if isinstance(entry, Page) and entry.mapcount == 1 and not page_ksm(entry):
        ksm.memory.set_content(entry, content)
        return
    if isinstance(entry, Page) and page_ksm(entry):
        ksm.cow_ksm += 1
    _set_new_page(ksm, vma, index, content, nid)


def unshare_fault(ksm: Ksm, vma: Vma, address: int, nid: int) -> None:
    """Give a mapping of a KSM page, or of a zero page placed by KSM, a page of its own (14.2, 14.3)."""
    index = (address - vma.start) >> PAGE_SHIFT
    entry = vma.ptes[index]
    if isinstance(entry, Page):
        _set_new_page(ksm, vma, index, entry.content, nid)
        ksm.cow_ksm += 1
    else:
        _set_new_page(ksm, vma, index, ZERO_CONTENT, nid)
