# SPDX-License-Identifier: GPL-2.0-or-later
"""Transactions from their plan to their end: what goes well, what goes wrong, and what is left of it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl import statefiles as files
from ksmd_ctl.config.model import Config
from ksmd_ctl.engine.host import EngineHost, open_engine_host
from ksmd_ctl.engine.memory import PAGE_SIZE
from ksmd_ctl.errors import (
    Absent,
    Busy,
    Cancelled,
    HostError,
    KsmdError,
    NoSuchProcess,
    Refused,
    Rejected,
    TimedOut,
    UsageError,
)
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import HomeRange, Losses, ProcessId, Skipped
from ksmd_ctl.host.operation import Unshare, UnsharePart, UnshareResult, finish
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.privileged.requests import MESSAGE_BYTES, UnsharePages, request_message
from ksmd_ctl.render.transaction import plan_lines, transaction_lines
from ksmd_ctl.transactions.change import plan_document, steps_of, too_busy
from ksmd_ctl.transactions.executor import Executor, TransactionRunner
from ksmd_ctl.transactions.journal import (
    TransactionJournal,
    process_document,
    transaction_document,
    transactions_section,
)
from ksmd_ctl.transactions.plan import (
    MAXIMUM_RANGES,
    Limits,
    Plan,
    UnmergeRates,
    limits_of,
    make_plan,
    need_room,
    remerge_seconds,
)
from ksmd_ctl.transactions.transaction import Phase, Result, TransactionState, UnshareStep, begin, next_step
from ksmd_ctl.transactions.transitions import recovered
from tests.fakes.host import FakeOperation
from tests.fakes.memory import Memory, MergedHost

LIMITS = replace(limits_of(Config()), floor_bytes=1 << 20)
ACROSS = {Knob.MERGE_ACROSS_NODES: 0}


def busy() -> Rejected:
    return Rejected("writing", "EBUSY", errno=errno.EBUSY)


def planned(host: Host, wanted: dict[Knob, KnobValue], limits: Limits = LIMITS) -> Plan:
    return make_plan(wanted, host.sample(), finish(host.inventory(limits.floor_bytes)), limits)


def runner(
    host: Host, folder: Path, wanted: dict[Knob, KnobValue], limits: Limits = LIMITS, *, force: bool = False
) -> TransactionRunner:
    journal = TransactionJournal(folder, host.identity)
    executor = Executor(host, SavedKnobs(folder, host.identity))
    return TransactionRunner.of_plan(
        host, executor, journal, limits, planned(host, wanted, limits), "a test", force=force
    )


def taken_up(host: Host, folder: Path) -> TransactionRunner | None:
    executor = Executor(host, SavedKnobs(folder, host.identity))
    return TransactionRunner.of_journal(host, executor, TransactionJournal(folder, host.identity), LIMITS)


def to_end(found: TransactionRunner, pass_time: Callable[[float], None], most: int = 2000) -> TransactionState:
    """Carry it out, time passing only where it waits."""
    for _ in range(most):
        if found.poll():
            return found.state
        pass_time(1.0)
    raise AssertionError(f"after {most} looks it is still in the phase {found.state.phase}")


def killed_in(phase: Phase, host: MergedHost, found: TransactionRunner) -> None:
    """Carry it out up to a step of a phase, which is in the journal then, and not begun."""

    def kill(_: str) -> None:
        if found.state.phase is phase:
            raise Killed

    host.interfere = kill
    with pytest.raises(Killed):
        to_end(found, passing(host))
    host.interfere = lambda _: None


def passing(host: MergedHost) -> Callable[[float], None]:
    def pass_time(seconds: float) -> None:
        host.now += seconds
        host.merge()
        if host.knobs[Knob.RUN] == 1:
            full_scans = host.counters["full_scans"]
            assert isinstance(full_scans, int)
            host.counters["full_scans"] = full_scans + 1

    return pass_time


# -- what goes well ------------------------------------------------------------------------------------------


def test_everything_ends_at_home_with_the_knob_changed_and_ksmd_running(tmp_path: Path) -> None:
    host = MergedHost()
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert state.result is Result.DONE
    assert host.knobs[Knob.MERGE_ACROSS_NODES] == 0
    assert host.knobs[Knob.RUN] == 1
    assert host.at_home()
    # What could not be un-merged from outside was left to run = 2, and moved from where that put it.
    assert (state.unshared_pages, state.rest_pages, state.moved_pages) == (120, 40, 20)
    assert state.home_before == (40, 120)
    assert state.home_after == (120, 120)
    assert state.left == {"not writable": 40}
    assert [write for write in host.written if write[0] is Knob.RUN] == [(Knob.RUN, 0), (Knob.RUN, 2), (Knob.RUN, 1)]


def without_sealed(**settings: int) -> MergedHost:
    """Everything on it can be un-merged from outside."""
    host = MergedHost(**settings)
    for item in host.mappings[11]:
        item.writable = True
    return host


PACE = {Knob.PAGES_TO_SCAN: 100, Knob.SLEEP_MILLISECS: 20}


def test_where_nothing_is_left_one_look_of_ksmd_stands_in_for_run_2(tmp_path: Path) -> None:
    host = without_sealed()
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert (state.result, state.unshared_pages, state.rest_pages) == (Result.DONE, 160, 0)
    assert (Knob.RUN, 2) not in host.written
    assert [value for knob, value in host.written if knob is Knob.RUN] == [0, 1, 0, 1]
    assert {knob: host.knobs[knob] for knob in PACE} == PACE
    assert host.at_home()


@pytest.mark.parametrize(
    ("why", "knobs"),
    [("a tree for each node", {Knob.MERGE_ACROSS_NODES: 0}), ("paced by the kernel", {Knob.ADVISOR_MODE: "scan-time"})],
)
def test_where_a_look_would_not_do_it_is_run_2(tmp_path: Path, why: str, knobs: dict[Knob, KnobValue]) -> None:
    host = without_sealed()
    host.knobs.update(knobs)
    state = to_end(runner(host, tmp_path, {Knob.MAX_PAGE_SHARING: 16}), passing(host))
    assert (state.result, (Knob.RUN, 2) in host.written) == (Result.DONE, True)
    assert not {knob for knob, _ in host.written} & PACE.keys()


def test_what_is_merged_while_it_looks_is_left_to_run_2(tmp_path: Path) -> None:
    host = without_sealed()

    def merge_one(what: str) -> None:
        if what == "write pages_to_scan" and host.knobs[Knob.PAGES_TO_SCAN] == 100:
            host.mappings[10][0].merged[:2] = [True, True]

    host.interfere = merge_one  # type: ignore[assignment]
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert (state.result, (Knob.RUN, 2) in host.written) == (Result.DONE, True)
    assert {knob: host.knobs[knob] for knob in PACE} == PACE


def test_a_write_whose_process_was_killed_right_after_it_has_taken_place(tmp_path: Path) -> None:
    host = MergedHost()

    def interfere(what: str) -> KsmdError | None:
        if what == "write merge_across_nodes":
            host.put(Knob.MERGE_ACROSS_NODES, 0)
            return HostError("writing", "its process ended with Killed")
        return None

    host.interfere = interfere
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert (state.result, host.knobs[Knob.MERGE_ACROSS_NODES], state.attempts) == (Result.DONE, 0, 0)


@pytest.mark.parametrize(("failures", "result"), [(2, Result.DONE), (3, Result.DEGRADED)])
def test_putting_run_back_is_tried_three_times(tmp_path: Path, failures: int, result: Result) -> None:
    host = MergedHost()
    failed = 0

    def interfere(what: str) -> KsmdError | None:
        nonlocal failed
        if what == "write run" and host.knobs[Knob.MERGE_ACROSS_NODES] == 0 and failed < failures:
            failed += 1
            return HostError("writing", "its process ended with Killed")
        return None

    host.interfere = interfere
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert (state.result, failed) == (result, failures)
    assert host.knobs[Knob.RUN] == (1 if result is Result.DONE else 2)


@pytest.mark.parametrize(("refusals", "result"), [(30, Result.DONE), (10**6, Result.DEGRADED)])
def test_what_is_refused_for_now_is_asked_for_again_for_a_while(tmp_path: Path, refusals: int, result: Result) -> None:
    host = MergedHost()
    refused = 0

    def interfere(what: str) -> KsmdError | None:
        nonlocal refused
        if what == "write run" and host.knobs[Knob.MERGE_ACROSS_NODES] == 0 and refused < refusals:
            refused += 1
            return Busy("setting run", "too many requests are being served")
        return None

    host.interfere = interfere
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert state.result is result
    assert host.knobs[Knob.RUN] == (1 if result is Result.DONE else 2)


@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("wanted", [ACROSS, {Knob.MAX_PAGE_SHARING: 16}, {**ACROSS, Knob.MAX_PAGE_SHARING: 64}])
def test_on_the_simulated_host(tmp_path: Path, nodes: int, wanted: dict[Knob, KnobValue]) -> None:
    host = simulated(nodes)
    before = {process: host.load(process, start, 100) for process, start in host_pages(host)}
    state = to_end(runner(host, tmp_path, wanted), host.advance)
    assert state.result is Result.DONE
    for knob, value in wanted.items():
        assert host.read(knob) == value
    assert host.read(Knob.RUN) == 1
    assert state.home_after == (100 * nodes, 100 * nodes)
    for process, start in host_pages(host):
        home = host.machine.processes[process.pid].mm.vmas[0].policy
        assert {page.node for page in host.pages(process, start, 100)} == {home}
    host.advance(5)
    assert (host.sample().number("pages_sharing") or 0) > 0
    assert {process: host.load(process, start, 100) for process, start in host_pages(host)} == before


def simulated(nodes: int) -> EngineHost:
    """On each node a process with the same pages, all merged onto one node."""
    host = open_engine_host(nodes=nodes, demo=False, source=None)
    for node in range(nodes):
        process = host.spawn(f"p{node}")
        start = host.map(process, 100, node)
        host.advise(process, start, 100, mergeable=True)
        host.store(process, start, [bytes([number % 20 + 1]) * PAGE_SIZE for number in range(100)])
    host.set(Knob.SMART_SCAN, 0)
    host.set(Knob.RUN, 1)
    host.advance(5)
    return host


def host_pages(host: EngineHost):  # type: ignore[no-untyped-def]
    return [(host.find(pid), process.mm.vmas[0].start) for pid, process in host.machine.processes.items()]


def test_what_needs_no_unmerge_is_only_written(tmp_path: Path) -> None:
    host = MergedHost()
    state = to_end(runner(host, tmp_path, {Knob.PAGES_TO_SCAN: 500, Knob.RUN: 0}), passing(host))
    assert state.result is Result.DONE
    # Stopped first.
    assert host.written == [(Knob.RUN, 0), (Knob.PAGES_TO_SCAN, 500)]
    assert host.merged_pages() == 160


def test_what_is_so_already_is_done(tmp_path: Path) -> None:
    host = MergedHost()
    state = to_end(runner(host, tmp_path, {Knob.PAGES_TO_SCAN: 100, Knob.RUN: 1}), passing(host))
    assert (state.result, state.writes, host.written) == (Result.DONE, (), [])


def test_what_changes_nothing_leaves_the_last_change_in_the_journal(tmp_path: Path) -> None:
    host = MergedHost()
    to_end(runner(host, tmp_path, {Knob.PAGES_TO_SCAN: 500}), passing(host))
    before = TransactionJournal(tmp_path, host.identity)
    found = runner(host, tmp_path, {Knob.PAGES_TO_SCAN: 500})
    assert to_end(found, passing(host)).result is Result.DONE
    assert "no change needed" in next(transaction_lines(found.document())).text
    after = TransactionJournal(tmp_path, host.identity)
    assert after.contents == before.contents


def test_run_2_is_a_transaction_too(tmp_path: Path) -> None:
    host = MergedHost()
    state = to_end(runner(host, tmp_path, {Knob.RUN: 2}), passing(host))
    assert (state.result, host.knobs[Knob.RUN], host.merged_pages()) == (Result.DONE, 2, 0)
    assert host.at_home()
    with pytest.raises(UsageError, match="stands alone"):
        make_plan({Knob.RUN: 2, Knob.PAGES_TO_SCAN: 5}, host.sample(), None, LIMITS)


def test_leftovers_that_no_counter_shows_are_unmerged(tmp_path: Path) -> None:
    # docs/engine.md 11.4: an ended process's items keep the knob from changing while pages_shared is 0.
    host = MergedHost()
    host.counters["pages_shared"] = host.counters["pages_sharing"] = 0
    plan = make_plan(ACROSS, host.sample(), None, LIMITS)
    assert not plan.unmerge
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert state.result is Result.DONE
    assert host.knobs[Knob.MERGE_ACROSS_NODES] == 0
    assert host.knobs[Knob.RUN] == 1


def test_it_waits_while_memory_goes_offline(tmp_path: Path) -> None:
    host = MergedHost()
    host.offline = True
    found = runner(host, tmp_path, ACROSS)
    for _ in range(5):
        assert not found.poll()
        host.now += 2
    assert host.written == []
    host.offline = False
    assert to_end(found, passing(host)).result is Result.DONE


# -- what goes wrong -----------------------------------------------------------------------------------------


def test_merged_again_before_the_knob_is_written(tmp_path: Path) -> None:
    host = MergedHost()
    times = 0

    def interfere(what: str) -> KsmdError | None:
        nonlocal times
        if what == "write merge_across_nodes" and times < 2:
            times += 1
            return busy()
        return None

    host.interfere = interfere
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert (state.result, state.attempts, times) == (Result.DONE, 2, 2)


def test_somebody_who_always_merges_again_ends_it(tmp_path: Path) -> None:
    host = MergedHost()
    host.interfere = lambda what: busy() if what == "write merge_across_nodes" else None
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert state.result is Result.ABANDONED
    assert "5 times in a row" in state.reason
    as_before(host)


def as_before(host: MergedHost, run: int = 1) -> None:
    assert host.knobs[Knob.MERGE_ACROSS_NODES] == 1
    assert host.knobs[Knob.RUN] == run
    assert {knob: host.knobs[knob] for knob in PACE} == PACE


def test_an_abandoned_one_has_ksmd_hurry_for_a_while(tmp_path: Path) -> None:
    host = MergedHost()
    host.interfere = lambda what: (
        Rejected("run", "ENOMEM", errno=errno.ENOMEM)
        if what == "write run"
        and not (host.knobs[Knob.RUN] == 1 or host.merged_pages() == 160)
        and (Knob.PAGES_TO_SCAN, 400) not in host.written
        else None
    )
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert state.result is Result.ABANDONED
    assert "ENOMEM" in state.reason
    assert [value for knob, value in host.written if knob is Knob.PAGES_TO_SCAN] == [400, 100]
    as_before(host)
    assert host.merged_pages() == 160


def stopped_half_way(host: EngineHost, folder: Path) -> TransactionRunner:
    """A change that is cancelled when one of two processes is un-merged: its pages still count as merged."""
    found = runner(host, folder, ACROSS)
    while merged_now(host) > 100:
        assert not found.poll()
        host.advance(0.1)
    found.cancel("interrupted")
    return found


def merged_now(host: EngineHost) -> int:
    return sum(page.ksm for process, start in host_pages(host) for page in host.pages(process, start, 100))


def test_counters_that_ksmd_has_not_brought_up_to_date_are_not_taken_for_merged_pages(tmp_path: Path) -> None:
    host = simulated(2)
    host.set(Knob.PAGES_TO_SCAN, 1)
    host.set(Knob.SLEEP_MILLISECS, 100)
    found = stopped_half_way(host, tmp_path)
    state = to_end(found, host.advance)
    assert (state.result, merged_now(host)) == (Result.ABANDONED, 200)
    assert (state.remerged_pages, state.remerge_seconds) == (200, 0.0)
    (said,) = [line for line in transaction_lines(transaction_document(state, 4096)) if line.label == "merging"]
    assert said.text == "finished: all 200 pages are merged again"


def pages_line(state: TransactionState) -> str:
    (said,) = [line.text for line in transaction_lines(transaction_document(state, 4096)) if line.label == "pages"]
    return said


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_step_had_un_merged_that_was_broken_off_is_not_known(tmp_path: Path, killed: bool) -> None:
    host = simulated(2)
    found: TransactionRunner | None = stopped_half_way(host, tmp_path)
    if killed:
        found = taken_up(host, tmp_path)
    assert found is not None
    state = to_end(found, host.advance)
    assert transaction_document(state, 4096)["pages"]["unshared"] is None  # type: ignore[index]
    why = "the process was killed" if killed else "that was broken off"
    assert pages_line(state) == f"some pages un-merged page by page; how many is not known, {why}"
    assert TransactionJournal(tmp_path, host.identity).last == transaction_document(state, 4096)


def test_what_was_un_merged_until_a_kill_between_two_steps_is_known(tmp_path: Path) -> None:
    host = simulated(2)
    found = runner(host, tmp_path, ACROSS)
    # The entry after the one for un-merging page by page.
    Dying(found, 3, after_the_step=False)
    with pytest.raises(Killed):
        to_end(found, host.advance)
    again = taken_up(host, tmp_path)
    assert again is not None
    state = to_end(again, host.advance)
    assert (state.recovered, pages_line(state)) == ("forget", "200 pages un-merged page by page")


@pytest.mark.parametrize("ended", [True, False])
def test_pages_that_run_2_had_un_merged_before_a_kill_are_counted_only_where_it_had_ended(
    tmp_path: Path, ended: bool
) -> None:
    host = MergedHost()
    killed_in(Phase.UNMERGE, host, runner(host, tmp_path, ACROSS))
    if ended:
        host.put(Knob.RUN, 2)
    again = taken_up(host, tmp_path)
    assert again is not None
    state = to_end(again, passing(host))
    assert state.result is (Result.DONE if ended else Result.ABANDONED)
    assert ("40 pages by run = 2" if ended else "some pages by run = 2; how many") in pages_line(state)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Refused("writing 2 to run", "no room"), "120 pages un-merged page by page"),
        (
            Rejected("writing 2 to run", "ENOMEM", errno=errno.ENOMEM),
            "120 pages un-merged page by page, some pages by run = 2; how many is not known, that was broken off",
        ),
    ],
)
def test_pages_that_run_2_has_not_un_merged_are_not_said_to_be(tmp_path: Path, error: KsmdError, said: str) -> None:
    host = MergedHost()
    errors = [error]
    host.interfere = lambda what: errors.pop() if errors and what == "write run" and host.knobs[Knob.RUN] == 0 else None
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert (state.result, pages_line(state)) == (Result.ABANDONED, said)


def test_pages_that_do_not_merge_again_are_counted(tmp_path: Path) -> None:
    host = simulated(2)
    found = stopped_half_way(host, tmp_path)
    process, start = host_pages(host)[0]
    assert not found.poll()
    host.store(process, start, [bytes([100 + number, number]) * (PAGE_SIZE // 2) for number in range(50)])
    state = to_end(found, host.advance)
    assert (state.result, state.remerged_pages, state.remerge_seconds) == (Result.ABANDONED, 150, None)
    (said,) = [line for line in transaction_lines(transaction_document(state, 4096)) if line.label == "merging"]
    assert said.text == "150 of 200 pages are merged again after two full scans; ksmd goes on"


def test_no_room_any_more_half_way(tmp_path: Path) -> None:
    host = MergedHost()
    found = runner(host, tmp_path, ACROSS)
    host.free["/tenant"] = 4096
    state = to_end(found, passing(host))
    assert state.result is Result.ABANDONED
    assert "in the memory cgroup /tenant it takes up to 160.0 KiB more, and 4.0 KiB are free" in state.reason
    as_before(host)


def test_pressure_that_does_not_pass(tmp_path: Path) -> None:
    """Before un-merging begins it is waited for here; once it has begun, whoever un-merges waits, and gives up."""
    host = MergedHost()
    host.counters["pressure_some_seconds"] = 0.0
    sample = host.sample

    def seldom_anew(*, fresh: bool = False) -> Sample:
        now = sample()
        return now if fresh else replace(now, readings={**now.readings, "pressure_some_seconds": 0.0})

    host.sample = seldom_anew  # type: ignore[method-assign]
    found = runner(host, tmp_path, ACROSS)

    def pass_time(seconds: float) -> None:
        host.now += seconds
        some = host.counters["pressure_some_seconds"]
        assert isinstance(some, float)
        host.counters["pressure_some_seconds"] = some + seconds * 0.9

    host.interfere = lambda what: pass_time(0.5) if what == "write run" else None  # type: ignore[func-returns-value]
    state = to_end(found, pass_time)
    assert state.result is Result.ABANDONED
    assert "tasks wait for memory" in state.reason
    as_before(host)


def test_what_was_un_merged_until_it_was_stopped_is_counted(tmp_path: Path) -> None:
    host = MergedHost()
    found = runner(host, tmp_path, ACROSS)
    seen = 0

    def stop_after_one(what: str) -> KsmdError | None:
        nonlocal seen
        seen += what == "unshare"
        stop = what == "unshare" and seen == 2
        return Refused("un-merging", "tasks wait for memory, for 60 s") if stop else None

    host.interfere = stop_after_one
    state = to_end(found, passing(host))
    assert state.result is Result.ABANDONED
    assert state.reason == "tasks wait for memory, for 60 s"
    assert (state.unshared_pages, state.batch) == (40, 1)
    as_before(host)


def test_a_process_that_ends_meanwhile_is_no_failure(tmp_path: Path) -> None:
    host = MergedHost()
    found = runner(host, tmp_path, ACROSS)
    del host.mappings[10]
    assert to_end(found, passing(host)).result is Result.DONE


@pytest.mark.parametrize("several", [True, False])
def test_processes_that_end_or_replace_their_memory_are_one_row(tmp_path: Path, several: bool) -> None:
    host = MergedHost()
    if not several:
        del host.mappings[10], host.mappings[12]
        host.mappings[11].pop()
    found = runner(host, tmp_path, ACROSS)
    pids = (10, 12) if several else (11,)
    for pid in pids:
        # Its memory is at another place from now on, as after an execve.
        host.mappings[pid] = [Memory(0x7000000 * pid, 0, [0], [False])]
    state = to_end(found, passing(host))
    document = transaction_document(state, 4096)
    assert document["gone"] == {"processes": len(pids), "pages": 40 * len(pids)}
    assert not any("mapped" in cause for cause in state.left)
    rows = [line.text for line in transaction_lines(document) if line.label == "gone"]
    assert rows == [
        "2 processes ended or replaced their memory meanwhile (80 pages)"
        if several
        else "1 process ended or replaced its memory meanwhile (40 pages)"
    ]


def test_cancelled_before_anything_was_unmerged(tmp_path: Path) -> None:
    host = MergedHost()
    found = runner(host, tmp_path, ACROSS)
    found.cancel("interrupted")
    state = to_end(found, passing(host))
    assert (state.result, host.merged_pages()) == (Result.ROLLED_BACK, 160)
    as_before(host)


def test_what_was_stopped_before_stays_stopped(tmp_path: Path) -> None:
    host = MergedHost(run=0)
    host.interfere = lambda what: busy() if what == "write merge_across_nodes" else None
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert state.result is Result.ABANDONED
    assert state.remerge_seconds is None
    as_before(host, run=0)


def test_knobs_that_were_written_are_put_back(tmp_path: Path) -> None:
    host = MergedHost()
    wanted: dict[Knob, KnobValue] = {**ACROSS, Knob.MAX_PAGE_SHARING: 32}
    host.interfere = lambda what: (
        Rejected("x", "EINVAL", errno=errno.EINVAL) if what == "write max_page_sharing" else None
    )
    state = to_end(runner(host, tmp_path, wanted), passing(host))
    assert state.result is Result.ABANDONED
    as_before(host)


_ERRORS = st.sampled_from(
    [
        None,
        None,
        None,
        busy(),
        Rejected("x", "EINTR", errno=errno.EINTR),
        Rejected("x", "ENOMEM", errno=errno.ENOMEM),
        NoSuchProcess("x", "it is gone"),
        TimedOut("x", "too late"),
        HostError("x", "ended without a result"),
        Cancelled("x", "cancelled"),
    ]
)


@given(
    errors=st.lists(_ERRORS, max_size=25),
    cancel=st.integers(-1, 15),
    run=st.sampled_from([0, 1]),
    kill=st.integers(-1, 20),
    sealed=st.booleans(),
)
def test_it_always_ends_in_a_state_with_a_name(
    tmp_path_factory: pytest.TempPathFactory,
    errors: list[KsmdError | None],
    cancel: int,
    run: int,
    kill: int,
    sealed: bool,
) -> None:
    folder = tmp_path_factory.mktemp("transaction")
    host = MergedHost(run=run) if sealed else without_sealed(run=run)
    found = runner(host, folder, ACROSS)
    left = iter(errors)
    steps = 0

    class Killed(Exception):
        pass

    def interfere(what: str) -> KsmdError | None:
        nonlocal steps
        steps += 1
        if steps == cancel:
            found.cancel("interrupted")
        if steps == kill:
            raise Killed
        return next(left, None)

    host.interfere = interfere
    try:
        state = to_end(found, passing(host))
    except Killed:
        # Another process takes up what the journal has; from now on nothing goes wrong.
        host.interfere = lambda _: None
        again = taken_up(host, folder)
        assert again is not None
        state = to_end(again, passing(host))
        assert state.recovered
    assert TransactionJournal(folder, host.identity).running is None
    match state.result:
        case Result.DONE:
            assert (host.knobs[Knob.MERGE_ACROSS_NODES], host.knobs[Knob.RUN]) == (0, run)
            assert {knob: host.knobs[knob] for knob in PACE} == PACE
        case Result.ROLLED_BACK | Result.ABANDONED:
            as_before(host, run)
        case _:
            # Something could not be put back, and the reason says what.
            assert state.result is Result.DEGRADED
            assert "put back" in state.reason or "stays at" in state.reason or "is not" in state.reason


@given(flips=st.lists(st.sampled_from([None, None, 0, 1, 2]), max_size=60), sealed=st.booleans())
def test_somebody_who_flips_run_all_the_time_neither_loses_the_state_nor_keeps_it_going(
    tmp_path_factory: pytest.TempPathFactory, flips: list[int | None], sealed: bool
) -> None:
    folder = tmp_path_factory.mktemp("transaction")
    host = MergedHost() if sealed else without_sealed()
    found = runner(host, folder, ACROSS)
    left = iter(flips)
    steps = 0

    def interfere(what: str) -> None:
        nonlocal steps
        steps += 1
        value = next(left, None)
        if value is not None:
            host.put(Knob.RUN, value)
            host.merge()

    host.interfere = interfere  # type: ignore[assignment]
    state = to_end(found, passing(host))
    # Each attempt takes a bounded number of steps, and there are at most five.
    assert steps <= 100
    assert TransactionJournal(folder, host.identity).running is None
    assert host.knobs[Knob.MERGE_ACROSS_NODES] == (0 if state.result is Result.DONE else 1)
    assert {knob: host.knobs[knob] for knob in PACE} == PACE


# -- the journal ---------------------------------------------------------------------------------------------


class Killed(Exception):
    """The process is gone: nothing of it goes on."""


class Dying:
    """Has a runner's process end at the n-th entry that it makes in the journal."""

    def __init__(self, found: TransactionRunner, entry: int, *, after_the_step: bool) -> None:
        self.entries = 0
        self._entry = entry
        self._after = after_the_step
        journal = found.journal
        self._save, self._close = journal.save, journal.close
        journal.save, journal.close = self.save, self.close  # type: ignore[method-assign]

    def save(self, state: TransactionState) -> None:
        if self._after and self.entries == self._entry:
            raise Killed
        self._save(state)
        self.entries += 1
        if not self._after and self.entries == self._entry:
            raise Killed

    def close(self, state: TransactionState, page_size: int) -> None:
        if self._after and self.entries == self._entry:
            raise Killed
        self._close(state, page_size)


