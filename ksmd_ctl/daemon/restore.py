# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to be done with the knobs at a stop: by the service itself, or by a process of its own.

Under systemd a stop has to be told from a restart. Both send SIGTERM, and nothing in a service's environment tells one
from the other. systemd knows: `systemctl restart` (and so an upgrade) runs a job of type ``restart`` that is still
there while ``ExecStopPost=`` runs, `systemctl stop` and a shutdown run a ``stop`` (systemd's job.c: a restart's job
turns into a start only once the unit is down). So what is to be done at a stop is done by ``ExecStopPost=``, which asks
for the job, and waits, so that `systemctl stop` returns only when the knobs are back. It runs as root: then `systemctl`
reaches systemd without a D-Bus daemon, the knobs can be written without the broker, which systemd would not start
during a shutdown, and it works after a crash.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ksmd_ctl.config.model import AtStop, Config, PolicyName
from ksmd_ctl.control.executor import Executor, KnobHost
from ksmd_ctl.control.lock import LOCK, HostLock
from ksmd_ctl.control.state import Journal
from ksmd_ctl.control.stop import plan_stop
from ksmd_ctl.daemon.log import Event, Level, Log, open_log
from ksmd_ctl.daemon.opening import open_host, put_back_what_verify_left, tell_damage
from ksmd_ctl.daemon.service import DaemonOptions
from ksmd_ctl.errors import ConfigError, ExitCode
from ksmd_ctl.knobs import Knob


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


_RESTARTS: Final = ("restart", "try-restart", "reload-or-start", "start", "verify-active")
_TIMEOUT_SECONDS: Final = 10


def final_stop(
    unit: str, environment: Mapping[str, str] = os.environ, jobs: Callable[[], str | None] | None = None
) -> bool:
    """Whether a unit whose ``ExecStopPost=`` this runs in is stopped, and not to be started again.

    :param jobs: what `systemctl list-jobs` prints, None where it can't be had
    """
    listing = (jobs or list_jobs)()
    if listing is None:
        # Putting back what a restart sets again costs a moment; not putting back would last.
        return True
    job = job_type(listing, unit)
    if job is not None:
        return job not in _RESTARTS
    # Nobody asked systemd: it ended by itself. Restart=on-failure starts it again unless all was well.
    return environment.get("SERVICE_RESULT", "success") == "success"


def job_type(listing: str, unit: str) -> str | None:
    """The type of a unit's job in a list of jobs (ID UNIT TYPE STATE), None where it has none."""
    for line in listing.splitlines():
        words = line.split()
        if len(words) == 4 and words[1] == unit:
            return words[2]
    return None


def list_jobs() -> str | None:
    """The jobs that systemd has now; None where it can't be asked."""
    try:
        result = subprocess.run(
            ["systemctl", "list-jobs", "--no-legend", "--no-pager", "--plain", "--full"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"},
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # "No jobs running." is no line of the table.
    return result.stdout
