# SPDX-License-Identifier: GPL-2.0-or-later
"""Restores the knobs at a stop: in the service itself, or in a process of its own.

Under systemd a stop must be told from a restart. Both send SIGTERM, and the environment of a service is the same. But
`systemctl restart` (and so an upgrade) runs a job of type ``restart`` that still exists while ``ExecStopPost=`` runs;
`systemctl stop` and a shutdown run a job of type ``stop`` (systemd's job.c: a restart job turns into a start job only
when the unit is down). So ``ExecStopPost=`` asks for the job and restores the knobs, and `systemctl stop` returns when
that is done. It runs as root: `systemctl` reaches systemd without a D-Bus daemon, the knobs can be written without the
broker, which systemd would not start during a shutdown, and it works after a crash.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ksmd_ctl.config.model import AtStop, Config, PolicyName
from ksmd_ctl.daemon.log import Event, Level, Log, Record, open_log
from ksmd_ctl.daemon.service import DaemonOptions, log_damage, open_host, restore_after_verify
from ksmd_ctl.errors import ConfigError, ExitCode
from ksmd_ctl.history.model import history_path
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.knobs.saved_knobs import SavedKnobs, plan_stop
from ksmd_ctl.statefiles import host_locked
from ksmd_ctl.transactions.executor import Executor


def at_stop(
    config: Config, what: AtStop, host: Host, executor: Executor, log: Log, *, first: bool = False, who: str = ""
) -> Mapping[Knob, str]:
    """Do what `at_stop` says, and log it; the knobs that are not as they were before, and why.

    :param first: restore the first values of this boot, not those from before the start of the service
    :param who: who asks for it; empty for the service itself
    """
    if not config.policy.writes and not executor.journal.entries:
        # Nothing was changed, unless an earlier service has left something.
        return {}
    plan = plan_stop(what, config.on_drift, executor.journal.entries, host.sample(), first=first)
    stopped = executor.carry_out(plan)
    once = "at first in this boot" if first else "before the start"
    asked = {"who": who} if who else {}
    by = f" ({who})" if who else ""
    for knob, why in stopped.left.items():
        before, found = plan.before.get(knob, "unknown"), plan.found.get(knob, "unknown")
        text = f"{knob} stays at {found} and was {before} {once}: {why}{by}"
        log.event(Event.NOT_RESTORED, text, knob=knob, before=before, **asked)
    changed = {write.knob for write in stopped.written}
    text = ", ".join(f"{write.knob} = {write.value} (was {plan.found[write.knob]})" for write in stopped.written)
    same = ", ".join(f"{knob} = {value}" for knob, value in plan.found.items() if knob not in {*changed, *stopped.left})
    match what:
        case AtStop.RESTORE if changed:
            log.event(Event.RESTORED, f"restored what was found {once}: {text}{by}", at_stop=what, **asked)
        case AtStop.RESTORE if not stopped.left:
            log.plain(Level.INFO, f"nothing had to be restored: {same or 'no knob was changed'}")
        case AtStop.STOP_SCANNING if changed:
            said = f'at_stop = "{what}": {text}; the others stay: {same or "none"}{by}'
            log.event(Event.RESTORED, said, at_stop=what, **asked)
        case AtStop.LEAVE | AtStop.STOP_SCANNING:
            log.plain(Level.INFO, f'at_stop = "{what}": the knobs stay as they are: {same or "none was changed"}')
    return stopped.left


def restore(options: DaemonOptions, load: Callable[[], Config]) -> int:
    """``ksmd-ctl daemon --restore``: by ``ExecStopPost=``, or by a person after a crash.

    :raises KsmdError: it can't be done
    """
    if options.unit and not final_stop(options.unit):
        return ExitCode.DONE
    log = open_log()
    records: list[Record] = []
    log.listen(records.append)
    config = _config(options, load, log)
    with ExitStack() as stack:
        host, close = open_host(options, config)
        stack.callback(close)
        stack.enter_context(host_locked(config.runtime_directory, config.state_directory, "ksmd-ctl daemon --restore"))
        stack.callback(_remember, config, host, log, records)
        restore_after_verify(options, log)
        executor = Executor(host, SavedKnobs(Path(config.state_directory), host.identity))
        log_damage(executor.journal, "no knob is put back", log)
        if not executor.journal.entries and not options.unit:
            if executor.journal.damaged:
                return ExitCode.CHECK_FAILED
            print("nothing to put back: no knob was changed in this boot", file=sys.stderr)
            return ExitCode.DONE
        if options.unit:
            at_stop(config, config.at_stop, host, executor, log, who=f"systemd, at the stop of {options.unit}")
            return ExitCode.DONE
        # A person wants the first values of this boot, whatever `at_stop` says.
        who = f"ksmd-ctl daemon --restore, pid {os.getpid()}, uid {os.getuid()}"
        left = at_stop(config, AtStop.RESTORE, host, executor, log, first=True, who=who)
    return ExitCode.CHECK_FAILED if left else ExitCode.DONE


def _remember(config: Config, host: Host, log: Log, records: Sequence[Record]) -> None:
    """Add what was done to the history, if the service keeps one, and how the service ended if nothing says that.

    The file belongs to the service's user, whom root does not trust: a process that has become that user writes it, and
    has a few seconds for it.
    """
    path = history_path(Path(config.state_directory), host.identity.kind)
    if not path.is_file():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_TIMEOUT_SECONDS)
        owner = path.parent.stat()
        if os.geteuid() == 0 and owner.st_uid:
            os.setgroups([])
            os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
            os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
        from ksmd_ctl.daemon.history import HistoryKeeper
        from ksmd_ctl.daemon.tasks import Tasks

        before = tuple(records)
        history = HistoryKeeper(path.parent, host.identity, Tasks(), lambda: config, log)
        history.begin(host.clock())
        for record in before:
            history.hear(record)
        history.close()
        code = 0
    finally:
        # Nothing of the parent's is undone here.
        os._exit(code)


def _config(options: DaemonOptions, load: Callable[[], Config], log: Log) -> Config:
    # At a stop, a wrong configuration must not prevent the restoration: the defaults are used instead.
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
    """Whether the unit of this ``ExecStopPost=`` is stopped, and will not be started again.

    :param jobs: gives the output of `systemctl list-jobs`, None if systemd can't be asked
    """
    listing = (jobs or list_jobs)()
    if listing is None:
        # To restore without need costs a moment, not to restore would last.
        return True
    job = job_type(listing, unit)
    if job is not None:
        return job not in _RESTARTS
    # No job: the service ended by itself. Restart=on-failure starts it again after a failure.
    return environment.get("SERVICE_RESULT", "success") == "success"


def job_type(listing: str, unit: str) -> str | None:
    """The type of the job of a unit in a list of jobs (ID UNIT TYPE STATE), None if it has none."""
    for line in listing.splitlines():
        words = line.split()
        if len(words) == 4 and words[1] == unit:
            return words[2]
    return None


def list_jobs() -> str | None:
    """The present jobs of systemd; None if it can't be asked."""
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
    return result.stdout
