# SPDX-License-Identifier: GPL-2.0-or-later
"""Switches merging for a process by the first method that works: QEMU's monitor, else an injected system call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from ksmd_ctl.errors import Absent, Cancelled, KsmdError, NoSuchProcess
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.switch.monitor import Marked, monitored, switch_by_monitor

_WHAT: Final = "switching merging"


class Inject(Protocol):
    """Switches by a system call that is injected into the process."""

    def __call__(self, request: Switch, *, dry_run: bool, root: Path, stop: Callable[[], bool]) -> SwitchResult: ...


def inject(request: Switch, *, dry_run: bool, root: Path, stop: Callable[[], bool]) -> SwitchResult:
    """
    :raises Absent: always
    """
    raise Absent(_WHAT, "this version can't inject system calls", hint="--method qmp, for QEMU with a monitor socket")


def switch_merging(
    request: Switch,
    method: Method | None,
    *,
    dry_run: bool = False,
    root: Path = Path("/"),
    stop: Callable[[], bool] = lambda: False,
    injected: Inject = inject,
) -> SwitchResult:
    """Switch merging on or off for a process. It may block: run it in a child.

    :param method: None for the first that works
    :param dry_run: only find out what would be done
    :raises KsmdError: no method works; the error is that of the last one
    """
    process = request.process
    if method is Method.QMP:
        return switch_by_monitor(process, on=request.on, dry_run=dry_run, root=root, stop=stop)
    came: SwitchResult | KsmdError | None = None
    by_monitor = method is None and not request.ranges and monitored(process, root)
    # What prctl made mergeable is more than the machine's memory, and no monitor takes it back.
    if by_monitor and (request.on or not Marked.of(process, root).merge_any):
        came = _by_monitor(request, dry_run=dry_run, root=root, stop=stop)
    if isinstance(came, SwitchResult) and not (came.left and not dry_run):
        return came
    try:
        result = injected(request, dry_run=dry_run, root=root, stop=stop)
    except KsmdError as error:
        if isinstance(came, SwitchResult):
            return replace(came, left=(*came.left, error.why))
        raise (came if isinstance(error, Absent) and came is not None else error) from error
    if isinstance(came, SwitchResult):
        longest = max(came.stopped_seconds, result.stopped_seconds)
        return replace(result, how=f"{came.how}; {result.how}", before=came.before, stopped_seconds=longest)
    if came is not None:
        return replace(result, how=f"{result.how}; the monitor did not do it: {came.why}")
    return result


def _by_monitor(request: Switch, *, dry_run: bool, root: Path, stop: Callable[[], bool]) -> SwitchResult | KsmdError:
    try:
        return switch_by_monitor(request.process, on=request.on, dry_run=dry_run, root=root, stop=stop)
    except (NoSuchProcess, Cancelled):
        raise
    except KsmdError as error:
        return error
