# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl daemon``: run the service, only check the configuration, or only restore the knobs."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ksmd_ctl.config.loader import check_knobs, load
from ksmd_ctl.config.model import Config
from ksmd_ctl.config.values import parse_address
from ksmd_ctl.daemon.log import Event, Log, open_log
from ksmd_ctl.errors import Absent, ConfigError, ExitCode, KsmdError, Refused, UsageError
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import HostKind, Sample
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.scenario import lab_restore
from ksmd_ctl.statefiles import became_of


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """The options of ``ksmd-ctl daemon``.

    :ivar config: the main configuration file, None for the default one
    :ivar metrics_listen: replaces the setting; empty for no HTTP server
    :ivar host: None for the kernel
    :ivar check_config: only check the configuration; also against a host, if one is named
    :ivar restore: only restore the knobs: with `unit` as a stop does, otherwise to the first values of this boot
    :ivar repair: only restore the knobs after a ``ksmd-ctl verify`` that was killed
    :ivar unit: the systemd unit of this process, empty for none. Its ``ExecStopPost=`` restores the knobs, because only
        there a stop can be told from a restart; the service itself doesn't
    :ivar root: the folder that has sys and proc
    """

    config: str | None = None
    metrics_listen: str | None = None
    host: HostKind | None = None
    check_config: bool = False
    restore: bool = False
    repair: bool = False
    unit: str = ""
    root: Path = Path("/")


_BROKER_SECONDS: Final = 10.0
_BROKER_PAUSE_SECONDS: Final = 0.1
_HINT: Final = "ksmd-ctl.toml(5) and the sample configuration explain every setting"


def run(options: DaemonOptions) -> int:
    """Do what the options ask for; the exit code.

    :raises KsmdError: it can't be done
    """
    # The parts are imported where they are needed: ExecStopPost= at each restart of the unit is quick without asyncio.
    if options.check_config:
        return _check(options)
    if options.repair:
        restore_after_verify(options, open_log())
        return ExitCode.DONE
    if options.restore:
        from ksmd_ctl.daemon.restore import restore

        return restore(options, partial(_load, options))
    # A reload asked for during the start waits for the loop, which reads the configuration again. By default SIGHUP
    # ends the process, and to systemd that is a clean exit, after which Restart=on-failure starts nothing.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    config = _load(options)
    # asyncio takes ssl for optional, and so does the import system (None: not to be had). Nothing here uses TLS, and
    # OpenSSL would take 4 MiB for ever.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    from ksmd_ctl.daemon.serving import serve

    return serve(options, config, partial(_load, options))


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


def _check(options: DaemonOptions) -> int:
    try:
        config = _load(options)
    except ConfigError as error:
        # The hint of the error is this command.
        raise ConfigError("checking the configuration", list(error.problems), hint=_HINT) from error
    if options.host is not None:
        host, close = open_host(options, config)
        try:
            sample = host.sample()
            need_ksm(sample)
            problems = check_knobs(config, lacking_knobs(sample))
        finally:
            close()
        if problems:
            raise ConfigError("checking the configuration against this host", problems, hint=_HINT)
    files = ", ".join(config.files) or "no file, so all defaults"
    print(f"the configuration is good ({files})")
    if config.unused:
        print(f'not used by policy = "{config.policy}": {", ".join(config.unused)}')
    return ExitCode.DONE


# -- what the service, a stop and a restoration open --------------------------------------------------------

_MISSING: Final = Absent("reading a knob", "it is not in the sample")


def lacking_knobs(sample: Sample) -> frozenset[Knob]:
    """The knobs that the host doesn't have."""
    return frozenset(knob for knob in Knob if isinstance(sample.readings.get(knob, _MISSING), Absent))


def open_host(options: DaemonOptions, config: Config) -> tuple[Host, Callable[[], None]]:
    """The host, and a function that closes it."""
    if options.host is HostKind.ENGINE:
        # Not imported otherwise, to save memory.
        from ksmd_ctl.engine.host import open_engine_host

        return open_engine_host(), lambda: None
    broker = Path(config.broker_socket)
    # Root needs no broker. Without one, the errors of the kernel say best what is missing.
    unprivileged = os.geteuid() != 0 and (broker.exists() or _comes(broker))
    host = open_kernel_host(options.root, broker if unprivileged else None)
    return host, host.close


def _comes(broker: Path) -> bool:
    """Whether a broker comes whose socket was named: the other container of a pod starts at the same time.

    It is waited for, with a limit; without it the errors of the kernel say what is missing.
    """
    if str(broker) == Config().broker_socket:
        return False
    print(f"ksmd-ctl: waiting for the broker at {broker}", file=sys.stderr, flush=True)
    until = time.monotonic() + _BROKER_SECONDS
    while not broker.exists() and time.monotonic() < until:
        time.sleep(_BROKER_PAUSE_SECONDS)
    if broker.exists():
        return True
    print(f"ksmd-ctl: no broker within {_BROKER_SECONDS:g} s: going on without one", file=sys.stderr, flush=True)
    return False


def need_ksm(sample: Sample) -> None:
    """
    :raises Absent: the host has no KSM
    """
    run = sample.readings.get(Knob.RUN)
    if run is None or isinstance(run, Absent):
        why = "this kernel has no KSM" if run is None else run.why
        hint = "it takes a kernel with CONFIG_KSM; --host engine runs on a simulated one"
        raise Absent("reading this host's KSM", why, hint=hint) from run


def restore_after_verify(options: DaemonOptions, log: Log) -> None:
    """Restore the knobs if ``ksmd-ctl verify`` was killed before it did.

    :raises Refused: it is still running
    """
    if options.host is HostKind.ENGINE or options.root != Path("/"):
        return
    what = "what `ksmd-ctl verify` had changed when it was killed"
    try:
        if os.geteuid() == 0:
            if lab_restore.repair():
                log.event(Event.RESTORED, f"{what} was put back")
        elif lab_restore.Recovery().pending() is not None:
            # In the unit, ExecStartPre= does it.
            log.event(Event.NOT_RESTORED, f"{what} was not undone: run `ksmd-ctl daemon --restore` as root")
    except Refused:
        raise
    except KsmdError as error:
        log.event(Event.NOT_RESTORED, f"{what} could not all be put back: {error}")


def log_damage(journal: SavedKnobs, consequence: str, log: Log) -> None:
    """Log if the file of saved knobs could not be understood, and what follows from that."""
    if journal.damaged:
        log.event(
            Event.STATE_DAMAGED,
            "the file with the knobs as found at first could not be understood and "
            f"{became_of(journal.path, journal.damaged)}; {consequence}",
            path=journal.damaged,
        )
