# SPDX-License-Identifier: GPL-2.0-or-later
"""When the full scan that runs will end, for what is to begin with the next one."""

from __future__ import annotations

from typing import Final

from ksmd_ctl.control.policies.burst import Burst
from ksmd_ctl.control.policies.change import grown, tracked_pages
from ksmd_ctl.host.sample import Sample

__all__ = ["left", "progress"]

# Before it is so far, how far it is says little about when it ends.
_TELLING_PROGRESS: Final = 0.25


def left(sample: Sample, burst: Burst, takes: float) -> tuple[float, float]:
    """Seconds until the full scan that runs in a burst seems to end, and for a whole one.

    :param takes: seconds for a whole one, as far as that is known without a look at this one
    """
    # The first one began in the background, a long time ago.
    since = burst.scan if burst.scan.time_seconds > burst.start.time_seconds else burst.start
    passed, done = sample.time_seconds - since.time_seconds, progress(burst.scan, sample)
    if done is None:
        return takes - passed, takes
    begun = progress(burst.scan, since) or 0.0
    if done - begun > _TELLING_PROGRESS:
        takes = passed / (done - begun)
    return takes * (1 - done), takes


def progress(scan: Sample, sample: Sample) -> float | None:
    """How much of a full scan is over that began at a sample; None before 6.7, where skipped pages are not counted."""
    scanned, skipped = grown(scan, sample, "pages_scanned"), grown(scan, sample, "pages_skipped")
    tracked = tracked_pages(sample)
    return None if scanned is None or skipped is None or not tracked else min((scanned + skipped) / tracked, 1.0)
