# SPDX-License-Identifier: GPL-2.0-or-later
"""/proc/kpagecount: how often each frame is mapped.

Source: Documentation/admin-guide/mm/pagemap.rst, fs/proc/page.c.
"""

from __future__ import annotations

from pathlib import Path

from ksmd_ctl.kernel.kpageflags import FrameFile

__all__ = ["FrameCounts"]


class FrameCounts(FrameFile):
    """How often frames are mapped, exact for pages that are no part of a huge one, as KSM pages are."""

    def __init__(self, root: Path = Path("/")) -> None:
        """
        :raises Absent, Denied: as `FrameFile`
        """
        super().__init__(root / "proc/kpagecount")
