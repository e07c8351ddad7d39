# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the service: opens everything, runs the loop, and restores the knobs at the end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ksmd_ctl.config.loader import check_knobs
from ksmd_ctl.config.model import Config
from ksmd_ctl.config.values import parse_address
from ksmd_ctl.daemon import http, varlink, varlink_socket
from ksmd_ctl.daemon.log import Event, open_log
from ksmd_ctl.daemon.loop import ServiceLoop
from ksmd_ctl.daemon.notify import Notifier
from ksmd_ctl.daemon.restore import at_stop
from ksmd_ctl.daemon.service import (
    DaemonOptions,
    lacking_knobs,
    log_damage,
    need_ksm,
    open_host,
    restore_after_verify,
)
from ksmd_ctl.daemon.udev import KernelEvents
from ksmd_ctl.daemon.varlink_socket import Authority, group_number
from ksmd_ctl.errors import Absent, ExitCode
from ksmd_ctl.host.sample import HostKind, Sample
from ksmd_ctl.knobs.saved_knobs import SavedKnobs, ServiceRun
from ksmd_ctl.privileged.host import KernelHost
from ksmd_ctl.statefiles import host_locked
from ksmd_ctl.transactions.executor import Executor

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _need_knobs(config: Config, sample: Sample) -> None:
    problems = check_knobs(config, lacking_knobs(sample)) if config.policy.writes else []
    if problems:
        raise Absent(
            "holding the knobs of [knobs]",
            "; ".join(map(str, problems)),
            hint="take them out, or mark them as optional",
        )


def serve(options: DaemonOptions, config: Config, load: Callable[[], Config]) -> int:
    """Serve until a signal ends it; the exit code. After that, signals stay blocked until the process ends.

    :param load: reads the configuration again
    :raises KsmdError: it can't be done
    """
    with ExitStack() as stack:
        log, notifier = open_log(), Notifier()
        host, close = open_host(options, config)
        stack.callback(close)
        sample = host.sample()
        need_ksm(sample)
        _need_knobs(config, sample)
        # Everything that can be refused is done before anything is written.
        lock = stack.enter_context(host_locked(config.runtime_directory, config.state_directory, "ksmd-ctl daemon"))
        restore_after_verify(options, log)
        metrics = None
        if config.metrics_listen:
            metrics = http.listen(*parse_address(config.metrics_listen))
            stack.callback(metrics.close)
        readers = group_number(config.socket_group) if config.socket_group else None
        writers = group_number(config.socket_write_group) if config.socket_write_group else None
        control = varlink_socket.inherit() or varlink_socket.listen(Path(config.socket), readers)
        stack.callback(control.sock.close)
        stack.callback(control.remove)
        named = "" if options.config is None else os.path.abspath(options.config)
        run = ServiceRun(os.getpid(), host.clock(), named, options.unit)
        journal = SavedKnobs(Path(config.state_directory), host.identity, run)
        log_damage(journal, "the current values are recorded as the original ones", log)
        executor = Executor(host, journal)
        events = _events(options)
        watched = host if isinstance(host, KernelHost) else None
        loop = ServiceLoop(config, host, executor, log, notifier, load, events, lock.touch, watched)
        # Last, so that it has the stop.
        stack.callback(loop.history.close)
        number = 0
        try:
            number = asyncio.run(_run(loop, metrics, control.sock, Authority(writers, config.socket_write_group)))
        finally:
            # Also after an error: in the foreground nobody else restores the knobs.
            executor.wait()
            loop.transactions.finish()
            if options.unit:
                log.event(Event.STOPPED, "stopped; the knobs keep their values during a restart")
            else:
                at_stop(loop.config, loop.config.at_stop, host, executor, log)
                log.event(Event.STOPPED, f"stopped by {signal.Signals(number).name}" if number else "stopped")
        return ExitCode.DONE


def _events(options: DaemonOptions) -> Callable[[], KernelEvents] | None:
    # Events of this machine's kernel are not about a simulated host, nor about files in another folder.
    return None if options.host is HostKind.ENGINE or options.root != Path("/") else KernelEvents


async def _run(loop: ServiceLoop, metrics: socket.socket | None, control: socket.socket, authority: Authority) -> int:
    servers: list[varlink.ControlServer | http.HttpServer] = []
    try:
        control_server = varlink.ControlServer(loop, control, authority)
        servers.append(control_server)
        http_server = None if metrics is None else http.HttpServer(loop, metrics)
        if http_server is not None:
            servers.append(http_server)
        # Objects that exist now stay for ever: the garbage collector need not visit them.
        gc.collect()
        gc.freeze()
        return await loop.run(control_server, http_server)
    finally:
        # asyncio removes its handlers before the knobs are restored, and a second signal is common: make forwards a
        # signal that the terminal sends to the whole process group, and people press Ctrl-C again.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for server in servers:
            server.close()
