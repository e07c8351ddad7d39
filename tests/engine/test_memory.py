# SPDX-License-Identifier: GPL-2.0-or-later
"""KSM and the rest of memory: statement 14 of docs/engine.md, by number, and system calls' refusals by errno."""

from __future__ import annotations

import errno

import pytest

from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import HUGE_PAGES, PAGE_SIZE, Memory
from ksmd_ctl.engine.migrate import NOT_WRITTEN
from ksmd_ctl.engine.state import calc_checksum, page_to_nid
from tests.engine.lab import ALL, CHAINS, COLLAPSE, NEW, OLD, Lab, Region, is_ksm
from tests.engine.scenario_runner import content
from tests.engine.validate import validate

each = pytest.mark.parametrize("profile", ALL)


@each
def test_14_1_a_write_to_a_ksm_page_copies_it_even_for_the_last_mapping(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], None)
    lab.scan(3)
    pages.move(1)
    page = pages[0]
    pages.write(0, "x")
    pages.write(1, "x")
    assert page.mapcount == 0
    assert pages.nodes() == [0, 0]  # by the task's policy, not where the page was
    assert lab.counts == (1, 1, 0, 0)


@each
def test_14_2_unmergeable_copies_for_the_process_itself(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.more(lab.machine.spawn("p", 1), ["x", "x"], None)
    lab.scan(3)
    pages.move(0)
    pages.advise(False)
    assert pages.nodes() == [1, 1]
    assert not any(map(is_ksm, pages.pages()))


@each
def test_14_3_copies_of_ksm_pages_are_counted(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x"] * 6, 0)
    lab.scan(3)
    pages.write(0, "y")
    assert lab.ksm.cow_ksm == 1
    pages.write(0, "z")
    assert lab.ksm.cow_ksm == 1
    lab.machine.break_sharing(pages.pid, pages.address(1), 1, None)
    assert lab.ksm.cow_ksm == 2
    lab.unmerge()
    assert lab.ksm.cow_ksm == 6


@each
def test_14_4_fork_registers_the_child_and_shares_everything(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "x", "-", "y"], 0)
    parent.read(2)
    lab.scan(3)
    child = parent.fork("q")
    assert [child.present(index) for index in range(4)] == [True, True, False, True]
    assert child[0] is parent[0]
    assert child[0].mapcount == 4
    assert lab.machine.mm(child.pid).slot is not None
    assert child.item(0) is None
    lab.scan(1)
    assert lab.counts[:2] == (1, 3)


@each
def test_14_4_a_childs_counters(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "x", "y"], 0)
    lab.scan(3)
    child = lab.machine.mm(parent.fork("q").pid)
    assert (child.ksm_merging_pages, child.ksm_rmap_items) == ((2, 3) if profile == "6.1" else (0, 0))
    lab.scan(1)
    assert child.ksm_merging_pages == (4 if profile == "6.1" else 2)


@pytest.mark.parametrize("profile", NEW)
def test_14_4_zero_pages_that_are_inherited_are_counted_again(profile: str) -> None:
    lab = Lab(profile, use_zero_pages=1)
    parent = lab.region("p", ["0", "0"], 0)
    lab.scan(2)
    child = parent.fork("q")
    assert lab.ksm.zero_pages == 4
    child.exit()
    assert lab.ksm.zero_pages == 2


