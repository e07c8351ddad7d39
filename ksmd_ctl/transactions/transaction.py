# SPDX-License-Identifier: GPL-2.0-or-later
"""A transaction as a state machine: `next_step` gives the next step, and `transitions` the state after it.

docs/transactions.md has the same for people:

    stop -> unshare ... -> check -> unmerge -> write ... -> look -> home ... -> report -> resume -> over

Where nothing is left and there is one stable tree, ``unshare -> forget ... -> pace ... -> write`` does without run = 2.
With one node ``look``, ``home`` and ``report`` are left out.
Without anything to un-merge it is ``write ... -> over``. From any of these it can be abandoned:

    undo ... or pace ... -> hasten -> abandon -> remerge -> slow -> over

A state can be taken up again by another process at any step, for every step may be done twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import RUN_OFFLINE, Knob, KnobValue
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.operation import Move, Operation, Unshare, UnsharePart, UnshareResult
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.knobs.reconcile import Write
from ksmd_ctl.transactions.plan import Batch, Belonging, Limits, Plan

#: How much faster ksmd scans for a while after something was abandoned.
HASTE: Final = 4
#: and never more pages at once than that.
MOST_PAGES_TO_SCAN: Final = 20_000
#: So long ksmd sleeps after it has looked at one page.
LONG_SLEEP_MILLISECS: Final = 3_600_000
#: What makes it look at one page and then stop, in this order; None: wait until it has.
FORGETTING: Final[tuple[tuple[Knob, int] | None, ...]] = (
    (Knob.SLEEP_MILLISECS, LONG_SLEEP_MILLISECS),
    (Knob.PAGES_TO_SCAN, 1),
    (Knob.RUN, 1),
    None,
    (Knob.RUN, 0),
)
_WRITE_SECONDS: Final = 30.0
# Before run = 2 the privileged part may look whether there is room.
_ROOM_SECONDS: Final = 60.0
# Whoever writes `run` waits for ksmd's batch, and a write that was given up may still take place: so it has more time
# than a batch takes where a page costs the most (findings F18, doubled for a busy host).
_PAGE_SECONDS: Final = 15e-6
# An un-merge step waits up to a minute for memory pressure, and a slow host un-merges at the least rate.
_UNSHARE_SECONDS: Final = 120.0
_LEAST_PAGES_PER_SECOND: Final = 5_000
# Of one step, so that the request for it fits into one packet (`ksmd_ctl.privileged.requests.MESSAGE_BYTES`).
_MOST_PARTS: Final = 256
_MOST_RANGES: Final = 2048
_MOVE_SECONDS: Final = 600.0


class Phase(StrEnum):
    """The phase of a transaction. The journal has these words, so they stay."""

    STOP = "stop"
    UNSHARE = "unshare"
    CHECK = "check"
    FORGET = "forget"
    PACE = "pace"
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
    """The result of a transaction.

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


