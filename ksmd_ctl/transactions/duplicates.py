# SPDX-License-Identifier: GPL-2.0-or-later
"""Recovery of duplicate KSM pages: when to search, how many to un-merge at once, what it gains (docs/healing.md).

The kernel never joins KSM pages of one content that were moved to one node (docs/findings.md: F1) or are left of full
ones. Where the smaller one is un-merged, those who map it get pages of their own, and ksmd merges these onto the other.
Until then each takes a frame. So it is done in rounds, the first one small. After each round, once ksmd has scanned
everything twice, the gain decides whether another one follows.

`DuplicatesRecovery` decides, without clock and host; `ksmd_ctl.daemon.recovery` carries it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, TypeVar

from ksmd_ctl.config.model import Config
from ksmd_ctl.errors import Cancelled, KsmdError, NoSuchProcess
from ksmd_ctl.host.duplicates import DuplicateKsmPages
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Unshare, UnsharePart, UnshareResult
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.transactions.transaction import UnshareStep

T = TypeVar("T")

#: Pages (mappings) of the first round, and of the largest: 128 MiB, which are there twice until ksmd comes by.
TRIAL_PAGES: Final = 1024
MOST_PAGES: Final = 32768
# How many times as large the round after a successful one is, and as long the search after one that was too short.
_GROWTH: Final = 4
#: Pages un-merged in a second, at most; and in one request, which may hold only so many ranges.
PAGES_PER_SECOND: Final = 4096
SLICE_PAGES: Final = 4096
SLICE_RANGES: Final = 512
#: Two full scans have surely passed once a third one is over. smart_scan skips a page that had not merged for long up
#: to eight times in a row: after the larger number nothing more is to come.
SCANS: Final = 3
MOST_SCANS: Final = 12
_FIRST_SECONDS: Final = 10.0
_HOUR: Final = 3600.0
_DAY: Final = 86400.0
_MOST_BUDGET_SECONDS: Final = 60.0
# Duplicates since the last search that are worth another one: the reciprocal of a share of those before.
_NEWS: Final = 8


class RecoveryPhase(StrEnum):
    """What it does now."""

    IDLE = "idle"
    LOOKING = "looking"
    UNMERGING = "un-merging"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class SearchDuplicates:
    """Search, as in `ksmd_ctl.host.interface.Host.duplicate_ksm_pages`."""

    budget_cpu_seconds: float
    most_pages: int


@dataclass(slots=True)
class Round:
    """Duplicates that are un-merged together.

    :ivar frames: how many it is to free
    :ivar shared, sharing: pages_shared and pages_sharing before
    :ivar unmerged: pages that were un-merged
    :ivar left: pages that were not, by the cause in words
    :ivar brought: frames that were freed, None until that is known
    :ivar shared_after, sharing_after: pages_shared and pages_sharing at that time
    """

    frames: int
    pages: int
    shared: int
    sharing: int
    unmerged: int = 0
    left: Counter[str] = field(default_factory=Counter)
    brought: int | None = None
    shared_after: int | None = None
    sharing_after: int | None = None


_Action = SearchDuplicates | UnshareStep
_Came = DuplicateKsmPages | UnshareResult | KsmdError
# Yields an action, and is sent its result; or None, and goes on at the next sample.
_Steps = Generator[_Action | None, _Came | None, T]


def is_allowed(config: Config) -> bool:
    """Whether duplicates may be un-merged; otherwise they are only counted."""
    return config.heal_twins and config.policy.writes


class DuplicatesRecovery:
    """Searches and un-merges, as often as the CPU budget and the gain allow.

    `step` gives what is to be begun after a sample, `on_result` takes its result.

    :ivar looked: the latest search, without its parts
    :ivar unrealised: frames that duplicates take now, as far as that is known
    :ivar round: the latest one
    :ivar fruitless: how many rounds in a row gained next to nothing
    :ivar text: how the last round ended, or why nothing is done
    """

    def __init__(self, now: float, page_size_bytes: int) -> None:
        self._page_size_bytes = page_size_bytes
        self.phase = RecoveryPhase.IDLE
        self.looked: DuplicateKsmPages | None = None
        self.unrealised: int | None = None
        self.round: Round | None = None
        self.fruitless = 0
        self.looks = 0
        self.failures = 0
        self.rounds = 0
        self.unmerged_pages = 0
        self.healed_pages = 0
        self.text = ""
        # Earliest next search, and that under the CPU budget. At the start the host has other things to do.
        self._due = now + _FIRST_SECONDS
        self._paid = 0.0
        # How long to wait after a search without consequence.
        self._pause = 0.0
        self._budget_seconds = 0.0
        self._batch = TRIAL_PAGES
        # `spare_dups` of the sample before, and at the latest search.
        self._spare: int | None = None
        self._looked_spare: int | None = None
        self._under_way = False
        self._steps = self._recover()

    def step(self, sample: Sample, config: Config, busy: bool) -> _Action | None:
        """What is to be begun after another sample; nothing while an action is under way.

        :param busy: somebody else moves or un-merges pages now
        """
        self._sample, self._config, self._busy = sample, config, busy
        if self._under_way:
            return None
        action = next(self._steps)
        self._under_way = action is not None
        return action

    def on_result(self, came: _Came, config: Config, busy: bool) -> None:
        """Take in the result of the action that is under way."""
        self._config, self._busy = config, busy
        self._under_way = False
        self._steps.send(came)

    def section(self, now: float, config: Config, reasons: Mapping[str, int | None]) -> dict[str, object]:
        """What a report has of it (docs/json.md).

        :param reasons: pages that are not merged for other reasons than duplicates, where a figure is known
        """
        looked, last = self.looked, self.round
        return {
            "allowed": is_allowed(config),
            "phase": self.phase.value,
            "unrealised": {"twins": self.unrealised, **reasons},
            "left": {} if looked is None else dict(looked.left),
            "complete": None if looked is None else looked.complete,
            "looked_age_seconds": None if looked is None else max(0.0, now - looked.time_seconds),
            "looked_cpu_seconds": None if looked is None else looked.cpu_seconds,
            "looks": self.looks,
            "failures": self.failures,
            "rounds": self.rounds,
            "unmerged_pages": self.unmerged_pages,
            "healed_pages": self.healed_pages,
            "text": self.text,
            "last": None
            if last is None
            else {
                "frames": last.frames,
                "pages": last.pages,
                "unmerged": last.unmerged,
                "left": dict(last.left),
                "brought": last.brought,
                "pages_shared": {"before": last.shared, "after": last.shared_after},
                "pages_sharing": {"before": last.sharing, "after": last.sharing_after},
            },
        }

    def _recover(self) -> _Steps[None]:
        while True:
            search = self._next_search()
            if search is not None:
                self.phase = RecoveryPhase.LOOKING
                came = yield search
                assert isinstance(came, DuplicateKsmPages | KsmdError)
                parts = self._searched(came)
                if parts:
                    yield from self._unmerge(parts)
                self.phase = RecoveryPhase.IDLE
            yield None

    # -- searching -------------------------------------------------------------------------------------------

    def _next_search(self) -> SearchDuplicates | None:
        before, self._spare = self._spare, spare_dups(self._sample)
        if self._spare == 0:
            # No chain has two: no two KSM pages on one node have one content.
            self.unrealised = self._looked_spare = self.fruitless = 0
            self._pause = 0.0
            self._batch = TRIAL_PAGES
            return None
        if not self._wanted(before):
            return None
        budget = max(self._budget_seconds, self._config.census_interval * self._config.census_cpu_share)
        self._budget_seconds = min(budget, _MOST_BUDGET_SECONDS)
        return SearchDuplicates(self._budget_seconds, self._affordable())

    def _wanted(self, before: int | None) -> bool:
        spare, now = self._spare, self._sample.time_seconds
        if self._busy or not self._config.census_cpu_share or not suspicious(self._sample, spare):
            return False
        if spare is not None and before is not None and spare > before and now < self._due + _HOUR:
            # ksmd has just found some: more may follow.
            return False
        looked = self._looked_spare or 0
        news = spare is not None and spare - looked > max(0, looked) // _NEWS
        return now >= (self._paid if news and self.looks else self._due)

    def _affordable(self) -> int:
        """How many pages may be un-merged now."""
        sample, config = self._sample, self._config
        if not is_allowed(config) or sample.knob(Knob.RUN) != 1:
            return 0
        available = sample.number("mem_available_bytes")
        if available is None:
            return TRIAL_PAGES
        room = max(0.0, available - config.floor_bytes) * config.headroom_share
        return min(self._batch, int(room / self._page_size_bytes))

    def _searched(self, came: DuplicateKsmPages | KsmdError) -> tuple[UnsharePart, ...]:
        """Take a search in; what is to be un-merged."""
        config, now = self._config, self._sample.time_seconds
        if isinstance(came, Cancelled):
            self._due = now + config.census_interval
            return ()
        if isinstance(came, KsmdError):
            self.failures += 1
            self.text = str(came)
            self._pause = _longer(self._pause, config, _DAY)
            self._due = now + self._pause
            return ()
        self.looks += 1
        self.looked = replace(came, parts=())
        self.unrealised = came.reclaimable
        self._looked_spare = spare_dups(self._sample)
        self._paid = now + (came.cpu_seconds / config.census_cpu_share if config.census_cpu_share else 0.0)
        if not came.complete:
            self._budget_seconds = min(_GROWTH * self._budget_seconds, _MOST_BUDGET_SECONDS)
        if not came.parts or self._busy or not is_allowed(config):
            # Where something is lost, another search is worth it sooner.
            self._pause = _longer(self._pause, config, _HOUR if came.reclaimable else _DAY)
            self._due = max(self._paid, now + self._pause)
            return ()
        self.round = Round(came.part_frames, came.part_pages, *_merged(self._sample))
        return came.parts

    # -- a round ---------------------------------------------------------------------------------------------

    def _unmerge(self, parts: tuple[UnsharePart, ...]) -> _Steps[None]:
        assert self.round is not None
        self.phase = RecoveryPhase.UNMERGING
        due, done = self._sample.time_seconds, 0
        for step in _slices(parts, self._config, self._page_size_bytes):
            size = sum(end - start for part in step.request.parts for start, end in part.ranges)
            pages = size // self._page_size_bytes
            while True:
                if (yield from self._interrupted()):
                    return
                now = self._sample.time_seconds
                if now >= due:
                    done = 0
                # All mappings of a page have to be un-merged before ksmd scans twice: it would merge the first ones
                # again. So slices follow one another at once, up to `SLICE_PAGES`.
                if not done or done + pages <= SLICE_PAGES:
                    break
            done += pages
            due = now + done / PAGES_PER_SECOND
            came = yield step
            if isinstance(came, Cancelled | NoSuchProcess):
                continue
            if isinstance(came, KsmdError):
                self.failures += 1
                self.text = str(came)
                break
            assert isinstance(came, UnshareResult)
            self.round.unmerged += came.unshared
            self.round.left.update(came.left)
            self.unmerged_pages += came.unshared
        if not (yield from self._interrupted()):
            self.phase = RecoveryPhase.WAITING
            yield from self._wait(self.round)

    def _interrupted(self) -> _Steps[bool]:
        """Wait for the next sample; whether un-merging has to stop then."""
        yield None
        if is_allowed(self._config) and not self._busy:
            return False
        self.round = None
        self._due = max(self._paid, self._sample.time_seconds + self._config.census_interval)
        self.text = "interrupted: somebody else moves or un-merges pages" if self._busy else ""
        return True

    def _wait(self, last: Round) -> _Steps[None]:
        began: int | None = None
        while True:
            yield None
            scans = self._sample.number("full_scans")
            if scans is None or not last.unmerged:
                break
            began = int(scans) if began is None else began
            passed = int(scans) - began
            if passed < 0:
                # Everything was un-merged meanwhile: the gain can't be known.
                self.round = None
                self._due = self._sample.time_seconds
                return
            shared, _ = _merged(self._sample)
            if passed >= MOST_SCANS or (passed >= SCANS and shared <= last.shared - last.frames):
                break
        self._ended(last)

    def _ended(self, last: Round) -> None:
        last.shared_after, last.sharing_after = _merged(self._sample)
        # These counters also contain what else was merged or freed meanwhile.
        brought = min(last.frames, max(0, last.shared - last.shared_after)) if last.unmerged else 0
        last.brought = brought
        self.rounds += 1
        self.healed_pages += brought
        self.unrealised = None if self.unrealised is None else max(0, self.unrealised - brought)
        self.text = _told(last, self._sample, self.text if not last.unmerged else "")
        if 2 * brought >= last.frames:
            self.fruitless = 0
            self._batch = min(_GROWTH * self._batch, MOST_PAGES)
            self._pause = 0.0
            self._due = self._paid
            return
        self.fruitless += 1
        self._batch = TRIAL_PAGES
        self._pause = min(self._config.census_interval * 2 ** min(self.fruitless, 20), _DAY)
        # Duplicates that are new since then are no reason to try sooner.
        self._due = self._paid = max(self._paid, self._sample.time_seconds + self._pause)


def spare_dups(sample: Sample) -> int | None:
    """KSM pages in chains beyond the first of each; None where the kernel has no chains (before 4.13).

    Before 6.11 the kernel may leave a chain with one dup: that is no duplicate.
    """
    dups, chains = sample.number("stable_node_dups"), sample.number("stable_node_chains")
    return None if dups is None or chains is None else max(0, int(dups) - int(chains))


def unexplained(sample: Sample) -> int | None:
    """Those of them that max_page_sharing does not explain: of a chain's dups all but one would be full."""
    spare, limit = spare_dups(sample), sample.number(Knob.MAX_PAGE_SHARING)
    if spare is None or not limit:
        return spare
    return max(0, spare - sum(_merged(sample)) // int(limit))


def suspicious(sample: Sample, spare: int | None) -> bool:
    """Whether there may be duplicates, by the counters alone."""
    across = sample.knob(Knob.MERGE_ACROSS_NODES) != 0
    if spare is None:
        # Such a kernel drops the pages of a moved duplicate from its lists, and counts them as volatile.
        return not across and bool(sample.number("pages_volatile"))
    return bool(unexplained(sample)) if across else spare > 0


def _merged(sample: Sample) -> tuple[int, int]:
    return int(sample.number("pages_shared") or 0), int(sample.number("pages_sharing") or 0)


def _longer(pause: float, config: Config, most: float) -> float:
    return min(max(2 * pause, config.census_interval), max(most, config.census_interval))


def _slices(parts: tuple[UnsharePart, ...], config: Config, page_size_bytes: int) -> Iterator[UnshareStep]:
    """Steps of at most `SLICE_PAGES` pages in `SLICE_RANGES` ranges, of as many processes as fit."""
    size = SLICE_PAGES * page_size_bytes
    found: list[UnsharePart] = []
    room, count = size, 0
    for part in parts:
        ranges: list[tuple[int, int]] = []
        for first, end in part.ranges:
            start = first
            while start < end:
                if not room or count == SLICE_RANGES:
                    if ranges:
                        found.append(UnsharePart(part.process, tuple(ranges), part.to))
                    yield _slice(found, config)
                    found, ranges, room, count = [], [], size, 0
                stop = min(end, start + room)
                ranges.append((start, stop))
                room -= stop - start
                count += 1
                start = stop
        if ranges:
            found.append(UnsharePart(part.process, tuple(ranges), part.to))
    if found:
        yield _slice(found, config)


def _slice(parts: list[UnsharePart], config: Config) -> UnshareStep:
    return UnshareStep(
        Unshare(tuple(parts), config.batch_latency, config.floor_bytes, headroom_share=config.headroom_share)
    )


def _told(last: Round, sample: Sample, error: str) -> str:
    assert last.brought is not None
    said = f"un-merging {last.unmerged:,} pages brought {last.brought:,} of {last.frames:,} pages"
    if 2 * last.brought >= last.frames:
        return said
    if error:
        return f"{said}: {error}"
    if last.left:
        return f"{said}: {max(last.left, key=lambda cause: last.left[cause])}"
    if sample.knob(Knob.ADVISOR_MODE) == "scan-time":
        return f"{said}: the kernel's advisor decides how fast ksmd is"
    if sample.knob(Knob.SMART_SCAN) == 1:
        return f"{said}: smart_scan may skip them, or they were written to, or others were merged meanwhile"
    return f"{said}: they were written to, or others were merged meanwhile"
