# SPDX-License-Identifier: GPL-2.0-or-later
"""A transaction as a state machine: `next_step` says what to do, `advance` what comes of it. Pure.

docs/transactions.md has the same for people:

    stop -> unshare ... -> check -> unmerge -> write ... -> look -> home ... -> report -> resume -> over

Without anything to un-merge it is ``write ... -> over``. From any of these it can be abandoned:

    undo ... -> hasten -> abandon -> remerge -> slow -> over

A state can be taken up again by another process at any step, for every step may be done twice.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from ksmd_ctl.control.plan import Batch, Belonging, Limits, Plan, at_home, away, remerge_seconds, room_text
from ksmd_ctl.control.reconcile import Write
from ksmd_ctl.errors import Cancelled, HostError, KsmdError, NoSuchProcess
from ksmd_ctl.host import Inventory, Move, MoveResult, Sample, Unshare, UnshareResult
from ksmd_ctl.knobs import RUN_OFFLINE, Knob, KnobValue

__all__ = [
    "LookStep",
    "MoveStep",
    "Pause",
    "Phase",
    "Put",
    "Result",
    "State",
    "Step",
    "UnshareStep",
    "abandoned",
    "advance",
    "begin",
    "next_step",
    "recovered",
]

#: How often the un-merge is repeated where something is merged again before the knob is written.
MAX_ATTEMPTS: Final = 5
#: For how many seconds pressure may stay high before it is abandoned.
MAX_PAUSES: Final = 60
#: How much faster ksmd scans for a while after something was abandoned.
HASTE: Final = 4
_MOST_PAGES_TO_SCAN: Final = 20_000
_REMERGE_SCANS: Final = 3
_LONGEST_REMERGE_SECONDS: Final = 120.0
_WRITE_SECONDS: Final = 30.0
# Whoever writes `run` waits for ksmd's batch, and a write that was given up may still take place: so it has more time
# than a batch takes where a page is as dear as can be (findings F18, doubled for a busy host).
_PAGE_SECONDS: Final = 15e-6
_BATCH_SECONDS: Final = 120.0
_MOVE_SECONDS: Final = 600.0


class Phase(StrEnum):
    """What a transaction is at. The journal holds it, so the words stay."""

    STOP = "stop"
    UNSHARE = "unshare"
    CHECK = "check"
    UNMERGE = "unmerge"
    WRITE = "write"
    LOOK = "look"
    HOME = "home"
    REPORT = "report"
    RESUME = "resume"
    UNDO = "undo"
    HASTEN = "hasten"
    ABANDON = "abandon"
    REMERGE = "remerge"
    SLOW = "slow"
    OVER = "over"


class Result(StrEnum):
    """What came of a transaction.

    - DONE: every knob is as it was asked for
    - ROLLED_BACK: every knob is as before, and nothing was un-merged
    - ABANDONED: every knob is as before, and ksmd merges again what was un-merged
    - DEGRADED: something could not be put back; the reason says what
    - LOST: the host was started anew meanwhile, with the kernel's own values
    - REFUSED: nothing was begun
    """

    DONE = "done"
    ROLLED_BACK = "rolled_back"
    ABANDONED = "abandoned"
    DEGRADED = "degraded"
    LOST = "lost"
    REFUSED = "refused"


_ABANDONING: Final = frozenset({Phase.UNDO, Phase.HASTEN, Phase.ABANDON, Phase.REMERGE, Phase.SLOW})
_PARKED_BY_OFFLINING: Final = frozenset(
    {Phase.STOP, Phase.UNMERGE, Phase.WRITE, Phase.RESUME, Phase.UNDO, Phase.ABANDON}
)


@dataclass(frozen=True, slots=True)
class Put:
    """Give a knob a value."""

    knob: Knob
    value: KnobValue
    deadline_seconds: float = _WRITE_SECONDS


@dataclass(frozen=True, slots=True)
class UnshareStep:
    request: Unshare
    deadline_seconds: float = _BATCH_SECONDS


@dataclass(frozen=True, slots=True)
class MoveStep:
    request: Move
    deadline_seconds: float = _MOVE_SECONDS


@dataclass(frozen=True, slots=True)
class LookStep:
    """Take an inventory."""

    floor_bytes: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Let time pass, then sample."""

    seconds: float
    why: str


