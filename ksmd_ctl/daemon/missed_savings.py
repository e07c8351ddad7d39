# SPDX-License-Identifier: GPL-2.0-or-later
"""The service counts pages that could be merged and are not, besides duplicate KSM pages (docs/healing.md).

It does so under every policy, and changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ksmd_ctl.config.model import Config
from ksmd_ctl.daemon.tasks import Tasks
from ksmd_ctl.errors import KsmdError
from ksmd_ctl.host.duplicates import DuplicatePages
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.memory import CONTENTS_PAUSE_SECONDS
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.policies.counters import counter_delta, tracked_pages
from ksmd_ctl.policies.knob_recovery import SwapCopies

ADVISOR: Final = "advisor"
KHUGEPAGED: Final = "khugepaged"
#: A full scan that takes longer than so many times what the advisor aims at comes too late.
_SLOW: Final = 2.0
#: Huge pages that khugepaged makes in a second at its own settings at most: 4096 pages each 10 s. Twice that is churn.
_CHURN_RATE: Final = 2 * 0.8
_CHURN_SECONDS: Final = 10.0
#: Pages whose contents are compared at first, 256 MiB; and at most: 4 GiB.
_FIRST_FRAMES: Final = 1 << 16
_MOST_FRAMES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class BlockedMerging:
    """Equal pages that are not merged while something is known to keep ksmd from it. Else nothing is compared.

    The kernel's advisor at its slowest (findings F12): ksmd doesn't know the pages yet that it has not come to.
    khugepaged (F17), which makes huge pages of merged ranges as quickly as ksmd splits them.

    :ivar due: when to compare next, at the earliest; `frames` is how many
    :ivar pages: by reason, how many are more than required; None while that is not known
    :ivar counted_from: the sample since which huge pages are counted; `churn` is whether they came and went before it
    """

    due: float = 0.0
    frames: int = _FIRST_FRAMES
    pages: Mapping[str, int | None] = field(default_factory=lambda: {ADVISOR: None, KHUGEPAGED: None})
    counted_from: Sample | None = None
    churn: bool | None = None

    def step(self, sample: Sample, cpu_share: float) -> tuple[BlockedMerging, int | None]:
        """Take a sample in: what it has become, and how many frames to compare now.

        :param cpu_share: of one CPU, that comparing may take; 0: never compare
        """
        after = self._counted(sample)
        reason = after.reason(sample)
        # What can be told to do no harm now costs nothing.
        harmless = {
            ADVISOR: isinstance(sample.readings.get(Knob.ADVISOR_MODE), str),
            KHUGEPAGED: after.churn is not None,
        }
        pages = {one: self.pages[one] if one == reason else 0 if harmless[one] else None for one in self.pages}
        due = bool(reason) and cpu_share > 0 and sample.time_seconds >= self.due
        return replace(after, pages=pages), self.frames if due else None

    def reason(self, sample: Sample) -> str:
        """What keeps ksmd from merging now; empty for nothing."""
        if sample.knob(Knob.RUN) != 1:
            return ""
        return ADVISOR if _slowed(sample) else KHUGEPAGED if self.churn else ""

    def on_result(
        self, came: DuplicatePages | None, sample: Sample, cpu_share: float, interval_seconds: float
    ) -> BlockedMerging:
        """Take a comparison in, None where it failed."""
        reason = self.reason(sample)
        interval_seconds = max(interval_seconds, CONTENTS_PAUSE_SECONDS)
        if came is None:
            pages = {one: None if one == reason else count for one, count in self.pages.items()}
            return replace(self, pages=pages, due=sample.time_seconds + interval_seconds)
        found = came.pages
        if reason == ADVISOR:
            passed = max(came.mergeable_pages, tracked_pages(sample) or 0)
            # Where it is soon at the end nothing is lost by it.
            found = found if _scan_seconds(sample, passed) > _SLOW * _target_seconds(sample) else 0
        # The CPU time is kept within its share by waiting; as many as fit into an interval are compared next time.
        cost = came.cpu_seconds / max(1, came.frames)
        affordable = round(cpu_share * interval_seconds / cost) if cost and cpu_share else _MOST_FRAMES
        return replace(
            self,
            due=sample.time_seconds + max(interval_seconds, came.cpu_seconds / cpu_share if cpu_share else 0.0),
            frames=max(_FIRST_FRAMES, min(affordable, _MOST_FRAMES)),
            pages={one: found if one == reason else count for one, count in self.pages.items()},
        )

    def _counted(self, sample: Sample) -> BlockedMerging:
        before = self.counted_from
        if before is None:
            return replace(self, counted_from=sample)
        passed = sample.time_seconds - before.time_seconds
        if passed < _CHURN_SECONDS:
            return self
        made = counter_delta(before, sample, "thp_collapse_alloc")
        split = counter_delta(before, sample, "thp_split_page")
        known = made is not None and split is not None
        churn = min(made or 0.0, split or 0.0) > _CHURN_RATE * passed if known else None
        return replace(self, counted_from=sample, churn=churn)


def _slowed(sample: Sample) -> bool:
    pages, least = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.ADVISOR_MIN_PAGES_TO_SCAN)
    return sample.knob(Knob.ADVISOR_MODE) == "scan-time" and pages is not None and least is not None and pages < least


def _scan_seconds(sample: Sample, pages: int) -> float:
    """How long a full scan takes at this speed, as far as ksmd sleeps."""
    batch, sleep = sample.number(Knob.PAGES_TO_SCAN), sample.number(Knob.SLEEP_MILLISECS) or 0.0
    return pages / batch * sleep / 1000 if batch else float("inf")


def _target_seconds(sample: Sample) -> float:
    return sample.number(Knob.ADVISOR_TARGET_SCAN_TIME) or 200.0


class MissedSavings:
    """Keeps the figures.

    :param config: gives the configuration that is in force
    :param changed: is called when there is something new to be reported
    """

    def __init__(self, host: Host, tasks: Tasks, config: Callable[[], Config], changed: Callable[[], None]) -> None:
        self._host = host
        self._tasks = tasks
        self._config = config
        self._changed = changed
        self._copies = SwapCopies()
        self._blocked = BlockedMerging()
        self._sample: Sample | None = None
        self._task: asyncio.Task[None] | None = None

    def pages(self) -> Mapping[str, int | None]:
        """By reason, how many pages; None where that isn't known."""
        return {"swapin": self._copies.pages, **self._blocked.pages}

    def tick(self, sample: Sample) -> None:
        """Take a sample in, and compare contents where that tells more."""
        self._sample = sample
        self._copies = self._copies.step(sample)
        self._blocked, frames = self._blocked.step(sample, self._config().census_cpu_share)
        if frames is not None and self._task is None:
            self._task = self._tasks.start(self._compare(frames))

    async def _compare(self, frames: int) -> None:
        came = await self._tasks.outcome(self._host.duplicates(frames))
        assert self._sample is not None
        config = self._config()
        found = None if isinstance(came, KsmdError) else came
        self._blocked = self._blocked.on_result(found, self._sample, config.census_cpu_share, config.census_interval)
        self._task = None
        self._changed()
