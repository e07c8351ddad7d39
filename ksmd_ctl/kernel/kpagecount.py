# SPDX-License-Identifier: GPL-2.0-or-later
"""/proc/kpagecount and /proc/kpagecgroup: how often each frame is mapped, and to which memory cgroup it is charged.

Source: Documentation/admin-guide/mm/pagemap.rst, fs/proc/page.c.
"""

from __future__ import annotations

from pathlib import Path

from ksmd_ctl.kernel.kpageflags import FrameFile

__all__ = ["FrameCgroups", "FrameCounts"]


class FrameCounts(FrameFile):
    """How often frames are mapped, exact for pages that are no part of a huge one, as KSM pages are."""

    def __init__(self, root: Path = Path("/")) -> None:
        """
        :raises Absent, Denied: as `FrameFile`
        """
        super().__init__(root / "proc/kpagecount")


class FrameCgroups(FrameFile):
    """The inode of the memory cgroup that each frame is charged to (its folder's, st_ino); 0 for none."""

    def __init__(self, root: Path = Path("/")) -> None:
        """
        :raises Absent, Denied: as `FrameFile`
        """
        super().__init__(root / "proc/kpagecgroup")
