# SPDX-License-Identifier: GPL-2.0-or-later
"""Recovery of duplicate KSM pages: when to search, how many to un-merge at once, what it gains (docs/healing.md).

The kernel never joins KSM pages of one content that were moved to one node (docs/findings.md: F1) or are left of full
ones. Where the smaller one is un-merged, those who map it get pages of their own, and ksmd merges these onto the other.
Until then each takes a frame. So it is done in rounds, the first one small. After each round, once ksmd has scanned
everything twice, the gain decides whether another one follows.

`Recovery` is an immutable value without clock and host; `ksmd_ctl.daemon.recovery` carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from ksmd_ctl.errors import Cancelled, KsmdError, NoSuchProcess
from ksmd_ctl.host.duplicates import DuplicateKsmPages
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.host.operation import Unshare, UnsharePart, UnshareResult
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.transactions.transaction import UnshareStep

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
class Circumstances:
    """Configuration, and what else happens on the host.

    :ivar allowed: duplicates may be un-merged; otherwise they are only counted
    :ivar busy: somebody else moves or un-merges pages now
    :ivar cpu_share: of one CPU, that searching may take; 0: never search
    """

    allowed: bool
    busy: bool
    interval_seconds: float
    cpu_share: float
    floor_bytes: int
    headroom_share: float
    latency_seconds: float
    page_size_bytes: int


@dataclass(frozen=True, slots=True)
class SearchDuplicates:
    """Search, as in `ksmd_ctl.host.interface.Host.duplicate_ksm_pages`."""

    budget_cpu_seconds: float
    most_pages: int


@dataclass(frozen=True, slots=True)
class Round:
    """Duplicates that are un-merged together.

    :ivar frames: how many it is to free
    :ivar shared, sharing: pages_shared and pages_sharing before
    :ivar unmerged: pages that were un-merged
    :ivar left: pages that were not, by the cause in words
    :ivar full_scans: at the time when the last page was un-merged; None until then
    :ivar brought: frames that were freed, None until that is known
    :ivar shared_after, sharing_after: pages_shared and pages_sharing at that time
    """

    frames: int
    pages: int
    shared: int
    sharing: int
    unmerged: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    full_scans: int | None = None
    brought: int | None = None
    shared_after: int | None = None
    sharing_after: int | None = None


@dataclass(frozen=True, slots=True)
class Recovery:
    """What is known, and what is under way.

    :ivar due: earliest next search
    :ivar paid: earliest next search under the CPU budget
    :ivar pause: how long to wait after a search without consequence
    :ivar looked: the latest search, without its parts; `looked_spare` is `spare_dups` at that time
    :ivar slice_due: earliest next slice; until then at most `SLICE_PAGES` pages, of which `slice_pages` are done
    :ivar unrealised: frames that duplicates take now, as far as that is known
    :ivar fruitless: how many rounds in a row gained next to nothing
    :ivar text: how the last round ended, or why nothing is done
    """

    due: float
    phase: RecoveryPhase = RecoveryPhase.IDLE
    paid: float = 0.0
    pause: float = 0.0
    budget_seconds: float = 0.0
    looked: DuplicateKsmPages | None = None
    looked_spare: int | None = None
    spare: int | None = None
    unrealised: int | None = None
    batch: int = TRIAL_PAGES
    queue: tuple[UnshareStep, ...] = ()
    slice_due: float = 0.0
    slice_pages: int = 0
    running: bool = False
    round: Round | None = None
    fruitless: int = 0
    looks: int = 0
    failures: int = 0
    rounds: int = 0
    unmerged_pages: int = 0
    healed_pages: int = 0
    text: str = ""

    @classmethod
    def begin(cls, now: float) -> Recovery:
        """At the start of the service; the first search waits, as the host has other things to do."""
        return cls(due=now + _FIRST_SECONDS)

    # -- a tick ----------------------------------------------------------------------------------------------

    def step(self, sample: Sample, around: Circumstances) -> tuple[Recovery, SearchDuplicates | UnshareStep | None]:
        """The recovery after another sample, and what is to be begun now."""
        spare = spare_dups(sample)
        match self.phase:
            case RecoveryPhase.LOOKING:
                return self, None
            case RecoveryPhase.UNMERGING:
                return self._next_slice(sample.time_seconds, around)
            case RecoveryPhase.WAITING:
                return self._watched(sample, around), None
        after = replace(self, spare=spare)
        if spare == 0:
            # No chain has two: no two KSM pages on one node have one content.
            return replace(after, unrealised=0, looked_spare=0, pause=0.0, fruitless=0, batch=TRIAL_PAGES), None
        if not self._wanted(sample, spare, around):
            return after, None
        budget = max(self.budget_seconds, around.interval_seconds * around.cpu_share)
        pages = self._affordable(sample, around)
        look = SearchDuplicates(min(budget, _MOST_BUDGET_SECONDS), pages)
        return replace(after, phase=RecoveryPhase.LOOKING, budget_seconds=look.budget_cpu_seconds), look

    def _wanted(self, sample: Sample, spare: int | None, around: Circumstances) -> bool:
        if around.busy or not around.cpu_share or not suspicious(sample, spare):
            return False
        now = sample.time_seconds
        if spare is not None and self.spare is not None and spare > self.spare and now < self.due + _HOUR:
            # ksmd has just found some: more may follow.
            return False
        news = spare is not None and spare - (self.looked_spare or 0) > max(0, self.looked_spare or 0) // _NEWS
        return now >= (self.paid if news and self.looks else self.due)

    def _affordable(self, sample: Sample, around: Circumstances) -> int:
        """How many pages may be un-merged now."""
        if not around.allowed or sample.knob(Knob.RUN) != 1:
            return 0
        available = sample.number("mem_available_bytes")
        if available is None:
            return TRIAL_PAGES
        room = max(0.0, available - around.floor_bytes) * around.headroom_share
        return min(self.batch, int(room / around.page_size_bytes))

    # -- searching -------------------------------------------------------------------------------------------

    def on_duplicates(self, came: DuplicateKsmPages | KsmdError, sample: Sample, around: Circumstances) -> Recovery:
        """The recovery after a search."""
        now = sample.time_seconds
        if isinstance(came, Cancelled):
            return replace(self, phase=RecoveryPhase.IDLE, due=now + around.interval_seconds)
        if isinstance(came, KsmdError):
            pause = _longer(self.pause, around, _DAY)
            return replace(
                self, phase=RecoveryPhase.IDLE, failures=self.failures + 1, pause=pause, due=now + pause, text=str(came)
            )
        paid = now + (came.cpu_seconds / around.cpu_share if around.cpu_share else 0.0)
        after = replace(
            self,
            phase=RecoveryPhase.IDLE,
            looks=self.looks + 1,
            paid=paid,
            looked=replace(came, parts=()),
            looked_spare=spare_dups(sample),
            unrealised=came.reclaimable,
            budget_seconds=self.budget_seconds
            if came.complete
            else min(_GROWTH * self.budget_seconds, _MOST_BUDGET_SECONDS),
        )
        shared, sharing = _merged(sample)
        if not came.parts or around.busy or not around.allowed:
            # Where something is lost, another search is worth it sooner.
            pause = _longer(self.pause, around, _HOUR if came.reclaimable else _DAY)
            return replace(after, pause=pause, due=max(paid, now + pause))
        return replace(
            after,
            phase=RecoveryPhase.UNMERGING,
            queue=tuple(_slices(came.parts, around)),
            slice_due=now,
            slice_pages=0,
            round=Round(came.part_frames, came.part_pages, shared, sharing),
        )

    # -- un-merging ------------------------------------------------------------------------------------------

    def _next_slice(self, now: float, around: Circumstances) -> tuple[Recovery, UnshareStep | None]:
        if self.running:
            return self, None
        if around.busy or not around.allowed:
            return replace(
                self,
                phase=RecoveryPhase.IDLE,
                queue=(),
                round=None,
                due=max(self.paid, now + around.interval_seconds),
                text="interrupted: somebody else moves or un-merges pages" if around.busy else "",
            ), None
        if not self.queue:
            return replace(self, phase=RecoveryPhase.WAITING), None
        step, *rest = self.queue
        pages = sum(end - start for part in step.request.parts for start, end in part.ranges) // around.page_size_bytes
        if now < self.slice_due:
            # All mappings of a page have to be un-merged before ksmd scans twice: it would merge the first ones again.
            pages += self.slice_pages
            if pages > SLICE_PAGES:
                return self, None
        due = now + pages / PAGES_PER_SECOND
        return replace(self, running=True, queue=tuple(rest), slice_pages=pages, slice_due=due), step

    def on_unshared(self, came: UnshareResult | KsmdError) -> Recovery:
        """The recovery after a slice."""
        assert self.round is not None
        if isinstance(came, Cancelled | NoSuchProcess):
            return replace(self, running=False)
        if isinstance(came, KsmdError):
            return replace(self, running=False, queue=(), failures=self.failures + 1, text=str(came))
        left = dict(self.round.left)
        for cause, pages in came.left.items():
            left[cause] = left.get(cause, 0) + pages
        return replace(
            self,
            running=False,
            round=replace(self.round, unmerged=self.round.unmerged + came.unshared, left=left),
            unmerged_pages=self.unmerged_pages + came.unshared,
        )

    # -- the gain --------------------------------------------------------------------------------------------

    def _watched(self, sample: Sample, around: Circumstances) -> Recovery:
        assert self.round is not None
        scans = sample.number("full_scans")
        if scans is None:
            return self._ended(sample, around)
        if self.round.full_scans is None:
            if not self.round.unmerged:
                return self._ended(sample, around)
            return replace(self, round=replace(self.round, full_scans=int(scans)))
        passed = int(scans) - self.round.full_scans
        if passed < 0:
            # Everything was un-merged meanwhile: the gain can't be known.
            return replace(self, phase=RecoveryPhase.IDLE, round=None, due=sample.time_seconds)
        shared, _ = _merged(sample)
        if passed >= MOST_SCANS or (passed >= SCANS and shared <= self.round.shared - self.round.frames):
            return self._ended(sample, around)
        return self

    def _ended(self, sample: Sample, around: Circumstances) -> Recovery:
        assert self.round is not None
        shared, sharing = _merged(sample)
        # These counters also contain what else was merged or freed meanwhile.
        brought = min(self.round.frames, max(0, self.round.shared - shared)) if self.round.unmerged else 0
        last = replace(self.round, brought=brought, shared_after=shared, sharing_after=sharing)
        after = replace(
            self,
            phase=RecoveryPhase.IDLE,
            round=last,
            rounds=self.rounds + 1,
            healed_pages=self.healed_pages + brought,
            unrealised=None if self.unrealised is None else max(0, self.unrealised - brought),
            text=_told(last, sample, self.text if not last.unmerged else ""),
        )
        if 2 * brought >= last.frames:
            batch = min(_GROWTH * self.batch, MOST_PAGES)
            return replace(after, fruitless=0, batch=batch, pause=0.0, due=self.paid)
        pause = min(around.interval_seconds * 2 ** min(self.fruitless + 1, 20), _DAY)
        due = max(self.paid, sample.time_seconds + pause)
        # Duplicates that are new since then are no reason to try sooner.
        return replace(after, fruitless=self.fruitless + 1, batch=TRIAL_PAGES, pause=pause, due=due, paid=due)


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


def _longer(pause: float, around: Circumstances, most: float) -> float:
    return min(max(2 * pause, around.interval_seconds), max(most, around.interval_seconds))


def _slices(parts: tuple[UnsharePart, ...], around: Circumstances) -> Iterator[UnshareStep]:
    """Steps of at most `SLICE_PAGES` pages in `SLICE_RANGES` ranges, of as many processes as fit."""
    size = SLICE_PAGES * around.page_size_bytes
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
                    yield _slice(found, around)
                    found, ranges, room, count = [], [], size, 0
                stop = min(end, start + room)
                ranges.append((start, stop))
                room -= stop - start
                count += 1
                start = stop
        if ranges:
            found.append(UnsharePart(part.process, tuple(ranges), part.to))
    if found:
        yield _slice(found, around)


def _slice(parts: list[UnsharePart], around: Circumstances) -> UnshareStep:
    return UnshareStep(
        Unshare(tuple(parts), around.latency_seconds, around.floor_bytes, headroom_share=around.headroom_share)
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


def recovery_section(
    state: Recovery, now: float, allowed: bool, reasons: Mapping[str, int | None] | None = None
) -> dict[str, object]:
    """What a report has of it (docs/json.md).

    :param reasons: pages that are not merged for other reasons than duplicates, where a figure is known
    """
    looked, last = state.looked, state.round
    return {
        "allowed": allowed,
        "phase": state.phase.value,
        "unrealised": {"twins": state.unrealised, **(reasons or {})},
        "left": {} if looked is None else dict(looked.left),
        "complete": None if looked is None else looked.complete,
        "looked_age_seconds": None if looked is None else max(0.0, now - looked.time_seconds),
        "looked_cpu_seconds": None if looked is None else looked.cpu_seconds,
        "looks": state.looks,
        "failures": state.failures,
        "rounds": state.rounds,
        "unmerged_pages": state.unmerged_pages,
        "healed_pages": state.healed_pages,
        "text": state.text,
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