_PARKED_BY_OFFLINING: Final = frozenset(
    {Phase.STOP, Phase.FORGET, Phase.UNMERGE, Phase.WRITE, Phase.RESUME, Phase.UNDO, Phase.ABANDON}
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
    deadline_seconds: float = _UNSHARE_SECONDS

    def begin(self, host: Host) -> Operation[UnshareResult]:
        """Begin it, also where it stands alone."""
        return host.unshare(self.request, self.deadline_seconds)


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


@dataclass(frozen=True, slots=True)
class TransactionState:
    """Everything that is known of a transaction, as the journal keeps it.

    :ivar who: what asked for it, for the one who comes second
    :ivar carrier: the process that carries it out; None where that is not known
    :ivar before: what its knobs, and `run`, were at
    :ivar batch: the batch that is next; `written`, `move` and `forget` (of `FORGETTING`) likewise
    :ivar at_once: the plan is to un-merge everything with run = 2, without page by page before
    :ivar one_tree: there is one stable tree, so that a look at one page empties it
    :ivar nodes: how many nodes with memory there are; 0 where that is not known
    :ivar forced: places that have too little room for it by the plan, and it was to be done all the same
    :ivar searched: one look at one page was tried already, and something is merged all the same
    :ivar pace: the earlier values of the knobs that were changed so that ksmd scans one page only
    :ivar attempts: how often un-merging was begun anew
    :ivar failures: how often the step that it is at has failed
    :ivar unshared_pages: un-merged page by page, in `unshare_seconds`; `rest_pages` by run = 2, in `run_2_seconds`
    :ivar calls: into how many calls un-merging page by page was divided by what lies between
    :ivar processes: how many had merged pages
    :ivar uncounted: which of these figures, by their names in JSON, are too low, for a step was broken off that had
        begun and has not said how far it came
    :ivar home_before: pages at home, of pages that have one; `home_after` likewise
    :ivar left: pages that un-merging from outside, or moving, did not reach, by the cause
    :ivar gone: processes that ended, or replaced their memory, before their pages were un-merged or moved
    :ivar gone_pages: how many pages these had of what was to be un-merged
    :ivar cgroups: the memory cgroups with a limit above the processes
    :ivar oom_kills: processes that the OOM killer had killed before it began, by place; `killed` meanwhile
    :ivar hasten: pages_to_scan as it was, where it is raised
    :ivar until: when waiting for ksmd ends at the latest
    :ivar remerged_pages: how many were merged when that ended; None where ksmd had not passed everything by then
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
    at_once: bool = False
    one_tree: bool = False
    nodes: int = 0
    forced: tuple[str, ...] = ()
    searched: bool = False
    forget: int = 0
    pace: Mapping[Knob, KnobValue] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0
    pauses: int = 0
    merged_pages: int = 0
    calls: int = 0
    processes: int = 0
    unshared_pages: int = 0
    unshare_seconds: float = 0.0
    run_2_seconds: float = 0.0
    rest_pages: int = 0
    moved_pages: int = 0
    uncounted: tuple[str, ...] = ()
    carrier: ProcessId | None = None
    home_before: tuple[int, int] | None = None
    home_after: tuple[int, int] | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    gone: tuple[ProcessId, ...] = ()
    gone_pages: int = 0
    cgroups: tuple[str, ...] = ()
    oom_kills: Mapping[str, int] = field(default_factory=dict)
    killed: Mapping[str, int] = field(default_factory=dict)
    unmerge_seconds: float = _WRITE_SECONDS
    hasten: int | None = None
    hurried: bool = False
    scans: float = 0.0
    until: float = 0.0
    remerge_seconds: float | None = None
    remerged_pages: int | None = None
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


def begin(
    plan: Plan,
    sample: Sample,
    id: str,
    who: str,
    boot_id: str,
    forced: tuple[str, ...] = (),
    oom_kills: Mapping[str, int] = MappingProxyType({}),
) -> TransactionState:
    """The first state of a transaction that carries a plan out.

    :param forced: places that have too little room, as phrases; it is done all the same
    :param oom_kills: processes that the OOM killer has killed by now, by place
    """
    some = sample.number("pressure_some_seconds")
    # It may be so already.
    nothing = not (plan.unmerge or plan.writes)
    return TransactionState(
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
        at_once=plan.at_once,
        one_tree=plan.one_tree,
        nodes=plan.nodes,
        forced=forced,
        cgroups=plan.cgroups,
        oom_kills=dict(oom_kills),
        merged_pages=plan.merged_pages,
        calls=plan.calls,
        processes=plan.processes,
        home_before=plan.at_home if plan.unmerge else None,
        # What can't be un-merged from outside is done in one go, as slowly as findings F11 saw it at its worst.
        unmerge_seconds=_WRITE_SECONDS + _ROOM_SECONDS + 4 * plan.sparse_seconds + plan.merged_pages / 20_000,
        remerge_seconds=plan.remerge_seconds,
        pressure=None if some is None else (sample.time_seconds, float(some), 0.0),
    )


# -- what to do ----------------------------------------------------------------------------------------------


def next_step(state: TransactionState, sample: Sample, limits: Limits) -> Step | None:
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
            return unshare_step(state.batches[state.batch :], limits)
        case Phase.CHECK | Phase.LOOK | Phase.REPORT:
            return LookStep(limits.floor_bytes)
        case Phase.FORGET:
            put = FORGETTING[state.forget]
            return Pause(0.02, "ksmd looks at one page") if put is None else Put(*put)
        case Phase.PACE:
            return Put(*next(iter(state.pace.items())))
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
            return Put(Knob.PAGES_TO_SCAN, min(max(MOST_PAGES_TO_SCAN, state.hasten), HASTE * state.hasten))
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


def unshare_step(batches: Sequence[Batch], limits: Limits) -> UnshareStep:
    """Un-merge the first of these batches: as many as fit into one request."""
    parts: list[UnsharePart] = []
    ranges = pages = 0
    for batch in batches[:_MOST_PARTS]:
        ranges += len(batch.ranges)
        if parts and ranges > _MOST_RANGES:
            break
        parts.append(UnsharePart(batch.process, batch.ranges, batch.to, batch.pages))
        pages += batch.pages
    request = Unshare(
        tuple(parts), limits.latency_seconds, limits.floor_bytes, limits.headroom_share, limits.max_pressure
    )
    return UnshareStep(request, unmerging_seconds(pages))


def unmerging_seconds(pages: int) -> float:
    """The deadline for un-merging so many pages."""
    return _UNSHARE_SECONDS + pages / _LEAST_PAGES_PER_SECOND


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
