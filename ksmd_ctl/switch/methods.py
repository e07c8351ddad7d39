# SPDX-License-Identifier: GPL-2.0-or-later
"""Switches merging for a process by the first method that works: QEMU's monitor, else an injected system call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ksmd_ctl.errors import Absent, Cancelled, KsmdError, NoSuchProcess
from ksmd_ctl.figures import plural
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.kernel.switching import switch, unmerge
from ksmd_ctl.kernel.syscalls import knows_memory_merge
from ksmd_ctl.switch.monitor import Marked, monitored, need_monitor, switch_by_monitor

Report = Callable[[Progress], None]
Stop = Callable[[], bool]


def switch_merging(
    request: Switch,
    method: Method | None,
    *,
    dry_run: bool = False,
    root: Path = Path("/"),
    progress: Report = lambda _: None,
    stop: Stop = lambda: False,
) -> SwitchResult:
    """Switch merging on or off for a process. It may block: run it in a child.

    :param method: None for the first that works
    :param dry_run: only find out what would be done
    :raises KsmdError: no method works; the error is that of the last one
    """
    process = request.process
    if method is Method.QMP:
        return _by_monitor(request, dry_run=dry_run, root=root, progress=progress, stop=stop)
    came: SwitchResult | KsmdError | None = None
    by_monitor = method is None and not request.ranges and monitored(process, root)
    # What prctl made mergeable is more than the machine's memory, and no monitor takes it back.
    if by_monitor and (request.on or not Marked.of(process, root).merge_any):
        try:
            came = _by_monitor(request, dry_run=dry_run, root=root, progress=progress, stop=stop)
        except (NoSuchProcess, Cancelled):
            raise
        except KsmdError as error:
            came = error
    if isinstance(came, SwitchResult) and (dry_run or not came.left):
        return came
    if dry_run:
        return _would_inject(request, root)
    try:
        result = switch(request, root=root, progress=progress, stop=stop)
    except KsmdError as error:
        if isinstance(came, SwitchResult):
            return replace(came, left=(*came.left, error.why))
        # Where nothing can be injected, it is the monitor that matters.
        raise (came if isinstance(error, Absent) and came is not None else error) from error
    if isinstance(came, SwitchResult):
        longest = max(came.stopped_seconds, result.stopped_seconds)
        return replace(
            result,
            how=f"{came.how}; {result.how}",
            before=came.before,
            stopped_seconds=longest,
            unmerged_pages=came.unmerged_pages + result.unmerged_pages,
        )
    if came is not None:
        return replace(result, how=f"{result.how}; the monitor did not do it: {came.why}")
    return result


def _by_monitor(request: Switch, *, dry_run: bool, root: Path, progress: Report, stop: Stop) -> SwitchResult:
    """
    :raises KsmdError: as `switch_by_monitor`, or there is no room to un-merge its memory
    """
    unmerged = 0
    if not (request.on or dry_run):
        # Where no monitor switches it, nothing is to be un-merged for that either.
        need_monitor(request.process, root)
        unmerged = unmerge(request, root=root, progress=progress, stop=stop)
    came = switch_by_monitor(request.process, on=request.on, dry_run=dry_run, root=root, stop=stop)
    return replace(came, unmerged_pages=unmerged)


def _would_inject(request: Switch, root: Path) -> SwitchResult:
    """What an injected call would do; nothing is attached to the process."""
    marked = Marked.of(request.process, root)
    if not request.ranges and knows_memory_merge():
        how = "prctl(PR_SET_MEMORY_MERGE)"
    else:
        many = len(request.ranges) or (marked.mappings - len(marked.sizes) if request.on else len(marked.sizes))
        how = f"madvise of about {plural(many, 'mapping')}"
    return marked.would(request.process, Method.INJECT, how, on=request.on)