Step = Put | UnshareStep | MoveStep | LookStep | Pause
Outcome = KnobValue | UnshareResult | MoveResult | Inventory | KsmdError | None


@dataclass(frozen=True, slots=True)
class State:
    """All that is known of a transaction; what the journal keeps.

    :ivar who: what asked for it, for the one who comes second
    :ivar before: what its knobs, and `run`, were at
    :ivar batch: the batch that is next; `written` and `move` likewise
    :ivar attempts: how often un-merging was begun anew
    :ivar unshared_pages: un-merged one batch after the other; `rest_pages` by the final run = 2
    :ivar home_before: pages at home, of pages that have one; `home_after` likewise
    :ivar left: pages that un-merging from outside, or moving, did not reach, by the cause
    :ivar hasten: pages_to_scan as it was, where it is raised
    :ivar until: when waiting for ksmd ends at the latest
    :ivar recovered: in which phase it was found by the one who took it up again
    :ivar pressure: the last sample's time and time spent waiting for memory, and the share of time since the one before
    """

    id: str
    who: str
    boot_id: str
    began: float
    phase: Phase
    before: Mapping[Knob, KnobValue]
    run_after: int
    writes: tuple[Write, ...]
    unmerge: bool
    homes: tuple[Belonging, ...] = ()
    batches: tuple[Batch, ...] = ()
    moves: tuple[Batch, ...] = ()
    batch: int = 0
    written: int = 0
    move: int = 0
    attempts: int = 0
    pauses: int = 0
    merged_pages: int = 0
    unshared_pages: int = 0
    unshare_seconds: float = 0.0
    rest_pages: int = 0
    moved_pages: int = 0
    home_before: tuple[int, int] | None = None
    home_after: tuple[int, int] | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    unmerge_seconds: float = _WRITE_SECONDS
    hasten: int | None = None
    hurried: bool = False
    scans: float = 0.0
    until: float = 0.0
    remerge_seconds: float | None = None
    result: Result | None = None
    reason: str = ""
    recovered: str = ""
    ended: float | None = None
    pressure: tuple[float, float, float] | None = None

    @property
    def run_before(self) -> int:
        return int(self.before[Knob.RUN])

    @property
    def untouched(self) -> bool:
        """Nothing was un-merged until now."""
        return not self.unmerge or (self.phase is Phase.STOP and not (self.batch or self.attempts))


def begin(plan: Plan, sample: Sample, id: str, who: str, boot_id: str) -> State:
    """The first state of a transaction that carries a plan out."""
    some = sample.number("pressure_some_seconds")
    # It may be so already.
    nothing = not (plan.unmerge or plan.writes)
    return State(
        id=id,
        who=who,
        boot_id=boot_id,
        began=sample.time_seconds,
        phase=Phase.OVER if nothing else Phase.STOP if plan.unmerge else Phase.WRITE,
        result=Result.DONE if nothing else None,
        ended=sample.time_seconds if nothing else None,
        before=dict(plan.found),
        run_after=plan.run_after,
        writes=plan.writes,
        unmerge=plan.unmerge,
        homes=plan.homes,
        batches=plan.batches,
        merged_pages=plan.merged_pages,
        home_before=plan.at_home if plan.unmerge else None,
        # What can't be un-merged from outside is done in one go, as slowly as findings F11 saw it at its worst.
        unmerge_seconds=_WRITE_SECONDS + 4 * plan.sparse_seconds + plan.merged_pages / 20_000,
        remerge_seconds=plan.remerge_seconds,
        pressure=None if some is None else (sample.time_seconds, float(some), 0.0),
    )