def entries(host: EngineHost, folder: Path) -> int:
    """How many entries a whole transaction makes."""
    found = runner(host, folder, ACROSS)
    counting = Dying(found, -1, after_the_step=False)
    to_end(found, host.advance)
    return counting.entries


@pytest.mark.parametrize("after", [False, True], ids=["before its step", "after its step"])
def test_killed_at_every_entry_of_the_journal(tmp_path: Path, after: bool) -> None:
    whole = entries(simulated(2), tmp_path / "whole")
    assert whole >= 8
    results = []
    for entry in range(1, whole + 1):
        host = simulated(2)
        folder = tmp_path / str(entry)
        found = runner(host, folder, ACROSS)
        Dying(found, entry, after_the_step=after)
        with pytest.raises(Killed):
            to_end(found, host.advance)
        running = TransactionJournal(folder, host.identity).running
        assert running is not None
        again = taken_up(host, folder)
        assert again is not None
        state = to_end(again, host.advance)
        assert state.recovered == running.phase
        results.append(state.result)
        assert {knob: host.read(knob) for knob in (Knob.RUN, *PACE)} == {Knob.RUN: 1, **PACE}
        assert host.read(Knob.MERGE_ACROSS_NODES) == (0 if state.result is Result.DONE else 1)
        host.advance(10)
        # Merged again, by whichever rule holds now: 20 contents, on each node or on one.
        assert host.sample().number("pages_shared") == (40 if state.result is Result.DONE else 20)
        assert taken_up(host, folder) is None
    assert set(results) == {Result.ROLLED_BACK, Result.ABANDONED, Result.DONE}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_journal_that_cannot_be_written_refuses_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    host = MergedHost()
    original = files.replace_file

    def fail(path: Path, content: bytes) -> None:
        if path.name.startswith("transactions-"):
            raise OSError(number, "no")
        original(path, content)

    monkeypatch.setattr(files, "replace_file", fail)
    with pytest.raises(HostError, match="keeping the journal of transactions") as caught:
        runner(host, tmp_path, ACROSS)
    assert caught.value.errno == number
    assert host.written == []
    assert host.merged_pages() == 160


