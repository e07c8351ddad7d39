# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's state as a document: what no kernel shows (docs/engine.md describes it)."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import PFN_NID_SHIFT
from ksmd_ctl.engine.mm import get_mergeable_page
from ksmd_ctl.engine.rbtree import RB_BLACK, RbRoot, rb_first, rb_next
from ksmd_ctl.engine.state import UNSTABLE, Ksm, RmapItem, StableNode, get_kpfn_nid
from ksmd_ctl.engine.sysfs import counters

#: Of the document; grows when the meaning of a field changes.
FORMAT = 1


def digest(content: bytes) -> str:
    """Twelve characters that name a content."""
    return blake2b(content, digest_size=6).hexdigest()


def state(machine: Machine) -> dict[str, Any]:
    """Trees by node, exiles, chains and items. Looking changes nothing: stale nodes stay."""
    ksm = machine.ksm
    mm = ksm.scan.mm_slot.mm
    return {
        "format": FORMAT,
        "profile": ksm.profile.name,
        "time_seconds": ksm.now_ns / 1e9,
        "knobs": {name: machine.show(name).strip() for name in ksm.profile.knobs},
        "counters": counters(ksm),
        "swap_ins": ksm.memory.swap_ins,
        "huge_page_splits": ksm.memory.splits,
        "freed_by_splits": ksm.memory.freed_by_splits,
        "cursor": None if mm is None else {"process": mm.name, "address": ksm.scan.address},
        "stable_trees": [
            {"nid": nid, "nodes": [_stable_node(ksm, node) for node in _in_order(root)]}
            for nid, root in enumerate(ksm.root_stable_tree[: ksm.nr_node_ids])
        ],
        "migrate_nodes": [_stable_node(ksm, node) for node in ksm.migrate_nodes],
        "unstable_trees": [
            {"nid": nid, "items": [_unstable_item(ksm, item) for item in _unstable(ksm, nid)]}
            for nid in range(ksm.nr_node_ids)
        ],
    }


# The items that are in a node's unstable tree, or were when the last scan ended, by what they hold now.
def _unstable(ksm: Ksm, nid: int) -> list[RmapItem]:
    found = []
    slot = ksm.mm_head.next
    while slot is not ksm.mm_head:
        item = slot.rmap_list
        while item is not None:
            if item.state == UNSTABLE and item.nid == nid:
                found.append(item)
            item = item.rmap_list
        slot = slot.next
    return sorted(found, key=_current_content)


def _current_content(item: RmapItem) -> bytes:
    page = get_mergeable_page(item)
    return b"" if page is None else page.content


def _in_order(root: RbRoot[Any]) -> Iterator[Any]:
    node = rb_first(root)
    while node is not None:
        yield node
        node = rb_next(node)


def _item(item: RmapItem) -> dict[str, Any]:
    return {"process": item.mm.name, "address": item.address}


def _unstable_item(ksm: Ksm, item: RmapItem) -> dict[str, Any]:
    page = get_mergeable_page(item)
    current = item.seqnr == ksm.scan.seqnr & 0xFF
    return {
        **_item(item),
        "digest": None if page is None else digest(page.content),
        "frame": None if page is None else page.pfn,
        "this_scan": current,
        "black": item.rb_color == RB_BLACK if current else None,
        "parent": _item(item.rb_parent) if current and item.rb_parent is not None else None,
    }


def _stable_node(ksm: Ksm, node: StableNode) -> dict[str, Any]:
    in_tree = node.head.value == "tree"
    seen: dict[str, Any] = {
        "id": node.serial,
        "kind": "chain" if node.dups is not None else "dup" if node.chain is not None else "node",
        "place": node.head.value,
        "black": node.rb_color == RB_BLACK if in_tree else None,
        "parent": node.rb_parent.serial if in_tree and node.rb_parent is not None else None,
    }
    if node.dups is not None:
        return {**seen, "dups": [_stable_node(ksm, dup) for dup in node.dups]}
    page = ksm.memory.pfn_to_page(node.kpfn)
    alive = page is not None and page.stable_node is node
    return {
        **seen,
        "nid": node.nid,
        "kpfn": node.kpfn,
        "node_of_kpfn": node.kpfn >> PFN_NID_SHIFT,
        "misplaced": get_kpfn_nid(ksm, node.kpfn) != node.nid,
        "stale": not alive,
        "digest": digest(page.content) if page is not None and alive else None,
        "mappings": page.mapcount if page is not None and alive else 0,
        "items": [_item(item) for item in node.items()],
    }
