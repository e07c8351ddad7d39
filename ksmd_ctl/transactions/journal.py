# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal of transactions: the one that runs, on disk before each of its steps, and the results of others.

One file, replaced as a whole and synced, so after a crash it is as it was before a step or after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ksmd_ctl.codec import encode_fields
from ksmd_ctl.errors import HostError, NoSuchProcess
from ksmd_ctl.host.knobs import Knob, KnobValue, parse_wanted
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.statefiles import JournalFile
from ksmd_ctl.transactions.plan import ASSUMED_RATES, UnmergeRates, work_pages
from ksmd_ctl.transactions.transaction import FORGETTING, Phase, Result, TransactionState

# What is longer is neither written nor read: root reads it in a directory that the service's user owns.
_MOST_BYTES = 64 << 20
# Fewer pages say little about how quickly many are un-merged.
_TELLING_PAGES = 5000
# What took longer had to wait for something that the next one may not wait for.
_MOST_FIXED_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Contents:
    """The file. An older one has no rates.

    :ivar running: the transaction that has begun and isn't over; None for none
    :ivar last: the document of the last one that is over (docs/json.md)
    :ivar totals: how many came to which result
    :ivar unmerged_pages: pages that transactions have un-merged; `home_pages` brought home, `seconds` taken
    """

    running: TransactionState | None
    last: Mapping[str, object] | None
    totals: Mapping[Result, int]
    unmerged_pages: int
    home_pages: int
    seconds: float
    pages_per_second: float = ASSUMED_RATES.page_by_page
    run_2_pages_per_second: float = ASSUMED_RATES.run_2
    fixed_seconds: float = ASSUMED_RATES.fixed_seconds

    def counted(self, result: Result) -> _Contents:
        return replace(self, totals={**self.totals, result: self.totals.get(result, 0) + 1})


class TransactionJournal:
    """The journal of one host's transactions.

    :ivar contents: what the file has
    :ivar damaged: where a file is now that could not be understood, empty for none

    :param keep: leave a file that can't be understood where it is: for those who only look
    :raises Unreadable: the file is there and can't be read
    """

    def __init__(self, directory: Path, identity: HostIdentity, *, keep: bool = False) -> None:
        self.path = directory / f"transactions-{identity.kind}.json"
        self._file = JournalFile(self.path, _Contents, "the journal of transactions", _MOST_BYTES)
        self.contents = self._file.read(_checked, keep=keep) or _Contents(None, None, {}, 0, 0, 0.0)
        self.damaged = self._file.damaged

    @property
    def running(self) -> TransactionState | None:
        """The transaction that has begun and isn't over."""
        return self.contents.running

    @property
    def last(self) -> Mapping[str, object] | None:
        """The document of the last one that is over (docs/json.md)."""
        return self.contents.last

    @property
    def rates(self) -> UnmergeRates:
        """How quickly the last ones un-merged."""
        found = self.contents
        return UnmergeRates(found.pages_per_second, found.run_2_pages_per_second, found.fixed_seconds)

    def save(self, state: TransactionState) -> None:
        """Note where a transaction is; it is on disk afterwards.

        :raises HostError: it can't be written, and what was there before is
        """
        before = self.contents
        try:
            self._write(replace(before, running=state))
        except HostError:
            self.contents = before
            raise

    def close(self, state: TransactionState, page_size: int) -> None:
        """Note the result of a transaction.

        :raises HostError: it can't be written; it is known to this process all the same
        """
        found = self.contents if state.result is None else self.contents.counted(state.result)
        taken = 0.0 if state.result is Result.LOST else max(0.0, (state.ended or state.began) - state.began)
        rates = _measured(self.rates, state)
        self._write(
            replace(
                found,
                running=None,
                last=transaction_document(state, page_size),
                unmerged_pages=found.unmerged_pages
                + state.unshared_pages
                + (state.rest_pages if state.result is Result.DONE else 0),
                home_pages=found.home_pages + state.moved_pages,
                seconds=found.seconds + taken,
                pages_per_second=rates.page_by_page,
                run_2_pages_per_second=rates.run_2,
                fixed_seconds=rates.fixed_seconds,
            )
        )

    def refused(self) -> None:
        """Count one that was not begun. Not worth a failure where it can't be written."""
        with contextlib.suppress(HostError):
            self._write(self.contents.counted(Result.REFUSED))

    def _write(self, contents: _Contents) -> None:
        self.contents = contents
        # How busy memory was belongs to the moment.
        running = None if contents.running is None else replace(contents.running, pressure=None)
        self._file.write(replace(contents, running=running))


