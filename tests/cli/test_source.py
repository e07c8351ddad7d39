# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from ksmd_ctl.cli.common import ENDING
from ksmd_ctl.cli.source import carry_out
from ksmd_ctl.cli.terminal import ProgressLine
from ksmd_ctl.host.operation import Operation, Steps


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    # Who runs the tests may ignore some, as nohup(1) does.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended_by(number: int) -> tuple[bool, bool]:
    """Whether an operation was cancelled by a signal, and whether that was said."""

    def steps() -> Steps[bool]:
        os.kill(os.getpid(), number)
        yield from ()
        return operation.cancelled

    operation: Operation[bool] = Operation(steps())
    with ProgressLine(sys.stderr) as line:
        return carry_out(operation, line)


@pytest.mark.parametrize("number", ENDING)
def test_what_ends_a_command_stops_what_it_carries_out(number: int) -> None:
    assert ended_by(number) == (True, True)


def test_a_hangup_that_nohup_ignores_is_none() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert ended_by(signal.SIGHUP) == (False, False)
