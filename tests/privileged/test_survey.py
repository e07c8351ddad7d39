# SPDX-License-Identifier: GPL-2.0-or-later
"""Surveys and plans through the host: in a process of their own, and what comes of them is what single looks find."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.codec import decode, encode
from ksmd_ctl.errors import NoSuchProcess, Rejected
from ksmd_ctl.host.memory import KsmDetection, Survey
from ksmd_ctl.host.operation import Move, finish
from ksmd_ctl.kernel.detection import PageReader
from ksmd_ctl.kernel.processes import Surveyor, count_relatives
from ksmd_ctl.kernel.pseudofile import PAGE_SIZE
from ksmd_ctl.kernel.topology import read_frame_map, read_topology
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.scenario.regions import spawn
from tests.kernel.test_detection import filled, scan
from tests.kernel.test_processes import FRAMES, TOPOLOGY, machine_tree
from tests.privileged.test_host import own_id


@given(st.dictionaries(st.integers(1, 50), st.integers(0, 4), max_size=12))
def test_relatives_are_those_whose_stack_begins_at_the_same_place(stacks: dict[int, int]) -> None:
    found = count_relatives(stacks)
    assert found.keys() == stacks.keys()
    for pid, count in found.items():
        others = [other for other, start in stacks.items() if start == stacks[pid] and other != pid]
        assert count == (len(others) if stacks[pid] else None)


def test_remote_pages_are_told_by_the_node_that_they_lie_on(tmp_path: Path) -> None:
    root = machine_tree(tmp_path)
    with PageReader(KsmDetection.KPAGEFLAGS, root) as reader:
        (found,) = Surveyor(TOPOLOGY, FRAMES, reader, root=root).all()
    assert (found.remote_pages, found.remote_nodes) == (2, {1: 2})
    # The tree doesn't say where its stack is.
    assert found.relatives is None


def test_real_forks_are_told() -> None:
    surveyor = Surveyor(read_topology(numa=True), read_frame_map(), None)
    with spawn("test-parent") as parent, spawn("test-stranger") as stranger:
        for process in (parent, stranger):
            process.advise(process.map(10), 10, mergeable=True)
        with parent.fork() as child:
            found = {item.id: item.relatives for item in surveyor.all()}
            assert (found[parent.id], found[child.id], found[stranger.id]) == (1, 1, 0)


def test_a_survey_is_all_of_it_at_once() -> None:
    host = open_kernel_host()
    memory = mmap.mmap(-1, 64 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_MERGEABLE)
    before = host.clock()
    survey = finish(host.survey(0.2), 200)
    assert before <= survey.time_seconds <= host.clock()
    assert survey.topology == host.topology()
    assert own_id() in {process.id for process in survey.processes}
    assert survey.census is not None
    assert (survey.lacking, survey.census.pages.keys()) == ("", {node.number for node in host.topology().with_memory()})
    assert {"host", *(f"node {node.number}" for node in host.topology().with_memory())} <= {
        item.where for item in survey.demands
    }
    assert survey.cpu_seconds >= survey.census.cpu_seconds > 0
    assert decode(Survey, encode(survey)) == survey
    memory.close()
    host.close()


def test_who_has_a_pid() -> None:
    host = open_kernel_host()
    assert host.find(own_id().pid) == own_id()
    with pytest.raises(NoSuchProcess, match="it is gone"):
        host.find(4194303)
    host.close()


def test_a_plan_counts_and_moves_nothing() -> None:
    host = open_kernel_host()
    if len(host.topology().nodes) > 1:
        pytest.skip("needs a machine with one NUMA node; tests/guest plans between several")
    with spawn("test-plan") as process:
        start = process.map(20)
        process.advise(start, 20, mergeable=True)
        process.store(start, [filled(number) for number in range(20)])
        plan = finish(host.plan(Move(process.id, 0)), 90)
        assert (plan.nodes, plan.shared, plan.already, plan.left) == ({}, 0, 20, {})
        assert plan.room == "on node 0"
        assert plan.room_bytes > 0
        with pytest.raises(Rejected, match="nothing is mapped"):
            finish(host.plan(Move(process.id, 0, ranges=((0x1000, 0x2000),))), 90)
        with pytest.raises(Rejected, match="no such node"):
            finish(host.plan(Move(process.id, 1023)), 90)
    host.close()


@pytest.mark.ksm
def test_a_survey_of_merged_memory(ksm_host: Path) -> None:
    host = open_kernel_host()
    with spawn("test-one") as one, spawn("test-two") as two:
        for process in (one, two):
            start = process.map(50)
            process.advise(start, 50, mergeable=True)
            process.store(start, [filled(number) for number in range(50)])
        scan(ksm_host, 4)
        survey = finish(host.survey(60.0), 300)
        assert survey.census is not None
        assert survey.census.complete
        assert sum(survey.census.pages.values()) == 50
        found = {process.id: process for process in survey.processes}
        for process in (one, two):
            mine = found[process.id]
            assert sum(mine.nodes.values()) == 50
            assert mine.merging_pages in (50, None)
            assert mine.relatives == 0
        growth = next(item.growth_bytes for item in survey.demands if item.where == "host")
        # 100 mappings get pages of their own, and 50 pages come free.
        assert growth == 50 * PAGE_SIZE
    host.close()
