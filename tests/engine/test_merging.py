# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparing, merging, leaving trees, counting: statements 3 and 5 to 9 of docs/engine.md, by number."""

from __future__ import annotations

import errno

import pytest

from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.engine.migrate import rmap_walk_ksm
from ksmd_ctl.engine.state import NONE, NULL_STABLE_NODE, STABLE, UNSTABLE, Head
from ksmd_ctl.engine.trees import remove_rmap_item_from_tree, stable_tree_search
from tests.engine.lab import ALL, CHAINS, NEW, Lab, is_exiled, is_ksm

each = pytest.mark.parametrize("profile", ALL)


# -- 3: cmp_and_merge_page -------------------------------------------------------------------------------------


@each
def test_3_1_own_item_exiles_a_misplaced_node_and_an_exile_stays_one(profile: str) -> None:
    lab = Lab(profile)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    moved.move(1)
    lab.batch(1)
    assert moved.node().nid == 1
    assert moved.node().head is Head.TREE


@each
def test_3_2_a_listed_item_of_a_proper_page_is_left_alone(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    items = list(pages.node().items())
    lab.scan(3)
    assert list(pages.node().items()) == items
    assert lab.ksm.cow_ksm == 0


@pytest.mark.parametrize("profile", CHAINS)
def test_3_3_a_fork_may_go_over_the_limit(profile: str) -> None:
    lab = Lab(profile, max_page_sharing=2)
    parent = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    parent.fork("q")
    lab.scan()
    assert parent.node().rmap_hlist_len == 4
    assert lab.counts == (1, 3, 0, 0)


@each
def test_3_5_the_further_items_of_a_node_put_back_change_nothing(profile: str) -> None:
    lab = Lab(profile)
    moved = lab.region("p", ["x"] * 4, 0)
    lab.scan(3)
    moved.move(1)
    lab.batch(1)
    items = list(moved.node().items())
    lab.batch(3)
    assert list(moved.node().items()) == items


@each
def test_3_8_where_mapping_fails_the_item_is_in_no_tree(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    late = lab.region("o", ["u"], 0)
    lab.scan(3)
    late.write(0, "x")
    lab.machine.memory.pinned.add(late[0])
    lab.scan(3)
    item = late.item(0)
    assert item is not None
    assert item.state == NONE
    assert lab.counts == (1, 1, 0, 1)
    lab.machine.memory.pinned.clear()
    lab.scan(1)
    assert late[0] is pages[0]


@each
def test_3_9_a_page_that_changes_between_scans_is_volatile(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["a"], 0)
    for label in "bcd":
        lab.scan()
        pages.write(0, label)
        assert lab.counts == (0, 0, 0, 1)
    lab.scan(2)
    assert lab.counts == (0, 0, 1, 0)


@pytest.mark.parametrize("profile", CHAINS)
def test_3_10_zero_pages_only_where_that_is_on_and_the_checksum_known(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["0"], 0)
    lab.scan(3)
    assert pages.present(0)
    lab.store("use_zero_pages", 1)
    lab.scan(1)
    assert not pages.present(0)
    lab.scan(1)  # its item is freed, so the checksum has to be learnt again
    pages.write(0, "0")
    lab.scan(1)
    assert pages.present(0)
    lab.scan(1)
    assert not pages.present(0)


@each
def test_3_11_a_pair_lists_the_partner_first(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(2)
    assert [item.address for item in pages.node().items()] == [pages.address(1), pages.address(0)]
    assert (pages[0].mapcount, lab.counts) == (2, (1, 1, 0, 0))


@each
def test_3_13_whether_a_page_with_a_new_checksum_is_searched_for(profile: str) -> None:
    lab = Lab(profile)
    late = lab.region("p", ["u"], 0)
    stale = lab.region("o", ["m", "m"], 0)
    lab.scan(3)
    node = stale.node()
    stale.discard()
    late.write(0, "z")
    lab.batch(1)
    assert (node.head is Head.FREED) == (profile not in NEW)  # a search brushed past it


@pytest.mark.parametrize("profile", CHAINS)
def test_3_16_zero_page_or_ksm_page_of_zeroes(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["0", "0"], 0)
    lab.scan(3)
    assert is_ksm(pages[0])
    lab.store("use_zero_pages", 1)
    late = lab.region("o", ["0"], 0)
    lab.scan(2)
    assert late.present(0) == (profile not in NEW)
    assert lab.ksm.zero_pages == (1 if profile in NEW else 0)


@each
def test_3_17_the_checksum_is_kept_over_merging_and_copying(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x", "y"], 0)
    lab.scan(3)
    pages.write(0, "x")
    pages.write(1, "z")
    lab.scan(1)
    # x is as it was recorded, z is new, and y has been unique all the time.
    assert lab.counts == (0, 0, 2, 1)
    assert lab.scan(1).counts == (0, 0, 3, 0)


# -- 5: merging ------------------------------------------------------------------------------------------------


@each
def test_5_1_no_merging_where_the_advice_was_taken_back(profile: str) -> None:
    lab = Lab(profile)
    early = lab.region("p", ["x"], 0)
    late = lab.region("o", ["x"], 0)
    lab.scan(1)
    lab.batch(1)
    early.advise(False)
    lab.batch(1)
    assert early[0] is not late[0]
    assert lab.counts == (0, 0, 1, 1)


@each
@pytest.mark.parametrize("held", ["scanned", "partner"])
def test_5_3_further_references_prevent_merging(profile: str, held: str) -> None:
    lab = Lab(profile)
    first = lab.region("p", ["x"], 0)
    second = lab.region("o", ["x"], 0)
    lab.machine.memory.pinned.add(second[0] if held == "scanned" else first[0])
    lab.scan(5)
    assert first[0] is not second[0]
    # The partner stays in the unstable tree; the page scanned ends in none, and in the second case it
    # was upgraded and broken again, each time.
    assert lab.counts == (0, 0, 1, 1)
    assert (lab.ksm.cow_ksm > 0) == (held == "partner")
    assert not is_ksm(second[0])


@pytest.mark.parametrize("profile", [name for name in ALL if name != "seed"])
def test_5_4_upgraded_page_that_a_fork_keeps_never_gets_a_node(profile: str) -> None:
    lab = Lab(profile)
    first = lab.region("o", ["x"], 0)
    parent = lab.region("p", ["x"], 0)
    child = parent.fork("q")
    lab.machine.memory.pinned.add(first[0])
    lab.scan(2)
    # The partner could not be replaced, so the scanned mapping was broken; the child kept the page.
    assert child[0].stable_node is NULL_STABLE_NODE
    assert not is_ksm(parent[0])
    lab.machine.memory.pinned.clear()
    lab.scan(3)
    assert child[0].stable_node is NULL_STABLE_NODE


@each
def test_5_5_a_replaced_page_lives_on_in_its_other_mappings(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x"], 0)
    other = lab.region("o", ["x"], 0)
    lab.scan(1)
    child = parent.fork("q")
    page = parent[0]
    assert page.mapcount == 2
    lab.batch(2)
    assert parent[0] is other[0]
    assert child[0] is page
    assert page.mapcount == 1


@pytest.mark.parametrize("profile", NEW)
def test_5_6_zero_pages_are_counted_for_host_and_process(profile: str) -> None:
    lab = Lab(profile, use_zero_pages=1)
    pages = lab.region("p", ["0", "0", "a"], 0)
    lab.scan(2)
    mm = lab.machine.mm(pages.pid)
    assert (lab.ksm.zero_pages, mm.ksm_zero_pages) == (2, 2)
    assert pages.read(0) == bytes(PAGE_SIZE)
    pages.discard(0, 1)
    assert (lab.ksm.zero_pages, mm.ksm_zero_pages) == (1, 1)


# -- 6: the unstable tree --------------------------------------------------------------------------------------


@each
def test_6_1_and_6_5_insertion_and_its_end_at_a_page_that_is_gone(profile: str) -> None:
    lab = Lab(profile)
    early = lab.region("a", ["m"], 0)
    late = lab.region("b", ["x"], 0)
    lab.scan(2)
    assert lab.counts == (0, 0, 2, 0)
    lab.batch(1)
    lab.machine.munmap(early.pid, early.start, 1)
    lab.batch(1)
    assert late.item(0).state == NONE  # type: ignore[union-attr]


@each
def test_6_2_the_same_page_again_is_not_inserted(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x"], 0)
    child = parent.fork("q")
    lab.scan(2)
    states = {region.item(0).state for region in (parent, child)}  # type: ignore[union-attr]
    assert states == {UNSTABLE, NONE}


@each
def test_6_4_an_equal_page_of_another_node_is_a_partner_across_nodes(profile: str) -> None:
    for across in (0, 1):
        lab = Lab(profile, across=across)
        first = lab.region("p", ["x"], 0)
        second = lab.region("o", ["x"], 1)
        lab.scan(3)
        assert (first[0] is second[0]) == bool(across)


@each
def test_6_6_current_contents_are_compared(profile: str) -> None:
    lab = Lab(profile)
    early = lab.region("p", ["a"], 0)
    late = lab.region("o", ["x"], 0)
    lab.scan(1)
    lab.batch(1)
    early.write(0, "x")  # changed after it was inserted
    lab.batch(1)
    assert early[0] is late[0]


@each
def test_6_7_items_are_taken_out_of_this_scans_tree_only(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["a", "b"], 0)
    other = lab.region("o", ["A"], 0)
    lab.scan(2)
    lab.batch(2)
    lab.machine.munmap(pages.pid, pages.address(1), 1)
    lab.scan(1)
    assert lab.ksm.pages_unshared == 3  # its item is not reached any more in this scan
    lab.scan(1)
    assert lab.ksm.pages_unshared == 2
    assert other.item(0).state == UNSTABLE  # type: ignore[union-attr]


# -- 7: leaving trees, staleness -------------------------------------------------------------------------------


@each
def test_7_1_the_last_item_to_leave_counts_as_shared(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x", "x"], 0)
    child = pages.fork("q")
    lab.scan(3)
    child_pages = child.pages()
    assert child_pages[0] is pages[0]
    node = pages.node()
    total = lab.counts[1]
    pages.write(0, "u")
    lab.batch(1)
    assert lab.counts[:2] == (1, total - 1)
    assert node.rmap_hlist_len == total


@each
def test_7_1_heads_are_forgotten_or_not(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    node = pages.node()
    pages.write(0, "u")
    lab.batch(1)
    item = pages.item(0)
    assert item is not None
    assert item.state == NONE
    assert item.head is (node if profile in ("seed", "4.1", "4.10") else None)


@each
def test_7_2_a_node_without_items_stays(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    parent.fork("q")
    node = parent.node()
    parent.write(0, "a")
    parent.write(1, "b")
    lab.batch(2)
    assert lab.counts[0] == 0
    assert (node.head, node.rmap_hlist_len) == (Head.TREE, 0)
    lab.scan(1)
    assert lab.counts[0] == 1  # the child's item


@each
def test_7_4_items_of_a_deleted_node_are_volatile_until_scanned(profile: str) -> None:
    lab = Lab(profile)
    lab.region("w", ["w"], 0)
    pages = lab.region("p", ["m", "m", "m"], 0)
    lab.scan(3)
    node = pages.node()
    item = pages.item(0)
    assert item is not None
    pages.discard()
    assert lab.counts == (1, 2, 1, 0)
    late = lab.region("o", ["w"], 0)
    assert late.present(0)
    search = lab.more(late.pid, ["m"], 0, mergeable=False)
    assert stable_tree_search(lab.ksm, search[0]) is None
    assert lab.counts == (0, 0, 1, 3)
    assert node.head is Head.FREED
    assert item.head is node  # no release clears it here


@each
def test_7_5_nobody_looks_for_stale_nodes(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["m", "m"], 0)
    lab.scan(3)
    node = pages.node()
    pages.discard()
    assert node.head is Head.TREE
    assert lab.counts == (1, 1, 0, 0)


# -- 8: counters -----------------------------------------------------------------------------------------------


@each
def test_8_1_append_counts(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"] * 4, 0)
    lab.scan(3)
    assert lab.counts == (1, 3, 0, 0)
    assert pages.node().rmap_hlist_len == 4
    assert lab.machine.mm(pages.pid).ksm_merging_pages == 4


@each
def test_8_3_volatile_is_what_is_left(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["x", "x", "u"], 0)
    lab.scan(1)
    assert lab.counts == (0, 0, 0, 3)
    lab.scan(1)
    assert lab.counts == (1, 1, 1, 0)


@each
def test_8_5_moving_between_trees_changes_no_counter(profile: str) -> None:
    lab = Lab(profile, 3)
    moved = lab.region("p", ["x"] * 3, 0)
    lab.region("o", ["u"], 1)
    lab.scan(3)
    before = lab.counts
    for nid in (1, 2, 0):
        moved.move(nid)
        assert lab.counts == before
        lab.scan(1)
        assert lab.counts == before


@each
def test_8_6_counters_follow_ksmd_not_the_page_tables(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"] * 5, 0)
    lab.scan(3)
    before = lab.counts
    pages.write(0, "u")
    pages.discard(1, 1)
    lab.machine.munmap(pages.pid, pages.address(2), 1)
    lab.machine.madvise(pages.pid, pages.address(3), 1, mergeable=False)
    pages.move(1)
    assert lab.counts == before


# -- 9: migration ----------------------------------------------------------------------------------------------


@each
def test_9_1_a_migrated_page_keeps_its_mappings(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"] * 3, 0)
    lab.scan(3)
    assert pages.move(1) == (0, [1])
    assert pages[0].mapcount == 3
    assert lab.machine.memory.nodes[0].used == 0


@each
def test_9_2_a_page_without_a_node_can_not_be_found_by_migration(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"], 0)
    pages[0].stable_node = NULL_STABLE_NODE
    result, status = pages.move(1)
    old = profile in ("seed", "4.1", "4.10")
    assert (result, status) == ((0, [-errno.EAGAIN]) if old else (1, [-1000]))
    assert pages.nodes() == [0]


@each
def test_9_5_an_exile_is_invisible(profile: str) -> None:
    lab = Lab(profile)
    twin = lab.region("o", ["x"], 1)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    twin.move(0)  # a plain page whose checksum is known
    moved.move(1)
    lab.batch(1)
    assert is_exiled(moved.node())
    for node in (0, 1):
        search = lab.more(lab.machine.spawn("s"), ["x"], node, mergeable=False)
        assert stable_tree_search(lab.ksm, search[0]) is None


@each
def test_9_6_nothing_is_exiled_across_nodes(profile: str) -> None:
    lab = Lab(profile, across=1)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    node = pages.node()
    pages.move(1)
    lab.scan(3)
    assert (node.nid, node.head, lab.exiled()) == (0, Head.TREE, 0)


@each
def test_9_7_rmap_finds_what_is_listed_and_its_forks(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    child = parent.fork("q")
    grandchild = child.fork("r")
    assert len(rmap_walk_ksm(parent[0])) == 6
    assert parent.move(1) == (0, [1])
    assert grandchild.nodes() == [1, 1]
    lab.scan(1)
    # With the parent's items gone, the child's lead to the child and its own fork only.
    late = grandchild.fork("s")
    assert len(rmap_walk_ksm(late[0])) == late[0].mapcount == 8
    parent.write(0, "a")
    parent.write(1, "b")
    assert len(rmap_walk_ksm(late[0])) == late[0].mapcount == 6


@each
def test_9_7_a_parents_mapping_is_not_found_from_its_childs_item(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    child = parent.fork("q")
    lab.scan(1)
    for index in range(2):
        item = parent.item(index)
        assert item is not None
        assert item.state == STABLE
    assert len(rmap_walk_ksm(child[0])) == 4
    for index in range(2):
        remove_rmap_item_from_tree(lab.ksm, parent.item(index))  # type: ignore[arg-type]
    assert len(rmap_walk_ksm(child[0])) == 2
