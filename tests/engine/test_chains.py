# SPDX-License-Identifier: GPL-2.0-or-later
"""max_page_sharing, chains and dups: statement 10 of docs/engine.md, by number."""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.state import NONE, STABLE, UNSTABLE, Head, StableNode
from ksmd_ctl.engine.trees import is_page_sharing_candidate
from tests.engine.lab import CHAINS, NEW, Lab, Region

each = pytest.mark.parametrize("profile", CHAINS)


def chain_of(region: Region, index: int = 0) -> list[StableNode]:
    """The dups of the chain that a page is in, from the front."""
    chain = region.node(index).chain
    assert chain is not None
    assert chain.dups is not None
    return list(chain.dups)


def three_dups(profile: str) -> tuple[Lab, Region]:
    """Six equal pages with a limit of 2: three dups, the newest in front."""
    lab = Lab(profile, max_page_sharing=2)
    pages = lab.region("p", ["x"] * 6, 0)
    lab.scan(4)
    assert lab.chains == (1, 3)
    return lab, pages


@each
def test_10_1_a_new_page_has_two_items_and_the_limit_is_256(profile: str) -> None:
    lab = Lab(profile)
    assert lab.machine.show("max_page_sharing") == "256\n"
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(2)
    assert pages.node().rmap_hlist_len == 2


@each
@pytest.mark.parametrize("limit", [2, 3, 10])
def test_10_3_and_10_8_copies_for_every_number_of_pages(profile: str, limit: int) -> None:
    for count in range(25):
        lab = Lab(profile, max_page_sharing=limit)
        lab.region("p", ["x"] * count or ["-"], 0)
        lab.scan(5)
        copies, rest = divmod(count, limit)
        full = (copies, copies * (limit - 1), rest, 0)
        expected = full if rest <= 1 else (copies + 1, count - copies - 1, 0, 0)
        assert lab.counts == expected, count
        assert lab.chains == ((1, expected[0]) if expected[0] > 1 else (0, 0)), count


@each
def test_10_4_the_first_candidate_stands_for_the_chain_and_moves_to_the_front(profile: str) -> None:
    lab = Lab(profile, max_page_sharing=4, stable_node_chains_prune_millisecs=1_000_000)
    pages = lab.region("p", ["x"] * 12, 0)
    lab.scan(4)
    newest, middle, oldest = chain_of(pages)
    # Make room in the two older ones: one item of each goes, then two of the oldest.
    for node, count in ((middle, 1), (oldest, 2)):
        for item in list(node.items())[:count]:
            lab.machine.discard(pages.pid, item.address, 1)
    lab.scan()
    assert [node.rmap_hlist_len for node in (newest, middle, oldest)] == [4, 3, 2]
    late = lab.region("o", ["x"], 0)
    lab.scan(2 if profile in NEW else 1)
    assert late.node() is middle
    assert chain_of(pages) == [newest, middle, oldest]  # it has room for this one only
    second = lab.region("q", ["x"], 0)
    lab.scan(2 if profile in NEW else 1)
    assert second.node() is oldest
    assert chain_of(pages)[0] is oldest


@each
def test_10_4_where_a_prune_is_due_the_fullest_candidate_is_chosen(profile: str) -> None:
    lab = Lab(profile, max_page_sharing=6)
    pages = lab.region("p", ["x"] * 12, 0)
    lab.scan(4)
    front, back = chain_of(pages)
    for node, count in ((front, 3), (back, 2)):
        for item in list(node.items())[:count]:
            lab.machine.discard(pages.pid, item.address, 1)
    lab.scan()
    late = lab.region("o", ["x"], 0)
    lab.scan(2 if profile in NEW else 1)
    assert late.node() is back
    assert chain_of(pages)[0] is back


@each
def test_10_4_without_a_candidate_any_dup_serves_to_compare(profile: str) -> None:
    lab, pages = three_dups(profile)
    lab.region("o", ["y"], 0)
    late = lab.region("q", ["x"], 0)
    lab.scan(3)
    assert lab.counts == (3, 3, 2, 0)
    assert late[0] not in pages.pages()
    assert not any(is_page_sharing_candidate(lab.ksm, dup) for dup in chain_of(pages))


