# SPDX-License-Identifier: GPL-2.0-or-later
"""The corner cases C1 to C37 of docs/engine.md, by name, on each profile in which they differ.

SH, SG, UN and VO are pages_shared, pages_sharing, pages_unshared and pages_volatile.
"""

from __future__ import annotations

import errno

import pytest

from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.engine.state import NONE, NULL_STABLE_NODE, STABLE, UNSTABLE, Head
from ksmd_ctl.engine.trees import stable_tree_insert
from tests.engine.lab import ALL, CHAINS, NEW, OLD, RESTART, Lab, Region, is_exiled, is_ksm

each = pytest.mark.parametrize("profile", ALL)


def collision(profile: str, mappings: int = 3) -> tuple[Lab, Region, Region]:
    """A page with some mappings moves to the node of its twin, which has two."""
    lab = Lab(profile)
    moved = lab.region("p", ["x"] * max(mappings, 2), 0)
    twin = lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    if mappings == 1:
        moved.discard(1)
        lab.scan()
    moved.move(1)
    return lab, moved, twin


# -- moved pages that meet others ------------------------------------------------------------------------------


@each
def test_c1_collision_of_a_page_with_several_mappings(profile: str) -> None:
    lab, moved, twin = collision(profile)
    assert lab.counts == (2, 3, 0, 0)
    lab.scan()
    if profile == "seed":
        # Its items go one by one onto the twin, and the last one frees it.
        assert lab.counts == (1, 4, 0, 0)
        assert set(moved.pages()) == {twin[0]}
        assert lab.exiled() == 1  # empty, until the next scan starts
        assert lab.scan().exiled() == 0
    elif profile in OLD:
        # Its items go one by one, and nowhere: the page can't be replaced.
        assert lab.counts == (1, 1, 0, 3)
        assert moved.frames() == 1
        assert moved[0] is not twin[0]
        assert lab.scan(3).counts == (1, 1, 0, 3)
    else:
        assert lab.counts == (2, 3, 0, 0)
        assert lab.chains == (1, 2)
        assert lab.scan(5).counts == (2, 3, 0, 0)


@each
def test_c2_collision_of_a_page_with_one_mapping(profile: str) -> None:
    lab, moved, twin = collision(profile, 1)
    lab.scan()
    if profile == "seed":
        assert lab.counts == (1, 2, 0, 0)
        assert moved[0] is twin[0]
    else:
        assert lab.counts == (1, 1, 0, 1)
        assert moved[0] is not twin[0]
    assert lab.ksm.stable_node_chains == 0


@each
def test_c2_counts_the_mapping_of_a_fork_that_ksmd_has_not_seen(profile: str) -> None:
    lab = Lab(profile)
    moved = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    moved.discard(1)
    lab.scan()
    moved.fork("q")
    moved.move(1)
    lab.scan()
    expected = {"seed": (1, 3, 0, 0), "4.1": (1, 1, 0, 2), "4.10": (1, 1, 0, 2)}
    assert lab.counts == expected.get(profile, (2, 2, 0, 0))
    assert lab.chains == ((1, 2) if profile in CHAINS else (0, 0))


@each
@pytest.mark.parametrize("mappings", [1, 2])
def test_c3_collision_with_a_twin_that_is_misplaced_itself(profile: str, mappings: int) -> None:
    lab = Lab(profile)
    first = lab.region("p", ["x", "x"], 0)
    second = lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    if mappings == 1:
        first.discard(1)
        second.discard(1)
        lab.scan()
    before = lab.counts
    first.move(1)
    second.move(0)
    lab.batch(1)
    if profile in CHAINS and mappings == 2:
        assert lab.chains == (1, 2)
        assert second.node().head is Head.DUP  # nobody noticed that it is misplaced
        lab.scan(2)
        assert lab.chains == ((1, 1))
    else:
        assert is_exiled(second.node())
        assert first.node() is lab.ksm.root_stable_tree[1].rb_node  # in its place
    lab.scan(2)
    assert lab.counts == before
    assert (first.node().nid, second.node().nid) == (1, 0)


