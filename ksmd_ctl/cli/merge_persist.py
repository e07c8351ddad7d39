# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl merge --persist``: what belongs into which configuration for the next start, and the drop-ins of units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ksmd_ctl.cli.memory_ksm import systemds_answer
from ksmd_ctl.cli.systemctl import Systemctl
from ksmd_ctl.codec import DecodeError, decode
from ksmd_ctl.errors import Denied, HostError, Refused, errno_text
from ksmd_ctl.reports.document import part, parts
from ksmd_ctl.statefiles import replace_file
from ksmd_ctl.switch.persist import Setting, Start, setting_for
from ksmd_ctl.transactions.assignment import is_unit_name

_WHAT: Final = "writing a drop-in"


def settings(document: Mapping[str, object], root: Path, *, write: bool) -> list[dict[str, object]]:
    """What belongs into configurations for the processes of a document (docs/json.md), each once.

    :param write: write the drop-ins of units, but not for a dry run
    :raises Refused: there is none to be written
    :raises KsmdError: one can't be written
    """
    from ksmd_ctl.kernel.syscalls import knows_memory_merge

    state, version = systemds_answer(root)
    found: dict[Start, Setting] = {}
    for one in parts(document, "processes"):
        try:
            start = decode(Start, part(one, "start"))
        except DecodeError:
            # It has no mergeable memory, or the service is of another version.
            continue
        machine = one.get("machine") is True
        on, prctl = document.get("on") is True, knows_memory_merge()
        found[start] = setting_for(start, on=on, machine=machine, state=state, version=version, prctl=prctl)
    if write and not any(setting.path for setting in found.values()):
        why = "none of the processes is a service of this host's system manager"
        raise Refused(_WHAT, why, hint="--persist without `write` prints what belongs where")
    really = write and not document.get("dry_run")
    if write:
        # Where no systemd runs that could read it, nothing is written, and a dry run says so.
        systemctl = Systemctl(root, hint="--persist without `write` prints what belongs where")
    if really:
        for setting in found.values():
            _write(setting, root)
        systemctl.reload()
    return [
        {
            "starter": setting.start.starter.value,
            "name": setting.start.name,
            "text": setting.text,
            "content": setting.content,
            "path": setting.path,
            "written": bool(really and setting.path),
        }
        for setting in found.values()
    ]


def _write(setting: Setting, root: Path) -> None:
    if not setting.path:
        return
    if not is_unit_name(setting.start.name):
        raise Refused(_WHAT, f"{setting.start.name[:100]!a} is no unit's name")
    path = root / setting.path.lstrip("/")
    try:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        replace_file(path, setting.content.encode())
    except OSError as error:
        kind = Denied if isinstance(error, PermissionError) else HostError
        why = f"{path}: {errno_text(error.errno or 0)}"
        raise kind(_WHAT, why, hint="run as root", path=str(path), errno=error.errno) from error
