# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes confined to nodes of their own: statement 15 of docs/engine.md, by number."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from ksmd_ctl.engine.host import EngineHost
from ksmd_ctl.engine.machine import Machine
from ksmd_ctl.engine.memory import HUGE_PAGES, Page
from ksmd_ctl.engine.profile import PROFILES
from ksmd_ctl.engine.state import folio_test_ksm, page_to_nid
from ksmd_ctl.scenario.generate import generate
from ksmd_ctl.scenario.runner import run
from ksmd_ctl.scenario.session import Session, engine_for
from tests.engine.lab import ALL, CHAINS, COLLAPSE, Lab, Region, is_ksm
from tests.engine.validate import validate

each = pytest.mark.parametrize("profile", ALL)
# Un-merging from outside changes a byte on the two oldest.
unsharing = pytest.mark.parametrize("profile", ["seed", *CHAINS])


def member(lab: Lab, name: str, labels: Sequence[str], nodes: set[int], node: int | None = None) -> Region:
    """A process confined to nodes, with one region: bound to a node, or without a policy."""
    return lab.more(lab.machine.spawn(name, min(nodes), frozenset(nodes)), labels, node)


@each
def test_15_1_the_page_s_node_chooses_its_trees(profile: str) -> None:
    lab = Lab(profile)
    gold, silver = member(lab, "g", ["x", "x"], {0}), member(lab, "s", ["x", "x"], {1})
    lab.scan(3)
    assert (gold.frames(), silver.frames(), gold[0] is silver[0]) == (1, 1, False)
    assert [gold.node().nid, silver.node().nid] == [0, 1]
    # With one tree for all nodes it is one frame.
    lab = Lab(profile, across=1)
    gold, silver = member(lab, "g", ["x", "x"], {0}), member(lab, "s", ["x", "x"], {1})
    lab.scan(3)
    assert {*gold.pages(), *silver.pages()} == {gold[0]}


class _Watched(EngineHost):
    """Looks before and after each batch at the nodes of all pages."""

    merges = 0

    def batch(self, pages: int) -> None:
        before = nodes_of(self.machine)
        super().batch(pages)
        if int(self.machine.show("merge_across_nodes")) == 0:
            for place, (page, nid) in nodes_of(self.machine).items():
                if folio_test_ksm(page):
                    old, where = before[place]
                    assert nid == where, place
                    self.merges += page is not old


def nodes_of(machine: Machine) -> dict[tuple[int, int, int], tuple[Page, int]]:
    return {
        (pid, vma.start, index): (entry, page_to_nid(entry))
        for pid, process in machine.processes.items()
        for vma in process.mm.vmas
        for index, entry in enumerate(vma.ptes)
        if isinstance(entry, Page)
    }


@each
def test_15_2_ksmd_leaves_every_mapping_on_its_node(profile: str) -> None:
    """Random scenarios, whose pages move between nodes also while ksmd is in the middle of a scan."""
    abilities = Session(profile).abilities()
    merges = 0
    for number in range(30):
        engine = engine_for(profile, 4)
        engine.__class__ = _Watched
        assert run(generate(29, number, abilities), engine, profile).observations
        assert isinstance(engine, _Watched)
        merges += engine.merges
    assert merges > 100


@unsharing
def test_15_3_only_a_stray_is_merged_across(profile: str) -> None:
    lab = Lab(profile)
    gold, silver = member(lab, "g", ["x", "x"], {0}), member(lab, "s", ["x", "x", "x"], {1})
    lab.scan(6)
    assert not set(gold.pages()) & set(silver.pages())
    assert silver.break_sharing(0) == 3
    assert not set(gold.pages()) & set(silver.pages())
    lab.scan(3)
    assert gold[0] is silver[0]


@each
def test_15_4_a_frame_moves_with_all_its_mappings_or_not_at_all(profile: str) -> None:
    lab = Lab(profile, 3)
    one, two = member(lab, "a", ["x"], {1, 2}), member(lab, "b", ["x"], {1, 2})
    lab.scan(3)
    lab.machine.memory.pinned.add(one[0])
    one.move(2)
    assert one.nodes() + two.nodes() == [1, 1]
    lab.machine.memory.pinned.clear()
    one.move(2)
    assert one.nodes() + two.nodes() == [2, 2]
    assert one[0] is two[0]


@each
def test_15_5_a_cpuset_refuses_a_node_and_only_the_process_s_own_is_asked(profile: str) -> None:
    lab = Lab(profile, 3)
    narrow, wide = member(lab, "a", ["x", "u"], {1}), member(lab, "b", ["x"], {1, 2})
    lab.scan(3)
    for nid in (0, 2):
        with pytest.raises(OSError, match="cpuset") as refused:
            narrow.move(nid)
        assert refused.value.errno == errno.EACCES
    assert narrow.nodes() + wide.nodes() == [1, 1, 1]
    wide.move(2)
    assert narrow.nodes() + wide.nodes() == [2, 1, 2]
    # No address, no question.
    assert lab.machine.move_pages(narrow.pid, [], 0, move_all=True) == (0, [])


@each
def test_15_6_what_a_process_allocates_itself_is_at_home(profile: str) -> None:
    lab = Lab(profile)
    silver = member(lab, "s", ["x", "x", "x", "x"], {1})
    lab.scan(3)
    silver.write(0, "y")
    silver.advise(False)
    assert silver.nodes() == [1] * 4
    assert silver.frames() == 4
    assert lab.machine.swap_out(silver.pid, silver.start, 4) == 4
    assert [silver.read(index) != b"" for index in range(4)] == [True] * 4
    silver.advise(True)
    lab.scan(3)
    assert is_ksm(silver[1])
    silver.start = lab.machine.mremap(silver.pid, silver.start, 4)
    assert silver.nodes() == [1] * 4
    assert silver.frames() == 4