@each
def test_c4_foreign_page_meets_a_misplaced_page(profile: str) -> None:
    lab = Lab(profile)
    other = lab.region("o", ["u"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    other.write(0, "x")
    moved.move(1)
    if profile in NEW:
        lab.batch(1)  # its checksum is not known yet
        assert not is_exiled(moved.node())
        lab.scan(1)  # the page's own items find it
        assert moved.node().nid == 1
        return
    lab.batch(1)
    assert is_exiled(moved.node())
    assert other[0] is not moved[0]
    assert lab.counts == (1, 1, 0, 1)


@pytest.mark.parametrize("profile", CHAINS)
@pytest.mark.parametrize("limit", [2, 3])
def test_c4_full_misplaced_page_is_not_exiled_by_a_foreign_page(profile: str, limit: int) -> None:
    lab = Lab(profile, max_page_sharing=limit)
    other = lab.region("o", ["x"], 1)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    other.move(0)
    moved.move(1)
    lab.batch(1)
    assert is_exiled(moved.node()) == (limit == 3)
    assert other[0] is not moved[0]


# -- stale nodes -----------------------------------------------------------------------------------------------


def stale_root(profile: str, labels: list[str], stale: list[str]) -> tuple[Lab, Region]:
    """A page moves to a node where stale nodes lie on its way to its place in the tree."""
    lab = Lab(profile)
    moved = lab.region("p", labels, 0)
    gone = lab.region("o", [label for label in stale for _ in range(2)], 1)
    lab.scan(3)
    gone.discard()
    moved.move(1)
    return lab, moved


@each
def test_c5_stale_node_on_an_exiles_way(profile: str) -> None:
    lab, moved = stale_root(profile, ["x", "x", "x"], ["m"])
    assert lab.counts == (2, 3, 0, 0)
    lab.scan()
    if profile in RESTART:
        assert lab.counts == (1, 2, 0, 0)
    else:
        # The first item's search gave up: it sits in the unstable tree. The second slotted the node in.
        assert lab.counts == (1, 1, 1, 0)
        item = moved.item(0)
        assert item is not None
        assert item.state == UNSTABLE
    assert lab.scan().counts == (1, 2, 0, 0)


@each
def test_c5_stale_node_hides_the_match_from_a_new_twin(profile: str) -> None:
    lab = Lab(profile)
    twin = lab.region("o", ["u"], 0)
    pages = lab.region("p", ["m", "m", "x", "x"], 0)
    lab.scan(3)
    pages.discard(0, 2)
    twin.write(0, "x")
    lab.batch(1)
    merged = twin[0] is pages[2]
    assert merged == (profile in ("4.10", "5.10", "6.1"))
    assert lab.scan(3).counts == (1, 2, 0, 0)


@each
def test_c6_stale_node_at_the_match_of_an_exile(profile: str) -> None:
    lab = Lab(profile)
    moved = lab.region("p", ["x", "x"], 0)
    gone = lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    gone.discard()
    moved.move(1)
    lab.batch(1)
    assert is_exiled(moved.node()) == (profile not in RESTART)
    assert lab.scan(3).counts == (1, 1, 0, 0)


@each
def test_c7_forked_page_whose_node_is_exiled(profile: str) -> None:
    lab = Lab(profile)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    lab.batch(1)
    child = moved.fork("q")  # ahead of its parent from the next scan on
    lab.scan(1)
    moved.move(1)
    lab.batch(1)
    assert lab.counts == (1, 2, 0, 0)
    assert child.node().nid == 1
    assert child.node().head is Head.TREE


@each
def test_c7_forked_page_whose_node_is_exiled_and_has_no_items(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["u"], 0)
    lab.scan(3)
    child = parent.fork("q")
    parent.discard()
    child.move(1)
    lab.scan()
    if profile in ("seed", *OLD):
        assert lab.counts == (1, 1, 1, 0)
    elif profile in NEW:
        assert lab.counts == (1, 0, 2, 0)  # the first item went straight to the unstable tree
    else:
        assert lab.counts == (1, 0, 1, 1)  # it has no checksum yet
    assert lab.scan().counts == (1, 1, 1, 0)


@pytest.mark.parametrize("profile", CHAINS)
def test_c8_full_page_moves(profile: str) -> None:
    lab = Lab(profile, max_page_sharing=3)
    moved = lab.region("p", ["x"] * 3, 0)
    lab.scan(3)
    assert lab.counts == (1, 2, 0, 0)
    moved.move(1)
    lab.scan()
    # The first item finds its page slotted in and full: it is listed nowhere for a scan, and as its
    # checksum is known it goes to the unstable tree.
    assert lab.counts == (1, 1, 1, 0)
    assert lab.scan().counts == (1, 2, 0, 0)


@pytest.mark.parametrize("profile", ["seed", "4.1"])
def test_c9_dangling_head(profile: str) -> None:
    lab, moved = stale_root(profile, ["x", "x", "x"], ["m", "t"])
    lab.scan(6)
    # The second item met its own page in the unstable tree, so it kept its head and was never listed again.
    assert lab.counts == (1, 1, 0, 1)
    item = moved.item(1)
    assert item is not None
    assert item.state == NONE
    assert item.head is moved.node()
    result, status = moved.move(0)
    assert (result, status) == (0, [-errno.EAGAIN])
    assert moved.nodes() == [1, 1, 1]


@pytest.mark.parametrize("profile", RESTART)
def test_c9_does_not_arise_where_searches_restart(profile: str) -> None:
    lab, moved = stale_root(profile, ["x", "x", "x"], ["m", "t"])
    assert lab.scan(6).counts == (1, 2, 0, 0)
    assert moved.move(0) == (0, [0])


def test_c9_by_a_collision_whose_twin_goes() -> None:
    lab, moved, twin = collision("4.10")
    lab.scan()
    twin.discard()
    # The exile is slotted in, but every item takes it that it is listed already.
    assert lab.scan(4).counts == (0, 0, 0, 3)
    assert moved.node().head is Head.TREE
    assert moved[0].mapcount == 3


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("profile", CHAINS)
def test_c9_a_head_at_an_address_that_is_used_again(profile: str, reuse: bool) -> None:
    lab = Lab(profile)
    lab.ksm.reuse_addresses = reuse
    lab.region("o", ["w"], 0)
    parent = lab.region("p", ["x", "x", "u"], 0)
    lab.scan(3)
    old = parent.node()
    parent.write(0, "y")
    parent.write(1, "z")
    lab.batch(3)
    assert old.head is Head.FREED
    parent.write(0, "w")
    # Ahead of its parent, for the cursor is there.
    child = parent.fork("q")
    lab.scan(3)
    item = parent.item(0)
    assert item is not None
    assert parent[0] is child[0]
    assert (parent.node().address == old.address) == reuse
    assert (item.head is old) == reuse
    assert lab.counts[:2] == (1, 1 if reuse else 2)
    assert lab.ksm.heads_in_doubt


# -- pages that move more than once ----------------------------------------------------------------------------


@each
def test_c10_away_and_back_before_ksmd_looks(profile: str) -> None:
    lab = Lab(profile)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    node, frame = moved.node(), moved[0].pfn
    moved.move(1)
    assert moved[0].pfn != frame
    moved.move(0)
    lab.batch(1)
    assert lab.exiled() == 0
    assert (moved.node(), node.nid, lab.counts) == (node, 0, (1, 1, 0, 0))


@each
def test_c11_two_moves_in_one_scan(profile: str) -> None:
    lab = Lab(profile, 3)
    moved = lab.region("p", ["x", "x", "x"], 0)
    lab.scan(3)
    moved.move(1)
    lab.batch(1)
    assert moved.node().nid == 1
    moved.move(2)
    lab.batch(1)
    assert moved.node().nid == 2
    assert lab.counts == (1, 2, 0, 0)


@each
def test_c11_with_one_item_the_second_move_waits_for_the_next_scan(profile: str) -> None:
    lab = Lab(profile, 3)
    moved = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    moved.discard(1)
    lab.scan()
    moved.move(1)
    lab.batch(1)
    moved.move(2)
    lab.scan(1)  # finishes the scan under way
    assert moved.node().nid == 1
    lab.scan(1)
    assert moved.node().nid == 2


@each
def test_c12_back_on_its_node_while_exiled(profile: str) -> None:
    lab = Lab(profile)
    twin = lab.region("o", ["x"], 0)
    lab.scan(1)
    moved = lab.region("p", ["y", "y"], 0)
    lab.scan(3)
    twin.write(0, "y")
    lab.batch(1)  # where checksums come first, this is the batch that learns it
    lab.scan(1)
    if twin[0] is moved[0]:  # it has merged already: part again, so that it can find the page misplaced
        twin.write(0, "y")
    moved.move(1)
    lab.batch(1)
    assert is_exiled(moved.node())
    moved.move(0)
    assert is_exiled(moved.node())
    lab.batch(1)
    assert moved.node().head is Head.TREE
    assert moved.node().nid == 0


@each
def test_c13_last_mapper_exits_while_exiled(profile: str) -> None:
    lab = Lab(profile)
    lab.region("w", ["w", "w"], 0)
    moved = lab.region("p", ["x", "x"], 0)
    twin = lab.region("o", ["u"], 0)
    lab.scan(3)
    twin.write(0, "x")
    if profile in NEW:
        lab.scan(1)
        twin.write(0, "x")  # apart again, its checksum known
    lab.batch(4)  # the page's items are passed
    moved.move(1)
    lab.scan(1)
    assert is_exiled(moved.node())
    moved.exit()
    shared = lab.counts[0]
    lab.batch(1)
    # Dropped as the scan started: before its process's items are reaped.
    assert lab.counts[0] == shared - 1
    assert lab.exiled() == 0


@each
def test_c13_with_ksmd_stopped_nothing_drops_it(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["u"], 0)
    lab.scan(3)
    pages.exit()
    assert lab.counts == (1, 1, 1, 0)


# -- knobs, run=2, exits ---------------------------------------------------------------------------------------


@each
def test_c14_exit_with_ksmd_stopped(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["u"], 0)
    lab.scan(3)
    pages.exit()
    with pytest.raises(OSError, match="pages are merged") as refusal:
        lab.store("merge_across_nodes", 1)
    assert refusal.value.errno == errno.EBUSY
    lab.scan()
    lab.store("merge_across_nodes", 1)
    assert lab.counts == (0, 0, 1, 0)


@each
def test_c15_run_2_twice(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    lab.store("run", 2)
    assert lab.ksm.scan.seqnr == 0
    assert pages.frames() == 2
    lab.machine.batch(10)
    lab.machine.batch(10)
    lab.scan(2)  # somebody makes ksmd work all the same
    assert pages.frames() == 1
    lab.store("run", 2)
    assert pages.frames() == 1
    lab.store("run", 0)
    lab.store("run", 2)
    assert pages.frames() == 2


@each
def test_c16_memory_offline(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 1)
    gone = lab.region("o", ["y", "y"], 1)
    lab.scan(3)
    gone.discard()
    lab.machine.going_offline(1)
    assert lab.machine.show("run") == "4\n"
    for knob in ("run", "merge_across_nodes"):
        with pytest.raises(BlockingIOError):
            lab.machine.store(knob, 1)
    with pytest.raises(BlockingIOError):
        lab.machine.batch(1)
    lab.machine.store("sleep_millisecs", 7)
    lab.machine.offline(1)
    # y's node is gone without any scan, its items wait; x's page has moved and is misplaced.
    assert lab.machine.show("run") == "0\n"
    assert lab.counts == (1, 1, 0, 2)
    assert pages.nodes() == [0, 0]
    assert pages.node().nid == 1
    lab.scan()
    assert pages.node().nid == 0
    assert lab.counts == (1, 1, 0, 0)


@each
def test_c16_offlining_can_be_cancelled(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 1)
    lab.machine.memory.pinned.add(pages[0])
    lab.machine.going_offline(1)
    with pytest.raises(OSError, match="can't be moved") as refusal:
        lab.machine.offline(1)
    assert refusal.value.errno == errno.EBUSY
    assert lab.machine.show("run") == "0\n"


@each
def test_c17_a_copy_for_each_node_that_holds_the_content(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    pages.move(1)  # as a demotion to slower memory does
    lab.scan()
    lab.region("o", ["x", "x"], 0)
    lab.scan(3)
    assert lab.counts == (2, 2, 0, 0)


@pytest.mark.parametrize("profile", CHAINS)
def test_c18_dups_that_move_apart(profile: str) -> None:
    lab, moved, twin = collision(profile)
    lab.scan()
    assert lab.chains == (1, 2)
    moved.move(0)
    lab.scan()
    # Taken out of the chain by its own item; the other dup stays in it, alone.
    assert moved.node().nid == 0
    assert twin.node().head is Head.DUP
    assert lab.chains == (1, 1)


@pytest.mark.parametrize("profile", CHAINS)
def test_c18_a_walk_collapses_the_chain_of_one(profile: str) -> None:
    lab, moved, _twin = collision(profile)
    lab.scan()
    moved.move(0)
    lab.scan()
    lab.machine.store("stable_node_chains_prune_millisecs", 2000)
    lab.ksm.now_ns += 1_000_000_000
    late = lab.region("l", ["a"], 1)
    lab.scan(1)
    late.write(0, "x")
    lab.scan(2 if profile in NEW else 1)
    # The search for the new twin walked over it: 6.12 collapses it at once, older ones when it is due.
    assert lab.chains == ((0, 0) if profile in NEW else (1, 1))
    lab.ksm.now_ns += 2_000_000_000
    late.write(0, "b")
    lab.scan(2)
    late.write(0, "x")
    lab.scan(2)
    assert lab.chains == (0, 0)


# -- which page, and when --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", CHAINS)
def test_c19_insertion_meets_equal_content_and_makes_a_dup(profile: str) -> None:
    lab = Lab(profile, max_page_sharing=2)
    pages = lab.region("p", ["x"] * 4, 0)
    lab.scan(3)
    assert lab.counts == (2, 2, 0, 0)
    assert lab.chains == (1, 2)
    assert pages.frames() == 2


@pytest.mark.parametrize("profile", ["seed", *OLD])
def test_c19_insertion_meets_equal_content_and_fails(profile: str) -> None:
    lab = Lab(profile)
    first = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    second = lab.region("o", ["x"], 0)
    page = second[0]
    page.stable_node = NULL_STABLE_NODE  # upgraded after its search missed the node
    assert stable_tree_insert(lab.ksm, page) is None
    page.stable_node = None
    assert first.node() is lab.ksm.root_stable_tree[0].rb_node


@pytest.mark.parametrize("profile", ["seed", "4.1"])
def test_c19_insertion_meets_a_stale_node_and_both_pages_are_broken(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["u", "v"], 0)
    stale = lab.region("o", [label for label in "lmnot" for _ in range(2)], 0)
    lab.scan(3)
    pages.write(0, "x")
    pages.write(1, "x")
    lab.scan(1)
    pages.discard()
    pages.write(0, "x")
    pages.write(1, "x")  # as before, their checksums known
    frames = set(pages.pages())
    stale.discard()
    lab.batch(2)
    # Each search removed a stale node and gave up, and so did the insertion.
    assert not any(map(is_ksm, pages.pages()))
    assert not frames & set(pages.pages())
    assert lab.ksm.cow_ksm == 2


@each
def test_c20_the_page_scanned_second_survives(profile: str) -> None:
    lab = Lab(profile, across=1)
    first = lab.region("p", ["x"], 0)
    second = lab.region("o", ["x"], 1)
    survivor = second[0]
    lab.scan(2)
    assert first[0] is survivor
    assert first.nodes() == [1]
    third = lab.region("q", ["x"], 0)
    lab.scan(2)
    assert third[0] is survivor


@each
def test_c21_first_sight_of_a_page_that_has_a_twin(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    late = lab.region("o", ["x"], 0)
    lab.scan(1)
    assert (late[0] is pages[0]) == (profile not in NEW)
    lab.scan(1)
    assert late[0] is pages[0]


@each
def test_c22_page_shared_by_fork_is_not_merged_with_itself(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x"], 0)
    child = parent.fork("q")
    lab.scan(5)
    assert lab.counts == (0, 0, 1, 1)
    third = lab.region("o", ["x"], 0)
    lab.scan(3)
    assert lab.counts == (1, 2, 0, 0)
    assert parent[0] is child[0] is third[0]


@each
def test_c23_unstable_walk_ends_at_a_page_that_is_gone(profile: str) -> None:
    lab = Lab(profile)
    early = lab.region("a", ["m"], 0)
    late = lab.region("b", ["x"], 0)
    lab.scan(1)
    lab.batch(1)
    early.discard()
    lab.batch(1)
    item = late.item(0)
    assert item is not None
    assert item.state == NONE
    assert lab.counts == (0, 0, 1, 1)


@each
def test_c23_unstable_walk_ends_at_an_equal_page_that_moved(profile: str) -> None:
    lab = Lab(profile)
    early = lab.region("a", ["x"], 0)
    late = lab.region("b", ["x"], 0)
    lab.scan(1)
    lab.batch(1)
    early.move(1)
    lab.batch(1)
    assert lab.counts == (0, 0, 1, 1)
    assert late[0] is not early[0]


@each
def test_c23_unequal_page_that_moved_only_guides(profile: str) -> None:
    lab = Lab(profile)
    early = lab.region("a", ["m"], 0)
    lab.region("b", ["x"], 0)
    lab.scan(1)
    lab.batch(1)
    early.move(1)
    lab.batch(1)
    assert lab.counts == (0, 0, 2, 0)


@each
def test_c24_unstable_items_outlive_their_tree(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["a", "b", "c"], 0)
    lab.scan(2)
    assert lab.counts == (0, 0, 3, 0)
    lab.batch(1)
    # The tree was emptied, the counter was not: two of the three are of the scan before.
    assert lab.counts == (0, 0, 3, 0)
    root = lab.ksm.root_unstable_tree[0].rb_node
    assert root is not None
    assert (root.rb_left, root.rb_right) == (None, None)


def one_mapping_and_stale_nodes(profile: str, *, plain_first: bool) -> tuple[Lab, Region, Region]:
    """A KSM page with one mapping moves to a node with stale nodes, where a plain page equals it."""
    lab = Lab(profile)
    if plain_first:
        plain = lab.region("z", ["x"], 1)
    moved = lab.region("p", ["x", "x"], 0)
    if not plain_first:
        plain = lab.region("z", ["x"], 1)
    gone = lab.region("o", ["m", "m", "t", "t"] if plain_first else ["m", "m"], 1)
    lab.scan(3)
    moved.discard(1)
    lab.scan()
    gone.discard()
    moved.move(1)
    return lab, moved, plain


@pytest.mark.parametrize("profile", ["seed", "4.1"])
def test_c25_ksm_page_in_the_unstable_tree_is_found_as_a_partner(profile: str) -> None:
    lab, moved, plain = one_mapping_and_stale_nodes(profile, plain_first=False)
    lab.batch(1)
    item = moved.item(0)
    assert item is not None
    assert item.state == UNSTABLE
    assert is_ksm(moved[0])
    frame = plain[0]
    lab.batch(1)
    if profile == "seed":
        assert moved[0] is plain[0] is frame
    else:
        # Upgraded and, as its partner can't be replaced, broken again: a copy.
        assert plain[0] is not frame
        assert not is_ksm(plain[0])
        assert item.state == UNSTABLE


@pytest.mark.parametrize("profile", ["seed", "4.1"])
def test_c25_ksm_page_is_scanned_and_finds_a_partner(profile: str) -> None:
    lab, moved, plain = one_mapping_and_stale_nodes(profile, plain_first=True)
    old = moved.node()
    lab.batch(2)
    item = moved.item(0)
    assert item is not None
    if profile == "seed":
        # Its back link was overwritten: it has a new node, and the old one is stale.
        assert moved[0] is plain[0]
        assert moved.node() is not old
        assert item.state == STABLE
        lab.scan(2)
        assert old.head is Head.FREED
    else:
        assert moved.node() is old
        assert moved[0] is not plain[0]
        assert item.state == NONE


@each
def test_c26_busy_page(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    late = lab.region("o", ["x"], 0)
    lab.scan(1 if profile in NEW else 0)
    lab.machine.memory.locked.add(pages[0])
    lab.scan()
    busy = profile in CHAINS
    assert (late[0] is pages[0]) != busy
    assert lab.counts == ((1, 1, 0, 1) if busy else (1, 2, 0, 0))
    lab.machine.memory.locked.clear()
    assert lab.scan(2).counts == (1, 2, 0, 0)


@pytest.mark.parametrize("profile", CHAINS)
def test_c27_zero_page(profile: str) -> None:
    lab = Lab(profile, use_zero_pages=1)
    pages = lab.region("p", ["0", "0", "x"], 0)
    lab.scan(2)
    assert [pages.present(index) for index in range(3)] == [False, False, True]
    assert lab.counts == (0, 0, 1, 2)  # until the cursor comes by
    assert lab.ksm.zero_pages == (2 if profile in NEW else 0)
    assert lab.scan().counts == (0, 0, 1, 0)
    _, status = lab.machine.move_pages(pages.pid, [pages.start], 1, move_all=True)
    assert status == [-errno.EFAULT]
    pages.write(0, "x")
    assert lab.ksm.zero_pages == (1 if profile in NEW else 0)
    lab.unmerge()
    assert pages.present(1) == (profile in NEW)
    assert lab.ksm.zero_pages == 0


# -- the walk ----------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(("pages_to_scan", "batches"), [(3, 2), (4, 1), (1, 4), (2, 2)])
def test_c28_batches_of_a_full_scan(profile: str, pages_to_scan: int, batches: int) -> None:
    lab = Lab(profile)
    lab.region("p", ["a", "b", "c"], 0)
    for batch in range(batches):
        assert lab.ksm.scan.seqnr == 0, batch
        lab.batch(pages_to_scan)
    assert lab.ksm.scan.seqnr == 1


@each
def test_c28_nothing_is_scanned_with_pages_to_scan_0(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["a"], 0)
    assert lab.machine.batch(0) == 0
    assert lab.ksm.rmap_items == 0


@each
def test_c29_newcomers_at_rest_are_scanned_last(profile: str) -> None:
    lab = Lab(profile)
    names = ["p", "q", "r"]
    regions = [lab.region(name, ["a"], 0) for name in names]
    for region in regions:
        assert region.item(0) is None
        lab.batch(1)
        assert region.item(0) is not None


@each
def test_c29_newcomers_under_way_wait_and_then_come_first(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["a", "b"], 0)
    lab.batch(1)
    late = lab.region("q", ["c"], 0)
    lab.scan(1)
    assert late.item(0) is None
    lab.batch(1)
    assert late.item(0) is not None


@pytest.mark.parametrize("profile", CHAINS)
@pytest.mark.parametrize(("count", "expected"), [(3, (1, 1, 1, 0)), (5, (2, 2, 1, 0)), (4, (2, 2, 0, 0))])
def test_c30_leftover_at_the_sharing_limit(profile: str, count: int, expected: tuple[int, ...]) -> None:
    lab = Lab(profile, max_page_sharing=2)
    lab.region("p", ["x"] * count, 0)
    assert lab.scan(6).counts == expected


@each
def test_c31_unmerged_pages_come_from_the_writers_node(profile: str) -> None:
    lab = Lab(profile, across=1)
    free = lab.region("p", ["x", "x"], None)
    bound = lab.region("o", ["x", "x"], 0)
    lab.scan(3)
    lab.unmerge(nid=1)
    assert free.nodes() == [1, 1]
    assert bound.nodes() == [0, 0]


def processed(encounters: int) -> list[int]:
    """The encounters, counted from 1, at which smart_scan lets a page pass that stays alone."""
    lab = Lab("6.12", smart_scan=1)
    lab.region("p", ["x"], 0)
    lab.region("keeps the list alive", ["-"], 0)
    found = []
    for encounter in range(1, encounters + 1):
        skipped = lab.ksm.pages_skipped
        lab.machine.scan()
        if lab.ksm.pages_skipped == skipped:
            found.append(encounter)
    return found


def test_c32_smart_scan_keeps_equal_pages_apart_for_ever() -> None:
    assert processed(41) == [1, 2, 3, 4, 6, 9, 14, 23, 32, 41]
    for delay, merges in ((12, True), (13, False), (14, True), (15, False), (16, False), (17, True)):
        lab = Lab("6.12", smart_scan=1)
        first = lab.region("p", ["x"], 0)
        lab.machine.scan(delay)
        second = lab.region("q", ["x"], 0)
        lab.machine.scan(120)
        assert (first[0] is second[0]) == merges, delay
        lab.store("smart_scan", 0)
        lab.machine.scan(3)
        assert first[0] is second[0]


# -- switching merge_across_nodes --------------------------------------------------------------------------------


@each
def test_c33_switch_in_the_middle_of_a_scan_keeps_the_old_trees(profile: str) -> None:
    lab = Lab(profile)
    away = lab.region("o", ["b"], 1)
    lab.region("p", ["a", "c"], 0)
    lab.scan(1)
    lab.batch(1)  # b is in tree 1
    lab.store("merge_across_nodes", 1)
    assert lab.ksm.root_unstable_tree[1].rb_node is away.item(0)
    lab.scan(1)
    item = away.item(0)
    assert item is not None
    assert (item.state, item.nid) == (UNSTABLE, 1)
    lab.scan(1)
    # Only tree 0 was emptied; the item is of the scan before, so nothing was erased from tree 1.
    assert lab.ksm.root_unstable_tree[1].rb_node is not None
    assert (item.state, item.nid) == (UNSTABLE, 0)


@each
def test_c34_unstable_items_become_node_0s(profile: str) -> None:
    lab = Lab(profile, across=1)
    away = lab.region("o", ["x"], 1)
    here = lab.region("p", ["x"], 0)
    lab.scan(1)
    lab.batch(1)
    lab.store("merge_across_nodes", 0)
    item = away.item(0)
    assert lab.ksm.root_unstable_tree[0].rb_node is item
    lab.batch(1)
    # Equal, and on another node: only that is asked, and the walk ends there.
    assert away[0] is not here[0]
    assert lab.counts == (0, 0, 1, 1)


@each
def test_c35_node_without_items(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["u"], 0)
    lab.scan(3)
    child = parent.fork("q")
    parent.exit()
    while lab.counts[0]:
        lab.batch(1)  # until the parent is reaped, and no further
    # Nothing counts as shared, but the child maps the page, so its node can't go.
    assert is_ksm(child[0])
    with pytest.raises(OSError, match="pages are merged") as refusal:
        lab.store("merge_across_nodes", 1)
    assert refusal.value.errno == errno.EBUSY
    assert child.node().head is Head.TREE


# -- move_pages, profit --------------------------------------------------------------------------------------------


@each
def test_c36_aliases_in_one_call(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"] * 4, 0)
    lab.scan(3)
    addresses = [pages.address(index) for index in range(4)]
    result, status = lab.machine.move_pages(pages.pid, addresses, 1, move_all=True)
    assert (result, status) == (0, [1, -errno.EBUSY, 1, 1])


@pytest.mark.parametrize("profile", NEW)
def test_c37_profit_of_processes_and_of_the_host(profile: str) -> None:
    lab = Lab(profile)
    lab.region("p", ["x", "x"], 0)
    lab.region("o", ["x", "y", "y"], 0)
    lab.scan(3)
    mms = [process.mm for process in lab.machine.processes.values()]
    own = [mm.ksm_merging_pages * PAGE_SIZE - mm.ksm_rmap_items * 64 for mm in mms]
    assert sum(own) == lab.ksm.general_profit + lab.ksm.pages_shared * PAGE_SIZE
    assert lab.ksm.general_profit == 3 * PAGE_SIZE - 5 * 64
