# SPDX-License-Identifier: GPL-2.0-or-later
"""The statements of "ksm: make !merge_across_nodes migration safe", by name, on the profile that means them."""

from __future__ import annotations

import errno

import pytest

from ksmd_ctl.engine.state import Head
from ksmd_ctl.engine.trees import stable_tree_search
from tests.engine.lab import ALL, Lab, is_exiled


@pytest.mark.parametrize("profile", ALL)
def test_folio_migrate_ksm_updates_kpfn_and_nothing_else(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    node, counts = pages.node(), lab.counts
    kpfn, items = node.kpfn, list(node.items())
    pages.move(1)
    assert node.kpfn == pages[0].pfn != kpfn
    assert (node.nid, node.head, list(node.items()), lab.counts) == (0, Head.TREE, items, counts)
    assert lab.ksm.root_stable_tree[0].rb_node is node
    assert lab.exiled() == 0


def test_a_stable_tree_may_indicate_a_page_of_the_wrong_node_until_ksmds_next_pass() -> None:
    lab = Lab("seed")
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    pages.move(1)
    assert pages.nodes() == [1, 1]
    assert lab.ksm.root_stable_tree[0].rb_node is pages.node()
    lab.batch(1)
    assert lab.ksm.root_stable_tree[0].rb_node is None
    assert lab.ksm.root_stable_tree[1].rb_node is pages.node()


def test_no_other_page_is_merged_onto_a_misplaced_page() -> None:
    lab = Lab("seed")
    other = lab.region("o", ["u"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    other.write(0, "x")
    moved.move(1)
    lab.batch(1)
    assert other[0] is not moved[0]
    assert lab.ksm.pages_sharing == 1


def test_the_nid_of_the_tree_does_not_always_match_that_of_kpfn() -> None:
    lab = Lab("seed", 4)
    pages = lab.region("p", ["x", "x"], 2)
    lab.scan(3)
    assert pages.node().nid == 2
    pages.move(3)
    assert (pages.node().nid, pages.nodes()) == (2, [3, 3])


def test_misplaced_page_is_discovered_at_one_of_its_rmap_items() -> None:
    lab = Lab("seed")
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    moved.move(1)
    lab.batch(1)
    assert moved.node().nid == 1


def test_misplaced_page_is_discovered_by_another_pages_search() -> None:
    lab = Lab("seed")
    other = lab.region("o", ["u"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    other.write(0, "x")
    moved.move(1)
    lab.batch(1)
    assert is_exiled(moved.node())
    assert lab.ksm.root_stable_tree[0].rb_node is None


def test_an_unequal_pages_search_does_not_discover_it() -> None:
    lab = Lab("seed")
    other = lab.region("o", ["u"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    other.write(0, "y")
    moved.move(1)
    lab.batch(1)
    assert not is_exiled(moved.node())


def test_an_exile_without_a_match_is_slotted_in_with_all_its_mappings() -> None:
    lab = Lab("seed")
    moved = lab.region("p", ["x"] * 5, 0)
    lab.region("o", ["k", "k", "z", "z"], 1)
    lab.scan(3)
    counts = lab.counts
    moved.move(1)
    lab.batch(1)
    assert lab.counts == counts
    assert moved.node().rmap_hlist_len == 5
    assert moved.node().head is Head.TREE
    assert lab.exiled() == 0


def test_otherwise_its_mappings_migrate_one_by_one_to_the_colliding_page() -> None:
    lab = Lab("seed")
    moved = lab.region("p", ["x"] * 3, 0)
    twin = lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    moved.move(1)
    for items in range(1, 4):
        lab.batch(1)
        assert [page is twin[0] for page in moved.pages()].count(True) == items
        assert twin[0].mapcount == 2 + items
        assert lab.counts == ((2, 3, 0, 0) if items < 3 else (1, 4, 0, 0))


def test_an_exile_takes_the_place_of_a_misplaced_match() -> None:
    lab = Lab("seed")
    first = lab.region("p", ["x", "x"], 0)
    second = lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    first.move(1)
    second.move(0)
    lab.batch(1)
    assert lab.ksm.root_stable_tree[1].rb_node is first.node()
    assert is_exiled(second.node())


def test_a_forked_page_is_returned_without_a_search() -> None:
    lab = Lab("seed")
    stale = lab.region("o", ["m", "m"], 0)
    parent = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    child = parent.fork("q")
    node = stale.node()
    stale.discard()
    child.move(1)
    assert stable_tree_search(lab.ksm, child[0]) is child[0]
    assert node.head is Head.TREE  # not walked over
    assert child.node().nid == 0  # nor was it looked where the page is


def test_stale_entries_of_migrate_nodes_are_pruned_once_each_full_scan() -> None:
    lab = Lab("seed")
    moved = lab.region("p", ["x", "x"], 0)
    twin = lab.region("o", ["u"], 0)
    lab.scan(3)
    twin.write(0, "x")
    lab.batch(2)  # the page's own items are passed
    moved.move(1)
    lab.scan(1)
    node = moved.node()
    assert is_exiled(node)
    moved.discard()
    assert is_exiled(node)  # nobody has noticed
    lab.batch(1)  # the next full scan starts
    assert node.head is Head.FREED
    assert lab.exiled() == 0


def test_stale_nodes_of_the_tree_are_pruned_as_searches_brush_past_them() -> None:
    lab = Lab("seed")
    late = lab.region("o", ["u"], 0)
    pages = lab.region("p", ["m", "m"], 0)
    lab.scan(3)
    node, frame = pages.node(), pages[0].pfn
    pages.discard()
    assert lab.ksm.root_stable_tree[0].rb_node is node
    newcomer = lab.region("r", ["z"], 0, mergeable=False)
    assert newcomer[0].pfn == frame  # in use again, by a page that doesn't point back
    late.write(0, "x")
    lab.batch(1)
    assert node.head is Head.FREED
    assert lab.ksm.root_stable_tree[0].rb_node is None


@pytest.mark.parametrize("where", ["tree", "migrate_nodes"])
def test_memory_offline_handles_tree_and_migrate_nodes_alike(where: str) -> None:
    lab = Lab("seed", 3)
    lab.region("w", ["w"], 0)
    twin = lab.region("o", ["u"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    if where == "migrate_nodes":
        twin.write(0, "x")
        moved.move(1)
        lab.batch(2)
        assert is_exiled(moved.node())
    node, nid = moved.node(), moved.nodes()[0]
    moved.discard()
    lab.machine.going_offline(nid)
    lab.machine.offline(nid)
    assert node.head is Head.FREED
    assert lab.ksm.pages_shared == 0


@pytest.mark.parametrize("where", ["tree", "migrate_nodes"])
def test_remove_all_stable_nodes_handles_tree_and_migrate_nodes_alike(where: str) -> None:
    lab = Lab("seed")
    lab.region("w", ["w"], 0)
    twin = lab.region("o", ["u"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    if where == "migrate_nodes":
        twin.write(0, "x")
        moved.move(1)
        lab.batch(2)
    node = moved.node()
    lab.unmerge()
    assert node.head is Head.FREED
    assert lab.exiled() == 0
    assert lab.ksm.root_stable_tree[0].rb_node is None


@pytest.mark.parametrize("profile", ["seed", "4.1", "4.10", "5.10", "6.1"])
def test_an_exile_that_is_still_mapped_keeps_the_knob_from_changing(profile: str) -> None:
    lab = Lab(profile)
    twin = lab.region("o", ["u"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    child = moved.fork("q")
    moved.move(1)
    twin.write(0, "x")
    moved.write(0, "a")
    moved.write(1, "b")
    lab.batch(3)  # exiled by the twin, and left by its items
    assert (is_exiled(child.node()), lab.counts[0]) == (True, 0)
    with pytest.raises(OSError, match="pages are merged") as refusal:
        lab.store("merge_across_nodes", 1)
    assert refusal.value.errno == errno.EBUSY
    child.discard()
    lab.store("merge_across_nodes", 1)
    assert lab.exiled() == 0


def test_nothing_is_ever_misplaced_while_pages_merge_across_nodes() -> None:
    lab = Lab("seed", across=1)
    moved = lab.region("p", ["x", "x"], 0)
    late = lab.region("o", ["u"], 0)
    lab.scan(3)
    moved.move(1)
    late.write(0, "x")
    lab.scan(3)
    assert late[0] is moved[0]
    assert lab.exiled() == 0
