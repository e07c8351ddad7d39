# SPDX-License-Identifier: GPL-2.0-or-later
"""Address spaces: VMAs with their page tables, who shares pages with whom by fork, and faults.

``nid`` of a fault is the node that the task at work prefers; a VMA's own policy goes before it (engine.md 14.1).
"""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from typing import Final

from ksmd_ctl.engine.memory import PAGE_SHIFT, ZERO_CONTENT, Page, Pte, SwapEntry, ZeroPte
from ksmd_ctl.engine.state import Ksm, MmSlot, RmapItem, folio_test_ksm, page_to_nid

_START: Final = attrgetter("start")


class AnonVma:
    """``struct anon_vma``: the VMAs that may map pages first written through one VMA.

    These are that VMA and those that fork made of it since: a parent's reaches its children's VMAs and not the other
    way round (engine.md 9.7).

    :ivar root: the oldest ancestor's
    """

    __slots__ = ("root", "vmas")

    def __init__(self, root: AnonVma | None = None) -> None:
        self.root: AnonVma = self if root is None else root
        self.vmas: dict[Vma, None] = {}


class Vma:
    """``struct vm_area_struct`` of private anonymous memory, with its page table entries.

    :ivar end: the address after its last page
    :ivar mergeable: VM_MERGEABLE
    :ivar writable: PROT_WRITE
    :ivar compatible: False of a kind that KSM ignores (engine.md 14.11)
    :ivar policy: the node that it is bound to, None where it has no policy
    :ivar moved: how far it was moved by mremap since its first page was written: ``vm_pgoff`` follows the VMA till then
    :ivar anon_vma: None until a page was first written
    :ivar chain: all the AnonVma that reach it, its own last
    :ivar ptes: an entry a page
    """

    __slots__ = (
        "anon_vma",
        "chain",
        "compatible",
        "end",
        "mergeable",
        "mm",
        "moved",
        "policy",
        "ptes",
        "start",
        "writable",
    )

    def __init__(self, mm: Mm, start: int, pages: int) -> None:
        self.mm = mm
        self.start = start
        self.end = start + (pages << PAGE_SHIFT)
        self.mergeable = False
        self.writable = True
        self.compatible = True
        self.policy: int | None = None
        self.moved = 0
        self.anon_vma: AnonVma | None = None
        self.chain: list[AnonVma] = []
        self.ptes: list[Pte] = [None] * pages

    def __repr__(self) -> str:
        return f"<vma {self.mm.name} {self.start:#x}-{self.end:#x}>"

    def anon_vma_prepare(self) -> None:
        """Give the VMA an anon_vma of its own before its first page is written."""
        if self.anon_vma is None:
            self._own(AnonVma())

    def _own(self, anon_vma: AnonVma) -> None:
        self.anon_vma = anon_vma
        self._join([anon_vma])

    def _join(self, chain: list[AnonVma]) -> None:
        for anon_vma in chain:
            anon_vma.vmas[self] = None
            self.chain.append(anon_vma)

    def fork_into(self, mm: Mm) -> Vma:
        """A child's copy, its entries still empty: reached through all of the parent's, and its own."""
        child = Vma(mm, self.start, len(self.ptes))
        self._copy_flags(child)
        if self.anon_vma is not None:
            child._join(self.chain)
            child._own(AnonVma(self.anon_vma.root))
        return child

    def _copy_flags(self, other: Vma) -> None:
        other.mergeable = self.mergeable
        other.writable = self.writable
        other.compatible = self.compatible
        other.policy = self.policy
        other.moved = self.moved

    def split(self, address: int) -> Vma:
        """``split_vma``: what lies from an address on becomes a VMA of its own, which is returned."""
        keep = (address - self.start) >> PAGE_SHIFT
        upper = Vma(self.mm, address, 0)
        self._copy_flags(upper)
        upper.ptes = self.ptes[keep:]
        upper.end = self.end
        del self.ptes[keep:]
        self.end = address
        if self.anon_vma is not None:
            upper._join(self.chain)
            upper.anon_vma = self.anon_vma
        return upper

    def alike(self, other: Vma) -> bool:
        """Whether the kernel would have made one of both, if they lay side by side."""
        names = ("mm", "anon_vma", "mergeable", "writable", "compatible", "policy", "moved")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def unlink(self) -> None:
        """The VMA goes: nobody finds a page through it any more."""
        for anon_vma in self.chain:
            anon_vma.vmas.pop(self, None)


