# SPDX-License-Identifier: GPL-2.0-or-later
"""Surveys and plans of the simulated host."""

from __future__ import annotations

import pytest

from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.errors import NoSuchProcess, Rejected
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Move, finish
from ksmd_ctl.host.sharing import figures, pairs
from tests.engine.test_host import lab, process_with, scan


def test_a_survey_tells_who_maps_what_from_where() -> None:
    host = lab()
    host.set(Knob.MERGE_ACROSS_NODES, 1)
    process_with(host, ["x", "y"], 0)
    process_with(host, ["x", "y", "own"], 1)
    scan(host, 3)
    survey = finish(host.survey(1.0))
    assert survey.census is not None
    assert sum(survey.census.pages.values()) == 2
    (holder,) = [node for node, pages in survey.census.pages.items() if pages]
    for process in survey.processes:
        assert process.nodes == {holder: 2}
        assert process.remote_pages == (0 if process.home == holder else 2)
        assert process.remote_nodes == ({} if process.home == holder else {holder: 2})
    growth = {item.where: item.growth_bytes for item in survey.demands}
    # On its own node a process's pages take the place of those that come free.
    assert growth == {"host": 2 * PAGE_SIZE, f"node {holder}": 0, f"node {1 - holder}": 2 * PAGE_SIZE}
    assert survey.topology == host.topology()


def test_who_has_a_pid() -> None:
    host = lab()
    process, _ = process_with(host, ["x"])
    assert host.find(process.pid) == process
    with pytest.raises(NoSuchProcess):
        host.find(process.pid + 1)


def test_a_plan_says_what_a_move_then_does() -> None:
    host = lab()
    process, start = process_with(host, ["x", "x", "a", "-"], 0)
    scan(host, 3)
    plan = finish(host.plan(Move(process, 1)))
    assert (plan.nodes, plan.shared, plan.already, plan.left) == ({0: 2}, 1, 0, {})
    assert plan.room == "on node 1"
    assert finish(host.plan(Move(process, 0))).already == 2
    assert [page.node for page in host.pages(process, start, 3)] == [0, 0, 0]
    assert finish(host.move(Move(process, 1), 10)).moved == sum(plan.nodes.values())
    for request in (Move(process, 7), Move(process, 1, ranges=((1, 2),))):
        with pytest.raises(Rejected):
            finish(host.plan(request))
    with pytest.raises(Rejected, match="nothing is mapped"):
        finish(host.move(Move(process, 0, ranges=((1, 2),)), 10))


def test_what_is_alike_and_apart() -> None:
    host = lab()
    host.set(Knob.MERGE_ACROSS_NODES, 1)
    process_with(host, ["x", "x", "y", "own", "-"], 0)
    process_with(host, ["x", "y"], 1)
    found = finish(host.duplicates(1))
    # Three of x and two of y; one of each is enough.
    assert (found.mergeable_pages, found.frames, found.pages, found.complete) == (6, 6, 3, True)
    scan(host, 3)
    found = finish(host.duplicates(1))
    assert (found.mergeable_pages, found.frames, found.pages) == (6, 3, 0)


def test_what_has_to_stay_apart_is_not_counted() -> None:
    host = lab()
    host.set(Knob.MERGE_ACROSS_NODES, 0)
    host.set(Knob.MAX_PAGE_SHARING, 2)
    process_with(host, ["x"] * 4, 0)
    process_with(host, ["x"], 1)
    assert finish(host.duplicates(1)).pages == 2
    scan(host, 4)
    found = finish(host.duplicates(1))
    assert (found.frames, found.pages) == (3, 0)


def test_what_of_a_process_is_where() -> None:
    host = lab()
    process_with(host, ["x", "y", "-"], 0)
    (process,) = finish(host.processes()).processes
    assert (process.walked_bytes, process.resident_bytes, process.swapped_bytes) == (3 * PAGE_SIZE, 2 * PAGE_SIZE, 0)
    assert (process.file_bytes, process.zero_mapped_pages) == (0, 0)


def test_who_shares_frames_with_whom() -> None:
    host = lab()
    host.set(Knob.MERGE_ACROSS_NODES, 1)
    one, _ = process_with(host, ["x", "x", "y", "own", "-", "z", "z"], 0)
    other, _ = process_with(host, ["x", "y"], 1)
    third, _ = process_with(host, ["y"], 1)
    scan(host, 3)
    found = finish(host.sharing([[one], [other], [third, ProcessId(99, 1)]], 1.0))
    assert [(pair.groups, pair.frames, pair.pages) for pair in pairs(found)] == [
        ((0, 1), 2, (3, 2)),
        ((0, 2), 1, (1, 1)),
        ((1, 2), 1, (1, 1)),
    ]
    first, second, last = figures(found)
    assert (first.merged_pages, first.frames, first.own_frames, first.leaving_costs_pages) == (5, 3, 1, 1)
    assert (second.leaving_costs_pages, last.leaving_costs_pages) == (0, 0)
    assert sum(group.saved_pages for group in (first, second, last)) == pytest.approx(found.saved_pages)
    assert found.saved_pages == host.sample().number("pages_sharing") == 5
    assert (found.complete, found.gone, found.unseen_frames) == (True, (99,), 0)
    assert finish(host.sharing([[one]], 1.0)).unseen_frames == 2
    # What fork shares is apart; of what nobody else maps any more one mapping is left.
    host.exit(other)
    host.exit(third)
    child = host.fork(one, "child")
    (both,) = pairs(finish(host.sharing([[one], [child]], 1.0)))
    assert (both.frames, both.forked_frames) == (3, 1)
    host.exit(child)
    (alone,) = figures(finish(host.sharing([[one]], 1.0)))
    assert (alone.merged_pages, alone.frames, alone.shared_frames, alone.forked_pages) == (5, 3, 0, 0)
