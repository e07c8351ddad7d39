# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries decisions out: the only place that starts an operation which changes a host.

Before the first write of a knob, what it was is on disk (`ksmd_ctl.knobs.saved_knobs`). Writes are done one after the
other, in the order that they are given in; none is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from ksmd_ctl.errors import Busy, KsmdError, Rejected, TimedOut
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue
from ksmd_ctl.host.memory import Inventory
from ksmd_ctl.host.operation import (
    Move,
    MoveResult,
    Operation,
    UnshareResult,
    finish,
    outcome,
)
from ksmd_ctl.knobs.reconcile import Write, WriteResult
from ksmd_ctl.knobs.saved_knobs import NEEDS_UNMERGE, SavedKnobs, Stopped, StopPlan
from ksmd_ctl.transactions.transaction import LookStep, MoveStep, Put, UnshareStep

#: `run` and two more wait for ksmd's batch: at the greatest pages_to_scan that is long, and then it is an error.
DEADLINE_SECONDS: Final = 30.0

# After the deadline: to end the process that writes, or find that it can't be ended, and to say so on a busy host.
_ANSWER_SECONDS: Final = 15.0

# What is refused because too much is going on is asked for again each so often, for so long altogether.
BUSY_PAUSE_SECONDS: Final = 0.25
BUSY_SECONDS: Final = 10.0


def move(host: Host, request: Move, deadline_seconds: float) -> Operation[MoveResult]:
    """Begin to move memory of one process."""
    return host.move(request, deadline_seconds)


def perform(
    host: Host, step: Put | UnshareStep | MoveStep | LookStep
) -> Operation[KnobValue] | Operation[UnshareResult] | Operation[MoveResult] | Operation[Inventory]:
    """Begin with a step of a transaction (`ksmd_ctl.transactions.runner`), which has its own journal."""
    match step:
        case Put(knob, value, deadline_seconds):
            return host.write(knob, value, deadline_seconds)
        case UnshareStep(unshare, deadline_seconds):
            return host.unshare(unshare, deadline_seconds)
        case MoveStep(move, deadline_seconds):
            return host.move(move, deadline_seconds)
        case LookStep(floor_bytes):
            return host.inventory(floor_bytes)


class Executor:
    """Writes knobs of one host, for whoever holds its lock."""

    def __init__(self, host: Host, journal: SavedKnobs) -> None:
        self._host = host
        self.journal = journal
        self._waiting: deque[Write] = deque()
        self._current: tuple[Write, Operation[KnobValue]] | None = None
        self._outcomes: list[WriteResult] = []

    @property
    def in_flight(self) -> frozenset[Knob]:
        """Knobs whose writes have begun or wait for their turn."""
        if self._current is None:
            return frozenset()
        return frozenset({self._current[0].knob, *(write.knob for write in self._waiting)})

    def fileno(self) -> int:
        """A descriptor that gets readable when `poll` has something to do; -1 where there is none."""
        return -1 if self._current is None else self._current[1].fileno()

    def begin(self, found: Mapping[Knob, KnobValue], writes: Iterable[Write]) -> None:
        """Note what knobs are at before the service has to do with them, and begin with writes of some of these.

        What comes of the writes, `take_outcomes` tells; without a note on disk that is the error.
        """
        writes = tuple(writes)
        try:
            self.journal.note(found, {write.knob: write.value for write in writes})
        except KsmdError as error:
            self._outcomes.extend(WriteResult(write, error) for write in writes)
            return
        self._waiting.extend(writes)
        self.poll()

    def gave_back(self, values: Mapping[Knob, KnobValue]) -> None:
        """Note that knobs are as they were before the start, and are nobody's concern from now on."""
        pages = self.journal.entries.get(Knob.PAGES_TO_SCAN)
        if values.get(Knob.ADVISOR_MODE) == "scan-time" and pages is not None:
            # The kernel's advisor sets it again, as it did before.
            values = {**values, Knob.PAGES_TO_SCAN: pages.at_first}
        # Not worth a failure where it can't be written: a stop then finds them as they were.
        with contextlib.suppress(KsmdError):
            self.journal.settle(values)

    def poll(self) -> None:
        """Go on as far as nothing has to be waited for."""
        while True:
            if self._current is None:
                if not self._waiting:
                    return
                write = self._waiting.popleft()
                self._current = write, self._host.write(write.knob, write.value, DEADLINE_SECONDS)
            write, operation = self._current
            if not operation.poll():
                return
            self._current = None
            self._outcomes.append(WriteResult(write, outcome(operation)))

    def take_outcomes(self) -> tuple[WriteResult, ...]:
        """What has come of writes since the last call."""
        if not self._outcomes:
            return ()
        outcomes, self._outcomes = tuple(self._outcomes), []
        return outcomes

    def wait(self) -> None:
        """Wait for the writes that have begun, and drop those that wait for their turn. For the end of the service."""
        self._waiting.clear()
        if self._current is not None:
            write, operation = self._current
            self._current = None
            self._outcomes.append(WriteResult(write, _finished(operation)))

    def carry_out(self, plan: StopPlan) -> Stopped:
        """Carry a stop out, and wait for it."""
        left = dict(plan.left)
        settled = dict(plan.settled)
        written = []
        stuck = ""
        for write in plan.writes:
            if stuck and KNOBS[write.knob].blocks:
                left[write.knob] = stuck
                settled.pop(write.knob, None)
                continue
            result = self._insist(write)
            if isinstance(result, TimedOut | Busy) and KNOBS[write.knob].blocks:
                # Others that wait for ksmd would wait as long, and the service manager does not for ever.
                stuck = f"it was not tried, for {write.knob} waits for ksmd"
            if isinstance(result, KsmdError):
                busy = isinstance(result, Rejected) and result.errno == errno.EBUSY
                left[write.knob] = NEEDS_UNMERGE if busy else result.why
                settled.pop(write.knob, None)
            else:
                written.append(write)
        self.journal.settle(settled, ended=True)
        return Stopped(tuple(written), left)

    def _insist(self, write: Write) -> KnobValue | KsmdError:
        """Write a knob, and wait for it: again where too much is going on, for nobody tries it later."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            result = _finished(self._host.write(write.knob, write.value, DEADLINE_SECONDS))
            if not isinstance(result, Busy) or time.monotonic() >= until:
                return result
            time.sleep(BUSY_PAUSE_SECONDS)


def _finished(operation: Operation[KnobValue]) -> KnobValue | KsmdError:
    try:
        # The host keeps the deadline; this is for one that doesn't answer at all.
        return finish(operation, DEADLINE_SECONDS + _ANSWER_SECONDS)
    except KsmdError as error:
        return error
