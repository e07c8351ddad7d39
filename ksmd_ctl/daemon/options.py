# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command line tells the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.host.sample import HostKind

__all__ = ["DaemonOptions"]


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """The options of ``ksmd-ctl daemon``.

    :ivar config: the main configuration file, None for the default one
    :ivar metrics_listen: takes the place of the setting; empty for no endpoint
    :ivar host: which host, None for the kernel
    :ivar check_config: only check the configuration; against a host, too, if one is named
    :ivar restore: only put back what was changed: in a unit what a stop puts back, else all of this boot
    :ivar repair: only put back what a ``ksmd-ctl verify`` that was killed left changed
    :ivar unit: the systemd unit that this runs in, empty for none. Its ``ExecStopPost=`` does what is to be done at
        a stop, because only there a stop can be told from a restart; so the service itself doesn't
    :ivar root: where sysfs and procfs are found below
    :ivar status_text: renders a report document for people
    """

    config: str | None = None
    metrics_listen: str | None = None
    host: HostKind | None = None
    check_config: bool = False
    restore: bool = False
    repair: bool = False
    unit: str = ""
    root: Path = Path("/")
    status_text: Callable[[Mapping[str, object]], str] | None = None