@each
@pytest.mark.parametrize("due", [True, False])
def test_10_5_stale_dups_are_dropped_when_a_prune_is_due(profile: str, due: bool) -> None:
    lab = Lab(profile, max_page_sharing=2)
    search = lab.region("o", ["x"], 1)  # known there, and scanned first when it comes over
    pages = lab.region("p", ["x"] * 6, 0)
    lab.scan(4)
    front, _middle, back = chain_of(pages)
    lab.machine.discard(pages.pid, next(iter(front.items())).address, 1)
    lab.scan()
    lab.store("stable_node_chains_prune_millisecs", 0 if due else 1_000_000)
    for item in list(back.items()):
        lab.machine.discard(pages.pid, item.address, 1)
    search.move(0)
    lab.ksm.now_ns += 1_000_000
    lab.batch(1)
    assert search.node() is front
    assert (back.head is Head.FREED) == due
    assert front.chain is not None
    assert (front.chain.chain_prune_time > 0) == due


@each
def test_10_6_a_chain_of_one_collapses(profile: str) -> None:
    lab, pages = three_dups(profile)
    keep = chain_of(pages)[0]
    for node in chain_of(pages)[1:]:
        for item in list(node.items()):
            lab.machine.discard(pages.pid, item.address, 1)
    lab.scan()
    assert lab.chains == (1, 1)
    lab.region("o", ["y"], 0)
    lab.scan(2)  # its search walks over the chain; the dup is full, which older kernels mind
    assert lab.chains == ((0, 0) if profile in NEW else (1, 1))
    lab.machine.discard(pages.pid, next(iter(keep.items())).address, 1)
    lab.scan(1)
    lab.region("q", ["z"], 0)
    lab.scan(2)
    assert lab.chains == (0, 0)
    assert (keep.head, keep.chain) == (Head.TREE, None)


@each
def test_10_7_a_chain_without_live_dups_is_erased(profile: str) -> None:
    lab, pages = three_dups(profile)
    pages.discard()
    lab.scan(1)  # the items go, and with them the nodes; the header stays
    assert lab.chains == (1, 0)
    lab.region("o", ["y"], 0)
    lab.scan(2)
    assert lab.chains == (0, 0)
    assert lab.counts == (0, 0, 1, 0)


@each
def test_10_9_a_page_over_the_limit_keeps_its_items_and_takes_no_more(profile: str) -> None:
    lab = Lab(profile, max_page_sharing=2)
    parent = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    parent.fork("q")
    late = lab.region("o", ["x"], 0)
    lab.scan(3)
    assert parent.node().rmap_hlist_len == 4
    assert late[0] is not parent[0]
    assert lab.counts == (1, 3, 1, 0)


@each
def test_10_10_a_dup_that_leaves_the_chain_is_not_counted(profile: str) -> None:
    lab, pages = three_dups(profile)
    node = pages.node()
    lab.machine.move_pages(pages.pid, [pages.start], 1, move_all=True)
    lab.scan(1)
    assert node.nid == 1
    assert lab.chains == (1, 2)


@each
def test_replacing_inside_a_chain(profile: str) -> None:
    """4.16: an exile with one mapping meets a chain whose choice is misplaced."""
    lab = Lab(profile, max_page_sharing=3)
    moved = lab.region("p", ["x", "x"], 0)
    pages = lab.region("o", ["x"] * 5, 1)
    lab.scan(4)
    assert lab.chains == (1, 2)
    moved.discard(1)
    lab.scan()
    candidate = next(dup for dup in chain_of(pages) if is_page_sharing_candidate(lab.ksm, dup))
    address = next(iter(candidate.items())).address
    lab.machine.move_pages(pages.pid, [address], 0, move_all=True)
    moved.move(1)
    lab.batch(1)
    assert candidate.head is Head.MIGRATE_NODES
    assert moved.node().head is Head.DUP
    assert lab.chains == (1, 2)


@each
def test_replacing_by_an_exile_without_items(profile: str) -> None:
    """4.16: an exile that is no candidate takes the place of a misplaced match, and is not returned."""
    lab = Lab(profile)
    moved = lab.region("p", ["x", "x"], 0)
    twin = lab.region("o", ["x", "x"], 1)
    lab.scan(3)
    moved.discard(1)
    lab.scan()
    lab.batch(2)
    child = moved.fork("q")  # between the two, as the cursor is on the twin
    lab.scan(1)
    moved.move(1)
    twin.move(0)
    moved.discard(0, 1)
    lab.batch(1)  # the parent's item goes, then the child's first is looked at
    assert child.node().head is Head.TREE
    assert child.node().nid == 1
    assert twin.node().head is Head.MIGRATE_NODES
    item = child.item(0)
    assert item is not None
    assert item.state == (UNSTABLE if profile in NEW else NONE)
    lab.scan(2)
    assert item.state == STABLE
