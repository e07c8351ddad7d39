# SPDX-License-Identifier: GPL-2.0-or-later
"""Structures and the walk: statements 1 and 2 of docs/engine.md, by number."""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.rbtree import rb_first, rb_next
from ksmd_ctl.engine.state import NONE, RmapItem
from tests.engine.lab import ALL, CHAINS, NEW, Lab, Region, is_ksm

each = pytest.mark.parametrize("profile", ALL)


@each
def test_1_1_a_ksm_page_never_becomes_a_plain_page_again(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    page = pages[0]
    pages.write(0, "x")
    assert page is pages[1]
    assert page.mapcount == 1
    assert is_ksm(page)
    assert not is_ksm(pages[0])
    pages.discard(1)
    assert page.mapcount == 0
    assert lab.machine.memory.pfn_to_page(page.pfn) is not page


@each
def test_1_4_an_item_begins_with_nothing_recorded(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"], 0)
    lab.batch(1)
    item = pages.item(0)
    assert item is not None
    assert (item.state, item.remaining_skips) == (NONE, 0)
    fresh = RmapItem(item.mm, 0, None)
    assert (fresh.oldchecksum, fresh.state, fresh.age, fresh.remaining_skips, fresh.head) == (0, NONE, 0, 0, None)


def test_1_4_head_lies_over_the_parent_link_and_nid_over_anon_vma() -> None:
    lab = Lab("6.12")
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    item = pages.item(0)
    assert item is not None
    assert item.rb_parent is item.head is pages.node()
    assert item.nid is item.anon_vma is lab.machine.mm(pages.pid).vmas[0].anon_vma


@each
def test_1_6_items_ascend_by_address(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["-", "b", "-", "a"], 0)
    lab.scan()
    pages.write(0, "z")
    pages.write(2, "z")
    lab.scan()
    slot = lab.machine.mm(pages.pid).slot
    assert slot is not None
    addresses, item = [], slot.rmap_list
    while item is not None:
        addresses.append(item.address)
        item = item.rmap_list
    assert addresses == [pages.address(index) for index in range(4)]


@each
def test_1_8_trees_order_by_unsigned_bytes(profile: str) -> None:
    lab = Lab(profile)
    labels = ["b", "\u00ff", "a", "0", "ab"]
    pages = lab.region("p", [label for label in labels for _ in range(2)], 0)
    lab.scan(3)
    node = rb_first(lab.ksm.root_stable_tree[0])
    found = []
    while node is not None:
        page = lab.machine.memory.pfn_to_page(node.kpfn)  # type: ignore[attr-defined]
        assert page is not None
        found.append(page.content)
        node = rb_next(node)  # type: ignore[assignment]
    assert found == sorted(found)
    assert len(found) == len(labels)
    assert pages.frames() == len(labels)


@each
@pytest.mark.parametrize("across", [0, 1])
def test_1_8_one_tree_or_one_a_node(profile: str, across: int) -> None:
    lab = Lab(profile, 3, across=across)
    for node in range(3):
        lab.region(f"p{node}", ["x", "x"], node)
    lab.scan(3)
    assert lab.counts == ((1, 5, 0, 0) if across else (3, 3, 0, 0))
    used = [root.rb_node is not None for root in lab.ksm.root_stable_tree]
    assert used == ([True] if across else [True, True, True])


@each
def test_1_9_new_items_and_new_exiles_go_to_the_front(profile: str) -> None:
    lab = Lab(profile)
    others = [lab.region(f"o{name}", ["u"], 0) for name in "xy"]
    pages = lab.region("p", ["x", "x", "y", "y"], 0)
    lab.scan(3)
    assert [item.address for item in pages.node().items()] == [pages.address(1), pages.address(0)]
    if profile in NEW:
        return  # there the newcomers would need a scan more to be seen
    for other, label in zip(others, "xy", strict=True):
        other.write(0, label)
    pages.move(1)
    lab.batch(2)
    assert list(lab.ksm.migrate_nodes) == [pages.node(2), pages.node(0)]


@pytest.mark.parametrize("profile", CHAINS)
def test_1_9_new_dups_go_to_the_front(profile: str) -> None:
    lab = Lab(profile, max_page_sharing=2)
    pages = lab.region("p", ["x"] * 6, 0)
    lab.scan(4)
    chain = pages.node().chain
    assert chain is not None
    assert chain.dups is not None
    assert [dup.serial for dup in chain.dups] == sorted((dup.serial for dup in chain.dups), reverse=True)


@each
def test_1_10_trees_a_node_come_with_the_first_change(profile: str) -> None:
    lab = Lab(profile, 3, across=1)
    pages = lab.region("p", ["a"], 2)
    lab.scan(2)
    assert len(lab.ksm.root_stable_tree) == 1
    lab.store("merge_across_nodes", 0)
    assert len(lab.ksm.root_stable_tree) == len(lab.ksm.root_unstable_tree) == 3
    lab.store("merge_across_nodes", 1)
    assert len(lab.ksm.root_stable_tree) == 3
    assert lab.ksm.nr_node_ids == 1
    assert pages.present(0)


@each
def test_2_1_ksmd_scans_pages_to_scan_and_sleeps(profile: str) -> None:
    lab = Lab(profile, pages_to_scan=10, sleep_millisecs=100)
    lab.region("p", [f"l{index}" for index in range(100)], 0)
    lab.machine.run_until(1_000_000_000)
    assert lab.ksm.rmap_items == 0  # run is 0
    lab.store("run", 1)
    assert lab.machine.run_until(1_450_000_000) == 50
    assert lab.ksm.rmap_items == 50
    lab.store("run", 0)
    assert lab.machine.run_until(3_000_000_000) == 0


@each
def test_2_2_a_batch_never_crosses_the_end_of_a_scan(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["a", "b"], 0)
    assert lab.machine.batch(1000) == 2
    assert lab.ksm.scan.seqnr == 1


@each
def test_2_4_full_scans_does_not_advance_where_nothing_is_registered(profile: str) -> None:
    lab = Lab(profile)
    assert lab.machine.scan(3) == 0
    assert lab.ksm.scan.seqnr == 0
    lab.region("p", ["-"], 0)
    assert lab.machine.scan(3) == 3


@each
def test_2_5_a_scan_empties_the_unstable_trees(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["a", "b"], 0)
    lab.region("o", ["c"], 1)
    lab.scan(2)
    lab.batch(1)
    assert lab.ksm.root_unstable_tree[0].rb_node is not None
    assert lab.ksm.root_unstable_tree[1].rb_node is None


@each
def test_2_6_only_mergeable_memory_is_scanned(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["a"], 0)
    plain = lab.more(pages.pid, ["b"], 0, mergeable=False)
    later = lab.more(pages.pid, ["c"], 0)
    assert lab.machine.batch(10) == 2
    assert plain.item(0) is None
    assert later.item(0) is not None


@each
def test_2_7_items_are_kept_by_address_and_freed_where_pages_are_gone(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["a", "b", "c"], 0)
    lab.scan()
    kept = pages.item(2)
    assert kept is not None
    pages.discard(0, 2)
    pages.write(1, "d")
    lab.scan()
    assert pages.item(0) is None
    assert pages.item(1) is not None
    assert pages.item(2) is kept
    assert lab.ksm.rmap_items == 2


@each
def test_2_8_trailing_items_are_freed_and_an_mm_without_mergeable_memory_goes(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["a", "b"], 0)
    lab.scan()
    pages.discard(1)
    lab.scan()
    assert lab.ksm.rmap_items == 1
    mm = lab.machine.mm(pages.pid)
    lab.machine.munmap(pages.pid, pages.start, 2)
    assert mm.slot is not None
    lab.scan()
    assert mm.slot is None
    assert lab.ksm.rmap_items == 0


@each
def test_2_9_pages_swapped_out_are_not_seen(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["a", "b"], 0)
    lab.scan()
    assert lab.machine.swap_out(pages.pid, pages.start, 1) == 1
    lab.scan()
    assert lab.ksm.rmap_items == 1
    pages.read(0)
    lab.scan()
    assert lab.ksm.rmap_items == 2


@each
def test_2_10_with_run_2_newcomers_go_to_the_tail(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["a", "b"], 0)
    lab.batch(1)
    lab.ksm.run = 2  # as it is while the un-merge is under way, the cursor on p
    late = lab.region("q", ["c"], 0)
    assert lab.ksm.mm_head.prev.mm is lab.machine.mm(late.pid)


@each
def test_2_11_an_exiting_mm_goes_at_once_or_is_reaped_next(profile: str) -> None:
    lab = Lab(profile)
    first = lab.region("p", ["a", "b"], 0)
    others = [lab.region(name, ["c"], 0) for name in "qr"]
    unseen = lab.region("s", ["d"], 0)
    lab.batch(1)
    mm = lab.machine.mm(unseen.pid)
    unseen.exit()
    assert mm.slot is None  # it had no items
    lab.scan(1)
    lab.batch(1)
    mm = lab.machine.mm(others[1].pid)
    others[1].exit()
    assert lab.ksm.scan.mm_slot.next is mm.slot  # just after the cursor
    mm = lab.machine.mm(first.pid)
    first.exit()
    assert mm.slot is lab.ksm.scan.mm_slot  # it is under the cursor: ksmd will see
    lab.scan(1)
    assert mm.slot is None
    assert lab.ksm.rmap_items == 1


@pytest.mark.parametrize("profile", NEW)
def test_2_13_pages_scanned_counts_what_was_compared(profile: str) -> None:
    lab = Lab(profile, smart_scan=1)
    lab.region("p", ["a", "b"], 0)
    lab.scan(5)
    assert (lab.ksm.pages_scanned, lab.ksm.pages_skipped) == (8, 2)
    lab.unmerge()
    assert lab.ksm.pages_scanned == 8


@pytest.mark.parametrize("profile", NEW)
def test_2_13_what_is_skipped_takes_nothing_of_the_batch(profile: str) -> None:
    lab = Lab(profile, smart_scan=1)
    pages = lab.region("p", ["a", "b", "c"], 0)
    lab.scan(4)
    pages.discard(2)
    pages.write(2, "d")  # the item is kept, and so is its age
    late = lab.more(pages.pid, ["e", "f"], 0)
    assert lab.machine.batch(2) == 2  # three are skipped first
    assert late.item(1) is not None


@each
@pytest.mark.parametrize("survivors", [0, 1])
def test_the_cursor_survives_storms_of_exits(profile: str, survivors: int) -> None:
    lab = Lab(profile)
    keep = [lab.region(f"k{number}", ["x"], 0) for number in range(survivors)]
    for number in range(20):
        doomed: Region = lab.region(f"d{number}", ["x", "y"], 0)
        if number % 3:
            lab.batch(number % 4)
        doomed.exit()
        lab.batch(1)
    lab.scan(2)
    assert lab.ksm.rmap_items == len(keep)
    assert lab.machine.memory.nodes[0].used == len(keep)
