# SPDX-License-Identifier: GPL-2.0-or-later
"""Switches merging for a process: by QEMU's monitor, by injected system calls, or by one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ksmd_ctl.errors import Absent, Cancelled, HostError, KsmdError, NoSuchProcess
from ksmd_ctl.figures import plural
from ksmd_ctl.host.operation import Progress
from ksmd_ctl.host.switching import Method, Switch, SwitchResult
from ksmd_ctl.kernel.proc_pid import Held
from ksmd_ctl.kernel.switching import state, switch, unmerge
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

    :param method: None for what works: a virtual machine is switched by both
    :param dry_run: only find out what would be done
    :raises KsmdError: no method works; the error is that of the last one
    """
    process = request.process
    if method is Method.QMP:
        return _by_monitor(request, dry_run=dry_run, root=root, progress=progress, stop=stop)
    by_monitor = method is None and not request.ranges and monitored(process, root)
    if dry_run:
        return _would(request, by_monitor=by_monitor, root=root)
    if not by_monitor:
        return switch(request, root=root, progress=progress, stop=stop)
    both = _on if request.on else _off
    return both(request, root=root, progress=progress, stop=stop)


def _on(request: Switch, *, root: Path, progress: Report, stop: Stop) -> SwitchResult:
    """Switch a virtual machine on by its monitor, and inject what that does not do."""
    came: SwitchResult | KsmdError
    try:
        came = switch_by_monitor(request.process, on=True, root=root, stop=stop)
        if not came.left:
            return came
    except (NoSuchProcess, Cancelled):
        raise
    except KsmdError as error:
        came = error
    try:
        result = switch(request, root=root, progress=progress, stop=stop)
    except KsmdError as error:
        if isinstance(came, SwitchResult):
            return replace(came, left=(*came.left, error.why))
        # Where nothing can be injected, it is the monitor that matters.
        raise (came if isinstance(error, Absent) else error) from error
    return _by_itself(result, came) if isinstance(came, KsmdError) else _both(came, result, injected=result)


def _off(request: Switch, *, root: Path, progress: Report, stop: Stop) -> SwitchResult:
    """Switch a virtual machine off.

    QEMU takes out a whole backend in one call: with 2 GiB the machine's main loop waited for 0.2 s, and so does
    whoever faults. So parts are taken out by injected calls, and the monitor's does nothing but set the property.
    """
    try:
        result = switch(request, root=root, progress=progress, stop=stop)
    except (NoSuchProcess, Cancelled):
        raise
    except KsmdError as error:
        try:
            came = _by_monitor(request, dry_run=False, root=root, progress=progress, stop=stop)
        except KsmdError as second:
            raise (second if isinstance(error, Absent) else error) from second
        return replace(came, left=(*came.left, error.why)) if came.left else came
    if result.after is not False:
        # There was no room, or no time: the monitor would not ask.
        return result
    try:
        said: SwitchResult | KsmdError = switch_by_monitor(request.process, on=False, root=root, stop=stop)
    except KsmdError as error:
        said = error
    # Whatever the monitor has said and done, its memory is off now. It is looked at once more, and no call is made
    # where it is so.
    last = switch(request, root=root, progress=progress, stop=stop)
    result = replace(_both(result, last, injected=last), how=result.how)
    return _by_itself(result, said) if isinstance(said, KsmdError) else _both(result, said, injected=result)


def _by_itself(injected: SwitchResult, error: KsmdError) -> SwitchResult:
    return replace(injected, how=f"{injected.how}; the monitor did not do it: {error.why}")


def _both(first: SwitchResult, second: SwitchResult, *, injected: SwitchResult) -> SwitchResult:
    return replace(
        injected,
        how=f"{first.how}; {second.how}",
        before=first.before,
        stopped_seconds=max(first.stopped_seconds, second.stopped_seconds),
        unmerged_pages=first.unmerged_pages + second.unmerged_pages,
    )


def _by_monitor(request: Switch, *, dry_run: bool, root: Path, progress: Report, stop: Stop) -> SwitchResult:
    """
    :raises KsmdError: as `switch_by_monitor`, or there is no room to un-merge its memory
    """
    unmerged = 0
    if not (request.on or dry_run):
        # Where no monitor switches it, nothing is to be un-merged for that either.
        need_monitor(request.process, root)
        unmerged = unmerge(request, root=root, progress=progress, stop=stop)
    try:
        came = switch_by_monitor(request.process, on=request.on, dry_run=dry_run, root=root, stop=stop)
    except HostError:
        # A monitor that hangs up may have ended with its process.
        with Held(request.process, root):
            raise
    return replace(came, unmerged_pages=unmerged)


def _would(request: Switch, *, by_monitor: bool, root: Path) -> SwitchResult:
    """What would be done; nothing is attached to the process.

    :raises KsmdError: it can be told that it would fail
    """
    if not by_monitor:
        return _would_inject(request, root)
    try:
        monitor = switch_by_monitor(request.process, on=request.on, dry_run=True, root=root)
    except NoSuchProcess:
        raise
    except KsmdError:
        return _would_inject(request, root)
    if request.on:
        return monitor
    try:
        injected = _would_inject(request, root)
    except NoSuchProcess:
        raise
    except KsmdError:
        return monitor
    return replace(injected, how=f"{injected.how}; {monitor.how}")


def _would_inject(request: Switch, root: Path) -> SwitchResult:
    """What an injected call would do.

    :raises KsmdError: it can be told that it would fail
    """
    name, now = state(request, root)
    marked = Marked.of(request.process, root)
    if not request.ranges and knows_memory_merge():
        how = "prctl(PR_SET_MEMORY_MERGE)"
    else:
        many = len(request.ranges) or (marked.mappings - len(marked.sizes) if request.on else len(marked.sizes))
        how = f"madvise of about {plural(many, 'mapping')}"
    would = marked.would(request.process, Method.INJECT, how, on=request.on)
    return replace(would, before=now, after=now, name=name)
