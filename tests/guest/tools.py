# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of the machine: where they are, and what to do when they fail."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.guest.errors import Failure, lacking

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]

# Which Debian package brings a program, where their names differ.
PACKAGES = {
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "udevadm": "udev",
}


def words(path: Path) -> list[str]:
    """Return the words of a list file, one a line; # begins a comment."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def require(programs: Sequence[str]) -> None:
    """Raise unless every program is there, naming the packages that bring them."""
    missing = [name for name in programs if find(name) is None]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise lacking(
            f"this machine has no {', '.join(missing)}",
            f"apt-get install --no-install-recommends {packages}",
        )


def find(program: str) -> str | None:
    """Return the path of a program, also where only root's PATH leads."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=f"{path}:/usr/sbin:/sbin")


def call(
    command: Sequence[str | Path],
    *,
    hint: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program and return what it printed; its last words explain a failure."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
    except OSError as error:
        raise lacking(f"cannot run {command[0]}: {error}", hint) from error
    except subprocess.CalledProcessError as error:
        raise _failed(error, hint) from error
    return done.stdout


def _failed(error: subprocess.CalledProcessError, hint: str) -> Failure:
    said: list[str] = error.stderr.strip().splitlines() or error.stdout.strip().splitlines()
    why = said[-1] if said else f"exit status {error.returncode}"
    return lacking(f"{error.cmd[0]} failed: {why}", hint)
