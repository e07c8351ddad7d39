# SPDX-License-Identifier: GPL-2.0-or-later
"""Validators of the engine's structures: each looks for what must always hold, between any two steps.

They look and change nothing. What does not hold raises ValidationError, which names the nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PFN_NID_SHIFT, ZERO_CONTENT, Page, SwapEntry, ZeroPte
from ksmd_ctl.engine.mm import Mm
from ksmd_ctl.engine.rbtree import RB_BLACK, RbNode, RbRoot
from ksmd_ctl.engine.state import (
    NULL_STABLE_NODE,
    STABLE,
    UNSTABLE,
    Head,
    Ksm,
    MmSlot,
    RmapItem,
    StableNode,
    page_to_nid,
)

__all__ = [
    "ValidationError",
    "validate",
    "validate_counters",
    "validate_frames",
    "validate_migrate_nodes",
    "validate_mm_slots",
    "validate_rbtree",
    "validate_rmap_items",
    "validate_stable_node",
    "validate_stable_trees",
    "validate_unstable_trees",
]


class ValidationError(Exception):
    """Something that must always hold doesn't."""


def _must(condition: bool, *what: object) -> None:
    if not condition:
        raise ValidationError(" ".join(map(str, what)))


def validate(machine: Machine) -> None:
    """Validate everything."""
    ksm = machine.ksm
    validate_mm_slots(ksm)
    validate_rmap_items(ksm)
    validate_stable_trees(ksm)
    validate_migrate_nodes(ksm)
    validate_unstable_trees(ksm)
    validate_counters(ksm)
    validate_frames(machine)


def validate_rbtree(root: RbRoot[Any], precedes: Callable[[Any, Any], bool] = lambda left, right: True) -> list[Any]:
    """Parent links, no red node below a red one, as many black nodes on every way down, and the order.

    :param precedes: whether two neighbours are in order
    :return: the nodes in order
    """
    top = root.rb_node
    _must(top is None or top.rb_parent is None, "the root", top, "has a parent")
    _must(top is None or top.rb_color == RB_BLACK, "the root", top, "is red")
    nodes: list[RbNode] = []

    def walk(node: RbNode | None) -> int:
        if node is None:
            return 1
        for child in (node.rb_left, node.rb_right):
            if child is not None:
                _must(child.rb_parent is node, child, "does not have", node, "as its parent")
                _must(node.rb_color == RB_BLACK or child.rb_color == RB_BLACK, node, "and", child, "are both red")
        left = walk(node.rb_left)
        nodes.append(node)
        right = walk(node.rb_right)
        _must(left == right, "below", node, "are", left, "black nodes to the left and", right, "to the right")
        return left + (node.rb_color == RB_BLACK)

    walk(top)
    for before, after in pairwise(nodes):
        _must(precedes(before, after), before, "and", after, "are not in order")
    return nodes


# -- stable nodes ----------------------------------------------------------------------------------------------


# The content of a node's page, None where the node is stale or a chain without live dups.
def _content(ksm: Ksm, node: StableNode) -> bytes | None:
    if node.dups is not None:
        return next((content for dup in node.dups if (content := _content(ksm, dup)) is not None), None)
    page = ksm.memory.pfn_to_page(node.kpfn)
    return page.content if page is not None and page.stable_node is node else None


def validate_stable_node(node: StableNode) -> None:
    """A node's list of rmap_items: links, state, length (engine.md 1.2, 1.3)."""
    before: RmapItem | None = None
    length = 0
    for item in node.items():
        _must(item.hlist_prev is before, item, "on the list of", node, "has a wrong link back")
        _must(item.state == STABLE, item, "on the list of", node, "is not stable")
        _must(item.head is node, item, "on the list of", node, "has another head")
        before = item
        length += 1
    _must(length == node.rmap_hlist_len, node, "has", length, "items")


def _validate_chain(ksm: Ksm, chain: StableNode, nid: int) -> int:
    assert chain.dups is not None
    _must(chain.hlist is None, chain, "has items of its own")
    contents = set()
    for dup in chain.dups:
        _must(dup.head is Head.DUP and dup.chain is chain, dup, "does not know that it is in", chain)
        _must(dup.nid == nid, dup, "is in a chain of tree", nid)
        validate_stable_node(dup)
        contents.add(_content(ksm, dup))
    _must(len(contents - {None}) <= 1, chain, "holds several contents")
    return len(chain.dups)


