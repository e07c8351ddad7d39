# SPDX-License-Identifier: GPL-2.0-or-later
"""A swap device of compressed memory, for as long as it is needed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.service.running import until

ZRAM = Path("/sys/class/zram-control")


@contextmanager
def swap_device() -> Iterator[None]:
    """256 MiB that are preferred to other swap. It needs a kernel with zram (`ZRAM`)."""
    number = int((ZRAM / "hot_add").read_text())
    device, folder = f"/dev/zram{number}", Path(f"/sys/block/zram{number}")
    try:
        (folder / "disksize").write_text(str(256 << 20))
        until("the device", lambda: True if Path(device).exists() else None)
        subprocess.run(["mkswap", device], check=True, capture_output=True)
        subprocess.run(["swapon", "--priority", "100", device], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", device], check=True)
    finally:
        (folder / "reset").write_text("1")
        (ZRAM / "hot_remove").write_text(str(number))