def test_a_disk_that_fills_up_half_way_has_everything_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = MergedHost()
    found = runner(host, tmp_path, ACROSS)
    writes = 0
    original = files.replace_file

    def fail(path: Path, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes > 3:
            raise OSError(errno.ENOSPC, "full")
        original(path, content)

    monkeypatch.setattr(files, "replace_file", fail)
    state = to_end(found, passing(host))
    assert state.result is Result.ABANDONED
    assert "the journal can't be written" in state.reason
    as_before(host)


def test_the_second_is_told_who_is_at_it(tmp_path: Path) -> None:
    host = MergedHost()
    first = runner(host, tmp_path, ACROSS)
    with pytest.raises(Refused, match=r"another one is under way \(a test, in the phase stop\)"):
        runner(host, tmp_path, ACROSS)
    assert to_end(first, passing(host)).result is Result.DONE


def test_what_another_boot_left_is_lost_and_said_to_be(tmp_path: Path) -> None:
    host = MergedHost()
    runner(host, tmp_path, ACROSS)
    host.boot_id = "boot-2"
    again = taken_up(host, tmp_path)
    assert again is not None
    state = to_end(again, passing(host))
    assert state.result is Result.LOST
    assert host.written == []


def test_who_only_looks_is_told_whether_the_process_is_still_there_that_carries_it_out(tmp_path: Path) -> None:
    host = MergedHost()
    me = os.getpid()
    host.alive.add(me)
    runner(host, tmp_path, ACROSS)
    state = TransactionJournal(tmp_path, host.identity).running
    assert state is not None
    assert process_document(state, "boot-1", host.find) == {"pid": me, "alive": True}
    assert process_document(state, "boot-2", host.find) == {"pid": me, "alive": False}
    # Another process has its pid now.
    another = replace(state, carrier=ProcessId(me, 7))
    assert process_document(another, "boot-1", host.find) == {"pid": me, "alive": False}
    # Hidden by hidepid, and ended.
    host.alive.clear()
    assert process_document(state, "boot-1", host.find) == {"pid": me, "alive": None}
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    dead = replace(state, carrier=ProcessId(ended.pid, 7))
    assert process_document(dead, "boot-1", host.find) == {"pid": ended.pid, "alive": False}
    unknown = replace(state, carrier=None)
    assert process_document(unknown, "boot-1", host.find) == {"pid": None, "alive": None}


def test_who_takes_it_up_again_carries_it_out_from_then_on(tmp_path: Path) -> None:
    host = MergedHost()
    TransactionJournal(tmp_path, host.identity).save(
        replace(runner(host, tmp_path, ACROSS).state, carrier=ProcessId(1, 1))
    )
    host.alive.add(os.getpid())
    again = taken_up(host, tmp_path)
    assert again is not None
    again.poll()
    assert again.state.carrier == host.find(os.getpid())


def test_a_damaged_journal_is_put_aside(tmp_path: Path) -> None:
    host = MergedHost()
    runner(host, tmp_path, ACROSS)
    path = tmp_path / "transactions-kernel.json"
    document = json.loads(path.read_text())
    for change in (
        {"phase": "dancing"},
        {"writes": [{"knob": "run", "value": 7}]},
        {"before": {}},
        {"written": 5},
        {"extra": 1},
        {"began": "noon"},
        {"began": float("nan")},
        {"unmerge_seconds": float("inf")},
        {"ended": -1},
        {"who": 7},
        {"unmerge": 1},
        {"attempts": True},
        {"merged_pages": 1 << 64},
        {"left": {"x": float("inf")}},
    ):
        path.write_text(json.dumps({**document, "running": {**document["running"], **change}}))
        found = TransactionJournal(tmp_path, host.identity)
        assert found.running is None
        assert found.damaged.endswith(".damaged")
        assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        '"totals": {"done": 1e400}',
        '"totals": {"done": -1}',
        '"seconds": NaN',
        '"seconds": -Infinity',
        '"seconds": "long"',
        '"unmerged_pages": 1e400',
        '"home_pages": 0.5',
        '"pages_per_second": NaN',
        '"last": {"pages": {"merged": NaN}}',
        '"last": {"who": "\\ud800"}',
    ],
)
def test_no_figure_in_a_damaged_journal_is_believed(tmp_path: Path, change: str) -> None:
    identity = MergedHost().identity
    TransactionJournal(tmp_path, identity).refused()
    path = tmp_path / "transactions-kernel.json"
    # Of two equal keys Python takes the last.
    path.write_text(f"{path.read_text()[:-1]}, {change}}}")
    found = TransactionJournal(tmp_path, identity)
    assert found.damaged == f"{path}.damaged"
    json.dumps(transactions_section(found, None), allow_nan=False, ensure_ascii=False).encode()
    # And it can be kept again.
    found.refused()
    assert TransactionJournal(tmp_path, identity).damaged == ""


