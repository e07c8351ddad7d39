# SPDX-License-Identifier: GPL-2.0-or-later
"""The transitions of a transaction: its state after each step, when it is abandoned, and after its process ended."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from ksmd_ctl.errors import (
    Absent,
    Busy,
    Cancelled,
    Denied,
    HostError,
    KsmdError,
    NoSuchProcess,
    Refused,
    Rejected,
    Unmapped,
)
from ksmd_ctl.figures import bytes_text
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import Inventory, Losses, ProcessId
from ksmd_ctl.host.operation import MoveResult, UnshareResult
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.transactions.plan import Limits, at_home, away, remerge_seconds
from ksmd_ctl.transactions.transaction import (
    FORGETTING,
    MOST_PAGES_TO_SCAN,
    Pause,
    Phase,
    Put,
    Result,
    Step,
    TransactionState,
    UnshareStep,
)

#: How often the un-merge is repeated where something is merged again before the knob is written.
MAX_ATTEMPTS: Final = 5
#: For how many seconds pressure may stay high before it is abandoned.
MAX_PAUSES: Final = 60
# The first scan had begun before: pages that it had passed still count as they did then. So the second one is the first
# that has passed everything, and the third is another chance for pages that were skipped or written.
_WHOLE_SCANS: Final = 2
_REMERGE_SCANS: Final = 3
# In steps of 20 ms: a page takes it microseconds, but it has to get a CPU first.
_MAX_LOOKS: Final = 50
_LONGEST_REMERGE_SECONDS: Final = 120.0

# What only looks, has ksmd look, or puts something back is tried again: its process may have been killed.
_INSISTING: Final = frozenset(
    {
        Phase.CHECK,
        Phase.FORGET,
        Phase.PACE,
        Phase.LOOK,
        Phase.REPORT,
        Phase.RESUME,
        Phase.UNDO,
        Phase.ABANDON,
        Phase.SLOW,
    }
)
_MAX_FAILURES: Final = 3
_ABANDONING: Final = frozenset({Phase.PACE, Phase.UNDO, Phase.HASTEN, Phase.ABANDON, Phase.REMERGE, Phase.SLOW})

StepResult = KnobValue | UnshareResult | MoveResult | Inventory | KsmdError | None


def on_result(
    state: TransactionState, step: Step, outcome: StepResult, sample: Sample, limits: Limits, step_seconds: float = 0.0
) -> TransactionState:
    """The state after a step.

    :param outcome: its result or error
    :param sample: taken after it
    """
    state = replace(state, pressure=_pressure(state, sample))
    if isinstance(step, Pause):
        return _paused(state, step, sample)
    if isinstance(step, Put) and isinstance(outcome, KsmdError) and _took_place(step, sample):
        outcome = step.value
    if isinstance(outcome, Cancelled) and state.phase not in _ABANDONING:
        return abandoned(_uncounted(state), sample, outcome.why or "cancelled")
    if isinstance(outcome, KsmdError) and state.phase in _INSISTING and state.failures + 1 < _MAX_FAILURES:
        return replace(state, failures=state.failures + 1)
    state = replace(state, failures=0)
    if _broken_off(state, outcome):
        state = _uncounted(state)
    match state.phase:
        case Phase.STOP:
            if isinstance(outcome, KsmdError):
                return abandoned(state, sample, f"ksmd can't be stopped: {outcome.why}")
            if state.batch < len(state.batches):
                return replace(state, phase=Phase.UNSHARE)
            if state.at_once and not state.recovered and not state.attempts:
                # The plan has just seen more than enough room, and since ksmd is stopped nothing more is merged.
                return replace(state, rest_pages=state.merged_pages, phase=Phase.UNMERGE)
            return replace(state, phase=Phase.CHECK)
        case Phase.UNSHARE:
            assert isinstance(step, UnshareStep)
            return _unshared(state, step, outcome, sample, limits, step_seconds)
        case Phase.CHECK:
            return _checked(state, outcome, sample, limits)
        case Phase.FORGET:
            return _forgotten(state, outcome, sample)
        case Phase.PACE:
            return _paced(state, outcome, sample)
        case Phase.UNMERGE:
            return _unmerged(state, outcome, sample, step_seconds)
        case Phase.WRITE:
            return _written(state, outcome, sample)
        case Phase.LOOK:
            if not isinstance(outcome, Inventory):
                return replace(_noted(state, {"where pages are could not be seen": 0}), phase=Phase.RESUME)
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


def _took_place(step: Put, sample: Sample) -> bool:
    """Whether a write that failed has been done all the same: whoever did it may have been killed right after it.

    Not of run = 2, which reads so from its beginning.
    """
    run_2 = step.knob is Knob.RUN and step.value == 2
    return not run_2 and sample.knob(step.knob) == step.value


def _pressure(state: TransactionState, sample: Sample) -> tuple[float, float, float] | None:
    some = sample.number("pressure_some_seconds")
    if some is None:
        return None
    if state.pressure is None or sample.time_seconds <= state.pressure[0]:
        return sample.time_seconds, float(some), 0.0
    share = (some - state.pressure[1]) / (sample.time_seconds - state.pressure[0])
    return sample.time_seconds, float(some), max(0.0, share)


def _paused(state: TransactionState, step: Pause, sample: Sample) -> TransactionState:
    if state.phase is Phase.REMERGE:
        return _merging_again(state, sample)
    state = replace(state, pauses=state.pauses + 1)
    if state.phase is Phase.FORGET:
        over = not sample.number("pages_shared") or state.pauses >= _MAX_LOOKS
        return replace(state, forget=state.forget + 1, pauses=0) if over else state
    if state.phase is Phase.UNSHARE and state.pauses > MAX_PAUSES:
        return abandoned(state, sample, f"{step.why}, for {MAX_PAUSES} s")
    return state


def _merging_again(state: TransactionState, sample: Sample) -> TransactionState:
    """Whether ksmd has merged everything again.

    What was un-merged page by page counts as merged until ksmd passes it (mm/ksm.c:remove_rmap_item_from_tree), so
    the counters say nothing before it has passed everything.
    """
    scans = (sample.number("full_scans") or 0) - state.scans
    merged = int((sample.number("pages_shared") or 0) + (sample.number("pages_sharing") or 0))
    known = scans >= _WHOLE_SCANS
    complete = known and merged >= state.merged_pages
    if not complete and scans < _REMERGE_SCANS and sample.time_seconds < state.until:
        return state
    if not known:
        return replace(state, phase=Phase.SLOW)
    # For what does not merge at once, no time can be told.
    return replace(state, phase=Phase.SLOW, remerged_pages=merged, remerge_seconds=0.0 if complete else None)


# What a step counts of pages, by the name in JSON.
_COUNTING: Final = {Phase.UNSHARE: "unshared", Phase.UNMERGE: "rest", Phase.HOME: "moved"}


def _broken_off(state: TransactionState, outcome: StepResult) -> bool:
    """Whether a step that counts pages has done an unknown part of them."""
    if not isinstance(outcome, KsmdError) or isinstance(outcome, Refused | Absent | Denied | NoSuchProcess):
        return False
    # run = 2 that the kernel ends with an error has begun; the others find the error before they begin.
    return state.phase is Phase.UNMERGE or not isinstance(outcome, Rejected)


def _uncounted(state: TransactionState) -> TransactionState:
    """A step was broken off: what it had done until then is not known."""
    name = _COUNTING.get(state.phase)
    return state if name is None or name in state.uncounted else replace(state, uncounted=(*state.uncounted, name))


def _noted(state: TransactionState, left: Mapping[str, int]) -> TransactionState:
    """More pages that were not reached, by the cause."""
    return replace(state, left={**state.left, **{cause: state.left.get(cause, 0) + left[cause] for cause in left}})


def _degraded(state: TransactionState, why: str) -> TransactionState:
    """Something can't be put back."""
    return replace(state, result=Result.DEGRADED, reason="; ".join(filter(None, (state.reason, why))))