def validate_stable_trees(ksm: Ksm) -> None:
    """Every tree: red-black, ordered by content, no content twice; its nodes, chains and dups (1.8, 10.8)."""
    chains = dups = 0
    for nid, root in enumerate(ksm.root_stable_tree):
        live: list[StableNode] = []
        for node in validate_rbtree(root):
            _must(node.head is Head.TREE and node.chain is None, node, "is in tree", nid)
            if node.dups is not None:
                _must(ksm.profile.chains, node, "is a chain")
                chains += 1
                dups += _validate_chain(ksm, node, nid)
            else:
                _must(node.nid == nid, node, "is in tree", nid)
                validate_stable_node(node)
            if _content(ksm, node) is not None:
                live.append(node)
        for before, after in pairwise(live):
            first, second = _content(ksm, before), _content(ksm, after)
            _must(first is not None and second is not None and first < second, before, "is not before", after)
        _must(nid < ksm.nr_node_ids or root.rb_node is None, "tree", nid, "is out of use and holds", root.rb_node)
    _must(chains == ksm.stable_node_chains, chains, "chains, stable_node_chains is", ksm.stable_node_chains)
    _must(dups == ksm.stable_node_dups, dups, "dups, stable_node_dups is", ksm.stable_node_dups)


def validate_migrate_nodes(ksm: Ksm) -> None:
    """Exiles know that they are; there are none while pages merge across nodes (engine.md 9.6)."""
    for node in ksm.migrate_nodes:
        _must(node.head is Head.MIGRATE_NODES, node, "is on migrate_nodes")
        _must(node.chain is None and node.dups is None, node, "is exiled and in a chain")
        _must(not ksm.merge_across_nodes, node, "is exiled while merge_across_nodes is 1")
        validate_stable_node(node)


def _stable_nodes(ksm: Ksm) -> Iterator[StableNode]:
    for root in ksm.root_stable_tree:
        for node in validate_rbtree(root):
            yield from (node,) if node.dups is None else node.dups
    yield from ksm.migrate_nodes


# -- rmap_items ------------------------------------------------------------------------------------------------


def _slots(ksm: Ksm) -> Iterator[tuple[MmSlot, Mm]]:
    slot = ksm.mm_head.next
    while slot is not ksm.mm_head:
        assert slot.mm is not None
        yield slot, slot.mm
        slot = slot.next


def _items(slot: MmSlot) -> Iterator[RmapItem]:
    item = slot.rmap_list
    while item is not None:
        yield item
        item = item.rmap_list


def validate_mm_slots(ksm: Ksm) -> None:
    """The ring of slots, and the cursor on it (engine.md 1.6, 1.7)."""
    slots = {ksm.mm_head}
    for slot, mm in _slots(ksm):
        _must(slot not in slots, "the slot of", mm, "is twice on the ring")
        slots.add(slot)
        _must(slot.prev.next is slot and slot.next.prev is slot, "the slot of", mm, "is badly linked")
        _must(mm.slot is slot, mm, "does not know its slot")
    cursor = ksm.scan.mm_slot
    _must(cursor in slots, "the cursor is on the slot of", cursor.mm, "which is not on the ring")


def validate_rmap_items(ksm: Ksm) -> None:
    """Each mm's items: ascending, its own, and as many as counted (engine.md 1.4, 2.7)."""
    for slot, mm in _slots(ksm):
        last = -1
        states: Counter[int] = Counter()
        for item in _items(slot):
            _must(item.mm is mm, item, "is on the list of", mm)
            _must(item.address > last, item, "comes after an item at", hex(last))
            last = item.address
            states[item.state] += 1
            if item.state == UNSTABLE:
                age = (ksm.scan.seqnr - item.seqnr) & 0xFF
                _must(age <= 1, item, "was missed by", age, "scans")
        merging, items = mm.inherited
        _must(mm.ksm_rmap_items - items == states.total(), mm, "has", states.total(), "items")
        _must(mm.ksm_merging_pages - merging == states[STABLE], mm, "has", states[STABLE], "stable items")


def validate_unstable_trees(ksm: Ksm) -> None:
    """In the middle of a scan: red-black, and exactly the items that this scan put there (engine.md 6.5).

    The order is not checked: pages change while they are in the tree. Between two scans the trees are
    what the last one left, and the next one empties them.
    """
    if ksm.scan.mm_slot is ksm.mm_head:
        return
    inserted = {
        item
        for slot, _mm in _slots(ksm)
        for item in _items(slot)
        if item.state == UNSTABLE and item.seqnr == ksm.scan.seqnr & 0xFF and item.nid < ksm.nr_node_ids
    }
    for nid, root in enumerate(ksm.root_unstable_tree[: ksm.nr_node_ids]):
        for item in validate_rbtree(root):
            _must(item in inserted, item, "is in tree", nid, "and was not put there in this scan")
            _must(item.nid == nid, item, "is in tree", nid)
            inserted.remove(item)
    _must(not inserted, *inserted, "is in no tree")


