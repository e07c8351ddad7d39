# SPDX-License-Identifier: GPL-2.0-or-later
"""Address spaces: VMAs with their page tables, and who shares pages with whom by fork."""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from typing import Final

from ksmd_ctl.engine.memory import PAGE_SHIFT, Page, Pte
from ksmd_ctl.engine.structs import MmSlot

__all__ = ["AnonVma", "Mm", "Vma"]

_START: Final = attrgetter("start")


class AnonVma:
    """``struct anon_vma``: the VMAs in which pages first written through one VMA may be mapped.

    These are that VMA and those that fork made of it since, so a parent's reaches its children's VMAs
    and not the other way round (engine.md 9.7).

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
    :ivar writable: else PROT_READ or PROT_NONE: the process can't write to it
    :ivar compatible: else it is of a kind that KSM leaves alone (engine.md 14.11)
    :ivar policy: the node that it is bound to, None where it has no policy
    :ivar anon_vma: None until a page was first written
    :ivar chain: all the AnonVma that it is reached by, its own last
    :ivar ptes: an entry a page
    """

    __slots__ = (
        "anon_vma",
        "chain",
        "compatible",
        "end",
        "mergeable",
        "mm",
        "name",
        "policy",
        "ptes",
        "start",
        "writable",
    )

    def __init__(self, mm: Mm, start: int, pages: int, name: str = "") -> None:
        self.mm = mm
        self.start = start
        self.end = start + (pages << PAGE_SHIFT)
        self.name = name
        self.mergeable = False
        self.writable = True
        self.compatible = True
        self.policy: int | None = None
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
        child = Vma(mm, self.start, len(self.ptes), self.name)
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

    def split(self, address: int) -> Vma:
        """``split_vma``: what lies from an address on becomes a VMA of its own, which is returned."""
        keep = (address - self.start) >> PAGE_SHIFT
        upper = Vma(self.mm, address, 0, self.name)
        self._copy_flags(upper)
        upper.ptes = self.ptes[keep:]
        upper.end = self.end
        del self.ptes[keep:]
        self.end = address
        if self.anon_vma is not None:
            upper._join(self.chain)
            upper.anon_vma = self.anon_vma
        return upper

    def unlink(self) -> None:
        """The VMA goes: nobody finds a page through it any more."""
        for anon_vma in self.chain:
            anon_vma.vmas.pop(self, None)


class Mm:
    """``struct mm_struct``.

    :ivar name: of its process, for people
    :ivar vmas: ascending by address
    :ivar policy: the node that its task prefers for memory without a VMA policy
    :ivar exited: no task has it any more (``mm_users`` is 0): what ksm_test_exit asks
    :ivar slot: its mm_slot, None where it is not registered
    :ivar merge_any: prctl's PR_SET_MEMORY_MERGE
    :ivar ksm_merging_pages: its rmap_items on stable nodes' lists
    :ivar ksm_rmap_items: all its rmap_items
    :ivar ksm_zero_pages: its pages that KSM replaced by the zero page
    :ivar inherited: what the first two began with where a fork copies them (engine.md 14.4)
    """

    __slots__ = (
        "exited",
        "inherited",
        "ksm_merging_pages",
        "ksm_rmap_items",
        "ksm_zero_pages",
        "last_vma",
        "merge_any",
        "name",
        "policy",
        "slot",
        "vmas",
    )

    def __init__(self, name: str, policy: int) -> None:
        self.name = name
        self.policy = policy
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