def test_who_only_looks_at_a_damaged_journal_leaves_it(tmp_path: Path) -> None:
    identity = MergedHost().identity
    path = tmp_path / "transactions-kernel.json"
    path.write_text("nothing")
    assert TransactionJournal(tmp_path, identity, keep=True).damaged == str(path)
    assert path.read_text() == "nothing"


def test_the_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    host = MergedHost()
    plan = planned(host, {**ACROSS, Knob.MAX_PAGE_SHARING: 9})
    state = begin(plan, host.sample(), "id", "who", "boot-1")
    for changed in (
        state,
        replace(state, phase=Phase.UNSHARE, batch=1, unshared_pages=7, left={"x": 3}, home_after=(1, 2)),
        replace(state, phase=Phase.SLOW, hasten=100, result=Result.ABANDONED, moves=plan.batches[:1], reason="so"),
    ):
        TransactionJournal(tmp_path, host.identity).save(changed)
        assert TransactionJournal(tmp_path, host.identity).running == changed


def test_it_counts_what_came_of_transactions(tmp_path: Path) -> None:
    host = MergedHost()
    to_end(runner(host, tmp_path, ACROSS), passing(host))
    host.merge()
    host.interfere = lambda what: busy() if what == "write merge_across_nodes" else None
    to_end(runner(host, tmp_path, {Knob.MERGE_ACROSS_NODES: 1}), passing(host))
    found = TransactionJournal(tmp_path, host.identity)
    assert found.contents.totals == {Result.DONE: 1, Result.ABANDONED: 1}
    assert found.contents.unmerged_pages > 160
    assert found.last is not None
    assert found.last["result"] == "abandoned"