def validate_counters(ksm: Ksm) -> None:
    """The counters against what they count (engine.md 8.2)."""
    shared = stable = 0
    for node in _stable_nodes(ksm):
        shared += node.hlist is not None
        stable += node.rmap_hlist_len
    _must(shared == ksm.pages_shared, shared, "nodes have items, pages_shared is", ksm.pages_shared)
    sharing = stable - shared
    _must(sharing == ksm.pages_sharing, sharing, "further items, pages_sharing is", ksm.pages_sharing)
    items = [item for slot, _mm in _slots(ksm) for item in _items(slot)]
    listed = sum(item.state == STABLE for item in items)
    _must(listed == stable, listed, "items are stable,", stable, "are on lists")
    unshared = sum(item.state == UNSTABLE for item in items)
    _must(unshared == ksm.pages_unshared, unshared, "items are unstable, pages_unshared is", ksm.pages_unshared)
    _must(len(items) == ksm.rmap_items, len(items), "items, counted are", ksm.rmap_items)


# -- frames ----------------------------------------------------------------------------------------------------


def validate_frames(machine: Machine) -> None:
    """No frame lost, none owned twice, every mapping counted, every content held once (engine.md 1.1)."""
    ksm, memory = machine.ksm, machine.memory
    mapped: Counter[Page] = Counter()
    swapped: Counter[SwapEntry] = Counter()
    placed = 0
    for process in machine.processes.values():
        zero = 0
        for vma in process.mm.vmas:
            mapped.update(pte for pte in vma.ptes if isinstance(pte, Page))
            swapped.update(pte for pte in vma.ptes if isinstance(pte, SwapEntry))
            zero += sum(pte is ZeroPte.KSM for pte in vma.ptes)
        _must(zero == process.mm.ksm_zero_pages, process.mm, "has", zero, "zero pages placed by KSM")
        placed += zero
    _must(placed == ksm.zero_pages, placed, "zero pages were placed, ksm_zero_pages is", ksm.zero_pages)
    for entry, count in swapped.items():
        _must(entry.count == count, "a swapped page has", count, "entries and counts", entry.count)
        back = entry.page
        _must(back is None or back.swap is entry, "a swapped page is back as", back, "which knows of another")
        if back is not None and back.mapcount:
            _must(back.content == entry.content, back, "was written while others have it in swap")
    known: set[Page] = set()
    contents: Counter[bytes] = Counter({ZERO_CONTENT: 1})
    nodes = set(_stable_nodes(ksm))
    for node in memory.nodes:
        for index, page in enumerate(node.mem_map):
            if page is None:
                continue
            _must(page not in known, page, "is in two frames")
            known.add(page)
            folio = page.folio
            _must(folio is None or page in folio.pages, page, "is not part of its huge page")
            _must(folio is None or page.stable_node is None, page, "is a KSM page and part of a huge page")
            head = page if folio is None else next(each for each in folio.pages if each.mapcount)
            _must(page_to_nid(head) == node.nid, page, "is on another node than its huge page")
            contents[page.content] += 1
            _must(page.pfn == node.nid << PFN_NID_SHIFT | index, page, "is in frame", index, "of node", node.nid)
            _must(mapped[page] == page.mapcount, page, "is mapped", mapped[page], "times")
            stable_node = page.stable_node
            if stable_node is not None and stable_node is not NULL_STABLE_NODE:
                _must(stable_node in nodes, page, "points to", stable_node, "which is nowhere")
                _must(stable_node.kpfn == page.pfn, page, "points to", stable_node)
        _must(node.used == sum(1 for _ in node.pages()), "node", node.nid, "counts", node.used, "frames")
        _must(len(set(node.free)) == len(node.free), "node", node.nid, "has a frame free twice")
        _must(node.used + len(node.free) == len(node.mem_map), "node", node.nid, "has frames neither free nor in use")
    _must(mapped.keys() <= known, "pages are mapped that have no frame:", *(mapped.keys() - known))
    _must(contents == memory.contents(), "contents are not held once for each page")
    held = {content: content for content in memory.contents()}
    _must(all(held[page.content] is page.content for page in known), "a content is there twice")
