# SPDX-License-Identifier: GPL-2.0-or-later
"""When a request of the broker may begin: at once, when another one has ended, or not at all.

Writes of knobs need no slot, so that nothing that looks or moves memory can keep a knob from being put back. Of
each knob there is one write at a time; the next ones wait for it, each as long as its own deadline. All other
requests share a number of slots. A child that nothing can end (uninterruptible sleep) gives its slot back; of
those, too, there is a limit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ksmd_ctl.errors import Busy
from ksmd_ctl.host.memory import CONTENTS_PAUSE_SECONDS
from ksmd_ctl.kernel.requests import Request

__all__ = ["Slots", "stuck"]

Begin = Callable[[], object]
Refuse = Callable[[str], object]


class Slots:
    """What runs, and what waits for its turn.

    :param most: requests at a time that are no writes of knobs
    :param most_left: of these, children that can't be ended; above it no more of these requests begin
    """

    def __init__(self, most: int, most_left: int) -> None:
        self._most = most
        self._most_left = most_left
        self._taken = 0
        self._left = 0
        self._contents_due = 0.0
        # By queue: those that wait, behind the one that runs.
        self._queues: dict[str, deque[tuple[Begin, Refuse]]] = {}
        # By queue: the write that can't be ended, in words.
        self._stuck: dict[str, str] = {}

    @property
    def left_behind(self) -> int:
        """Children that can't be ended."""
        return self._left + len(self._stuck)

    def enter(self, request: Request[Any], uid: int, begin: Begin, refuse: Refuse) -> bool:
        """Whether a request may begin now; where not, one of both is called later.

        :param uid: of whom asks
        :raises Busy: neither now nor later
        """
        queue = request.queue
        if queue:
            if queue in self._stuck:
                raise stuck(request, self._stuck[queue])
            if queue in self._queues:
                self._queues[queue].append((begin, refuse))
                return False
            self._queues[queue] = deque()
            return True
        if self._taken >= self._most:
            raise Busy(request.description, "too many requests are being served", hint="try again")
        if self._left >= self._most_left:
            why = f"{self._left} processes of earlier requests wait in the kernel and can't be ended"
            raise Busy(request.description, why, hint="what they wait for is in the log of the broker")
        if request.compares_contents and uid != 0:
            self._need_pause(request)
        self._taken += 1
        return True

    def _need_pause(self, request: Request[Any]) -> None:
        now = time.monotonic()
        wait_seconds = self._contents_due - now
        if wait_seconds > 0:
            why = f"contents are compared once in {CONTENTS_PAUSE_SECONDS:g} s, but for root"
            raise Busy(request.description, why, hint=f"try again in {wait_seconds:.0f} s")
        self._contents_due = now + CONTENTS_PAUSE_SECONDS

    def withdraw(self, request: Request[Any], begin: Begin) -> None:
        """It waits no more."""
        waiting = self._queues.get(request.queue, deque())
        for one in tuple(waiting):
            if one[0] == begin:
                waiting.remove(one)

    def leave(self, request: Request[Any]) -> None:
        """It has ended: the next one of its queue begins."""
        queue = request.queue
        if not queue:
            self._taken -= 1
        elif self._queues[queue]:
            begin, _ = self._queues[queue].popleft()
            begin()
        else:
            del self._queues[queue]

    def leave_behind(self, request: Request[Any], where: str) -> None:
        """Its process can't be ended.

        :param where: which process that is, and what becomes of it, in words
        """
        queue = request.queue
        if not queue:
            self._taken -= 1
            self._left += 1
            return
        self._stuck[queue] = where
        for _, refuse in self._queues.pop(queue):
            refuse(where)

    def ended(self, request: Request[Any]) -> None:
        """A process that could not be ended has ended."""
        if request.queue:
            del self._stuck[request.queue]
        else:
            self._left -= 1


def stuck(request: Request[Any], where: str) -> Busy:
    """The error for a write behind one whose process can't be ended."""
    why = f"an earlier write has not ended: {where}"
    return Busy(request.description, why, hint="`ksmd-ctl doctor` tells what keeps ksmd")