def _gone(state: TransactionState, process: ProcessId, pages: int) -> TransactionState:
    known = state.gone if process in state.gone else (*state.gone, process)
    return replace(state, gone=known, gone_pages=state.gone_pages + pages)


def _unshared(
    state: TransactionState, step: UnshareStep, outcome: StepResult, sample: Sample, limits: Limits, seconds: float
) -> TransactionState:
    parts = step.request.parts
    following = state.batch + len(parts)
    if isinstance(outcome, UnshareResult):
        state = replace(
            state,
            unshared_pages=state.unshared_pages + outcome.unshared,
            unshare_seconds=state.unshare_seconds + seconds,
        )
        state = _noted(state, outcome.left)
        for part, one in zip(parts, outcome.parts, strict=False):
            if one.ended:
                state = _gone(state, part.process, max(0, part.pages - one.unshared - sum(one.left.values())))
        if outcome.stopped:
            return abandoned(replace(state, batch=state.batch + len(outcome.parts)), sample, outcome.stopped)
        if not outcome.unshared and outcome.left:
            # Perhaps there is no room any more. A look at everything tells; what is left is for run = 2, if it fits.
            following = len(state.batches)
    elif isinstance(outcome, NoSuchProcess | Unmapped):
        for part in parts:
            state = _gone(state, part.process, part.pages)
    elif isinstance(outcome, Absent | Denied | Rejected):
        # It can't be done from outside here: then run = 2 is the only way, if there is room for that.
        state = _noted(state, {outcome.why: sum(part.pages for part in parts)})
    elif isinstance(outcome, KsmdError):
        return abandoned(state, sample, f"un-merging failed: {outcome.why}")
    available = sample.number("mem_available_bytes")
    state = replace(state, batch=following, pauses=0)
    if available is not None and available < limits.floor_bytes:
        return abandoned(state, sample, f"only {bytes_text(available)} are available on the host")
    if following < len(state.batches):
        return state
    complete = not state.left and state.unshared_pages >= state.merged_pages
    pace = _pace(state, sample) if complete else {}
    return replace(state, phase=Phase.FORGET, forget=0, pace=pace) if pace else replace(state, phase=Phase.CHECK)