class Mm:
    """``struct mm_struct``.

    :ivar name: of its process
    :ivar vmas: ascending by address
    :ivar policy: the node that its task prefers for memory without a VMA policy
    :ivar mems_allowed: the nodes of its task's cpuset; None: all
    :ivar exited: ksm_test_exit: no task has it any more (``mm_users`` is 0)
    :ivar slot: its mm_slot, None where it is not registered
    :ivar merge_any: MMF_VM_MERGE_ANY, of prctl(PR_SET_MEMORY_MERGE)
    :ivar ksm_merging_pages: its rmap_items on stable nodes' lists
    :ivar ksm_zero_pages: its pages that KSM replaced by the zero page
    :ivar inherited: values of ksm_merging_pages and ksm_rmap_items that a fork copied (engine.md 14.4)
    """

    def __init__(self, name: str, policy: int, mems_allowed: frozenset[int] | None = None) -> None:
        self.name = name
        self.policy = policy
        self.mems_allowed = mems_allowed
        self.vmas: list[Vma] = []
        self.last_vma: Vma | None = None
        self.exited = False
        self.slot: MmSlot | None = None
        self.merge_any = False
        self.ksm_merging_pages = 0
        self.ksm_rmap_items = 0
        self.ksm_zero_pages = 0
        self.inherited = (0, 0)

    def __repr__(self) -> str:
        return f"<mm {self.name}>"

    def vma_lookup(self, address: int) -> Vma | None:
        """The VMA that covers an address."""
        vma = self.last_vma
        if vma is None or not vma.start <= address < vma.end:
            index = bisect_right(self.vmas, address, key=_START) - 1
            if index < 0:
                return None
            vma = self.vmas[index]
            if address >= vma.end:
                return None
            self.last_vma = vma
        return vma

    def first_vma(self, address: int) -> int:
        """``find_vma``: the index of the first VMA that ends after an address."""
        index = bisect_right(self.vmas, address, key=_START)
        return index - 1 if index and self.vmas[index - 1].end > address else index

    def insert(self, vma: Vma) -> None:
        """Put a VMA in its place."""
        self.vmas.insert(bisect_right(self.vmas, vma.start, key=_START), vma)
        self.last_vma = None

    def remove(self, vma: Vma) -> None:
        """Take a VMA out; its entries must be gone already."""
        vma.unlink()
        self.vmas.remove(vma)
        self.last_vma = None

    def move(self, vma: Vma, start: int) -> None:
        """``copy_vma`` and ``move_page_tables``: a VMA with its entries goes to a free address."""
        self.vmas.remove(vma)
        if vma.anon_vma is not None:
            vma.moved += start - vma.start
        vma.end += start - vma.start
        vma.start = start
        self.insert(vma)

    def split_at(self, address: int) -> None:
        """Let a VMA begin at an address, where one covers it."""
        vma = self.vma_lookup(address)
        if vma is not None and vma.start < address:
            self.last_vma = None
            self.insert(vma.split(address))

    def covering(self, start: int, end: int) -> list[Vma]:
        """The VMAs that have pages in a range, split so that none has any outside it."""
        self.split_at(start)
        self.split_at(end)
        return [vma for vma in self.vmas if start <= vma.start and vma.end <= end]

    def pte(self, address: int) -> Pte:
        """The page table entry of an address, None also where nothing is mapped."""
        vma = self.vma_lookup(address)
        return None if vma is None else vma.ptes[(address - vma.start) >> PAGE_SHIFT]

    def page(self, address: int) -> Page | None:
        """The anonymous page mapped at an address."""
        entry = self.pte(address)
        return entry if isinstance(entry, Page) else None


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
    if find_mergeable_vma(rmap_item.mm, rmap_item.address) is None:
        return None
    return rmap_item.mm.page(rmap_item.address)


# -- faults ------------------------------------------------------------------------------------------------------


# A new page in an entry; the old one goes only when that has succeeded.
def _set_new_page(ksm: Ksm, vma: Vma, index: int, content: bytes, nid: int) -> Page:
    page = ksm.memory.alloc_page(content, nid if vma.policy is None else vma.policy)
    vma.anon_vma_prepare()
    zap_pte(ksm, vma, index)
    vma.ptes[index] = page
    return page


def zap_pte(ksm: Ksm, vma: Vma, index: int) -> None:
    """Empty an entry, as munmap, MADV_DONTNEED and exit do (engine.md 14.5)."""
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
    """Read a page: maps the zero page where nothing was, and swaps in what was swapped out."""
    index = (address - vma.start) >> PAGE_SHIFT
    entry = vma.ptes[index]
    if isinstance(entry, Page):
        return entry.content
    if isinstance(entry, SwapEntry):
        return _do_swap_page(ksm, vma, index, entry, nid).content
    if entry is None:
        vma.ptes[index] = ZeroPte.ZERO
    return ZERO_CONTENT


def ksm_might_need_to_copy(entry: SwapEntry, place: tuple[object, int]) -> bool:
    """Whether a page that is back from swap has to be copied for a further mapping (engine.md 14.9).

    It is shared only at the same place of the family of address spaces that first read it.
    """
    return entry.place != place


