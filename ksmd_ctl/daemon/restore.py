# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to be done with the knobs at a stop: by the service itself, or by a process of its own."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ksmd_ctl.config.model import AtStop, Config, PolicyName
from ksmd_ctl.control.executor import Executor, KnobHost
from ksmd_ctl.control.lock import HostLock
from ksmd_ctl.control.state import Journal
from ksmd_ctl.control.stop import plan_stop
from ksmd_ctl.daemon.journal import Event, Level, Log, open_log
from ksmd_ctl.daemon.opening import open_host, put_back_what_verify_left, tell_damage
from ksmd_ctl.daemon.options import DaemonOptions
from ksmd_ctl.daemon.stopping import final_stop
from ksmd_ctl.errors import ConfigError, ExitCode
from ksmd_ctl.knobs import Knob

__all__ = ["LOCK", "at_stop", "restore"]

#: The lock's name in the runtime directory.
LOCK: Final = "lock"


def at_stop(
    config: Config, what: AtStop, host: KnobHost, executor: Executor, log: Log, *, first: bool = False
) -> Mapping[Knob, str]:
    """Do what is to be done at a stop and say what was done; the knobs that are not as they were before, and why.

    :param first: put back what knobs were at first in this boot, not what they were before the service was started
    """
    if not config.policy.writes and not executor.journal.entries:
        # Who only observed has nothing to put back, unless a service before it has left something.
        return {}
    plan = plan_stop(what, config.on_drift, executor.journal.entries, host.sample(), first=first)
    stopped = executor.carry_out(plan)
    once = "at first in this boot" if first else "before the start"
    for knob, why in stopped.left.items():
        before, found = plan.before.get(knob, "unknown"), plan.found.get(knob, "unknown")
        log.event(
            Event.NOT_RESTORED, f"{knob} stays at {found} and was {before} {once}: {why}", knob=knob, before=before
        )
    changed = {write.knob for write in stopped.written}
    text = ", ".join(f"{write.knob} = {write.value} (was {plan.found[write.knob]})" for write in stopped.written)
    same = ", ".join(f"{knob} = {value}" for knob, value in plan.found.items() if knob not in {*changed, *stopped.left})
    match what:
        case AtStop.RESTORE if changed:
            log.event(Event.RESTORED, f"restored what was found {once}: {text}", at_stop=what)
        case AtStop.RESTORE if not stopped.left:
            log.plain(Level.INFO, f"nothing had to be restored: {same or 'no knob was changed'}")
        case AtStop.STOP_SCANNING if changed:
            log.event(Event.RESTORED, f'at_stop = "{what}": {text}; the others stay: {same or "none"}', at_stop=what)
        case AtStop.LEAVE | AtStop.STOP_SCANNING:
            log.plain(Level.INFO, f'at_stop = "{what}": the knobs stay as they are: {same or "none was changed"}')
    return stopped.left


def restore(options: DaemonOptions, load: Callable[[], Config]) -> int:
    """What is to be done at a stop, by a process of its own: ``ExecStopPost=``, or a person after a crash.

    :raises KsmdError: it can't be done
    """
    if options.unit and not final_stop(options.unit):
        return ExitCode.DONE
    log = open_log()
    config = _config(options, load, log)
    with ExitStack() as stack:
        host, close = open_host(options, config)
        stack.callback(close)
        stack.enter_context(HostLock(Path(config.runtime_directory) / LOCK, "ksmd-ctl daemon --restore"))
        put_back_what_verify_left(options, log)
        executor = Executor(host, Journal(Path(config.state_directory), host.identity))
        tell_damage(executor.journal, "no knob is put back", log)
        if not executor.journal.entries and not options.unit:
            if executor.journal.damaged:
                return ExitCode.CHECK_FAILED
            print("nothing to put back: no knob was changed in this boot", file=sys.stderr)
            return ExitCode.DONE
        if options.unit:
            at_stop(config, config.at_stop, host, executor, log)
            return ExitCode.DONE
        # A person who asks for it means it, whatever the configuration says of a stop, and all of this boot.
        left = at_stop(config, AtStop.RESTORE, host, executor, log, first=True)
    return ExitCode.CHECK_FAILED if left else ExitCode.DONE


def _config(options: DaemonOptions, load: Callable[[], Config], log: Log) -> Config:
    """The configuration. At a stop a wrong one must not keep the knobs from being put back: then the defaults do it."""
    try:
        return load()
    except ConfigError as error:
        if not options.unit:
            raise
        log.plain(Level.WARNING, f"{error}; the defaults hold for this stop, with at_stop = restore")
        config = Config(policy=PolicyName.FIXED)
        # systemd.exec(5): where the unit's directories are.
        return dataclasses.replace(
            config,
            state_directory=os.environ.get("STATE_DIRECTORY", config.state_directory).partition(":")[0],
            runtime_directory=os.environ.get("RUNTIME_DIRECTORY", config.runtime_directory).partition(":")[0],
        )