def test_an_ended_one_needs_nothing(tmp_path: Path) -> None:
    host = MergedHost()
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert recovered(state, host.sample(), "boot-1") is state


# -- plans ---------------------------------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_is_refused_with_figures() -> None:
    host = MergedHost(pages=1000)
    host.free["/a/b"] = 1 << 20
    plan = planned(host, ACROSS)
    assert not plan.fits
    with pytest.raises(Refused) as caught:
        need_room(plan, LIMITS.floor_bytes)
    assert "in the memory cgroup /a/b it takes up to 15.6 MiB more, and 1.0 MiB are free above its reserve" in str(
        caught.value
    )
    assert "node" not in caught.value.why


def test_a_plan_says_what_it_takes() -> None:
    host = MergedHost(pages=1000)
    plan = planned(host, ACROSS)
    assert plan.fits
    assert (plan.merged_pages, plan.processes, plan.homeless_pages) == (4000, 3, 1000)
    assert plan.at_home == (1000, 3000)
    # 1000 belong on node 0, 2000 on node 1: the writer on node 0 would take the 2000.
    assert plan.leave_pages == 2000
    assert sum(batch.pages for batch in plan.batches) == 4000
    rates = UnmergeRates(page_by_page=100.0, fixed_seconds=0.25)
    measured = make_plan(ACROSS, host.sample(), finish(host.inventory(0)), LIMITS, rates=rates)
    # Each of the processes takes as long as 600 pages.
    assert measured.seconds == pytest.approx((4000 + 3 * 600) / 100 + 0.25)


