# SPDX-License-Identifier: GPL-2.0-or-later
"""Merging switched on or off for a running process: what is asked for, and what came of it (docs/switching.md)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import AddressRange


class Method(StrEnum):
    """How a process is reached: by its QEMU monitor, or by a system call that is injected into it."""

    QMP = "qmp"
    INJECT = "inject"


@dataclass(frozen=True, slots=True)
class Switch:
    """A request.

    :ivar ranges: (start, end) addresses; empty for all of the process's memory
    """

    process: ProcessId
    on: bool
    ranges: tuple[AddressRange, ...] = ()


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """What came of it, as /proc/PID shows it afterwards.

    :ivar how: as in ``prctl(PR_SET_MEMORY_MERGE)`` or ``madvise of 12 mappings``
    :ivar before: whether its anonymous memory was mergeable (VmFlags mg, ksm_merge_any); None where that isn't known
    :ivar after: whether it is now
    :ivar mergeable_bytes: the size of its mergeable mappings now
    :ivar merging_pages: its merged pages now
    :ivar stopped_seconds: the longest time that it was stopped
    :ivar left: what could not be switched, and why
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
    left: tuple[str, ...]