def _pace(state: TransactionState, sample: Sample) -> dict[Knob, KnobValue]:
    """What sets ksmd's pace, where a look at one page is a way to empty the stable tree; empty where it is none.

    With nothing left that is merged, run = 2 would only throw away what the stable tree has of it, and walk all
    address space for that (findings F11). One search in the tree throws it away as well (findings F21).
    """
    pages, sleep = sample.knob(Knob.PAGES_TO_SCAN), sample.knob(Knob.SLEEP_MILLISECS)
    advised = sample.knob(Knob.ADVISOR_MODE) == "scan-time"
    if state.attempts or state.searched or not state.one_tree or advised or pages is None or sleep is None:
        return {}
    return {Knob.PAGES_TO_SCAN: pages, Knob.SLEEP_MILLISECS: sleep}


def _checked(state: TransactionState, outcome: StepResult, sample: Sample, limits: Limits) -> TransactionState:
    if not isinstance(outcome, Inventory):
        why = outcome.why if isinstance(outcome, KsmdError) else "no inventory"
        return abandoned(state, sample, f"whether the rest fits can't be seen: {why}")
    over = [item for item in outcome.demands if item.over_bytes]
    # The counters follow only with ksmd, so what is left is counted in the page tables.
    rest = sum(item.merged_pages for memory in outcome.memories for item in memory.ranges)
    if over and (rest or outcome.skipped) and not state.forced:
        rooms = "; ".join(item.text(limits.floor_bytes) for item in over[:4])
        return abandoned(state, sample, f"there is no room for the rest: {rooms}")
    pace = {} if rest else _pace(state, sample)
    if pace:
        return replace(state, rest_pages=rest, phase=Phase.FORGET, forget=0, pauses=0, pace=pace)
    return replace(state, rest_pages=rest, phase=Phase.UNMERGE)


def _forgotten(state: TransactionState, outcome: StepResult, sample: Sample) -> TransactionState:
    if isinstance(outcome, KsmdError):
        return abandoned(state, sample, f"ksmd can't be made to look at one page: {outcome.why}")
    following = state.forget + 1
    return replace(state, forget=following, phase=Phase.FORGET if following < len(FORGETTING) else Phase.PACE)


