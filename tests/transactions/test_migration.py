# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from typing import Any

import pytest

from ksmd_ctl.errors import Cancelled, Denied, ExitCode, KsmdError, NoSuchProcess, Refused, UsageError
from ksmd_ctl.host.memory import Node, ProcessId
from ksmd_ctl.host.operation import Move, MovePlan, MoveResult, Progress
from ksmd_ctl.transactions.migration import Migration, MigrationOrder, exit_code, members
from tests.fakes.host import FakeHost, FakeOperation, process

UNIT = "web.service"


def host(*pids: int) -> FakeHost:
    found = FakeHost()
    found.running = [process(pid, unit=UNIT) for pid in pids]
    return found


def carried_out(migration: Migration) -> dict[str, Any]:
    assert migration.poll()
    return migration.result().document()


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (MigrationOrder(to=0), "either one process or one unit"),
        (MigrationOrder(to=0, pid=1, unit=UNIT), "either one process or one unit"),
        (MigrationOrder(to=0, unit=UNIT, ranges=((0, 4096),)), "one process's own"),
        (MigrationOrder(to=0, pid=1, ranges=((4096, 4096),)), "is no range"),
        (MigrationOrder(to=2, pid=1), "there is no such node"),
        (MigrationOrder(to=7, pid=1), "has no memory"),
    ],
)
def test_what_can_not_be_asked_for(order: MigrationOrder, why: str) -> None:
    there = host(1)
    there.nodes += (Node(7, frozenset({2}), 0, {0: 20, 1: 20, 7: 10}),)
    with pytest.raises(UsageError, match=why) as caught:
        Migration(there, order)
    assert caught.value.exit_code == ExitCode.USAGE
    assert there.moves == []


def test_a_pid_that_nobody_has() -> None:
    with pytest.raises(UsageError, match="there is no process 2"):
        Migration(host(1), MigrationOrder(to=0, pid=2))


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_process_without_mergeable_memory_is_refused(dry_run: bool) -> None:
    there = host(1)
    there.move_outcomes = [MoveResult(0, 0, {})]
    there.plan = lambda _: FakeOperation(MovePlan({}, 0, 0, {}, "", 0))  # type: ignore[method-assign]
    migration = Migration(there, MigrationOrder(to=1, pid=1, dry_run=dry_run))
    assert migration.poll()
    with pytest.raises(Refused, match="no mergeable memory that could be moved"):
        migration.result()


def test_one_process() -> None:
    there = host(1)
    there.move_outcomes = [MoveResult(30, 7, {})]
    order = MigrationOrder(to=1, pid=1, ranges=((4096, 8192),), everything=True, floor_bytes=5, latency_seconds=0.5)
    document = carried_out(Migration(there, order))
    assert document["totals"] == {"moved": 30, "would_move": 0, "already": 7, "left": 0}
    assert there.moves[0][0] == Move(ProcessId(1, 100), 1, ((4096, 8192),), True, 0.5, 5)
    assert exit_code(document) == ExitCode.DONE


def test_a_latency_that_was_asked_for_stays_and_0_is_no_limit() -> None:
    def found(asked: float | None) -> float:
        order = MigrationOrder(to=1, pid=1, latency_seconds=asked)
        order.check()
        return order.within(5, 0.01).move(ProcessId(1, 100)).latency_seconds

    assert (found(None), found(0.5), found(0.0)) == (0.01, 0.5, 0)
    for wrong in (-1.0, 1e-5, 1.5, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="latency_seconds"):
            MigrationOrder(to=1, pid=1, latency_seconds=wrong).check()


def test_a_dry_run_moves_nothing() -> None:
    there = host(1)
    document = carried_out(Migration(there, MigrationOrder(to=1, pid=1, dry_run=True)))
    assert there.moves == []
    (part,) = document["processes"]
    assert (part["would_move"], part["shared"], part["room"], part["room_bytes"]) == ({"0": 30}, 20, "on node 1", 2**20)
    assert document["totals"]["would_move"] == 30
    assert exit_code(document) == ExitCode.DONE


