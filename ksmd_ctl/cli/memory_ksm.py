# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at what comes of ``MemoryKSM=`` in units of this host's systemd (`ksmd_ctl.switch.persist`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from ksmd_ctl.cli.systemctl import Systemctl
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.regularfile import read_regular
from ksmd_ctl.switch.persist import MemoryKsm, MemoryKsmUnit, memory_ksm

# systemd.unit(5); what comes later wins.
_FOLDERS: Final = ("usr/lib/systemd/system", "usr/local/lib/systemd/system", "run/systemd/system", "etc/systemd/system")
_SETTING: Final = re.compile(r"^[ \t]*MemoryKSM[ \t]*=[ \t]*(\S*)[ \t]*$", re.MULTILINE | re.ASCII)
_TRUE: Final = ("1", "yes", "y", "true", "t", "on")
_MOST_BYTES: Final = 1 << 20
_MOST_UNITS: Final = 64


def systemds_answer(root: Path) -> tuple[MemoryKsm, str]:
    """What comes of ``MemoryKSM=`` on this host, and the version of its systemd; empty where there is none."""
    from ksmd_ctl.kernel.syscalls import knows_memory_merge

    try:
        version = Systemctl(root).version()
    except KsmdError:
        version = ""
    return memory_ksm(version, prctl=knows_memory_merge()), version


def units(root: Path) -> tuple[MemoryKsmUnit, ...]:
    """The units that have the setting, by name, and whether their main process is mergeable by prctl."""
    found: dict[str, bool] = {}
    for unit, on in _settings(root):
        found[unit] = on
    named = sorted(unit for unit in found if "@." not in unit)[:_MOST_UNITS]
    try:
        manager = Systemctl(root)
    except KsmdError:
        return ()
    return tuple(_unit(manager, unit, root, on=found[unit]) for unit in named)


def _settings(root: Path) -> Iterator[tuple[str, bool]]:
    """Each setting of a unit, those of drop-ins after those of the unit itself."""
    for pattern in ("*.service", "*.service.d/*.conf"):
        for folder in _FOLDERS:
            for path in sorted((root / folder).glob(pattern)):
                unit = path.name if pattern == "*.service" else path.parent.name.removesuffix(".d")
                with suppress(OSError, ValueError):
                    text = read_regular(path, _MOST_BYTES, follow=True).decode(errors="replace")
                    for value in _SETTING.findall(text):
                        yield unit, value.lower() in _TRUE


def _unit(manager: Systemctl, unit: str, root: Path, *, on: bool) -> MemoryKsmUnit:
    from ksmd_ctl.kernel.process_counts import read_counts

    state, pid, merge_any = "", 0, None
    with suppress(KsmdError):
        found = manager.properties(unit, "ActiveState", "MainPID")
        state, pid = found.get("ActiveState", ""), int(found.get("MainPID") or 0)
    if pid:
        with suppress(KsmdError):
            merge_any = read_counts(pid, root).merge_any
    return MemoryKsmUnit(unit, on, state, pid, merge_any)
