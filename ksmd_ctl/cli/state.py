# SPDX-License-Identifier: GPL-2.0-or-later
"""What a service keeps on disk, for commands that look where none runs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmd_ctl.cli.client import socket_path
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.sample import HostIdentity, HostKind

__all__ = ["Folders", "folders", "foreign_changes", "left_by_service"]

#: The defaults of the settings state_directory and runtime_directory in [service]; a test holds that they agree.
STATE_DIRECTORY = "/var/lib/ksmd-ctl"
RUNTIME_DIRECTORY = "/run/ksmd-ctl"


@dataclass(frozen=True, slots=True)
class Folders:
    """Where one service has its files."""

    state: Path
    runtime: Path


def folders(args: argparse.Namespace) -> tuple[Folders, ...]:
    """Where a service may have its files: as a configuration that was named says, else by default or with its socket.

    The service's own configuration is not read: that takes longer than all that these commands do else.

    :raises ConfigError: a configuration was named, and it is wrong
    """
    named = getattr(args, "config", None)
    if named is not None:
        from ksmd_ctl.config.loader import load

        config = load(named)
        return (Folders(Path(config.state_directory), Path(config.runtime_directory)),)
    if getattr(args, "root", "/") != "/":
        return ()
    beside = Path(socket_path(getattr(args, "socket", None))).parent
    default = Folders(Path(STATE_DIRECTORY), Path(RUNTIME_DIRECTORY))
    return (default, Folders(beside, beside))


def left_by_service(args: argparse.Namespace) -> Mapping[str, object] | None:
    """What a service left changed that ended without a stop (docs/json.md); None for nothing, or not ours to read.

    It is for where no service answers.
    """
    if getattr(args, "host", None) == HostKind.ENGINE:
        return None
    for places in folders(args):
        if not (places.state / f"found-{HostKind.KERNEL}.json").exists():
            continue
        try:
            found = _left(places, getattr(args, "root", "/"))
        except KsmdError:
            continue
        if found is not None:
            return found
    return None


def _left(places: Folders, root: str) -> Mapping[str, object] | None:
    from ksmd_ctl.control.left import left_section
    from ksmd_ctl.control.lock import LOCK, holder
    from ksmd_ctl.control.state import Journal
    from ksmd_ctl.kernel.host import open_kernel_host

    lock = places.runtime / LOCK
    if holder(lock):
        # It is being started or restored, or somebody makes a change: then that is to be waited for.
        return None
    host = open_kernel_host(Path(root))
    try:
        seen = max(0.0, time.time() - lock.stat().st_mtime)
    except OSError:
        # systemd removes the folder of a service that has failed.
        seen = None
    return left_section(Journal(places.state, host.identity, keep=True), host.sample(), seen)


def foreign_changes(identity: HostIdentity, where: tuple[Folders, ...], now: float) -> list[dict[str, object]] | None:
    """What others changed within a day (docs/json.md); None where no service has kept it, or it is not ours to read."""
    for places in where:
        if not (places.state / f"foreign-{identity.kind}.json").exists():
            continue
        from ksmd_ctl.control.foreign import ForeignChanges, foreign_section

        try:
            return foreign_section(ForeignChanges(places.state, identity, keep=True).entries, now)
        except KsmdError:
            continue
    return None
