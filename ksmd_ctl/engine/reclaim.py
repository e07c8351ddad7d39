# SPDX-License-Identifier: GPL-2.0-or-later
"""Swapping pages out, as far as KSM notices it: their stable nodes go stale."""

from __future__ import annotations

from collections.abc import Iterable

from ksmd_ctl.engine.memory import PAGE_SHIFT, Memory, Page, SwapEntry
from ksmd_ctl.engine.migrate import rmap_walk_ksm
from ksmd_ctl.engine.mm import Mm, Vma
from ksmd_ctl.engine.state import page_ksm

__all__ = ["swap_out_page"]


def swap_out_page(memory: Memory, mms: Iterable[Mm], page: Page, address: int) -> bool:
    """Put an entry for swap in place of every mapping of a page (engine.md 14.9).

    :param mms: all address spaces
    :param address: where one of them maps it; forks of a plain page have it at the same address
    :return: False where a mapping is not found, or something else holds the page
    """
    mappings = rmap_walk_ksm(page) if page_ksm(page) else _mappings(mms, page, address)
    if page.mapcount != len(mappings) or page in memory.pinned:
        return False
    entry = SwapEntry(page.content, len(mappings))
    for vma, index in mappings:
        vma.ptes[index] = entry
        memory.unmap(page)
    return True


def _mappings(mms: Iterable[Mm], page: Page, address: int) -> list[tuple[Vma, int]]:
    found = []
    for mm in mms:
        vma = mm.vma_lookup(address)
        if vma is not None and mm.pte(address) is page:
            found.append((vma, (address - vma.start) >> PAGE_SHIFT))
    return found
