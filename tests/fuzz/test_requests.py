# SPDX-License-Identifier: GPL-2.0-or-later
"""Made-up requests to the privileged part: read as what they say, or refused."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from ksmd_ctl.errors import UsageError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Move
from ksmd_ctl.host.switching import Method, Switch
from ksmd_ctl.privileged.requests import (
    MESSAGE_BYTES,
    CountSharedFrames,
    ListProcesses,
    MoveMemory,
    PlanMove,
    Request,
    SwitchMerging,
    TakeInventory,
    TakeSurvey,
    UnsharePages,
    WatchWrites,
    WriteKnob,
    parse_request,
    request_message,
)
from tests.fakes.unsharing import unshare_one
from tests.fuzz.chance import every, mutated, noise, to_json

_PROCESS = ProcessId(4711, 1234)
_REQUESTS: tuple[Request[Any], ...] = (
    WriteKnob(Knob.PAGES_TO_SCAN, 100),
    WriteKnob(Knob.ADVISOR_MODE, "none"),
    WatchWrites(),
    ListProcesses(),
    TakeSurvey(0.5),
    CountSharedFrames(((_PROCESS, ProcessId(4712, 1)), ()), 0.5),
    TakeInventory(1 << 20),
    PlanMove(Move(_PROCESS, 1)),
    MoveMemory(Move(_PROCESS, 1)),
    UnsharePages(unshare_one(_PROCESS, ((0, 4096),))),
    SwitchMerging(Switch(_PROCESS, True, ((0, 4096),)), Method.INJECT),
)
_DOCUMENTS = tuple(json.loads(request_message(request, 30.0)) for request in _REQUESTS)


def fuzz(count: int, seed: int) -> int:
    """Read so many; how many were requests."""
    good = longest = 0

    def item(chance: Random) -> None:
        nonlocal good, longest
        document = chance.choice(_DOCUMENTS)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            document = mutated(chance, document)
        data = to_json(document)
        if chance.random() < 0.2:
            data = noise(chance, data)
        try:
            request, deadline = parse_request(data)
        except UsageError as error:
            longest = max(longest, len(str(error)))
            return
        assert len(data) <= MESSAGE_BYTES
        assert 0 < deadline <= 24 * 3600
        # What was read says the same again.
        again, _ = parse_request(request_message(request, deadline))
        assert again == request
        good += 1

    every(count, seed, item)
    assert longest < 600
    return good


def test_made_up_requests_are_read_or_refused() -> None:
    assert 100 < fuzz(4000, 1) < 3900
