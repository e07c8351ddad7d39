# SPDX-License-Identifier: GPL-2.0-or-later
"""Opens the host that the options name, and checks that it has KSM and that nothing is left from before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.log import Event, Log
from ksmd_ctl.daemon.service import DaemonOptions
from ksmd_ctl.errors import Absent, KsmdError, Refused
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.sample import HostKind, Sample
from ksmd_ctl.knobs.saved_knobs import SavedKnobs
from ksmd_ctl.privileged.host import open_kernel_host
from ksmd_ctl.scenario import lab_restore
from ksmd_ctl.statefiles import became_of

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
    unprivileged = os.geteuid() != 0 and broker.exists()
    host = open_kernel_host(options.root, broker if unprivileged else None)
    return host, host.close


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
            log.event(Event.NOT_RESTORED, f"{what} is still so: run `ksmd-ctl daemon --restore` as root")
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
