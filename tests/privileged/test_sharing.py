# SPDX-License-Identifier: GPL-2.0-or-later
"""The request to count shared frames: which processes it takes, and that the largest one fits."""

from __future__ import annotations

import pytest

from ksmd_ctl.errors import UsageError
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.sharing import MOST_PROCESSES
from ksmd_ctl.privileged.requests import MESSAGE_BYTES, CountSharedFrames, parse_request, request_message

# As long as they can be.
LARGEST = [ProcessId((1 << 22) - number, (1 << 63) - 1) for number in range(MOST_PROCESSES + 1)]


def test_as_many_processes_as_there_may_be_fit_in_a_message() -> None:
    request = CountSharedFrames(tuple((process,) for process in LARGEST[:-1]), 5.0)
    message = request_message(request, 30.0)
    assert len(message) <= MESSAGE_BYTES
    assert parse_request(message) == (request, 30.0)


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ((tuple(LARGEST),), "more than 2048 processes|longer than"),
        (((ProcessId(1, 5), ProcessId(2, 5)), (ProcessId(1, 5),)), "a process twice"),
        (((ProcessId(1, 5),), (ProcessId(1, 6),)), "a process twice"),
    ],
)
def test_what_it_does_not_take(groups: tuple[tuple[ProcessId, ...], ...], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_request(request_message(CountSharedFrames(groups, 5.0), 30.0))