# -- what to do ----------------------------------------------------------------------------------------------


def next_step(state: State, sample: Sample, limits: Limits) -> Step | None:
    """The next step, None where it is over."""
    run = sample.knob(Knob.RUN)
    if state.phase in _PARKED_BY_OFFLINING and isinstance(run, int) and run & RUN_OFFLINE:
        return Pause(1.0, "memory is going offline")
    match state.phase:
        case Phase.STOP:
            return Put(Knob.RUN, 0, _WRITE_SECONDS + _PAGE_SECONDS * (sample.number(Knob.PAGES_TO_SCAN) or 0))
        case Phase.UNSHARE:
            if state.pressure is not None and state.pressure[2] > limits.max_pressure:
                return Pause(1.0, "tasks wait for memory")
            return _unshare(state.batches[state.batch], limits)
        case Phase.CHECK | Phase.LOOK | Phase.REPORT:
            return LookStep(limits.floor_bytes)
        case Phase.UNMERGE:
            return Put(Knob.RUN, 2, state.unmerge_seconds)
        case Phase.WRITE:
            write = state.writes[state.written]
            return Put(write.knob, write.value)
        case Phase.HOME:
            return _move(state.moves[state.move], limits)
        case Phase.RESUME:
            return Put(Knob.RUN, state.run_after)
        case Phase.UNDO:
            write = state.writes[state.written - 1]
            return Put(write.knob, state.before[write.knob])
        case Phase.HASTEN:
            assert state.hasten is not None
            return Put(Knob.PAGES_TO_SCAN, min(max(_MOST_PAGES_TO_SCAN, state.hasten), HASTE * state.hasten))
        case Phase.ABANDON:
            # Where everything had been un-merged before, 2 would un-merge once more, and 0 stops as well.
            return Put(Knob.RUN, 1 if state.run_before == 1 else 0)
        case Phase.REMERGE:
            return Pause(1.0, "ksmd merges again")
        case Phase.SLOW:
            assert state.hasten is not None
            return Put(Knob.PAGES_TO_SCAN, state.hasten)
        case Phase.OVER:
            return None


def _unshare(batch: Batch, limits: Limits) -> UnshareStep:
    request = Unshare(batch.process, batch.ranges, batch.to, limits.latency_seconds, limits.floor_bytes)
    return UnshareStep(request)


def _move(batch: Batch, limits: Limits) -> MoveStep:
    assert batch.to is not None
    return MoveStep(
        Move(
            batch.process,
            batch.to,
            batch.ranges,
            latency_seconds=limits.latency_seconds,
            floor_bytes=limits.floor_bytes,
        )
    )


# -- what comes of it ----------------------------------------------------------------------------------------


def advance(
    state: State, step: Step, outcome: Outcome, sample: Sample, limits: Limits, step_seconds: float = 0.0
) -> State:
    """The state after a step.

    :param outcome: what came of it: its result, or the error that it ended with
    :param sample: taken after it
    """
    state = replace(state, pressure=_pressure(state, sample))
    if isinstance(step, Pause):
        return _paused(state, step, sample)
    if isinstance(outcome, Cancelled) and state.phase not in _ABANDONING:
        return abandoned(state, sample, outcome.why or "cancelled")
    match state.phase:
        case Phase.STOP:
            if isinstance(outcome, KsmdError):
                return abandoned(state, sample, f"ksmd can't be stopped: {outcome.why}")
            return replace(state, phase=Phase.UNSHARE if state.batch < len(state.batches) else Phase.CHECK)
        case Phase.UNSHARE:
            return _unshared(state, outcome, sample, limits, step_seconds)
        case Phase.CHECK:
            return _checked(state, outcome, sample, limits)
        case Phase.UNMERGE:
            return _unmerged(state, outcome, sample)
        case Phase.WRITE:
            return _written(state, outcome, sample)
        case Phase.LOOK:
            if not isinstance(outcome, Inventory):
                return replace(_noted(state, "where pages are could not be seen"), phase=Phase.RESUME)
            moves = away(outcome, state.homes)
            if moves:
                return replace(state, moves=moves, move=0, phase=Phase.HOME)
            return replace(state, home_after=at_home(outcome, state.homes), phase=Phase.RESUME)
        case Phase.HOME:
            return _moved(state, outcome)
        case Phase.REPORT:
            after = at_home(outcome, state.homes) if isinstance(outcome, Inventory) else None
            return replace(state, home_after=after, phase=Phase.RESUME)
        case Phase.RESUME:
            if isinstance(outcome, KsmdError):
                reason = f"the knobs are written, and run = {state.run_after} is not: {outcome.why}"
                return _over(state, Result.DEGRADED, sample, reason)
            return _over(state, Result.DONE, sample)
        case _:
            return _abandoning(state, outcome, sample)


