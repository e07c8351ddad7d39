# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds who has changed a knob: puts changes down to the latest writes (`ksmd_ctl.kernel.knob_writes`)."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Final, Protocol

from ksmd_ctl.daemon.log import Level, Log
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Operation
from ksmd_ctl.kernel.knob_writes import KnobWrite, WriteReader
from ksmd_ctl.knobs.reconcile import Drift

# Un-merges all (KSM_RUN_UNMERGE).
_UNMERGE: Final = 2
# A change is noticed at the next sample, or, where the service was busy, at the one after that.
_SAMPLES: Final = 2
# The kernel tells of a write when it has ended: a moment after the value can be read, but with run = 2 only after all
# is un-merged. A change waits for that, at most so long.
_WAIT_SECONDS: Final = 2.0
_UNMERGING_SECONDS: Final = 60.0
# Of all knobs. Whoever writes all the time must not take memory.
_MOST_WRITES: Final = 256


class WatchedHost(Protocol):
    """A host that tells who writes its knobs."""

    def watch_writes(self) -> Operation[int]:
        """A descriptor for `WriteReader`."""
        ...

    def has_written(self, pid: int) -> bool:
        """Whether a process has written for this service, as far as that is known yet."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """A change that the service did not make.

    :ivar reason: what becomes of the knob
    :ivar seen_at: when it was noticed, by the host's clock
    :ivar who: the process that did it; empty where that isn't known
    """

    drift: Drift
    reason: str
    seen_at: float
    who: str = ""


class KnobWrites:
    """The latest writes, and the changes that wait for theirs.

    A thread reads the writes: who writes may end at once, and has no name then.

    :param host: None for one that can't tell
    :param clock: gives the time in seconds; also called by that thread
    """

    def __init__(self, host: WatchedHost | None, tasks: Tasks, log: Log, clock: Callable[[], float]) -> None:
        self._host = host
        self._log = log
        self._tasks = tasks
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._end = -1
        # What the thread has read, and what is taken from it.
        self._arrived: deque[tuple[float, KnobWrite]] = deque(maxlen=_MOST_WRITES)
        self._latest: deque[tuple[float, KnobWrite]] = deque(maxlen=_MOST_WRITES)
        self._error: KsmdError | None = None
        self._waiting: list[Change] = []

    def begin(self) -> None:
        """Begin to watch; without the privilege nobody is known."""
        if self._host is not None:
            self._tasks.start(self._begin(self._host.watch_writes()))

    async def _begin(self, operation: Operation[int]) -> None:
        found = await self._tasks.outcome(operation)
        if isinstance(found, KsmdError):
            self._log.plain(Level.INFO, f"who changes a knob is not known: {found}")
            return
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._read, args=(found, self._end), name="knob-writes", daemon=True)
        self._thread.start()

    def _read(self, descriptor: int, end: int) -> None:
        reader, poller = WriteReader(descriptor), select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.register(end, select.POLLIN)
        try:
            while all(ready != end for ready, _ in poller.poll()):
                for write in reader.read():
                    self._arrived.append((self._clock(), write))
        except KsmdError as error:
            self._error = error
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Watch no more."""
        if self._thread is not None:
            os.eventfd_write(self._end, 1)
            self._thread.join()
            os.close(self._end)
            self._thread = None

    def told(self, changes: Sequence[Change], in_flight: Set[Knob], interval_seconds: float) -> list[Change]:
        """The changes that can be told now, with who it was: of these and of earlier ones.

        :param in_flight: knobs that the service itself is writing
        :param interval_seconds: how far apart samples are
        """
        if self._error is not None:
            self._log.plain(Level.INFO, f"who changes a knob is not known any more: {self._error}")
            self._error = None
            self.close()
        self._take_in()
        found, waiting, earlier = [], [], len(self._waiting)
        for number, change in enumerate((*self._waiting, *changes)):
            name = self._who(change, in_flight, interval_seconds, new=number >= earlier)
            if name is None:
                waiting.append(change)
            else:
                found.append(replace(change, who=name))
        self._waiting = waiting
        return found

    def rest(self, interval_seconds: float) -> list[Change]:
        """The service ends: those that still wait."""
        self._take_in()
        rest, self._waiting = self._waiting, []
        return [replace(change, who=self._writer(change, interval_seconds) or "") for change in rest]

    def _take_in(self) -> None:
        while self._arrived:
            self._latest.append(self._arrived.popleft())

    def _who(self, change: Change, in_flight: Set[Knob], interval_seconds: float, *, new: bool) -> str | None:
        """Who has made a change; None while that may become known, empty where it will not."""
        if self._host is None or self._thread is None:
            return ""
        drift, age_seconds = change.drift, self._clock() - change.seen_at
        unmerging = drift.knob is Knob.RUN and drift.found == _UNMERGE
        # Until the un-merging is over no other write of `run` ends either, and the latest was somebody else's. The
        # service's own is only begun when the change is new.
        if drift.knob not in in_flight and not (unmerging and new):
            name = self._writer(change, interval_seconds)
            if name is not None:
                return name
        return None if age_seconds < (_UNMERGING_SECONDS if unmerging else _WAIT_SECONDS) else ""

    def _writer(self, change: Change, interval_seconds: float) -> str | None:
        """Who wrote a knob last before the service put it back; each write explains one change."""
        assert self._host is not None
        own, since = self._host.has_written, change.seen_at - _SAMPLES * interval_seconds - 1
        writes = [one for one in self._latest if one[1].knob is change.drift.knob and one[0] >= since]
        again = (at for at, (time, write) in enumerate(writes) if time >= change.seen_at and own(write.pid))
        back = next(again, len(writes))
        before = [at for at in range(back) if not own(writes[at][1].pid)]
        # Where two writes end one after the other, the kernel may tell of the second one first.
        after = [at for at in range(back, len(writes)) if not own(writes[at][1].pid)]
        if not before and not after:
            return None
        chosen = before[-1] if before else after[0]
        for one in writes[: max(chosen, back if before else 0) + 1]:
            self._latest.remove(one)
        return writes[chosen][1].who