def test_what_a_change_took_is_what_the_next_one_is_predicted_to_take_also_after_a_restart(tmp_path: Path) -> None:
    host = MergedHost(pages=5000)
    for item in host.mappings[11]:
        item.writable = True
    found = runner(host, tmp_path, ACROSS)
    # Each step takes 0.1 s on this host: 20,000 pages in one, and what comes beside it.
    state = to_end(found, passing(host))
    assert (state.result, state.unshared_pages) == (Result.DONE, 20_000)
    rates = TransactionJournal(tmp_path, host.identity).rates
    assert rates.page_by_page == pytest.approx((20_000 + 3 * 600) / 0.1)
    assert state.ended is not None
    assert rates.fixed_seconds == pytest.approx(state.ended - state.began - 0.1)
    host.merge()
    plan = make_plan({Knob.MAX_PAGE_SHARING: 2}, host.sample(), finish(host.inventory(0)), LIMITS, rates=rates)
    assert plan.seconds == pytest.approx(state.ended - state.began)


def test_how_long_empty_address_space_takes_is_by_what_was_measured_on_this_kernel() -> None:
    host = MergedHost(pages=5000)
    inventory = finish(host.inventory(0))
    (first, *others) = inventory.memories
    far = replace(first, ranges=(HomeRange(0, 128 << 30, 0, {0: 1}, 1),))
    inventory = replace(inventory, memories=(far, *others))

    def sparse_seconds(measured: float | None) -> float:
        found = replace(inventory, sparse_seconds_per_gib=measured)
        return make_plan(ACROSS, host.sample(), found, LIMITS).sparse_seconds

    assert sparse_seconds(None) == pytest.approx(128 * 0.015, rel=0.01)
    assert sparse_seconds(0.5) == pytest.approx(64, rel=0.01)
    assert sparse_seconds(0.0) == 0