def _pressure(state: State, sample: Sample) -> tuple[float, float, float] | None:
    some = sample.number("pressure_some_seconds")
    if some is None:
        return None
    if state.pressure is None or sample.time_seconds <= state.pressure[0]:
        return sample.time_seconds, float(some), 0.0
    share = (some - state.pressure[1]) / (sample.time_seconds - state.pressure[0])
    return sample.time_seconds, float(some), max(0.0, share)


def _paused(state: State, step: Pause, sample: Sample) -> State:
    if state.phase is Phase.REMERGE:
        merged = (sample.number("pages_shared") or 0) + (sample.number("pages_sharing") or 0)
        scans = (sample.number("full_scans") or 0) - state.scans
        if merged >= state.merged_pages or scans >= _REMERGE_SCANS or sample.time_seconds >= state.until:
            return replace(state, phase=Phase.SLOW)
        return state
    state = replace(state, pauses=state.pauses + 1)
    if state.phase is Phase.UNSHARE and state.pauses > MAX_PAUSES:
        return abandoned(state, sample, f"{step.why}, for {MAX_PAUSES} s")
    return state


def _noted(state: State, cause: str, pages: int = 0) -> State:
    return replace(state, left={**state.left, cause: state.left.get(cause, 0) + pages})


def _unshared(state: State, outcome: Outcome, sample: Sample, limits: Limits, seconds: float) -> State:
    batch = state.batches[state.batch]
    following = state.batch + 1
    if isinstance(outcome, UnshareResult):
        state = replace(
            state,
            unshared_pages=state.unshared_pages + outcome.unshared,
            unshare_seconds=state.unshare_seconds + seconds,
        )
        for cause, pages in outcome.left.items():
            state = _noted(state, cause, pages)
        if not outcome.unshared and outcome.left:
            # Perhaps there is no room any more. A look at everything tells; what is left is for run = 2, if it fits.
            following = len(state.batches)
    elif isinstance(outcome, NoSuchProcess):
        # It ended, and there is nothing of it left to un-merge.
        pass
    elif isinstance(outcome, KsmdError):
        state = _noted(state, outcome.why, batch.pages)
    available = sample.number("mem_available_bytes")
    state = replace(state, batch=following, pauses=0)
    if available is not None and available < limits.floor_bytes:
        return abandoned(state, sample, f"only {available / (1 << 20):,.1f} MiB are available on the host")
    return state if following < len(state.batches) else replace(state, phase=Phase.CHECK)


def _checked(state: State, outcome: Outcome, sample: Sample, limits: Limits) -> State:
    if not isinstance(outcome, Inventory):
        why = outcome.why if isinstance(outcome, KsmdError) else "no inventory"
        return abandoned(state, sample, f"whether the rest fits can't be seen: {why}")
    over = [item for item in outcome.exposures if item.over_bytes]
    if over:
        rooms = "; ".join(room_text(item, limits.floor_bytes) for item in over[:4])
        return abandoned(state, sample, f"there is no room for the rest: {rooms}")
    # The counters follow only with ksmd, so what is left is counted in the page tables.
    rest = sum(item.merged_pages for stock in outcome.stocks for item in stock.ranges)
    return replace(state, phase=Phase.UNMERGE, rest_pages=rest)


