# SPDX-License-Identifier: GPL-2.0-or-later
"""Every validator finds what it looks for: a healthy machine passes, one with a fault does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ksmd_ctl.engine.memory import SwapEntry, ZeroPte
from ksmd_ctl.engine.rbtree import RB_RED
from ksmd_ctl.engine.state import NONE, Head, hlist_del
from tests.engine.lab import Lab, Region
from tests.engine.scenario_runner import content
from tests.engine.validate import ValidationError, validate


def healthy() -> tuple[Lab, Region]:
    """Two contents merged, one of them in a chain; three unique pages; in the middle of a scan."""
    lab = Lab("6.12", max_page_sharing=3)
    pages = lab.region("p", ["x"] * 6 + ["y", "y", "a", "b", "c"], 0)
    lab.region("o", ["z"], 1)
    lab.scan(4)
    lab.batch(11)
    return lab, pages


def chain(pages: Region):  # type: ignore[no-untyped-def]
    return pages.node(0).chain


def swap_children(lab: Lab, pages: Region) -> None:
    root = lab.ksm.root_stable_tree[0].rb_node
    root.rb_left, root.rb_right = root.rb_right, root.rb_left  # type: ignore[union-attr]


def wrong_parent(lab: Lab, pages: Region) -> None:
    root = lab.ksm.root_stable_tree[0].rb_node
    (root.rb_right or root.rb_left).rb_parent = None  # type: ignore[union-attr]


def red_root(lab: Lab, pages: Region) -> None:
    lab.ksm.root_stable_tree[0].rb_node.rb_color = RB_RED  # type: ignore[union-attr]


def red_below_red(lab: Lab, pages: Region) -> None:
    root = lab.ksm.root_unstable_tree[0].rb_node
    root.rb_left.rb_color = 1  # type: ignore[union-attr]


def wrong_tree(lab: Lab, pages: Region) -> None:
    pages.node(6).nid = 1


def unknown_exile(lab: Lab, pages: Region) -> None:
    lab.ksm.migrate_nodes.add_head(pages.node(6))


def exile_in_a_tree(lab: Lab, pages: Region) -> None:
    pages.node(6).head = Head.MIGRATE_NODES


def short_list(lab: Lab, pages: Region) -> None:
    pages.node(6).rmap_hlist_len += 1


def wrong_head(lab: Lab, pages: Region) -> None:
    pages.item(6).head = pages.node(0)  # type: ignore[union-attr]


def not_stable(lab: Lab, pages: Region) -> None:
    pages.item(6).state = NONE  # type: ignore[union-attr]


def broken_list(lab: Lab, pages: Region) -> None:
    node = pages.node(6)
    node.hlist.hlist_next.hlist_prev = None  # type: ignore[union-attr]


def lost_item(lab: Lab, pages: Region) -> None:
    node = pages.node(6)
    hlist_del(node.hlist, node)  # type: ignore[arg-type]
    node.rmap_hlist_len -= 1


def foreign_dup(lab: Lab, pages: Region) -> None:
    pages.node(0).chain = None


def dup_of_another_content(lab: Lab, pages: Region) -> None:
    page = pages[0]
    page.content = lab.machine.memory.hold(content("other"))


def counter(name: str) -> Callable[[Lab, Region], None]:
    def fault(lab: Lab, pages: Region) -> None:
        setattr(lab.ksm, name, getattr(lab.ksm, name) + 1)

    fault.__name__ = name
    return fault


def merging_pages(lab: Lab, pages: Region) -> None:
    lab.machine.mm(pages.pid).ksm_merging_pages -= 1


def items_of_mm(lab: Lab, pages: Region) -> None:
    lab.machine.mm(pages.pid).ksm_rmap_items += 1


def items_out_of_order(lab: Lab, pages: Region) -> None:
    pages.item(2).address = pages.address(5)  # type: ignore[union-attr]


def missed_scan(lab: Lab, pages: Region) -> None:
    pages.item(9).seqnr -= 2  # type: ignore[union-attr]


def not_in_the_tree(lab: Lab, pages: Region) -> None:
    lab.ksm.root_unstable_tree[0].rb_node = None


def twice_in_trees(lab: Lab, pages: Region) -> None:
    lab.ksm.root_unstable_tree[1].rb_node = lab.ksm.root_unstable_tree[0].rb_node


def cursor_off_the_ring(lab: Lab, pages: Region) -> None:
    lab.machine.mm(pages.pid).slot.unlink()  # type: ignore[union-attr]


def unknown_slot(lab: Lab, pages: Region) -> None:
    lab.machine.mm(pages.pid).slot = None


def mapcount(lab: Lab, pages: Region) -> None:
    pages[8].mapcount += 1


def frame_lost(lab: Lab, pages: Region) -> None:
    lab.machine.mm(pages.pid).vmas[0].ptes[8] = None


def frame_owned_twice(lab: Lab, pages: Region) -> None:
    lab.machine.memory.nodes[1].mem_map.append(pages[8])


def frame_of_another_node(lab: Lab, pages: Region) -> None:
    pages[8].pfn += 1 << 24


def frame_count(lab: Lab, pages: Region) -> None:
    lab.machine.memory.nodes[0].used += 1


def free_twice(lab: Lab, pages: Region) -> None:
    lab.machine.memory.nodes[0].free *= 2


def content_twice(lab: Lab, pages: Region) -> None:
    pages[8].content = bytes(bytearray(pages[8].content))


def content_lost(lab: Lab, pages: Region) -> None:
    lab.machine.memory.hold(content("nobody has it"))


def zero_page(lab: Lab, pages: Region) -> None:
    lab.machine.mm(pages.pid).vmas[0].ptes.append(ZeroPte.KSM)


def swap_count(lab: Lab, pages: Region) -> None:
    lab.machine.mm(pages.pid).vmas[0].ptes.append(SwapEntry(content("a"), 2))


def back_link(lab: Lab, pages: Region) -> None:
    pages.node(6).kpfn += 1


def freed_node(lab: Lab, pages: Region) -> None:
    pages[8].stable_node = lab.ksm.alloc_stable_node(pages[8].pfn, 0)


FAULTS: list[Callable[[Lab, Region], None]] = [
    *(swap_children, wrong_parent, red_root, red_below_red, wrong_tree, unknown_exile, exile_in_a_tree),
    *(short_list, wrong_head, not_stable, broken_list, lost_item, foreign_dup, dup_of_another_content),
    *(merging_pages, items_of_mm, items_out_of_order, missed_scan, not_in_the_tree, twice_in_trees),
    *(cursor_off_the_ring, unknown_slot, mapcount, frame_lost, frame_owned_twice, frame_of_another_node),
    *(frame_count, free_twice, content_twice, content_lost, zero_page, swap_count, back_link, freed_node),
    *map(counter, ["pages_shared", "pages_sharing", "pages_unshared", "rmap_items", "zero_pages"]),
    *map(counter, ["stable_node_chains", "stable_node_dups"]),
]


def test_a_healthy_machine_is_valid() -> None:
    lab, pages = healthy()
    validate(lab.machine)
    assert chain(pages) is not None
    assert lab.ksm.root_unstable_tree[0].rb_node.rb_left is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault: Callable[[Lab, Region], None]) -> None:
    lab, pages = healthy()
    fault(lab, pages)
    with pytest.raises(ValidationError):
        validate(lab.machine)


def test_the_error_names_the_node() -> None:
    lab, pages = healthy()
    node = pages.node(6)
    node.rmap_hlist_len = 9
    with pytest.raises(ValidationError, match=f"stable_node {node.serial} .* has 2 items"):
        validate(lab.machine)
