# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of the machine: where they are, and what to do when they fail."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.guest.errors import lacking

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


def call(command: Sequence[str | Path], *, hint: str, cwd: Path | None = None) -> str:
    """Run a program and return what it printed; its last words explain a failure."""
    try:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
    except OSError as error:
        raise lacking(f"cannot run {command[0]}: {error}", hint) from error
    with child:
        try:
            printed, complaints = child.communicate()
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)  # its children too, and it may clean up
            child.wait()
            raise
    if child.returncode != 0:
        said = complaints.strip().splitlines() or printed.strip().splitlines()
        # The first error that apt marks as one is the cause; others mostly say it last.
        causes = [line for line in said if line.startswith("E: ")] or said[-1:]
        why = causes[0] if causes else f"exit status {child.returncode}"
        raise lacking(f"{command[0]} failed: {why.removeprefix('E: ')}", hint)
    return printed