def _unmerged(state: State, outcome: Outcome, sample: Sample) -> State:
    if not isinstance(outcome, KsmdError):
        if state.writes:
            return replace(state, phase=Phase.WRITE)
        return replace(state, phase=Phase.LOOK)
    # A signal leaves run at 0 and what was not reached merged (semantics 11.2).
    again = isinstance(outcome, HostError) and outcome.errno == errno.EINTR and state.attempts + 1 < MAX_ATTEMPTS
    if again:
        return replace(state, phase=Phase.STOP, attempts=state.attempts + 1)
    return abandoned(state, sample, f"run = 2 failed: {outcome.why}")


def _written(state: State, outcome: Outcome, sample: Sample) -> State:
    if not isinstance(outcome, KsmdError):
        written = state.written + 1
        if written < len(state.writes):
            return replace(state, written=written)
        if state.unmerge:
            return replace(state, written=written, phase=Phase.LOOK)
        return _over(replace(state, written=written), Result.DONE, sample)
    if isinstance(outcome, HostError) and outcome.errno == errno.EBUSY:
        # Merged again before the knob was written, or a process ended and left its items behind, which no counter
        # shows (semantics 11.4). Either way un-merging, checked like the first time, clears it.
        if state.attempts + 1 < MAX_ATTEMPTS:
            return replace(state, phase=Phase.STOP, attempts=state.attempts + 1, unmerge=True)
        often = f"{MAX_ATTEMPTS} times in a row: somebody else has ksmd merge meanwhile"
        return abandoned(state, sample, f"{state.writes[state.written].knob}: {outcome.why}, {often}")
    return abandoned(state, sample, f"{state.writes[state.written].knob}: {outcome.why}")


def _moved(state: State, outcome: Outcome) -> State:
    batch = state.moves[state.move]
    if isinstance(outcome, MoveResult):
        state = replace(state, moved_pages=state.moved_pages + outcome.moved)
        for cause, pages in outcome.left.items():
            state = _noted(state, cause, pages)
    elif isinstance(outcome, KsmdError) and not isinstance(outcome, NoSuchProcess):
        state = _noted(state, outcome.why, batch.pages)
    following = state.move + 1
    return replace(state, move=following, phase=Phase.HOME if following < len(state.moves) else Phase.REPORT)


# -- abandoning ----------------------------------------------------------------------------------------------


def abandoned(state: State, sample: Sample, reason: str, *, hurried: bool = False) -> State:
    """The state in which everything that can be put back is put back. Where all knobs are written, it is completed.

    :param hurried: there is no time to wait for ksmd
    """
    if state.phase is Phase.OVER:
        return state
    if state.phase in _ABANDONING:
        state = replace(state, hurried=state.hurried or hurried)
        return replace(state, phase=Phase.SLOW) if hurried and state.phase is Phase.REMERGE else state
    if state.unmerge and state.phase in (Phase.LOOK, Phase.HOME, Phase.REPORT, Phase.RESUME):
        # What it was for has been reached: only pages that are not at home are left where they are.
        return replace(state, phase=Phase.RESUME, reason=reason)
    untouched = state.untouched
    state = replace(state, reason=reason, hurried=state.hurried or hurried)
    if untouched:
        state = replace(state, result=Result.ROLLED_BACK)
    else:
        state = replace(state, result=Result.ABANDONED, remerge_seconds=_estimate(state, sample))
    return replace(state, phase=Phase.UNDO) if state.written else _hastened(state, sample)


def _estimate(state: State, sample: Sample) -> float | None:
    if state.run_before != 1:
        return None
    return state.remerge_seconds if state.remerge_seconds is not None else remerge_seconds(sample)