def test_pages_that_lie_apart_or_are_read_only_are_predicted_to_take_longer() -> None:
    host = MergedHost(pages=5000)
    inventory = finish(host.inventory(0))
    rates = UnmergeRates(page_by_page=100_000, run_2=200_000, fixed_seconds=0.5)

    def plan(**more: int) -> Plan:
        memories = tuple(replace(memory, **more) for memory in inventory.memories)
        return make_plan(ACROSS, host.sample(), replace(inventory, memories=memories), LIMITS, rates=rates)

    processes = len(inventory.memories)
    pages = plan().merged_pages
    # What a process takes by itself is as long as 600 pages.
    alone = 0.5 + 600 * processes / 100_000
    assert plan().seconds == pytest.approx(alone + pages / 100_000)
    assert plan(calls=1000).seconds == pytest.approx(alone + (pages + 32 * 1000 * processes) / 100_000)
    read_only = plan(read_only_pages=2000)
    assert read_only.seconds == pytest.approx(alone + (pages - 2000 * processes) / 100_000 + 2000 * processes / 200_000)
    steps = " ".join(plan_document(read_only, LIMITS, 4096)["steps"])  # type: ignore[arg-type]
    assert f"un-merge {pages - 2000 * processes:,} pages" in steps
    assert f"{2000 * processes:,} pages lie in mappings that are not writable" in steps


def test_few_pages_say_nothing_of_how_quickly_many_are_un_merged(tmp_path: Path) -> None:
    host = MergedHost()
    to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert TransactionJournal(tmp_path, host.identity).rates.page_by_page == UnmergeRates().page_by_page


def test_a_ksmd_that_waits_for_a_cpu_takes_longer_to_merge_again() -> None:
    host = MergedHost(pages=1000)
    host.knobs |= {Knob.PAGES_TO_SCAN: 100, Knob.SLEEP_MILLISECS: 20}
    host.counters["pages_scanned"] = 0
    before = host.sample()
    alone = remerge_seconds(before)
    assert alone == pytest.approx(2 * 4000 / 100 * 0.0205)
    # 10 batches in 0.82 s: four times as long as with a CPU to itself.
    host.counters["pages_scanned"] = 1000
    host.now += 0.82
    assert remerge_seconds(host.sample(), before) == pytest.approx(4 * alone)
    # A few batches, or a ksmd that is quicker than thought, say nothing.
    host.counters["pages_scanned"] = 300
    assert remerge_seconds(host.sample(), before) == alone


