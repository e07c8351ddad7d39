# SPDX-License-Identifier: GPL-2.0-or-later
"""How many merged pages a process has, and all have together, by the kernel's own count.

While ksmd is stopped nothing else tells of pages that went with their process: the counters of the host keep them.
"""

from __future__ import annotations

from pathlib import Path

from ksmd_ctl.errors import Denied, NoSuchProcess, ReadError, Unparsable
from ksmd_ctl.kernel.identity import pids
from ksmd_ctl.kernel.ranges import read_process_file

__all__ = ["merging_pages", "merging_pages_of"]


def merging_pages_of(pid: int, root: Path = Path("/")) -> int | None:
    """ksm_merging_pages of a process (since 5.19, fs/proc/base.c:proc_pid_ksm_merging_pages), which takes no lock.

    :returns: None where the file is empty: a kernel thread has no memory, nor has a process that has ended
    :raises NoSuchProcess, Denied, ReadError: as `ksmd_ctl.kernel.ranges.read_process_file`
    """
    text = read_process_file(pid, "ksm_merging_pages", root).strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        path = str(root / "proc" / str(pid) / "ksm_merging_pages")
        raise Unparsable(path, f"{text[:40]!a} is not a number", path=path)
    return int(text)


def merging_pages(root: Path = Path("/")) -> int | None:
    """The sum of `merging_pages_of`.

    :returns: None where this kernel has no such file, or not all processes' may be read
    """
    total = 0
    for pid in pids(root / "proc"):
        try:
            total += merging_pages_of(pid, root) or 0
        except NoSuchProcess:
            # Its pages went with it.
            continue
        except (Denied, ReadError):
            return None
    return total