@unsharing
def test_15_7_copies_of_somebody_else_come_from_his_node_or_by_the_policy(profile: str) -> None:
    lab = Lab(profile)
    free, bound = member(lab, "s", ["x", "x"], {1}), member(lab, "t", ["y", "y"], {1}, 1)
    lab.scan(3)
    for region, nodes in ((free, [0, 0]), (bound, [1, 1])):
        assert region.break_sharing(0) == 2
        assert region.nodes() == nodes
    free.move(1)
    lab.scan(3)
    lab.unmerge(nid=0)
    assert free.nodes() + bound.nodes() == [0, 0, 1, 1]


@pytest.mark.parametrize("profile", CHAINS)
def test_15_7_ksmd_s_own_copy_comes_from_where_it_runs(profile: str) -> None:
    """Where a merge fails half way, as in C25, in a domain of two nodes; then it is merged with another domain's."""
    lab = Lab(profile, 3, max_page_sharing=2)
    member(lab, "p", ["k"] * 4, {1, 2}, 2)
    silver, gold = member(lab, "q", ["k", "k"], {1, 2}), member(lab, "w", ["k", "w"], {0})
    lab.scan(3)
    silver.write(1, "k")
    lab.batch(4)
    silver.move(2)
    assert silver.nodes() == [2, 2]
    lab.batch(1).batch(1)
    assert silver.nodes() == [2, 0]
    lab.scan(3)
    assert silver[1] is gold[0]


@unsharing
def test_15_8_a_stray_goes_home_alone_until_it_is_merged(profile: str) -> None:
    lab = Lab(profile)
    gold, silver = member(lab, "g", ["x", "x"], {0}), member(lab, "s", ["x", "x"], {1})
    for merged in (False, True):
        lab.scan(3)
        silver.break_sharing(0)
        assert silver.nodes() == [0, 0]
        if merged:
            lab.scan(3)
        silver.move(1)
        assert (silver.nodes(), gold.nodes()) == ([1, 1], [1, 1] if merged else [0, 0])
    # What is un-merged by the rules of its home is at home.
    assert gold.break_sharing(0) == 2
    assert silver.break_sharing(1) == 2
    lab.scan(3)
    assert (silver.nodes(), gold.nodes()) == ([1, 1], [0, 0])
    assert not set(gold.pages()) & set(silver.pages())


@each
def test_15_9_a_child_and_a_new_program_stay_in_the_cpuset(profile: str) -> None:
    lab = Lab(profile)
    silver = member(lab, "s", ["x", "y"], {1})
    child = silver.fork("c")
    child.write(0, "z")
    lab.machine.exec(silver.pid)
    again = lab.more(silver.pid, ["x"], None)
    assert child.nodes() + again.nodes() == [1, 1, 1]
    for region in (child, again):
        with pytest.raises(OSError, match="cpuset"):
            region.move(0)


@pytest.mark.parametrize("profile", CHAINS)
def test_15_10_the_zero_page_is_one_for_all_domains(profile: str) -> None:
    lab = Lab(profile, use_zero_pages=1)
    gold, silver = member(lab, "g", ["0", "0"], {0}), member(lab, "s", ["0", "0"], {1})
    lab.scan(3)
    ptes = [lab.machine.mm(region.pid).pte(region.address(index)) for region in (gold, silver) for index in (0, 1)]
    assert len(set(ptes)) == 1
    assert not gold.pages() + silver.pages()
    # Without it pages of zeroes are like others.
    lab = Lab(profile)
    gold, silver = member(lab, "g", ["0", "0"], {0}), member(lab, "s", ["0", "0"], {1})
    lab.scan(3)
    assert (gold.frames(), silver.frames(), gold[0] is silver[0]) == (1, 1, False)


@pytest.mark.parametrize("profile", COLLAPSE)
@pytest.mark.parametrize("allowed", [{1}, {0, 1}])
def test_15_11_a_collapse_heeds_the_cpuset(profile: str, allowed: set[int]) -> None:
    lab = Lab(profile)
    # Touched before the process came into its cpuset.
    pages = lab.region("s", [f"h{index}" for index in range(HUGE_PAGES)], None)
    assert set(pages.nodes()) == {0}
    mm = lab.machine.mm(pages.pid)
    mm.policy, mm.mems_allowed = 1, frozenset(allowed)
    assert lab.machine.collapse(pages.pid, pages.start, HUGE_PAGES) == [True]
    assert set(pages.nodes()) == {min(allowed)}
    validate(lab.machine)


@each
def test_15_12_the_knob_can_not_be_switched_while_pages_are_merged(profile: str) -> None:
    lab = Lab(profile)
    gold, silver = member(lab, "g", ["x", "x"], {0}), member(lab, "s", ["x", "x"], {1})
    lab.scan(3)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.EBUSY}\]"):
        lab.store("merge_across_nodes", 1)
    lab.scan(3)
    assert gold[0] is not silver[0]


@each
def test_15_13_memory_that_goes_offline_goes_to_other_domains_nodes(profile: str) -> None:
    lab = Lab(profile)
    gold, silver = member(lab, "g", ["x", "x"], {0}), member(lab, "s", ["x", "x"], {1}, 1)
    lab.scan(3)
    lab.machine.going_offline(1)
    lab.machine.offline(1)
    assert silver.nodes() == [0, 0]
    assert gold[0] is not silver[0]


def test_all_profiles_are_tried() -> None:
    assert set(ALL) == set(PROFILES)