def _do_swap_page(ksm: Ksm, vma: Vma, index: int, entry: SwapEntry, nid: int) -> Page:
    vma.anon_vma_prepare()
    assert vma.anon_vma is not None
    place = (vma.anon_vma.root, vma.start + (index << PAGE_SHIFT) - vma.moved)
    page = entry.page
    ksm.memory.swap_ins += 1
    if page is not None and page.mapcount:
        if not ksm_might_need_to_copy(entry, place):
            page.mapcount += 1
            vma.ptes[index] = page
            entry.count -= 1
            return page
        ksm.swpin_copy += 1
        return _set_new_page(ksm, vma, index, entry.content, nid)
    page = _set_new_page(ksm, vma, index, entry.content, nid)
    page.swap, entry.page, entry.place = entry, page, place
    return page


def in_swap_cache(page: Page) -> bool:
    """Whether entries for swap still wait for a page that was read back."""
    return page.swap is not None and page.swap.count > 0


def write_fault(ksm: Ksm, vma: Vma, address: int, content: bytes, nid: int) -> None:
    """Write a page: a KSM page and a page shared by fork are copied first (engine.md 14.1), present or in swap."""
    index = (address - vma.start) >> PAGE_SHIFT
    entry = vma.ptes[index]
    if isinstance(entry, SwapEntry):
        entry = _do_swap_page(ksm, vma, index, entry, nid)
    if isinstance(entry, Page) and entry.mapcount == 1 and not folio_test_ksm(entry) and not in_swap_cache(entry):
        ksm.memory.set_content(entry, content)
        return
    if isinstance(entry, Page) and folio_test_ksm(entry):
        ksm.cow_ksm += 1
    _set_new_page(ksm, vma, index, content, nid)


def split_huge_page(ksm: Ksm, page: Page) -> bool:
    """Make the huge page that a page is part of single pages; also where it is part of none (engine.md 14.10).

    Where the kernel does it, what holds only zeroes is given back, and the zero page is mapped there.

    :return: False where something holds one of its pages
    """
    folio, memory = page.folio, ksm.memory
    if folio is None:
        return True
    if not memory.pinned.isdisjoint(folio.pages):
        return False
    memory.splits += 1
    for number, each in enumerate(folio.pages):
        each.folio = None
        if each.content is ZERO_CONTENT and ksm.profile.split_frees_zeroes:
            memory.freed_by_splits += each.mapcount > 0
            for vma in folio.anon_vma.vmas:
                index = ((folio.offset + vma.moved - vma.start) >> PAGE_SHIFT) + number
                if 0 <= index < len(vma.ptes) and vma.ptes[index] is each:
                    vma.ptes[index] = ZeroPte.ZERO
                    memory.unmap(each)
    return True


def collapse(ksm: Ksm, vmas: list[Vma], start: int) -> bool:
    """``collapse_huge_page``: copy a block into a new huge page (engine.md 14.10).

    :param vmas: those that cover it, split so that none has pages outside it
    :return: False where that can't be done
    """
    first = vmas[0]
    ptes = [entry for vma in vmas for entry in vma.ptes]
    pages = [entry for entry in ptes if isinstance(entry, Page)]
    plain = [page for page in pages if not folio_test_ksm(page)]
    # A page that is mapped twice is isolated once, and then it is gone.
    if first.anon_vma is None or not all(map(first.alike, vmas)) or len(set(pages)) < len(pages):
        return False
    if not (ptes.count(None) < len(ptes) if ksm.profile.collapse_read_only else plain and first.writable):
        return False
    if len(pages) == len(ptes) and pages[0].folio is not None and all(page.folio is pages[0].folio for page in pages):
        return True
    if not ksm.memory.pinned.isdisjoint(pages):
        return False
    nids = [page_to_nid(page) for page in pages] or [first.mm.policy]
    nid = max(sorted(set(nids)), key=nids.count)
    if first.mm.mems_allowed is not None and nid not in first.mm.mems_allowed:
        nid = first.mm.policy
    contents = [entry.content if isinstance(entry, Page | SwapEntry) else ZERO_CONTENT for entry in ptes]
    folio = ksm.memory.alloc_folio(contents, nid, first.anon_vma, start - first.moved)
    if folio is None:
        return False
    new = iter(folio.pages)
    for vma in vmas:
        for index in range(len(vma.ptes)):
            zap_pte(ksm, vma, index)
            vma.ptes[index] = next(new)
    return True


def break_ksm(ksm: Ksm, vma: Vma, address: int, end: int, nid: int) -> None:
    """Give mappings of KSM pages, and of zero pages placed by KSM, a page of their own (engine.md 14.2, 14.3).

    Other pages of the range are left alone; rmap_items wait for ksmd's next pass (8.6). For a whole VMA this is
    ``unmerge_ksm_pages`` in older kernels.

    :raises OSError: ENOMEM, no node has room for the copies
    """
    for index in range((address - vma.start) >> PAGE_SHIFT, (end - vma.start) >> PAGE_SHIFT):
        entry = vma.ptes[index]
        if entry is ZeroPte.KSM:
            _set_new_page(ksm, vma, index, ZERO_CONTENT, nid)
        elif isinstance(entry, Page) and folio_test_ksm(entry):
            _set_new_page(ksm, vma, index, entry.content, nid)
            ksm.cow_ksm += 1
