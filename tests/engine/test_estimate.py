# SPDX-License-Identifier: GPL-2.0-or-later
"""What merging would save on the simulated machine is what its ksmd then reaches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksmd_ctl.engine import estimate as engine
from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.engine.memory import ZERO_CONTENT, page_content
from ksmd_ctl.host.estimate import Estimate, Outcome, Stage
from ksmd_ctl.host.memory import ProcessId


def machine(processes: list[list[int]], nodes: list[int]) -> tuple[EngineHost, list[ProcessId]]:
    """Processes with these contents, each on a node; content 0 is zeroes."""
    host = open_engine_host(demo=False, source=None)
    found = []
    for number, contents in enumerate(processes):
        process = host.spawn(f"p{number}")
        start = host.map(process, len(contents), nodes[number])
        host.advise(process, start, len(contents), mergeable=True)
        host.store(process, start, [ZERO_CONTENT if one == 0 else page_content(f"c{one}") for one in contents])
        found.append(process)
    return host, found


def look(host: EngineHost, *, more: bool = False) -> Estimate:
    return engine.look(host.machine, engine.chosen(host.machine, lambda _: True, more=more), more=more)


def outcome(found: Estimate, host: EngineHost) -> Outcome:
    rules = engine.rules(host.machine)
    (one,) = [
        one
        for one in found.outcomes
        if (one.merge_across_nodes, one.use_zero_pages) == (rules.merge_across_nodes, rules.use_zero_pages)
    ]
    return one


def merge(host: EngineHost) -> None:
    for name, value in (("smart_scan", 0), ("run", 1)):
        host.machine.store(name, str(value))
    for _ in range(8):
        host.batch(100_000)


def reached(host: EngineHost) -> tuple[int, int, int]:
    sample = host.sample()
    return tuple(int(sample.number(name) or 0) for name in ("pages_shared", "pages_sharing", "ksm_zero_pages"))  # type: ignore[return-value]


contents = st.lists(st.integers(0, 12), min_size=1, max_size=40)


@settings(max_examples=60)
@given(st.lists(contents, min_size=1, max_size=4), st.booleans(), st.booleans(), st.sampled_from([2, 3, 256]))
def test_it_is_what_ksmd_reaches(processes: list[list[int]], across: bool, zero: bool, limit: int) -> None:
    host, _ = machine(processes, [number % 2 for number in range(len(processes))])
    for name, value in (("merge_across_nodes", across), ("use_zero_pages", zero), ("max_page_sharing", limit)):
        host.machine.store(name, str(int(value)))
    before = sum(node.used for node in host.machine.memory.nodes)
    found = look(host)
    expected = outcome(found, host)
    merge(host)
    assert reached(host) == (expected.pages_shared, expected.pages_sharing, expected.zero_pages)
    assert before - sum(node.used for node in host.machine.memory.nodes) == expected.freed.found
    assert host.sample().number("general_profit") == (expected.pages_sharing + expected.zero_pages) * 4096 - (
        expected.items * 64
    )
    # The parts of all are the whole, and what is merged already is found.
    assert sum(one.freed for one in found.owners) == pytest.approx(expected.freed.found)
    again = outcome(look(host), host)
    assert (again.pages_shared, again.pages_sharing) == (expected.pages_shared, expected.pages_sharing)
    assert look(host).merged_pages == expected.pages_sharing


def test_what_fork_shares_is_one_page() -> None:
    host, (parent,) = machine([[1, 2, 3, 3]], [0])
    host.fork(parent, "child")
    assert outcome(look(host), host).freed.found == 1
    frames = sum(node.used for node in host.machine.memory.nodes)
    merge(host)
    assert frames - sum(node.used for node in host.machine.memory.nodes) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(contents, min_size=1, max_size=4), st.booleans(), st.data())
def test_what_changes_between_two_looks_is_left_out(
    processes: list[list[int]], zero: bool, data: st.DataObject
) -> None:
    """Pages that get a content of their own meanwhile: ksmd then reaches what the second look told."""
    host, found = machine(processes, [number % 2 for number in range(len(processes))])
    host.machine.store("use_zero_pages", str(int(zero)))
    places = [(number, page) for number, one in enumerate(processes) for page in range(len(one))]
    written = data.draw(st.lists(st.sampled_from(places), unique=True))
    starts = [host.machine.processes[one.pid].mm.vmas[0].start for one in found]

    def write() -> None:
        for number, page in written:
            host.store(found[number], starts[number] + page * 4096, [page_content(f"own {number} {page}")])

    chosen = engine.chosen(host.machine, lambda _: True, more=False)
    told = engine.look(host.machine, chosen, wait=write)
    assert told.stage is Stage.FINAL
    frames = sum(node.used for node in host.machine.memory.nodes)
    merge(host)
    freed = frames - sum(node.used for node in host.machine.memory.nodes)
    # Of zeroes that stay mapped it is the share that stays, and the one of them that is kept is not told apart.
    assert outcome(told, host).freed.found == pytest.approx(freed, abs=1e-6 if zero else 1)
    assert sum(one.freed for one in told.owners) == pytest.approx(outcome(told, host).freed.found)


def test_one_look_says_that_it_was_one() -> None:
    host, _ = machine([[1], [1]], [0, 0])
    once = look(host)
    assert (once.stage, once.stable, outcome(once, host).freed.found) == (Stage.READ, None, 1)


def test_a_process_that_ends_between_two_looks_has_no_part() -> None:
    host, (_, other) = machine([[1, 2, 3, 3], [1, 2]], [0, 0])
    found = engine.chosen(host.machine, lambda _: True, more=False)
    told = engine.look(host.machine, found, wait=lambda: host.machine.exit(other.pid))
    assert [engine.running(host.machine, one) for one in found] == [True, False]
    assert [round(one.freed, 6) for one in told.owners] == [1, 0]
    assert (told.pages, outcome(told, host).freed.found) == (4, 1)


def test_memory_that_nobody_marked_is_told_apart() -> None:
    host, (one,) = machine([[1, 2]], [0])
    start = host.map(one, 2, 0)
    host.store(one, start, [page_content("c1"), page_content("c5")])
    assert look(host).outcomes_with_more == ()
    found = look(host, more=True)
    assert (found.pages, found.more_pages) == (2, 2)
    assert (found.outcomes[0].freed.found, found.outcomes_with_more[0].freed.found) == (0, 1)
    host.advise(one, start, 2, mergeable=True)
    merge(host)
    assert reached(host)[:2] == (1, 1)


def test_huge_pages() -> None:
    """A split frees the pages of zeroes in a huge page, whatever use_zero_pages is."""
    host = open_engine_host(demo=False, source=None)
    process = host.spawn("huge")
    pages = 512
    start = host.map(process, 2 * pages, 0)
    start += -start % (pages * 4096)
    host.store(process, start, [page_content("a"), page_content("a")] + [ZERO_CONTENT] * 100
               + [page_content(f"own {one}") for one in range(pages - 102)])  # fmt: skip
    assert host.collapse(process, start, pages) == (True,)
    host.advise(process, start, pages, mergeable=True)
    frames = sum(node.used for node in host.machine.memory.nodes)
    expected = outcome(look(host), host)
    assert (expected.split_zero_pages, expected.freed.found, expected.items) == (100, 101, pages - 100)
    merge(host)
    assert frames - sum(node.used for node in host.machine.memory.nodes) == 101
    assert reached(host) == (expected.pages_shared, expected.pages_sharing, 0)


def test_domains_kept_apart() -> None:
    host, _ = machine([[1, 2, 0], [1, 2, 0], [1, 1, 7]], [0, 0, 0])
    found = engine.chosen(host.machine, lambda _: True, more=False)
    result = engine.look(host.machine, found, domain_of=["a", "a", "b"])
    assert result.domains is not None
    assert {name: bounds.found for name, bounds in result.domains.items()} == {"a": 3, "b": 1}
    assert result.outcomes[0].freed.found == 5
