# SPDX-License-Identifier: GPL-2.0-or-later
"""How many merged pages all processes have together, by the kernel's count of each.

While ksmd is stopped nothing else tells of pages that went with their process: the counters of the host keep them.
"""

from __future__ import annotations

from pathlib import Path

from ksmd_ctl.errors import Denied, NoSuchProcess, ReadError
from ksmd_ctl.kernel.identity import pids
from ksmd_ctl.kernel.ranges import read_process_file

__all__ = ["merging_pages"]


def merging_pages(root: Path = Path("/")) -> int | None:
    """The sum of ksm_merging_pages (since 5.19, fs/proc/base.c:proc_pid_ksm_merging_pages), which takes no lock.

    :returns: None where this kernel has no such file, or not all processes' may be read
    """
    total = 0
    for pid in pids(root / "proc"):
        try:
            text = read_process_file(pid, "ksm_merging_pages", root).strip()
        except NoSuchProcess:
            # Its pages went with it.
            continue
        except (Denied, ReadError):
            return None
        # A kernel thread has no memory, and then the file is empty.
        if text.isascii() and text.isdigit():
            total += int(text)
    return total