def _checked(document: _Contents) -> _Contents:
    """
    :raises ValueError: it has a figure that nothing can have
    """
    _need_amounts(document)
    if not (document.pages_per_second and document.run_2_pages_per_second and document.fixed_seconds):
        raise ValueError("a rate is 0")
    return document if document.running is None else replace(document, running=_checked_state(document.running))


def _need_amounts(holder: _Contents | TransactionState) -> None:
    for item in dataclasses.fields(holder):
        value = getattr(holder, item.name)
        for amount in value.values() if isinstance(value, Mapping) and item.name != "last" else (value,):
            if isinstance(amount, int | float) and not 0 <= amount < 1 << 63:
                raise ValueError(f"{item.name} is {value!r}")


def _measured(before: UnmergeRates, state: TransactionState) -> UnmergeRates:
    """Rates with what a transaction has shown; of a few pages it shows nothing."""
    if state.result is not Result.DONE or not state.unmerge or state.ended is None or state.recovered:
        return before
    found = before
    if state.unshared_pages >= _TELLING_PAGES and state.unshare_seconds > 0:
        work = work_pages(state.unshared_pages, state.calls, state.processes)
        found = replace(found, page_by_page=work / state.unshare_seconds)
    if state.rest_pages >= _TELLING_PAGES and state.run_2_seconds > 0:
        found = replace(found, run_2=state.rest_pages / state.run_2_seconds)
    rest = state.ended - state.began - state.unshare_seconds - state.run_2_seconds
    return replace(found, fixed_seconds=min(_MOST_FIXED_SECONDS, max(0.01, rest)))


def _checked_state(state: TransactionState) -> TransactionState:
    """A state with which a transaction can go on.

    Whoever can write this file must not be able to have anything else written than a knob can be.

    :raises ValueError: it is no such state
    """
    _need_amounts(state)
    if Knob.RUN not in state.before or any(write.knob not in state.before for write in state.writes):
        raise ValueError("what a knob was at is missing")
    _need_places(state)
    return replace(
        state,
        before=_values(state.before),
        run_after=int(parse_wanted(Knob.RUN, state.run_after)),
        writes=tuple(replace(write, value=parse_wanted(write.knob, write.value)) for write in state.writes),
        pace=_values(state.pace),
        hasten=None if state.hasten is None else int(parse_wanted(Knob.PAGES_TO_SCAN, state.hasten)),
    )


def _values(found: Mapping[Knob, KnobValue]) -> dict[Knob, KnobValue]:
    return {knob: parse_wanted(knob, value) for knob, value in found.items()}


def _need_places(state: TransactionState) -> None:
    if not (
        0 <= state.written <= len(state.writes)
        and (state.phase is not Phase.UNSHARE or 0 <= state.batch < len(state.batches))
        and (state.phase is not Phase.HOME or 0 <= state.move < len(state.moves))
        and (state.phase is not Phase.FORGET or 0 <= state.forget < len(FORGETTING))
        and (state.phase is not Phase.PACE or bool(state.pace))
        and (state.phase is not Phase.WRITE or state.written < len(state.writes))
        and (state.phase is not Phase.UNDO or state.written > 0)
        and (state.phase not in (Phase.HASTEN, Phase.SLOW) or state.hasten is not None)
    ):
        raise ValueError(f"there is no such step in the phase {state.phase}")