@each
def test_14_5_discarding_takes_mappings_at_once_and_items_later(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    page = pages[0]
    pages.discard()
    assert page.mapcount == 0
    assert lab.ksm.rmap_items == 2
    lab.scan(1)
    assert lab.ksm.rmap_items == 0


@each
def test_14_6_counters_stay_until_the_exited_mm_is_reaped(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.region("o", ["u"], 0)
    lab.scan(3)
    pages.exit()
    assert lab.counts == (1, 1, 1, 0)
    lab.scan(1)
    assert lab.counts == (0, 0, 1, 0)


@pytest.mark.parametrize("readers", [1, 2])
@each
def test_14_9_swap_brings_back_plain_pages(profile: str, readers: int) -> None:
    lab = Lab(profile)
    first = lab.region("p", ["x"], 0)
    second = lab.region("o", ["x"], 0)
    lab.scan(3)
    node = first.node()
    assert lab.machine.swap_out(first.pid, first.start, 1) == 1
    assert not second.present(0)
    assert lab.machine.memory.nodes[0].used == 0
    for region in (first, second)[:readers]:
        assert region.read(0) == content("x")
    assert lab.ksm.swpin_copy == readers - 1
    assert node.hlist is not None  # stale, and nobody knows
    lab.scan(2)
    assert lab.counts == ((1, 1, 0, 0) if readers == 2 else (0, 0, 1, 0))


@each
def test_14_7_an_exec_hands_prctl_on_and_no_advice(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    if profile in NEW:
        lab.machine.prctl_merge(pages.pid, True)
    lab.scan(3)
    lab.machine.exec(pages.pid)
    validate(lab.machine)
    assert lab.counts == (1, 1, 0, 0)
    after = lab.more(pages.pid, ["x", "x"], 0, mergeable=False)
    assert lab.machine.memory.nodes[0].used == 2
    lab.scan(3)
    assert lab.counts == ((1, 1, 0, 0) if profile in NEW else (0, 0, 0, 0))
    after.advise(True)
    assert lab.scan(3).counts == (1, 1, 0, 0)


@each
def test_14_8_what_mremap_moves_is_unmerged_before(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x", "-", "u"], 1)
    lab.scan(3)
    lab.machine.munmap(pages.pid, pages.address(3), 1)
    pages.start = lab.machine.mremap(pages.pid, pages.start, 4)
    validate(lab.machine)
    assert [pages.present(index) for index in range(4)] == [True, True, False, False]
    assert pages[0] is not pages[1]
    assert pages.nodes() == [1, 1]
    assert lab.counts == (1, 1, 1, 0)
    lab.scan(1)
    assert lab.counts == (0, 0, 0, 2)
    assert lab.scan(2).counts == (1, 1, 0, 0)
    child = pages.fork("q")
    # Both are found at the new address, by the mapping's first page.
    assert pages.move(0) == (0, [0])
    assert child[0] is pages[0]
    assert child.nodes() == [0, 0]


@each
def test_14_9_a_fork_shares_what_comes_back_from_swap(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x"], 0)
    child = parent.fork("q")
    assert lab.machine.swap_out(parent.pid, parent.start, 1) == 1
    parent.read(0)
    child.read(0)
    assert parent[0] is child[0]
    assert lab.ksm.swpin_copy == 0


@each
def test_14_9_a_ksm_page_at_two_places_of_a_process_comes_back_twice(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    assert lab.machine.swap_out(pages.pid, pages.start, 2) == 1
    pages.read(0)
    pages.read(1)
    assert pages[0] is not pages[1]
    assert lab.ksm.swpin_copy == 1


@each
def test_14_9_who_writes_while_another_has_the_page_in_swap_gets_a_copy(profile: str) -> None:
    lab = Lab(profile)
    parent = lab.region("p", ["x", "y"], 0)
    assert lab.machine.pageout(parent.pid, parent.start, 2) == 2
    child = parent.fork("q")
    child.read(0)
    back = child[0]
    child.write(0, "z")
    assert child[0] is not back
    assert (parent.read(0), child.read(0)) == (content("x"), content("z"))
    # Nobody waits for it any more.
    parent.write(0, "m")
    child.write(1, "n")
    assert (parent.read(1), child.read(1)) == (content("y"), content("n"))
    assert lab.ksm.swpin_copy == 0
    validate(lab.machine)


@each
def test_14_9_pageout_leaves_pages_with_several_mappings(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x", "y"], 0)
    lab.scan(3)
    assert lab.machine.pageout(pages.pid, pages.start, 3) == 1
    pages.discard(1, 1)
    assert lab.machine.pageout(pages.pid, pages.start, 3) == 1
    assert lab.machine.memory.nodes[0].used == 0
    validate(lab.machine)


def huge(lab: Lab, labels: dict[int, str], rest: str, node: int = 0) -> Region:
    pages = lab.region("p", [labels.get(index, rest.format(index)) for index in range(HUGE_PAGES)], node)
    assert lab.machine.collapse(pages.pid, pages.start, HUGE_PAGES) == [True]
    validate(lab.machine)
    return pages


@pytest.mark.parametrize("zero_pages", [0, 1])
@pytest.mark.parametrize("profile", COLLAPSE)
def test_14_10_a_split_gives_zeroes_back(profile: str, zero_pages: int) -> None:
    lab = Lab(profile, use_zero_pages=zero_pages)
    pages = huge(lab, {0: "x", 1: "u"}, "0")
    lab.region("q", ["x"], 0)
    lab.scan(2)
    gives_back = lab.ksm.profile.split_frees_zeroes
    assert [pages.present(index) for index in (0, 1, 2)] == [True, True, not gives_back and not zero_pages]
    assert lab.counts[:2] == ((1, 1) if gives_back or zero_pages else (3, 508))
    assert lab.ksm.zero_pages == 0
    assert lab.machine.memory.freed_by_splits == (510 if gives_back else 0)
    assert lab.machine.memory.splits == 1
    # Un-merging takes none of them back, and a collapse all.
    lab.unmerge()
    assert pages.present(2) == (not gives_back and not zero_pages)
    assert lab.machine.collapse(pages.pid, pages.start, HUGE_PAGES) == [True]
    assert pages.present(2)
    validate(lab.machine)


@pytest.mark.parametrize("profile", COLLAPSE)
def test_14_10_a_huge_page_of_zeroes_goes_whole(profile: str) -> None:
    lab = Lab(profile)
    pages = huge(lab, {}, "0")
    lab.scan(3)
    assert pages.frames() == (0 if lab.ksm.profile.split_frees_zeroes else 2)


@pytest.mark.parametrize("profile", COLLAPSE)
def test_14_10_two_pages_of_one_huge_page_wait_for_a_scan(profile: str) -> None:
    lab = Lab(profile)
    pages = huge(lab, {0: "x", 511: "x"}, "h{}")
    lab.scan(2)
    assert lab.counts[:2] == (0, 0)
    assert lab.machine.memory.splits == 1
    lab.scan(1)
    assert lab.counts[:2] == (1, 1)
    # The KSM page is there twice.
    assert lab.machine.collapse(pages.pid, pages.start, HUGE_PAGES) == [False]
    pages.write(0, "y")
    assert lab.machine.collapse(pages.pid, pages.start, HUGE_PAGES) == [True]
    validate(lab.machine)


@pytest.mark.parametrize("profile", COLLAPSE)
def test_14_10_a_huge_page_moves_as_one(profile: str) -> None:
    lab = Lab(profile)
    pages = huge(lab, {}, "h{}")
    addresses = [pages.address(index) for index in (7, 8, 9)]
    assert lab.machine.move_pages(pages.pid, addresses, 1, move_all=True) == (0, [1, -errno.EBUSY, 1])
    assert set(pages.nodes()) == {1}
    validate(lab.machine)
    lab.machine.memory.pinned.add(pages[3])
    lab.region("q", ["h5"], 1)
    lab.scan(3)
    assert lab.counts[0] == 0
    lab.machine.memory.pinned.clear()
    assert lab.scan(1).counts[0] == 1


@pytest.mark.parametrize("profile", COLLAPSE)
def test_14_10_what_a_collapse_refuses(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["-"] * HUGE_PAGES, 0)
    collapse = lab.machine.collapse
    assert collapse(pages.pid, pages.start, HUGE_PAGES) == [False]
    assert collapse(pages.pid, pages.start, HUGE_PAGES - 1) == []
    pages.write(5, "x")
    lab.region("q", ["x"], 0)
    lab.scan(3)
    # Nothing in it can be written.
    assert collapse(pages.pid, pages.start, HUGE_PAGES) == [lab.ksm.profile.collapse_read_only]
    pages.write(6, "u")
    lab.machine.mprotect(pages.pid, pages.start, 5, writable=False)
    assert collapse(pages.pid, pages.start, HUGE_PAGES) == [False] or lab.ksm.profile.collapse_read_only
    lab.machine.mprotect(pages.pid, pages.start, 5, writable=True)
    assert collapse(pages.pid, pages.start, HUGE_PAGES) == [True]
    lab.machine.munmap(pages.pid, pages.start, 1)
    assert collapse(pages.pid, pages.start, HUGE_PAGES) == [False]


@pytest.mark.parametrize("profile", ["seed", *OLD, "5.10"])
def test_14_10_there_is_no_collapse_on_older_kernels(profile: str) -> None:
    lab = Lab(profile)
    with pytest.raises(OSError, match="MADV_COLLAPSE"):
        lab.machine.collapse(lab.machine.spawn("p"), 0, HUGE_PAGES)


@each
def test_14_11_unsuitable_memory_ignores_the_advice(profile: str) -> None:
    machine = Machine(1)
    pid = machine.spawn("p")
    start = machine.mmap(pid, 2, private=False)
    machine.madvise(pid, start, 2, mergeable=True)
    assert machine.mm(pid).slot is None


@each
def test_14_11_protection_is_irrelevant(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.machine.mprotect(pages.pid, pages.start, 2, writable=False)
    assert lab.scan(3).counts == (1, 1, 0, 0)


@each
def test_14_12_advice_on_what_was_never_touched(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["-", "-"], 0)
    lab.scan(1)
    assert lab.ksm.rmap_items == 0
    pages.advise(False)
    pages.advise(False)
    assert lab.machine.mm(pages.pid).slot is not None


@pytest.mark.parametrize("profile", NEW)
def test_14_13_prctl(profile: str) -> None:
    lab = Lab(profile)
    before = lab.region("p", ["x"], 0, mergeable=False)
    lab.machine.prctl_merge(before.pid, True)
    after = lab.more(before.pid, ["x"], 0, mergeable=False)
    child = before.fork("q")
    late = lab.more(child.pid, ["x"], 0, mergeable=False)
    lab.scan(3)
    assert before[0] is after[0] is child[0] is late[0]
    lab.machine.prctl_merge(before.pid, False)
    assert before[0] is not after[0]
    assert child[0] is late[0]


@pytest.mark.parametrize("profile", ["seed", *OLD, "5.10", "6.1"])
def test_14_13_prctl_is_einval_where_there_is_none(profile: str) -> None:
    lab = Lab(profile)
    with pytest.raises(OSError, match="PR_SET_MEMORY_MERGE") as refusal:
        lab.machine.prctl_merge(lab.machine.spawn("p"), True)
    assert refusal.value.errno == errno.EINVAL


@each
def test_14_14_dups_and_empty_chains_go_with_their_memory(profile: str) -> None:
    lab = Lab(profile, **({"max_page_sharing": 2} if profile in CHAINS else {}))
    pages = lab.region("p", ["x"] * 4, 1)
    lab.scan(4)
    assert lab.chains == ((1, 2) if profile in CHAINS else (0, 0))
    pages.discard()
    lab.machine.going_offline(1)
    lab.machine.offline(1)
    assert lab.counts == (0, 0, 0, 4)
    assert lab.chains == (0, 0)
    assert lab.ksm.root_stable_tree[1].rb_node is None


def test_14_16_the_checksum_tells_contents_apart() -> None:
    assert calc_checksum(content("a")) == calc_checksum(bytes(content("a")))
    assert calc_checksum(content("a")) != calc_checksum(content("b"))


# -- unsharing from outside ------------------------------------------------------------------------------------


@each
def test_unsharing_touches_ksm_pages_only(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x", "u", "-"], None)
    pages.read(3)
    lab.scan(3)
    frames = pages.pages()
    assert pages.break_sharing(1) == 2
    assert pages.nodes() == [1, 1, 0]
    assert pages[2] is frames[2]
    kept = pages.read(0) == content("x")
    assert kept == (profile not in OLD)  # there, the write that fails clears a byte


@each
def test_unsharing_does_not_reach_what_can_not_be_written(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x"], 0)
    lab.scan(3)
    lab.machine.mprotect(pages.pid, pages.start, 1, writable=False)
    assert pages.break_sharing() == 1
    assert is_ksm(pages[0])


# -- refusals ----------------------------------------------------------------------------------------------------


def test_refusals_by_errno() -> None:
    machine = Machine(2)
    pid = machine.spawn("p")
    start = machine.mmap(pid, 2)
    hole = start + 2 * PAGE_SIZE
    for number, call in (
        (errno.EFAULT, lambda: machine.write(pid, hole, content("a"))),
        (errno.EFAULT, lambda: machine.read(pid, hole)),
        (errno.ESRCH, lambda: machine.write(pid + 7, start, content("a"))),
        (errno.ESRCH, lambda: machine.exit(pid + 7)),
        (errno.ENODEV, lambda: machine.spawn("q", 2)),
        (errno.ENODEV, lambda: machine.mmap(pid, 1, -1)),
        (errno.ENODEV, lambda: machine.move_pages(pid, [start], 9, move_all=True)),
        (errno.ENODEV, lambda: machine.break_sharing(pid, start, 1, 9)),
        (errno.ENODEV, lambda: machine.going_offline(5)),
        (errno.EINVAL, lambda: machine.mmap(pid, 0)),
        (errno.EINVAL, lambda: machine.madvise(pid, start + 1, 1, mergeable=True)),
        (errno.ENOMEM, lambda: machine.madvise(pid, start, 3, mergeable=True)),
        (errno.ENOMEM, lambda: machine.discard(pid, start, 3)),
        (errno.ENOMEM, lambda: machine.mprotect(pid, start, 3, writable=False)),
        (errno.EFAULT, lambda: machine.write(pid, start, content("a"))),  # what is mapped was protected
    ):
        with pytest.raises(OSError) as refusal:  # noqa: PT011
            call()
        assert refusal.value.errno == number, number
    assert machine.mm(pid).vmas[0].mergeable  # ENOMEM came after the rest was done


def test_the_last_node_can_not_go_offline() -> None:
    machine = Machine(1)
    with pytest.raises(OSError, match="last node") as refusal:
        machine.going_offline(0)
    assert refusal.value.errno == errno.EBUSY


def test_memory_can_be_full() -> None:
    machine = Machine(2, node_pages=2)
    pid = machine.spawn("p")
    start = machine.mmap(pid, 5, 1)
    for index in range(4):
        machine.write(pid, start + index * PAGE_SIZE, content("a"))
    pages = [machine.mm(pid).page(start + index * PAGE_SIZE) for index in range(5)]
    assert [page and page_to_nid(page) for page in pages] == [1, 1, 0, 0, None]
    with pytest.raises(OSError, match="free frame") as refusal:
        machine.write(pid, start + 4 * PAGE_SIZE, content("a"))
    assert refusal.value.errno == errno.ENOMEM
    assert machine.move_pages(pid, [start], 0, move_all=True) == (1, [NOT_WRITTEN])


def test_a_page_has_its_size() -> None:
    with pytest.raises(ValueError, match="4096"):
        Memory([4]).hold(b"short")


def test_contents_are_held_once_and_let_go() -> None:
    memory = Memory([8])
    first = memory.alloc_page(content("a"), 0)
    second = memory.alloc_page(bytes(content("a")), 0)
    assert first.content is second.content
    assert memory.contents()[content("a")] == 2
    memory.unmap(first)
    memory.set_content(second, content("b"))
    assert content("a") not in memory.contents()


# -- move_pages ----------------------------------------------------------------------------------------------------


@each
def test_statuses_of_move_pages(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["x", "x", "a", "b", "-", "-"], 0)
    pages.read(5)
    lab.scan(3)
    lab.machine.move_pages(pages.pid, [pages.address(3)], 1, move_all=False)
    addresses = [pages.address(index) for index in (0, 2, 3, 4, 5, 6)]
    result, status = lab.machine.move_pages(pages.pid, addresses, 1, move_all=False)
    assert status == [-errno.EACCES, 1, 1, -errno.ENOENT, -errno.EFAULT, -errno.EFAULT]
    assert result == 0
    pages.write(1, "c")
    assert lab.machine.move_pages(pages.pid, [pages.start], 1, move_all=False) == (0, [1])  # one mapping is left


@each
def test_a_pinned_page_is_not_moved(profile: str) -> None:
    lab = Lab(profile)
    pages = lab.region("p", ["a", "b", "c"], 0)
    lab.machine.memory.pinned.add(pages[1])
    addresses = [pages.address(index) for index in range(3)]
    result, status = lab.machine.move_pages(pages.pid, addresses, 1, move_all=True)
    if profile in ("seed", *OLD):
        assert (result, status) == (0, [1, -errno.EAGAIN, 1])
    else:
        assert (result, status) == (1, [NOT_WRITTEN] * 3)
    assert pages.nodes() == [1, 0, 1]
