# SPDX-License-Identifier: GPL-2.0-or-later
"""Switching KSM on or off for a process that runs: what is asked for, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import AddressRange, FloorBytes, HeadroomShare, LatencySeconds, MaxPressure


class Method(StrEnum):
    """How a process is switched: QEMU's monitor, or a system call that another process has it make."""

    QMP = "qmp"
    INJECT = "inject"


@dataclass(frozen=True, slots=True)
class Switch:
    """A process whose memory is to be mergeable from now on, or not to be.

    :ivar ranges: (start, end) addresses; empty for all of its memory
    :ivar latency_seconds: and what follows is how merged pages are un-merged before, as in `Unshare`
    """

    process: ProcessId
    on: bool
    ranges: tuple[AddressRange, ...] = ()
    latency_seconds: LatencySeconds = 0.01
    floor_bytes: FloorBytes = 0
    headroom_share: HeadroomShare = 0.25
    max_pressure: MaxPressure = 1.0


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """What smaps and ksm_stat showed before and afterwards.

    :ivar how: the call, or the property that was set: ``prctl(PR_SET_MEMORY_MERGE)``, ``madvise of 12 mappings``
    :ivar before: whether all of its memory that can be merged was mergeable; None where only some was, `after` is
    :ivar mergeable_bytes: mappings that are mergeable now
    :ivar merging_pages: its merged pages now, by the kernel's count, which is as old as ksmd's last visit
    :ivar stopped_seconds: the longest time that it was stopped at once
    :ivar left: what could not be switched, and why
    :ivar unmerged_pages: pages that were un-merged before, each onto its home
    :ivar name: what the process is called; empty where that was not looked for
    """

    process: ProcessId
    on: bool
    method: Method
    how: str
    before: bool | None
    after: bool | None
    mergeable_bytes: int
    merging_pages: int
    stopped_seconds: float
    left: tuple[str, ...] = ()
    unmerged_pages: int = 0
    name: str = ""
