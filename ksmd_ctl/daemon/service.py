# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl daemon``: run the service, only check the configuration, or only restore the knobs."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ksmd_ctl.config.loader import check_knobs, load
from ksmd_ctl.config.model import Config
from ksmd_ctl.config.values import parse_address
from ksmd_ctl.errors import ConfigError, ExitCode, UsageError
from ksmd_ctl.host.sample import HostKind


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


_HINT: Final = "ksmd-ctl.toml(5) and the sample configuration explain every setting"


def run(options: DaemonOptions) -> int:
    """Do what the options ask for; the exit code.

    :raises KsmdError: it can't be done
    """
    # Imports are local, because ExecStopPost= at each restart of the unit should be quick.
    if options.check_config:
        return _check(options)
    if options.repair:
        from ksmd_ctl.daemon.log import open_log
        from ksmd_ctl.daemon.opening import restore_after_verify

        restore_after_verify(options, open_log())
        return ExitCode.DONE
    if options.restore:
        from ksmd_ctl.daemon.restore import restore

        return restore(options, partial(_load, options))
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
        from ksmd_ctl.daemon.opening import lacking_knobs, need_ksm, open_host

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
