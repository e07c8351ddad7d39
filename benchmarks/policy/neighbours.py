# SPDX-License-Identifier: GPL-2.0-or-later
"""The neighbours of the tenants: some that measure their own latency, one a CPU, and some that take CPU time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from array import array
from pathlib import Path

from benchmarks.policy.cgroups import Group
from benchmarks.policy.latency import Latency, summarise
from benchmarks.policy.neighbour import PERIOD_NS

__all__ = ["Neighbours"]

PROGRAM = Path(__file__).with_name("neighbour.py")
#: CPUs of a large host that are measured: enough to meet ksmd.
_MOST = 8


class Neighbours:
    """They are started at once, and measure from `begin` on."""

    def __init__(self, group: Group, busy: int) -> None:
        """
        :param group: where they are to be; who empties it ends them
        :param busy: how many take all of a CPU that they get; they may run anywhere
        """
        self._busy = [_start(group, "busy", 0) for _ in range(busy)]
        self._measuring = [_start(group, "latency", cpu) for cpu in sorted(os.sched_getaffinity(0))[:_MOST]]

    def begin(self, seconds: float) -> None:
        """Requests come from now on, for so long."""
        first = time.monotonic_ns()
        for process in self._measuring:
            assert process.stdin is not None
            process.stdin.write(b"%d %d\n" % (first, max(1, int(seconds * 1e9) // PERIOD_NS)))
            process.stdin.flush()

    def latency(self) -> Latency:
        """What all of them measured together, when all requests are served."""
        found = array("Q")
        for process in self._measuring:
            assert process.stdout is not None
            found.frombytes(process.stdout.read())
        return summarise(found)

    def wait(self) -> None:
        """Until they have ended."""
        for process in (*self._busy, *self._measuring):
            process.communicate()


def _start(group: Group, kind: str, cpu: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-s", "-S", str(PROGRAM), kind, str(cpu), str(os.getpid())]
    return subprocess.Popen(
        group.inside(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
