# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this machine runs guests with KVM: /dev/kvm may be there and not work, as inside some virtual machines."""

import os
import subprocess
from pathlib import Path

from tests.guest import cache, kernels

DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Without a root file system a kernel ends after two seconds; where KVM only seems to work, it never gets there.
SECONDS = 20
#: What a kernel says then.
REACHED = b"Unable to mount root fs"


def works() -> bool:
    """Return whether a kernel boots under KVM; tried once for each boot of this machine."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return False
    kept = cache.folder() / "kvm"
    boot = BOOT_ID.read_text().strip()
    for answer in (True, False):
        if kept.exists() and kept.read_text() == f"{boot} {answer}":
            return answer
    found = _boots()
    kept.write_text(f"{boot} {found}")
    return found


def _boots() -> bool:
    kernel = kernels.fetch("6.12").image
    words = ["-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "256", "-nodefaults", "-display", "none"]
    line = ["-serial", "stdio", "-no-reboot", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
    try:
        done = subprocess.run(
            ["qemu-system-x86_64", *words, *line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return REACHED in done.stdout
