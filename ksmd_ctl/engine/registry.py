# SPDX-License-Identifier: GPL-2.0-or-later
"""Which address spaces KSM works on: registration, fork, exit, madvise and prctl."""

from __future__ import annotations

from ksmd_ctl.engine.mm import Mm, Vma, break_ksm
from ksmd_ctl.engine.state import KSM_RUN_UNMERGE, Ksm, MmSlot


def ksm_enter(ksm: Ksm, mm: Mm) -> None:
    """``__ksm_enter``: register an mm, just before the slot under the cursor (engine.md 2.10)."""
    slot = MmSlot(mm)
    mm.slot = slot
    slot.insert_before(ksm.mm_head if ksm.run & KSM_RUN_UNMERGE else ksm.scan.mm_slot)


def mm_slot_free(slot: MmSlot) -> None:
    """Deregister an mm."""
    assert slot.mm is not None
    slot.unlink()
    slot.mm.slot = None
    slot.mm.merge_any = False


def ksm_fork(ksm: Ksm, parent: Mm, child: Mm) -> None:
    """A fork of a registered mm is registered (engine.md 14.4)."""
    child.ksm_zero_pages = parent.ksm_zero_pages
    if ksm.profile.zero_counted:
        ksm.zero_pages += parent.ksm_zero_pages
    if ksm.profile.fork_counter_copy:
        child.ksm_merging_pages = parent.ksm_merging_pages
        child.ksm_rmap_items = parent.ksm_rmap_items
        child.inherited = (child.ksm_merging_pages, child.ksm_rmap_items)
    if parent.slot is not None:
        child.merge_any = parent.merge_any
        ksm_enter(ksm, child)


def ksm_execve(ksm: Ksm, old: Mm, new: Mm) -> None:
    """PR_SET_MEMORY_MERGE stays on in the new mm, which is registered before the old one ends (engine.md 14.7)."""
    if old.merge_any:
        new.merge_any = True
        ksm_enter(ksm, new)


def ksm_exit(ksm: Ksm, mm: Mm) -> None:
    """``__ksm_exit``: an mm is exiting (engine.md 2.11).

    Without rmap_items it goes at once, else ksmd reaps it next; under the cursor ksmd sees for itself.
    """
    slot = mm.slot
    if slot is None or slot is ksm.scan.mm_slot:
        return
    if slot.rmap_list is None:
        mm_slot_free(slot)
    else:
        slot.unlink()
        slot.insert_before(ksm.scan.mm_slot.next)


def ksm_madvise(ksm: Ksm, vma: Vma, mergeable: bool) -> None:
    """MADV_MERGEABLE or MADV_UNMERGEABLE, ignored where it does not apply (engine.md 14.2, 14.11, 14.12).

    The process itself breaks its KSM pages.

    :raises OSError: ENOMEM, no node has room for the copies
    """
    if not mergeable:
        if vma.mergeable:
            break_ksm(ksm, vma, vma.start, vma.end, vma.mm.policy)
        vma.mergeable = False
    elif vma.compatible and not vma.mergeable:
        if vma.mm.slot is None:
            ksm_enter(ksm, vma.mm)
        vma.mergeable = True


def ksm_vma_flags(vma: Vma) -> None:
    """A VMA of an mm with PR_SET_MEMORY_MERGE (engine.md 14.13); ``ksm_add_vma`` in older kernels."""
    if vma.mm.merge_any and vma.compatible:
        vma.mergeable = True


def ksm_enable_merge_any(ksm: Ksm, mm: Mm) -> None:
    """``prctl(PR_SET_MEMORY_MERGE, 1)``: all VMAs that can be (engine.md 14.13)."""
    if mm.merge_any:
        return
    if mm.slot is None:
        ksm_enter(ksm, mm)
    mm.merge_any = True
    for vma in mm.vmas:
        ksm_vma_flags(vma)


def ksm_disable_merge_any(ksm: Ksm, mm: Mm) -> None:
    """``prctl(PR_SET_MEMORY_MERGE, 0)``: un-merges all, also what madvise marked.

    :raises OSError: ENOMEM, no node has room for the copies
    """
    if not mm.merge_any:
        return
    for vma in mm.vmas:
        ksm_madvise(ksm, vma, False)
    mm.merge_any = False