def test_neighbouring_ranges_of_one_home_are_one_and_none_has_more_than_fit_into_a_request() -> None:
    host = MergedHost(pages=4)
    # Pairs of mappings that belong together, and one without merged pages between: as mprotect leaves them.
    host.mappings = {
        10: [Memory((number + 1) * 0x10000, number // 2 % 2, [0], [number % 4 != 1]) for number in range(6000)]
    }
    batches = planned(host, ACROSS).batches
    assert {batch.process.pid for batch in batches} == {10}
    assert [len(batch.ranges) for batch in batches] == [MAXIMUM_RANGES, 476, MAXIMUM_RANGES, 476]
    assert sum(batch.pages for batch in batches) == 4500
    state = begin(planned(host, ACROSS), host.sample(), "id", "who", "boot")
    step = next_step(replace(state, phase=Phase.UNSHARE), host.sample(), LIMITS)
    assert isinstance(step, UnshareStep)
    assert [len(part.ranges) for part in step.request.parts] == [MAXIMUM_RANGES, 476]
    # The longest request that such steps can ask for fits into a packet.
    parts = tuple(UnsharePart(ProcessId(4194304, 1 << 40), far(8), 1, 1 << 30) for _ in range(256))
    most = UnsharePages(Unshare(parts))
    assert len(request_message(most, 1e5)) < MESSAGE_BYTES


def far(count: int) -> tuple[tuple[int, int], ...]:
    """Ranges as far from each other as can be."""
    step = (1 << 47) // count
    return tuple((number * step, number * step + 4096) for number in range(count))


def test_the_whole_of_a_change_is_one_request(tmp_path: Path) -> None:
    host = MergedHost(pages=5000)
    host.mappings = {pid: [Memory(0x1000000 * pid, pid % 2, [0] * 100, [True] * 100)] for pid in range(1, 201)}
    asked: list[str] = []
    host.interfere = asked.append  # type: ignore[assignment]
    unshare, steps = host.unshare, []

    def count(request: Unshare, deadline_seconds: float) -> FakeOperation[UnshareResult]:
        steps.append(len(request.parts))
        return unshare(request, deadline_seconds)

    host.unshare = count  # type: ignore[method-assign]
    assert to_end(runner(host, tmp_path, ACROSS), passing(host)).result is Result.DONE
    assert steps == [200]
    # Planned, and looked at afterwards; whether everything was un-merged its result has said.
    assert asked.count("inventory") == 2


def test_with_one_node_and_room_everywhere_run_2_is_chosen_where_it_stops_nobody_for_long(tmp_path: Path) -> None:
    host = MergedHost(pages=100)
    host.nodes = host.nodes[:1]
    host.free = {"host": 1 << 30, "node 0": 1 << 30}
    plan = planned(host, ACROSS)
    assert plan.at_once
    assert not plan.batches
    assert any("with run = 2" in step for step in steps_of(plan))
    asked: list[str] = []
    host.interfere = asked.append  # type: ignore[assignment]
    state = to_end(runner(host, tmp_path, ACROSS), passing(host))
    assert (state.result, state.unshared_pages, state.rest_pages) == (Result.DONE, 0, 400)
    # The plan's look is the only one.
    assert asked.count("inventory") == 1
    assert host.knobs[Knob.MERGE_ACROSS_NODES] == 0


@pytest.mark.parametrize("why", ["long", "little room", "two nodes"])
def test_else_it_is_done_page_by_page(why: str) -> None:
    host = MergedHost(pages=10_000 if why == "long" else 100)
    if why != "two nodes":
        host.nodes = host.nodes[:1]
    host.free = {"host": 1 << 30, "node 0": (3 << 20) if why == "little room" else 1 << 30}
    plan = planned(host, ACROSS)
    assert plan.fits
    assert not plan.at_once
    assert plan.batches


def test_force_does_what_has_no_room_by_the_plan_and_keeps_the_figures(tmp_path: Path) -> None:
    host = MergedHost()
    host.free["/tenant"] = 4096
    plan = planned(host, ACROSS)
    assert not plan.fits
    first = host.sample()
    assert isinstance(too_busy(plan, LIMITS, first, first), Refused)
    assert too_busy(plan, LIMITS, first, first, force=True) is None
    state = to_end(runner(host, tmp_path, ACROSS, force=True), passing(host))
    assert state.result is Result.DONE
    (place,) = transaction_document(state, 4096)["forced"]  # type: ignore[misc]
    assert place.startswith("in the memory cgroup /tenant it takes up to 640.0 KiB more, and 4.0 KiB are free")


def test_a_refused_run_2_is_abandoned_with_the_figures_and_what_force_needs(tmp_path: Path) -> None:
    host = MergedHost()
    host.free["host"] = 4096
    why = "on the host it takes 640.0 KiB more, and 4.0 KiB are free above the floor of 16.0 MiB"
    answers: Iterator[KsmdError | None] = iter((None, Refused("un-merging everything", why)))
    host.interfere = lambda what: next(answers, None) if what == "write run" else None
    state = to_end(runner(host, tmp_path, ACROSS, force=True), passing(host))
    assert state.result is Result.ABANDONED
    assert state.reason.startswith(f"run = 2 was refused: {why}; a service that is not root can't go below that limit")
    assert host.knobs[Knob.RUN] == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_the_oom_killer_did_meanwhile_is_in_the_result(tmp_path: Path, nodes: int) -> None:
    host = MergedHost(pages=100)
    host.nodes = host.nodes[:nodes]
    for items in host.mappings.values():
        for item in items:
            item.home = 0
    host.limited[10] = ("/tenant",)
    host.oom_kills["/tenant"] = 1
    found = runner(host, tmp_path, ACROSS)

    def interfere(what: str) -> None:
        if what == "write merge_across_nodes":
            del host.mappings[10]
            host.gone.add(ProcessId(10, 1000))
            host.oom_kills |= {"/tenant": 2, "host": 8}

    host.interfere = interfere  # type: ignore[assignment]
    state = to_end(found, passing(host))
    assert (state.result, state.home_before, state.home_after) == (Result.DONE, (400, 400), (300, 300))
    document = transaction_document(state, 4096)
    assert document["oom_kills"] == {"host": 1, "/tenant": 1}
    assert document["gone"] == {"processes": 1, "pages": 0}
    said = {line.label: line for line in transaction_lines(document)}
    assert (said["killed"].text, said["done"].tone) == (
        "the OOM killer killed 1 process on this host meanwhile: 1 in the memory cgroup /tenant",
        "bad",
    )
    assert said["at home"].text == "100.0 % of 400 pages before, 100.0 % of 300 pages after"
    assert TransactionJournal(tmp_path, host.identity).last == document


def test_where_nobody_was_killed_nothing_is_said_of_it(tmp_path: Path) -> None:
    host = MergedHost()
    document = transaction_document(to_end(runner(host, tmp_path, ACROSS), passing(host)), 4096)
    assert document["oom_kills"] == {}
    assert not {line.label for line in transaction_lines(document)} & {"killed", "gone"}


def test_what_was_killed_before_a_transaction_was_taken_up_again_counts(tmp_path: Path) -> None:
    host = simulated(2)
    found = runner(host, tmp_path, ACROSS)
    Dying(found, 3, after_the_step=False)
    with pytest.raises(Killed):
        to_end(found, host.advance)
    host.losses = lambda processes, cgroups: Losses({"host": 2})  # type: ignore[method-assign]
    again = taken_up(host, tmp_path)
    assert again is not None
    assert to_end(again, host.advance).killed == {"host": 2}


def test_a_knob_that_this_kernel_lacks() -> None:
    host = MergedHost()
    del host.knobs[Knob.SMART_SCAN]
    with pytest.raises(Absent):
        make_plan({Knob.SMART_SCAN: 0}, host.sample(), None, LIMITS)


def test_a_plan_names_who_could_not_be_read_and_stops_nobody_at_once() -> None:
    host = MergedHost()
    inventory = finish(host.inventory(LIMITS.floor_bytes))
    unread = tuple(Skipped(pid, "stuck", "the process keeps its readers waiting") for pid in range(1000, 1102))
    plan = make_plan(ACROSS, host.sample(), replace(inventory, skipped=unread), LIMITS)
    document = plan_document(plan, LIMITS, 4096)
    skipped = document["skipped"]
    assert isinstance(skipped, dict)
    assert skipped["stuck (pid 1000)"] == "the process keeps its readers waiting"
    assert (len(skipped), skipped["2 more"]) == (101, "they can't be read either")
    said = [line.text for line in plan_lines(document) if line.label == "left alone"]
    assert said[0] == "stuck (pid 1000) until run = 2: the process keeps its readers waiting"
