# SPDX-License-Identifier: GPL-2.0-or-later
"""The rule for all requests whose result depends on which pages have the same content (docs/security.md).

Who could have a page of its own compared with everybody's would learn of any guess whether somebody has it. The
service has no privilege, and may be somebody else's tool. So whoever asks, unless it is root, learns nothing beyond
what merging itself tells the owner of a mergeable page: the asker's own processes are left out, nothing is compared
while KSM does not merge, counts are rounded, and it is not done often.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ksmd_ctl.errors import Absent, NoSuchProcess, ReadError, Refused
from ksmd_ctl.kernel.ksmfs import KsmFs
from ksmd_ctl.kernel.pseudofile import read_file
from ksmd_ctl.knobs import Knob

__all__ = ["need_merging", "rounded", "unlike_asker"]

_ROUND_PAGES: Final = 256
# Real, effective, saved and file system uid.
_UIDS: Final = re.compile(rb"^Uid:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", re.MULTILINE)


def need_merging(uid: int, root: Path, what: str) -> None:
    """
    :raises Refused: KSM does not merge, and it is not root that asks
    """
    if uid == 0:
        return
    ksm = KsmFs(root)
    try:
        run = ksm.read(Knob.RUN)
    finally:
        ksm.close()
    if run != 1:
        raise Refused(what, f"run is {run}: contents are compared for root only while KSM does not merge")


def rounded(pages: int, uid: int) -> int:
    """A count of pages as whoever asks gets it: for all but root a multiple of 256, rounded down."""
    return pages if uid == 0 else pages // _ROUND_PAGES * _ROUND_PAGES


def unlike_asker(uid: int, root: Path) -> Callable[[int], bool]:
    """Whether a process (a pid) takes part in a comparison: it has none of its uids from whoever asks."""

    def compared(pid: int) -> bool:
        if uid == 0:
            return True
        path = root / "proc" / str(pid) / "status"
        try:
            match = _UIDS.search(read_file(path))
        except Absent as error:
            raise NoSuchProcess(f"process {pid}", "it is gone", path=str(path), errno=error.errno) from error
        except ReadError:
            return False
        return match is not None and str(uid).encode() not in match.groups()

    return compared