def _hastened(state: State, sample: Sample) -> State:
    if not state.unmerge:
        return _over(state, state.result or Result.ROLLED_BACK, sample, state.reason)
    pages = sample.number(Knob.PAGES_TO_SCAN)
    hasten = (
        state.result is Result.ABANDONED
        and state.run_before == 1
        and not state.hurried
        and sample.knob(Knob.ADVISOR_MODE) != "scan-time"
        and isinstance(pages, int)
        and 0 < pages < _MOST_PAGES_TO_SCAN
    )
    if hasten:
        assert isinstance(pages, int)
        return replace(state, hasten=state.hasten or pages, phase=Phase.HASTEN)
    return replace(state, phase=Phase.ABANDON)


def _abandoning(state: State, outcome: Outcome, sample: Sample) -> State:
    failed = outcome if isinstance(outcome, KsmdError) else None
    match state.phase:
        case Phase.UNDO:
            write = state.writes[state.written - 1]
            if failed is not None:
                reason = f"{state.reason}; {write.knob} stays at {write.value}: {failed.why}"
                state = replace(state, result=Result.DEGRADED, reason=reason)
            state = replace(state, written=state.written - 1)
            return state if state.written else _hastened(state, sample)
        case Phase.HASTEN:
            return replace(state, phase=Phase.ABANDON, hasten=None if failed else state.hasten)
        case Phase.ABANDON:
            if failed is not None:
                reason = f"{state.reason}; run can't be put back to {state.run_before}: {failed.why}"
                state = replace(state, result=Result.DEGRADED, reason=reason)
            if state.hasten is None:
                return _over(state, state.result or Result.ABANDONED, sample, state.reason)
            if state.hurried or failed is not None:
                return replace(state, phase=Phase.SLOW)
            wait = 30.0 if state.remerge_seconds is None else 1.5 * state.remerge_seconds
            return replace(
                state,
                phase=Phase.REMERGE,
                scans=float(sample.number("full_scans") or 0),
                until=sample.time_seconds + min(_LONGEST_REMERGE_SECONDS, max(5.0, wait)),
            )
        case _:
            if failed is not None:
                reason = f"{state.reason}; pages_to_scan can't be put back to {state.hasten}: {failed.why}"
                return _over(state, Result.DEGRADED, sample, reason)
            return _over(state, state.result or Result.ABANDONED, sample, state.reason)


def _over(state: State, result: Result, sample: Sample, reason: str = "") -> State:
    return replace(
        state,
        phase=Phase.OVER,
        result=result,
        reason=reason or state.reason,
        ended=max(state.began, sample.time_seconds),
    )


# -- taking it up again --------------------------------------------------------------------------------------


def recovered(state: State, sample: Sample, boot_id: str) -> State:
    """How a transaction goes on whose process ended in the middle: completed, abandoned or rolled back.

    :param sample: taken now
    """
    was = state.phase
    if was is Phase.OVER:
        return state
    state = replace(state, recovered=state.recovered or was.value, pressure=None)
    if state.boot_id != boot_id:
        # Another boot begins with the kernel's own values and nothing merged.
        return _over(
            replace(state, began=min(state.began, sample.time_seconds)),
            Result.LOST,
            sample,
            "the host was started anew",
        )
    why = f"its process ended in the phase {was}"
    match was:
        case Phase.STOP | Phase.UNSHARE | Phase.CHECK:
            return abandoned(state, sample, why)
        case Phase.UNMERGE:
            if not sample.number("pages_shared"):
                return replace(state, phase=Phase.WRITE if state.writes else Phase.LOOK)
            return abandoned(state, sample, why)
        case Phase.WRITE if not state.unmerge and not state.written:
            return _over(state, Result.ROLLED_BACK, sample, why) if _unwritten(state, sample) else state
        case _:
            return state


def _unwritten(state: State, sample: Sample) -> bool:
    write = state.writes[0]
    return sample.knob(write.knob) == state.before[write.knob]
