# SPDX-License-Identifier: GPL-2.0-or-later
"""The service from its first line to its last: ``ksmd-ctl daemon``."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ksmd_ctl.config.loader import check_knobs, load
from ksmd_ctl.config.model import AtStop, Config, Policy, parse_address
from ksmd_ctl.control.executor import Executor, KnobHost
from ksmd_ctl.control.lock import HostLock
from ksmd_ctl.control.state import Journal
from ksmd_ctl.control.stop import plan_stop
from ksmd_ctl.daemon import http, varlink, varlink_socket
from ksmd_ctl.daemon.authority import Authority, group_number
from ksmd_ctl.daemon.journal import Event, Log, open_log
from ksmd_ctl.daemon.loop import Loop, lacking
from ksmd_ctl.daemon.notify import Notifier
from ksmd_ctl.daemon.options import DaemonOptions
from ksmd_ctl.daemon.stopping import final_stop
from ksmd_ctl.errors import Absent, ConfigError, ExitCode, UsageError
from ksmd_ctl.host import HostKind, Sample
from ksmd_ctl.kernel.host import open_kernel_host
from ksmd_ctl.knobs import Knob

__all__ = ["run"]

LOCK: Final = "lock"


def run(options: DaemonOptions) -> int:
    """Do what the options ask for; the exit code.

    :raises KsmdError: it can't be done
    """
    if options.check_config:
        return _check(options)
    config = _load(options)
    if options.restore:
        return _restore(options, config)
    return _serve(options, config)


def _load(options: DaemonOptions) -> Config:
    config = load(options.config)
    if options.metrics_listen is not None:
        if options.metrics_listen:
            try:
                parse_address(options.metrics_listen)
            except ValueError as error:
                raise UsageError("--metrics-listen", str(error), hint="as in 127.0.0.1:19753") from error
        config = dataclasses.replace(config, metrics_listen=options.metrics_listen)
    return config


def _open_host(options: DaemonOptions, config: Config) -> tuple[KnobHost, Callable[[], None]]:
    """The host, and what closes it."""
    if options.host is HostKind.ENGINE:
        # Only here: it costs memory that the service on a kernel has no use for.
        from ksmd_ctl.engine.host import open_engine_host

        return open_engine_host(), lambda: None
    broker = Path(config.broker_socket)
    # Root needs no broker; and where there is none, the kernel says what is missing better than a connection does.
    unprivileged = os.geteuid() != 0 and broker.exists()
    host = open_kernel_host(options.root, broker if unprivileged else None)
    return host, host.close


def _need_ksm(host: KnobHost, sample: Sample) -> None:
    run = sample.readings.get(Knob.RUN)
    if run is None or isinstance(run, Absent):
        why = "this kernel has no KSM" if run is None else run.why
        hint = "it takes a kernel with CONFIG_KSM; --host engine runs on a simulated one"
        raise Absent("reading this host's KSM", why, hint=hint) from run


def _need_knobs(config: Config, sample: Sample) -> None:
    problems = check_knobs(config, lacking(sample)) if config.policy is not Policy.OBSERVE else []
    if problems:
        raise Absent(
            "holding the knobs of [knobs]",
            "; ".join(map(str, problems)),
            hint="take them out, or mark them as optional",
        )


def _check(options: DaemonOptions) -> int:
    """Check the configuration; against a host, too, if one was named."""
    config = _load(options)
    if options.host is not None:
        host, close = _open_host(options, config)
        try:
            sample = host.sample()
            _need_ksm(host, sample)
            problems = check_knobs(config, lacking(sample))
        finally:
            close()
        if problems:
            raise ConfigError("checking the configuration against this host", problems)
    files = ", ".join(config.files) or "no file, so all defaults"
    print(f"the configuration is good ({files})")
    return ExitCode.DONE


# -- serving -----------------------------------------------------------------------------------------------


def _serve(options: DaemonOptions, config: Config) -> int:
    with ExitStack() as stack:
        log, notifier = open_log(), Notifier()
        host, close = _open_host(options, config)
        stack.callback(close)
        sample = host.sample()
        _need_ksm(host, sample)
        _need_knobs(config, sample)
        # All that can be refused is taken before anything is written.
        stack.enter_context(HostLock(Path(config.runtime_directory) / LOCK, "ksmd-ctl daemon"))
        metrics = None
        if config.metrics_listen:
            metrics = http.listen(*parse_address(config.metrics_listen))
            stack.callback(metrics.close)
        group = group_number(config.socket_group) if config.socket_group else None
        control = varlink_socket.inherit() or varlink_socket.listen(Path(config.socket), group)
        stack.callback(control.sock.close)
        stack.callback(control.remove)
        journal = Journal(Path(config.state_directory), host.identity)
        if journal.damaged:
            log.event(
                Event.STATE_DAMAGED,
                f"the knobs as found at first could not be read and were put aside as {journal.damaged}; "
                "what is found now counts instead",
                path=journal.damaged,
            )
        executor = Executor(host, journal)
        loop = Loop(config, host, executor, log, notifier, lambda: _load(options), options.status_text)
        number = 0
        try:
            number = asyncio.run(_run(loop, metrics, control.sock, Authority(group)))
        finally:
            # Also after an error: in the foreground nobody else puts anything back.
            executor.wait()
            if options.unit:
                log.event(Event.STOPPED, "stopped; the knobs are as they were held, until the unit is stopped for good")
            else:
                # "observe" writes nothing, not at a stop either; what an earlier run left, --restore puts back.
                if loop.config.policy is not Policy.OBSERVE:
                    _at_stop(loop.config, loop.config.at_stop, host, executor, log)
                log.event(Event.STOPPED, f"stopped by {signal.Signals(number).name}" if number else "stopped")
        return ExitCode.DONE


async def _run(loop: Loop, metrics: socket.socket | None, control: socket.socket, authority: Authority) -> int:
    servers: list[varlink.ControlServer | http.HttpServer] = []
    try:
        control_server = await varlink.serve(loop, control, authority)
        servers.append(control_server)
        http_server = None
        if metrics is not None:
            http_server = await http.serve(loop, metrics)
            servers.append(http_server)
        # What was made until now stays: no collection has to look at it again.
        gc.collect()
        gc.freeze()
        return await loop.run(control_server, http_server)
    finally:
        for server in servers:
            server.close()


# -- stopping ----------------------------------------------------------------------------------------------


def _at_stop(config: Config, at_stop: AtStop, host: KnobHost, executor: Executor, log: Log) -> dict[Knob, str]:
    """Do what is to be done at a stop; the knobs that are not as they were at first, and why."""
    entries = executor.journal.entries
    sample = host.sample()
    plan = plan_stop(at_stop, config.on_drift, entries, sample)
    left = executor.carry_out(plan)
    for knob, why in left.items():
        first, found = entries[knob].at_first if knob in entries else 0, sample.knob(knob)
        log.event(
            Event.NOT_RESTORED, f"{knob} stays at {found} and was {first} at first: {why}", knob=knob, at_first=first
        )
    restored = [write for write in plan.writes if write.knob not in left]
    if restored:
        text = ", ".join(f"{write.knob} = {write.value}" for write in restored)
        log.event(Event.RESTORED, f"written at the stop: {text}", at_stop=at_stop)
    return left


def _restore(options: DaemonOptions, config: Config) -> int:
    """What is to be done at a stop, by a process of its own: ``ExecStopPost=``, or a person after a crash."""
    log = open_log()
    if options.unit and (config.policy is Policy.OBSERVE or not final_stop(options.unit)):
        return ExitCode.DONE
    with ExitStack() as stack:
        host, close = _open_host(options, config)
        stack.callback(close)
        stack.enter_context(HostLock(Path(config.runtime_directory) / LOCK, "ksmd-ctl daemon --restore"))
        executor = Executor(host, Journal(Path(config.state_directory), host.identity))
        # A person who asks for it means it, whatever the configuration says of a stop.
        at_stop = config.at_stop if options.unit else AtStop.RESTORE
        if not executor.journal.entries:
            if not options.unit:
                print("nothing to put back: no knob was changed in this boot", file=sys.stderr)
            return ExitCode.DONE
        left = _at_stop(config, at_stop, host, executor, log)
    return ExitCode.CHECK_FAILED if left and not options.unit else ExitCode.DONE
