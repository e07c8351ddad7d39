# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel that was built without KSM: Debian's user-mode-linux, a program that is a kernel and boots in a second."""

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from tests.guest import cache
from tests.guest.apt import Suite
from tests.guest.tools import CHECKOUT, require

SUITE = "sid"
# The kernel, and the libraries that it was linked against: they are newer than the machine's.
PACKAGES = ("user-mode-linux", "libc6", "libgcc-s1")
SECONDS = 120

# The machine's root is below /host there: it is read through the program's own eyes, and so is what it may write to.
OUTSIDE = """
mount --rbind / {tree}/host && mount --rbind /proc {tree}/proc && mount --rbind /dev {tree}/dev &&
mount -t tmpfs none {tree}/tmp &&
HOME=/tmp exec chroot {tree} /usr/bin/linux.uml mem=256M uml_dir=/tmp/ rootfstype=hostfs rootflags=/host ro \\
    init={folder}/init con=null con0=fd:0,fd:1
"""
INSIDE = """#!/bin/sh
mount -t proc none /proc && mount -t sysfs none /sys && mount -t tmpfs none /run && mkdir /run/out &&
mount -t hostfs none /run/out -o /host{folder}
export PATH={checkout}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
cd {checkout}
sh /run/out/script > /run/out/said 2>&1
echo $? > /run/out/status
echo o > /proc/sysrq-trigger
sleep 60
"""


def run_without_ksm(script: str) -> tuple[int, str]:
    """Run a script as root on such a kernel, in the checkout; its exit status, and what it said.

    The file system is the machine's and can't be written to, but for /run. Root only.

    :raises AssertionError: the kernel was lost
    """
    require(["unshare", "chroot"])
    tree = cache.keep(f"uml/{SUITE}", partial(_build), f"fetching user-mode-linux from Debian {SUITE}")
    with tempfile.TemporaryDirectory(prefix="ksmd-ctl-uml-") as name:
        folder = Path(name)
        (folder / "init").write_text(INSIDE.format(folder=folder, checkout=CHECKOUT))
        (folder / "init").chmod(0o755)
        (folder / "script").write_text(script)
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        done = subprocess.run(
            [*command, OUTSIDE.format(tree=tree, folder=folder)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
        status = folder / "status"
        assert status.exists(), done.stdout[-4000:] + done.stderr[-2000:]
        return int(status.read_text()), (folder / "said").read_text()


def _build(tree: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=tree.parent) as folder:
        archive = Suite(SUITE, Path(folder))
        archive.update()
        archive.unpack(list(PACKAGES), tree)
    for name in ("lib", "lib64"):
        if not (tree / name).exists():
            os.symlink(f"usr/{name}", tree / name)
    for name in ("host", "proc", "dev", "tmp"):
        (tree / name).mkdir()
