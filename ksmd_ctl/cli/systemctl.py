# SPDX-License-Identifier: GPL-2.0-or-later
"""systemd as `ksmd_ctl.transactions.assignment` needs it, by systemctl(1)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, Denied, Rejected, TimedOut

_SECONDS: Final = 60.0
_ALLOWED: Final = "AllowedMemoryNodes"
_WITHOUT_SYSTEMD: Final = (
    "limit processes by cpuset.mems of their control groups; `ksmd-ctl migrate` moves their memory"
)
# What systemctl says where the bus or polkit refuses.
_DENIALS: Final = ("Access denied", "authentication required", "Permission denied")


class Systemctl:
    """The system manager of this host.

    :param root: where /run is looked for
    :param hint: what to do where this host does not run systemd
    :raises Absent: it does not
    """

    def __init__(self, root: Path = Path("/"), hint: str = _WITHOUT_SYSTEMD) -> None:
        # As sd_booted(3) does.
        found = shutil.which("systemctl") if (root / "run/systemd/system").is_dir() else None
        if found is None:
            why = "this host was not started with systemd"
            raise Absent("looking for systemd", why, hint=hint)
        self._command = found

    def allowed_nodes(self, unit: str) -> str:
        return self._property(unit, _ALLOWED)

    def effective_nodes(self, unit: str) -> str:
        return self._property(unit, "EffectiveMemoryNodes")

    def set_allowed_nodes(self, unit: str, nodes: str) -> None:
        # What is set for a unit that has ended holds when it starts again, unless it was made at run time and is gone.
        if "LoadState=loaded" not in self._run("show", "--property=LoadState", "--", unit).splitlines():
            raise Absent(f"looking at {unit}", "there is no such unit", hint=f"systemctl status {unit}")
        self._run("set-property", "--runtime", "--", unit, f"{_ALLOWED}={nodes}")

    def version(self) -> str:
        """Of the systemd that runs, as in ``252.39-1~deb12u1``."""
        return self._run("show", "--property=Version", "--value").strip()

    def reload(self) -> None:
        """Have it read its units again."""
        self._run("daemon-reload")

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit; what this systemd does not know is left out."""
        said = self._run("show", f"--property={','.join(names)}", "--", unit)
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    def _property(self, unit: str, name: str) -> str:
        found = self.properties(unit, "ActiveState", name)
        if found.get("ActiveState") in (None, "inactive", "failed"):
            why = "it has ended, or there is no such unit"
            raise Absent(f"looking at {unit}", why, hint=f"systemctl status {unit}")
        if name not in found:
            raise Absent(f"looking at {unit}", f"this systemd has no {name}= (it came with 244)")
        # Ranges with blanks between.
        return ",".join(found[name].split())

    def _run(self, *words: str) -> str:
        what, environment = f"systemctl {' '.join(words)}", {**os.environ, "LC_ALL": "C"}
        try:
            came = subprocess.run(
                [self._command, *words], capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TimedOut(what, f"it did not end within {_SECONDS:g} s") from error
        why = came.stderr.strip().replace("\n", "; ") or f"it ended with {came.returncode}"
        if any(denial in why for denial in _DENIALS):
            raise Denied(what, why, hint="run as root")
        if came.returncode:
            raise Rejected(what, why)
        return came.stdout