def _paced(state: TransactionState, outcome: StepResult, sample: Sample) -> TransactionState:
    knob, value = next(iter(state.pace.items()))
    if isinstance(outcome, KsmdError):
        state = _degraded(state, f"{knob} can't be put back to {value}: {outcome.why}")
    state = replace(state, pace={other: was for other, was in state.pace.items() if other is not knob})
    if state.pace:
        return state
    if state.result is not None:
        return _hastened(state, sample)
    # Where the look has not helped, as when a page was merged meanwhile, run = 2 does, if there is room for that.
    return replace(state, searched=True, phase=Phase.CHECK if sample.number("pages_shared") else Phase.WRITE)


def _unmerged(state: TransactionState, outcome: StepResult, sample: Sample, seconds: float) -> TransactionState:
    if not isinstance(outcome, KsmdError):
        state = replace(state, run_2_seconds=state.run_2_seconds + seconds)
        return replace(state, phase=Phase.WRITE) if state.writes else _settled(state)
    # A signal leaves run at 0 and what was not reached merged (engine.md 11.2).
    again = isinstance(outcome, HostError) and outcome.errno == errno.EINTR and state.attempts + 1 < MAX_ATTEMPTS
    if again:
        return replace(state, phase=Phase.STOP, attempts=state.attempts + 1)
    if isinstance(outcome, Refused | Absent | Denied):
        # Nothing was done of it.
        state = replace(state, rest_pages=0)
    if isinstance(outcome, Refused) and not isinstance(outcome, Busy):
        # The privileged part has a floor of its own; below it only root itself goes (docs/security.md).
        only_root = "; a service that is not root can't go below that limit: stop it and run the command as root"
        return abandoned(state, sample, f"run = 2 was refused: {outcome.why}{only_root if state.forced else ''}")
    return abandoned(state, sample, f"run = 2 failed: {outcome.why}")


def _written(state: TransactionState, outcome: StepResult, sample: Sample) -> TransactionState:
    if not isinstance(outcome, KsmdError):
        written = state.written + 1
        if written < len(state.writes):
            return replace(state, written=written)
        state = replace(state, written=written)
        return _settled(state) if state.unmerge else _over(state, Result.DONE, sample)
    if isinstance(outcome, HostError) and outcome.errno == errno.EBUSY:
        # Merged again before the knob was written, or a process ended and left its items behind, which no counter
        # shows (engine.md 11.4). Either way un-merging, checked like the first time, clears it.
        if state.attempts + 1 < MAX_ATTEMPTS:
            return replace(state, phase=Phase.STOP, attempts=state.attempts + 1, unmerge=True)
        often = f"{MAX_ATTEMPTS} times in a row: another program restarted merging each time"
        return abandoned(state, sample, f"{state.writes[state.written].knob}: {outcome.why}, {often}")
    return abandoned(state, sample, f"{state.writes[state.written].knob}: {outcome.why}")


def _settled(state: TransactionState) -> TransactionState:
    """Everything is un-merged and written: with more than one node, look where pages are."""
    if state.nodes == 1:
        return replace(state, home_after=state.home_before, phase=Phase.RESUME)
    return replace(state, phase=Phase.LOOK)


def _moved(state: TransactionState, outcome: StepResult) -> TransactionState:
    batch = state.moves[state.move]
    if isinstance(outcome, MoveResult):
        state = _noted(replace(state, moved_pages=state.moved_pages + outcome.moved), outcome.left)
    elif isinstance(outcome, NoSuchProcess | Unmapped):
        state = _gone(state, batch.process, 0)
    elif isinstance(outcome, KsmdError):
        state = _noted(state, {outcome.why: batch.pages})
    following = state.move + 1
    return replace(state, move=following, phase=Phase.HOME if following < len(state.moves) else Phase.REPORT)


# -- abandoning ----------------------------------------------------------------------------------------------


def abandoned(state: TransactionState, sample: Sample, reason: str, *, hurried: bool = False) -> TransactionState:
    """The state in which everything that can be put back is put back. Where all knobs are written, it is completed.

    :param hurried: there is no time to wait for ksmd
    """
    if state.phase is Phase.OVER:
        return state
    if state.phase in _ABANDONING and (state.phase is not Phase.PACE or state.result is not None):
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
        known = state.remerge_seconds
        seconds = None if state.run_before != 1 else remerge_seconds(sample) if known is None else known
        state = replace(state, result=Result.ABANDONED, remerge_seconds=seconds)
    if state.pace:
        return replace(state, phase=Phase.PACE)
    return replace(state, phase=Phase.UNDO) if state.written else _hastened(state, sample)