def transactions_section(journal: TransactionJournal, running: Mapping[str, object] | None) -> dict[str, object]:
    """What a report has of transactions (docs/json.md).

    :param running: the document of the one that is under way
    """
    found = journal.contents
    return {
        "running": running,
        "last": found.last,
        "totals": {result.value: found.totals.get(result, 0) for result in Result},
        "unmerged_pages": found.unmerged_pages,
        "home_pages": found.home_pages,
        "seconds": found.seconds,
    }


def process_document(state: TransactionState, boot_id: str, find: Callable[[int], ProcessId]) -> dict[str, object]:
    """Which process carries a transaction out, and whether it is still there, for those who only look (docs/json.md).

    :param find: gives the process that has a pid now
    """
    if state.carrier is None:
        return {"pid": None, "alive": False if state.boot_id != boot_id else None}
    pid = state.carrier.pid
    alive: bool | None
    try:
        alive = state.boot_id == boot_id and find(pid) == state.carrier
    except NoSuchProcess:
        # With hidepid others are hidden, and a signal tells that they are there (proc(5)).
        alive = None if _hidden(pid) else False
    return {"pid": pid, "alive": alive}


def _hidden(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True, slots=True)
class TransactionPages:
    """Pages of a transaction, each count None where it isn't known."""

    merged: int
    expected: int
    unshared: int | None
    rest: int | None
    moved: int | None
    remerged: int | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Batches:
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Share:
    """So many pages of others, and their ratio, None for none."""

    pages: int
    of: int
    ratio: float | None


@dataclass(frozen=True, slots=True)
class HomeShares:
    before: Share | None
    after: Share | None


@dataclass(frozen=True, slots=True)
class Gone:
    processes: int
    pages: int


@dataclass(frozen=True, slots=True)
class TransactionReport:
    """What a report has of a transaction (docs/json.md)."""

    id: str
    who: str
    phase: Phase
    result: Result | None
    reason: str
    recovered: str
    knobs: Mapping[Knob, Mapping[str, KnobValue | None]]
    run_after: int
    unmerge: bool
    began_seconds: float
    duration_seconds: float | None
    pages: TransactionPages
    batches: Batches
    home: HomeShares
    left: Mapping[str, int]
    gone: Gone
    oom_kills: Mapping[str, int]
    forced: tuple[str, ...]
    remerge_seconds: float | None


def transaction_document(state: TransactionState, page_size: int) -> dict[str, object]:
    """What the report says of a transaction (docs/json.md)."""

    def counted(name: str, pages: int) -> int | None:
        return None if name in state.uncounted else pages

    report = TransactionReport(
        id=state.id,
        who=state.who,
        phase=state.phase,
        result=state.result if state.phase is Phase.OVER else None,
        reason=state.reason,
        recovered=state.recovered,
        knobs={write.knob: {"from": state.before[write.knob], "to": write.value} for write in state.writes},
        run_after=state.run_after,
        unmerge=state.unmerge,
        began_seconds=state.began,
        duration_seconds=None if state.ended is None else state.ended - state.began,
        pages=TransactionPages(
            merged=state.merged_pages,
            expected=sum(batch.pages for batch in state.batches),
            unshared=counted("unshared", state.unshared_pages),
            rest=counted("rest", state.rest_pages),
            moved=counted("moved", state.moved_pages),
            remerged=state.remerged_pages,
            size_bytes=page_size,
        ),
        batches=Batches(state.batch, len(state.batches)),
        home=HomeShares(_share(state.home_before), _share(state.home_after)),
        left=state.left,
        gone=Gone(len(state.gone), state.gone_pages),
        oom_kills=state.killed,
        forced=tuple(state.forced),
        remerge_seconds=state.remerge_seconds,
    )
    return dict(encode_fields(report))


def _share(pages: tuple[int, int] | None) -> Share | None:
    return None if pages is None else Share(*pages, pages[0] / pages[1] if pages[1] else None)
