# SPDX-License-Identifier: GPL-2.0-or-later
"""Moving pages between nodes, and finding who maps them (engine.md 9)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from ksmd_ctl.engine.memory import PAGE_SHIFT, Page, ZeroPte
from ksmd_ctl.engine.mm import Mm, Vma
from ksmd_ctl.engine.state import Ksm, page_ksm, page_stable_node, page_to_nid

__all__ = ["NOT_WRITTEN", "ksm_migrate_page", "migrate_page", "move_pages", "rmap_walk_ksm"]

#: The status of an address that move_pages said nothing about.
NOT_WRITTEN: Final = -1000


def rmap_walk_ksm(page: Page) -> list[tuple[Vma, int]]:
    """The mappings of a KSM page that can be found from its node's rmap_items (engine.md 9.7).

    First those listed, then the same addresses in what was forked from them since. A mapping that no
    listed rmap_item leads to is not found.
    """
    stable_node = page_stable_node(page)
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


def ksm_migrate_page(page: Page) -> None:
    """Tell the stable node that its page has another frame, and nothing else (engine.md 9.1).

    The tree can't be touched here: a node whose page changed its memory node is misplaced until ksmd
    finds out.
    """
    stable_node = page_stable_node(page)
    if stable_node is not None:
        stable_node.kpfn = page.pfn


def migrate_page(ksm: Ksm, page: Page, nid: int) -> bool:
    """Move a page to a node; False where it can't be moved now (-EAGAIN).

    References that no page table explains prevent it, and so does a mapping that is not found.
    """
    memory = ksm.memory
    if page in memory.pinned or page in memory.locked:
        return False
    if page_ksm(page) and len(rmap_walk_ksm(page)) < page.mapcount:
        return False
    if not memory.move_frame(page, nid):
        return False
    if page in memory.huge:
        memory.split_huge_page(page)
    ksm_migrate_page(page)
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
    if entry in queued:
        return -errno.EBUSY  # isolated already, by an alias: C36
    return entry


def move_pages(ksm: Ksm, mm: Mm, addresses: Sequence[int], nid: int, *, move_all: bool) -> tuple[int, list[int]]:
    """move_pages(2) of one process to one node, MPOL_MF_MOVE_ALL or MPOL_MF_MOVE.

    :return: what the call returns, and a status an address: the node, -errno, or NOT_WRITTEN
    :raises OSError: ENODEV, the node does not exist or has no memory
    """
    if not 0 <= nid < ksm.memory.nr_node_ids or not ksm.memory.nodes[nid].online:
        raise OSError(errno.ENODEV, f"node {nid} does not exist")
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
