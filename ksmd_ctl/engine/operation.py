# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on the simulated host that takes its (virtual) time: a step at each poll."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Generic, TypeVar

from ksmd_ctl.errors import Cancelled, KsmdError, TimedOut
from ksmd_ctl.host.operation import Progress

__all__ = ["SteppedOperation", "Steps"]

T = TypeVar("T")

#: What does the work: yields how far it is wherever it may be stopped, returns what came of it.
Steps = Generator[Progress, None, T]


class SteppedOperation(Generic[T]):
    """`ksmd_ctl.host.operation.Operation` on the engine.

    Nothing happens beside the caller: each poll does one step. So it has no descriptor to wait on.

    :param what: what is being done, for errors
    :param clock: the host's time
    """

    def __init__(self, what: str, steps: Steps[T], clock: Callable[[], float], deadline_seconds: float) -> None:
        self._what = what
        self._steps = steps
        self._clock = clock
        self._deadline_seconds = deadline_seconds
        self._ends = clock() + deadline_seconds
        self._progress = Progress()
        self._cancelled = False
        self._value: T | None = None
        self._error: KsmdError | None = None
        self._finished = False

    def fileno(self) -> int:
        """Always -1."""
        return -1

    def poll(self) -> bool:
        """Do one step; True once it is finished."""
        if self._finished:
            return True
        state = f"stopped at {self._progress.done} of {self._progress.total} {self._progress.unit}".rstrip()
        if self._cancelled:
            self._end(Cancelled(self._what, state))
        elif self._clock() > self._ends:
            self._end(TimedOut(self._what, f"{state}, after {self._deadline_seconds:g} s"))
        else:
            try:
                self._progress = next(self._steps)
            except StopIteration as stop:
                self._value = stop.value
                self._finished = True
            except KsmdError as error:
                self._end(error)
        return self._finished

    def _end(self, error: KsmdError) -> None:
        self._steps.close()
        self._error = error
        self._finished = True

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self._progress

    def cancel(self) -> None:
        """Stop at the next poll."""
        self._cancelled = True

    def result(self) -> T:
        """What came of it.

        :raises KsmdError: it failed, was cancelled, or its deadline passed; TimedOut where it isn't finished
        """
        if not self._finished:
            raise TimedOut(self._what, "it is not finished")
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