def _hastened(state: TransactionState, sample: Sample) -> TransactionState:
    if not state.unmerge:
        return _over(state, state.result or Result.ROLLED_BACK, sample)
    pages = sample.number(Knob.PAGES_TO_SCAN)
    hasten = (
        state.result is Result.ABANDONED
        and state.run_before == 1
        and not state.hurried
        and sample.knob(Knob.ADVISOR_MODE) != "scan-time"
        and isinstance(pages, int)
        and 0 < pages < MOST_PAGES_TO_SCAN
    )
    if hasten:
        assert isinstance(pages, int)
        return replace(state, hasten=state.hasten or pages, phase=Phase.HASTEN)
    return replace(state, phase=Phase.ABANDON)


def _abandoning(state: TransactionState, outcome: StepResult, sample: Sample) -> TransactionState:
    failed = outcome if isinstance(outcome, KsmdError) else None
    match state.phase:
        case Phase.UNDO:
            write = state.writes[state.written - 1]
            if failed is not None:
                state = _degraded(state, f"{write.knob} stays at {write.value}: {failed.why}")
            state = replace(state, written=state.written - 1)
            return state if state.written else _hastened(state, sample)
        case Phase.HASTEN:
            return replace(state, phase=Phase.ABANDON, hasten=None if failed else state.hasten)
        case Phase.ABANDON:
            if failed is not None:
                state = _degraded(state, f"run can't be put back to {state.run_before}: {failed.why}")
            if state.hasten is None:
                return _over(state, state.result or Result.ABANDONED, sample)
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
                state = _degraded(state, f"pages_to_scan can't be put back to {state.hasten}: {failed.why}")
            return _over(state, state.result or Result.ABANDONED, sample)


def _over(state: TransactionState, result: Result, sample: Sample, reason: str = "") -> TransactionState:
    return replace(
        state,
        phase=Phase.OVER,
        result=result,
        reason=reason or state.reason,
        ended=max(state.began, sample.time_seconds),
    )


# -- taking it up again --------------------------------------------------------------------------------------


def recovered(state: TransactionState, sample: Sample, boot_id: str) -> TransactionState:
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
    if was is not Phase.UNMERGE or sample.number("pages_shared"):
        # Else run = 2 had come to its end, and everything that was left is un-merged.
        state = _uncounted(state)
    match was:
        case Phase.STOP | Phase.UNSHARE | Phase.CHECK:
            return abandoned(state, sample, why)
        case Phase.FORGET | Phase.PACE if state.result is None:
            return abandoned(state, sample, why)
        case Phase.UNMERGE:
            if not sample.number("pages_shared"):
                return replace(state, phase=Phase.WRITE if state.writes else Phase.LOOK)
            return abandoned(state, sample, why)
        case Phase.WRITE if not state.unmerge and not state.written:
            write = state.writes[0]
            unwritten = sample.knob(write.knob) == state.before[write.knob]
            return _over(state, Result.ROLLED_BACK, sample, why) if unwritten else state
        case _:
            return state


def planned_processes(state: TransactionState) -> tuple[ProcessId, ...]:
    """The processes whose memory a transaction is about."""
    homes, batches = (item.process for item in state.homes), (item.process for item in state.batches)
    return tuple(dict.fromkeys((*homes, *batches)))


def counted(state: TransactionState, after: Losses) -> TransactionState:
    """A transaction that is over, with what was killed since it began and who of its processes is gone."""
    kills = {
        where: after.oom_kills[where] - before
        for where, before in state.oom_kills.items()
        if after.oom_kills.get(where, 0) > before
    }
    home_after = state.home_after
    if home_after is not None and state.nodes == 1:
        # On one node nobody has looked where pages are.
        lost = sum(item.pages for item in state.homes if item.process in after.gone)
        home_after = max(0, home_after[0] - lost), max(0, home_after[1] - lost)
    gone = tuple(dict.fromkeys((*state.gone, *after.gone)))
    return replace(state, killed=kills, gone=gone, home_after=home_after)