def test_a_unit_is_all_of_its_processes_and_one_that_ends_is_told() -> None:
    there = host(3, 1, 2)
    there.running.append(process(9, unit="other.service"))
    gone = NoSuchProcess("moving memory of process 2", "it exited half way; 5 pages had been moved")
    there.move_outcomes = [MoveResult(10, 0, {}), gone, MoveResult(20, 1, {"busy": 2})]
    document = carried_out(Migration(there, MigrationOrder(to=1, unit="web")))
    assert [part["pid"] for part in document["processes"]] == [1, 2, 3]
    assert [part["error"] is None for part in document["processes"]] == [True, False, True]
    assert document["processes"][1]["error"]["why"] == gone.why
    assert document["totals"] == {"moved": 30, "would_move": 0, "already": 1, "left": 2}
    assert exit_code(document) == ExitCode.CHECK_FAILED


def test_a_unit_of_which_nothing_could_be_moved_is_an_error() -> None:
    there = host(1, 2)
    there.move_outcomes = [Denied("moving", "CAP_SYS_NICE is missing"), Denied("moving", "another")]
    migration = Migration(there, MigrationOrder(to=1, unit=UNIT))
    assert migration.poll()
    with pytest.raises(Denied, match="CAP_SYS_NICE"):
        migration.result()


def test_a_unit_that_nobody_is_in() -> None:
    migration = Migration(host(1), MigrationOrder(to=1, unit="nobody.scope"))
    assert migration.poll()
    with pytest.raises(Refused, match=r"no process of unit nobody\.scope has mergeable memory"):
        migration.result()


@pytest.mark.parametrize("name", ["a", "a.service"])
def test_a_unit_without_a_suffix_is_a_service(name: str) -> None:
    assert [one.id.pid for one in members([process(1, unit="a.service"), process(2, unit="a.scope")], name)] == [1]
    assert [one.id.pid for one in members([process(1, unit="a.service"), process(2, unit="a.scope")], "a.scope")] == [2]


def test_cancelled_in_the_middle_of_a_unit() -> None:
    there = host(1, 2, 3)
    there.move_outcomes = [MoveResult(10, 0, {})]
    migration = Migration(there, MigrationOrder(to=1, unit=UNIT))
    assert not migration.poll()
    (_, running) = there.moves[1]
    running.at = Progress(3, 9, "pages")
    assert migration.progress == Progress(3, 9, "pages")
    assert migration.fileno() == running.fileno()
    migration.cancel()
    document = carried_out(migration)
    assert (document["cancelled"], document["untouched"], len(document["processes"])) == (True, 1, 2)
    assert document["totals"]["moved"] == 10
    assert len(there.moves) == 2
    assert exit_code(document) == ExitCode.TIMED_OUT


def test_cancelled_by_somebody_else() -> None:
    there = host(1)
    there.move_outcomes = [Cancelled("moving", "the broker is being stopped")]
    document = carried_out(Migration(there, MigrationOrder(to=1, pid=1)))
    assert document["cancelled"] is True


@pytest.mark.parametrize(
    ("moved", "left", "code"),
    [
        (0, {"needs MPOL_MF_MOVE_ALL and CAP_SYS_NICE": 5}, ExitCode.DENIED),
        (1, {"needs MPOL_MF_MOVE_ALL and CAP_SYS_NICE": 5}, ExitCode.CHECK_FAILED),
        (0, {"needs MPOL_MF_MOVE_ALL and CAP_SYS_NICE": 5, "busy": 1}, ExitCode.CHECK_FAILED),
        (1, {}, ExitCode.DONE),
    ],
)
def test_a_privilege_that_was_missing_has_its_own_exit_code(moved: int, left: dict[str, int], code: ExitCode) -> None:
    there = host(1)
    there.move_outcomes = [MoveResult(moved, 0, left)]
    assert exit_code(carried_out(Migration(there, MigrationOrder(to=1, pid=1)))) == code


def test_an_error_is_itself_for_one_process() -> None:
    there = host(1)
    there.move_outcomes = [KsmdError("moving", "a reason", hint="do this")]
    migration = Migration(there, MigrationOrder(to=1, pid=1))
    assert migration.poll()
    with pytest.raises(KsmdError, match="a reason"):
        migration.result()
