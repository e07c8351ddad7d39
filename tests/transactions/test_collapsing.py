# SPDX-License-Identifier: GPL-2.0-or-later
"""Huge pages given back: what is asked of a host, the document, and the exit code that it stands for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ksmd_ctl.cli.collapse import _lines
from ksmd_ctl.errors import Absent, ExitCode, Refused, UsageError
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import KSMD_IS_RUNNING, Collapse, CollapsedProcess, CollapseResult
from ksmd_ctl.transactions.collapsing import CollapseOrder, Collapsing, exit_code
from ksmd_ctl.transactions.plan import Limits
from tests.cli.test_schemas import problems
from tests.fakes.host import FakeHost, process

LIMITS = Limits(floor_bytes=1 << 30, headroom_share=0.5, latency_seconds=0.01, max_pressure=0.2)
UNIT = "web.service"


def host(*done: CollapsedProcess, stopped: str = "") -> FakeHost:
    found = FakeHost()
    found.running = [process(7, unit=UNIT)]
    found.collapse_outcome = CollapseResult(done, stopped)
    return found


def result(there: FakeHost, order: CollapseOrder) -> dict[str, Any]:
    collapsing = Collapsing(there, order, LIMITS)
    assert collapsing.poll()
    document = collapsing.result().document()
    assert problems("collapse", json.loads(json.dumps(document))) == []
    return document


def one(pid: int = 7, **more: Any) -> CollapsedProcess:
    return CollapsedProcess(ProcessId(pid, 1), "qemu", **more)


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (CollapseOrder(), "either one process or one unit"),
        (CollapseOrder(pid=7, unit=UNIT), "either one process or one unit"),
        (CollapseOrder(pid=7, keep_pages=0), "not from 1 to 512"),
        (CollapseOrder(pid=7, keep_pages=513), "not from 1 to 512"),
    ],
)
def test_what_can_not_be_asked_for(order: CollapseOrder, why: str) -> None:
    there = host()
    with pytest.raises(UsageError, match=why):
        Collapsing(there, order, LIMITS)
    assert there.collapses == []


def test_a_pid_that_nobody_has() -> None:
    collapsing = Collapsing(host(), CollapseOrder(pid=8), LIMITS)
    assert collapsing.poll()
    with pytest.raises(UsageError, match="there is no process 8"):
        collapsing.result()


def test_the_limits_of_the_configuration_hold() -> None:
    there = host(one())
    result(there, CollapseOrder(pid=7, dry_run=True))
    result(there, CollapseOrder(unit="web", keep_pages=512))
    first, second = there.collapses
    assert first == Collapse(process(7).id, "", 32, 1 << 30, 0.5, 0.2, dry_run=True)
    # A large machine takes its time: 512 MiB were seen to take 4 s.
    assert there.collapse_deadline == 3600
    assert (second.process, second.unit, second.keep_pages, second.dry_run) == (None, UNIT, 512, False)


def test_a_unit_without_processes_is_refused() -> None:
    collapsing = Collapsing(host(), CollapseOrder(unit="none"), LIMITS)
    assert collapsing.poll()
    with pytest.raises(Refused, match=r"no process of unit none\.service"):
        collapsing.result()


def test_what_the_host_lacks_is_its_error() -> None:
    there = host()
    there.collapse_outcome = Absent("making huge pages", "this kernel does not do it")
    collapsing = Collapsing(there, CollapseOrder(pid=7), LIMITS)
    assert collapsing.poll()
    with pytest.raises(Absent):
        collapsing.result()


@pytest.mark.parametrize(
    ("done", "stopped", "code", "said"),
    [
        ([one(huge_before=1, huge_after=9, blocks=8, pages=92, kept=2)], "", ExitCode.DONE, "8 huge pages of qemu"),
        ([one()], "", ExitCode.DONE, "0 huge pages of qemu"),
        ([one(blocks=1, left={"pinned": 2})], "", ExitCode.CHECK_FAILED, "2 blocks: pinned"),
        ([one(left={"pinned": 2})], "", ExitCode.REFUSED, "2 blocks: pinned"),
        ([one(left={KSMD_IS_RUNNING: 2})], "", ExitCode.REFUSED, "to do leave the process out of merging"),
        ([one(blocks=1), one(8, error="may not be read")], "", ExitCode.CHECK_FAILED, "(pid 8): may not be read"),
        ([one(8, error="may not be read")], "", ExitCode.REFUSED, "may not be read"),
        ([one(blocks=3)], "it was asked to stop", ExitCode.CHECK_FAILED, "it was asked to stop"),
        ([], "it was asked to stop", ExitCode.TIMED_OUT, "it was asked to stop"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_said_and_the_exit_code(
    done: list[CollapsedProcess], stopped: str, code: ExitCode, said: str, dry_run: bool
) -> None:
    document = result(host(*done, stopped=stopped), CollapseOrder(unit=UNIT, dry_run=dry_run))
    assert exit_code(document) == code
    lines = [f"{line.label} {line.text}" for line in _lines(document)]
    assert any(said in line for line in lines)
    assert any(line.startswith("would make") for line in lines) == (dry_run and bool(done))
    if done and done[0].pages:
        assert any("368.0 KiB" in line for line in lines)
        assert any("2 blocks of 2 MiB, where a huge page would take 32 pages or more" in line for line in lines)
