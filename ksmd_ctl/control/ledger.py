# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal of transactions: the one that runs, as it is on disk before each of its steps, and what came of others.

One file, replaced as a whole and synced, so after a crash it is as it was before a step or after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksmd_ctl.control.files import MALFORMED, parse_json, put_aside, read_file, replace_file
from ksmd_ctl.control.lock import make_directory
from ksmd_ctl.control.plan import ASSUMED_RATES, CALL_PAGES, Batch, Belonging, Rates
from ksmd_ctl.control.reconcile import Write
from ksmd_ctl.control.transaction import FORGETTING, Phase, Result, State
from ksmd_ctl.errors import Denied, HostError, NoSuchProcess, errno_text
from ksmd_ctl.host.memory import ProcessId
from ksmd_ctl.host.sample import HostIdentity
from ksmd_ctl.knobs import Knob, parse_wanted

__all__ = ["Ledger", "carrier_document", "ledger_section", "transaction_document"]

_FORMAT = 1
# What is longer is neither written nor read: root reads it in a directory that the service's user owns.
_MOST_BYTES = 64 << 20
# Fewer pages say little about how quickly many are un-merged.
_TELLING_PAGES = 5000
# What took longer had to wait for something that the next one may not wait for.
_MOST_FIXED_SECONDS = 10.0


class Ledger:
    """The journal of one host's transactions.

    :ivar running: the transaction that has begun and isn't over; None for none
    :ivar last: the document of the last one that is over (docs/json.md)
    :ivar totals: how many came to which result
    :ivar unmerged_pages: pages that transactions have un-merged; `home_pages` brought home, `seconds` taken
    :ivar rates: how quickly the last ones un-merged
    :ivar damaged: where a file is now that could not be understood, empty for none

    :param keep: leave a file that can't be understood where it is: for those who only look
    :raises Unreadable: the file is there and can't be read
    """

    def __init__(self, directory: Path, identity: HostIdentity, *, keep: bool = False) -> None:
        self.path = directory / f"transactions-{identity.kind}.json"
        self.running: State | None = None
        self.last: Mapping[str, object] | None = None
        self.totals: Counter[Result] = Counter()
        self.unmerged_pages = 0
        self.home_pages = 0
        self.seconds = 0.0
        self.rates = ASSUMED_RATES
        self.damaged = ""
        try:
            text = read_file(self.path, "reading the journal of transactions", _MOST_BYTES)
            if text is not None:
                self._take(parse_json(text))
        except MALFORMED:
            self.damaged = str(self.path) if keep else put_aside(self.path)
            self.running = self.last = None

    def save(self, state: State) -> None:
        """Note where a transaction is; it is on disk afterwards.

        :raises HostError: it can't be written, and what was there before is
        """
        before, self.running = self.running, state
        try:
            self._write()
        except HostError:
            self.running = before
            raise

    def close(self, state: State, page_size: int) -> None:
        """Note what came of a transaction.

        :raises HostError: it can't be written; it is known to this process all the same
        """
        self.running = None
        self.last = transaction_document(state, page_size)
        if state.result is not None:
            self.totals[state.result] += 1
        self.unmerged_pages += state.unshared_pages + (state.rest_pages if state.result is Result.DONE else 0)
        self.home_pages += state.moved_pages
        if state.result is not Result.LOST:
            self.seconds += max(0.0, (state.ended or state.began) - state.began)
        self.rates = _measured(self.rates, state)
        self._write()

    def refused(self) -> None:
        """Count one that was not begun. Not worth a failure where it can't be written."""
        self.totals[Result.REFUSED] += 1
        with contextlib.suppress(HostError):
            self._write()

    def _write(self) -> None:
        document = {
            "format": _FORMAT,
            "running": None if self.running is None else _encoded(self.running),
            "last": self.last,
            "totals": {result.value: count for result, count in self.totals.items()},
            "unmerged_pages": self.unmerged_pages,
            "home_pages": self.home_pages,
            "seconds": self.seconds,
            "pages_per_second": self.rates.page_by_page,
            "run_2_pages_per_second": self.rates.run_2,
            "fixed_seconds": self.rates.fixed_seconds,
        }
        what, hint = "keeping the journal of transactions", "nothing is changed before that is on disk"
        content = json.dumps(document).encode()
        if len(content) > _MOST_BYTES:
            why = f"{self.path}: it would be longer than {_MOST_BYTES} bytes"
            raise HostError(what, why, hint=hint, path=str(self.path))
        try:
            make_directory(self.path.parent)
            replace_file(self.path, content)
        except OSError as error:
            why = f"{self.path}: {errno_text(error.errno or 0)}"
            kind = Denied if isinstance(error, PermissionError) else HostError
            raise kind(what, why, hint=hint, path=str(self.path), errno=error.errno) from error

    def _take(self, document: dict[str, Any]) -> None:
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r} is unknown")
        self.running = None if document["running"] is None else _state(document["running"])
        last = document["last"]
        if last is not None and not isinstance(last, dict):
            raise ValueError("last is no object")
        self.last = last
        self.totals = Counter({Result(name): _whole(count) for name, count in document["totals"].items()})
        self.unmerged_pages = _whole(document["unmerged_pages"])
        self.home_pages = _whole(document["home_pages"])
        self.seconds = _amount(document["seconds"])
        self.rates = Rates(
            _rate(document.get("pages_per_second"), ASSUMED_RATES.page_by_page),
            _rate(document.get("run_2_pages_per_second"), ASSUMED_RATES.run_2),
            _rate(document.get("fixed_seconds"), ASSUMED_RATES.fixed_seconds),
        )


def _rate(value: object, assumed: float) -> float:
    """What was measured; what is assumed where nothing was.

    :raises ValueError: it is no such figure
    """
    if value is None:
        return assumed
    if not (rate := _amount(value)):
        raise ValueError(f"{value!r} is not a rate")
    return rate


def _measured(before: Rates, state: State) -> Rates:
    """Rates with what a transaction has shown; of a few pages it shows nothing."""
    if state.result is not Result.DONE or not state.unmerge or state.ended is None or state.recovered:
        return before
    found = before
    if state.unshared_pages >= _TELLING_PAGES and state.unshare_seconds > 0:
        found = replace(found, page_by_page=(state.unshared_pages + CALL_PAGES * state.calls) / state.unshare_seconds)
    if state.rest_pages >= _TELLING_PAGES and state.run_2_seconds > 0:
        found = replace(found, run_2=state.rest_pages / state.run_2_seconds)
    rest = state.ended - state.began - state.unshare_seconds - state.run_2_seconds
    return replace(found, fixed_seconds=min(_MOST_FIXED_SECONDS, max(0.01, rest)))


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _amount(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not an amount")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _or_none(check: Callable[[object], object]) -> Callable[[object], object]:
    return lambda value: None if value is None else check(value)


# How the fields of a state are checked that are of one of Python's own types.
_PLAIN: dict[str, Callable[[object], object]] = {
    "int": _whole,
    "float": _amount,
    "str": _text,
    "bool": _flag,
    "int | None": _or_none(_whole),
    "float | None": _or_none(_amount),
}


def _encoded(state: State) -> dict[str, Any]:
    document = dataclasses.asdict(state)
    # How busy memory was belongs to the moment.
    del document["pressure"]
    return document


def _state(document: dict[str, Any]) -> State:
    """The state that a document holds.

    :raises ValueError: or another error of a wrong form
    """
    known = {field.name for field in dataclasses.fields(State)}
    if unknown := document.keys() - known:
        raise ValueError(f"{sorted(unknown)} are not known")
    values = dict(document)
    for field in dataclasses.fields(State):
        # With annotations from __future__ a type is its text.
        check = _PLAIN.get(str(field.type))
        if check is not None and field.name in values:
            values[field.name] = check(values[field.name])
    values["phase"] = Phase(document["phase"])
    values["result"] = None if document["result"] is None else Result(document["result"])
    # Whoever can write this file must not be able to have anything else written than a knob can be.
    values["before"] = {Knob(name): parse_wanted(Knob(name), value) for name, value in document["before"].items()}
    values["run_after"] = parse_wanted(Knob.RUN, document["run_after"])
    values["writes"] = tuple(
        Write(Knob(item["knob"]), parse_wanted(Knob(item["knob"]), item["value"])) for item in document["writes"]
    )
    if Knob.RUN not in values["before"] or any(write.knob not in values["before"] for write in values["writes"]):
        raise ValueError("what a knob was at is missing")
    values["pace"] = {Knob(name): parse_wanted(Knob(name), value) for name, value in document.get("pace", {}).items()}
    if document["hasten"] is not None:
        values["hasten"] = parse_wanted(Knob.PAGES_TO_SCAN, document["hasten"])
    values["homes"] = tuple(
        Belonging(
            _process(item["process"]),
            int(item["start"]),
            int(item["end"]),
            int(item["home"]),
            int(item.get("pages", 0)),
        )
        for item in document["homes"]
    )
    for name in ("batches", "moves"):
        values[name] = tuple(_batch(item) for item in document[name])
    for name in ("home_before", "home_after"):
        pair = document[name]
        values[name] = None if pair is None else (int(pair[0]), int(pair[1]))
    values["forced"] = tuple(str(place) for place in document.get("forced", ()))
    carrier = document.get("carrier")
    values["carrier"] = None if carrier is None else _process(carrier)
    values["uncounted"] = tuple(str(name) for name in document.get("uncounted", ()))
    values["gone"] = tuple(_process(item) for item in document.get("gone", ()))
    values["cgroups"] = tuple(str(path) for path in document.get("cgroups", ()))
    for name in ("oom_kills", "killed"):
        values[name] = {str(where): _whole(count) for where, count in document.get(name, {}).items()}
    values["left"] = {str(cause): int(pages) for cause, pages in document["left"].items()}
    state = State(**values)
    _need_places(state)
    return state


def _need_places(state: State) -> None:
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


def _process(item: dict[str, Any]) -> ProcessId:
    return ProcessId(int(item["pid"]), int(item["start_time_ticks"]))


def _batch(item: dict[str, Any]) -> Batch:
    ranges = tuple((int(start), int(end)) for start, end in item["ranges"])
    return Batch(_process(item["process"]), None if item["to"] is None else int(item["to"]), ranges, int(item["pages"]))


def ledger_section(ledger: Ledger, running: Mapping[str, object] | None) -> dict[str, object]:
    """What a report has of transactions (docs/json.md).

    :param running: the document of the one that is under way
    """
    return {
        "running": running,
        "last": ledger.last,
        "totals": {result.value: ledger.totals[result] for result in Result},
        "unmerged_pages": ledger.unmerged_pages,
        "home_pages": ledger.home_pages,
        "seconds": ledger.seconds,
    }


def carrier_document(state: State, boot_id: str, find: Callable[[int], ProcessId]) -> dict[str, object]:
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


def transaction_document(state: State, page_size: int) -> dict[str, object]:
    """What the report says of a transaction (docs/json.md)."""
    expected = sum(batch.pages for batch in state.batches)
    counts = {"unshared": state.unshared_pages, "rest": state.rest_pages, "moved": state.moved_pages}
    return {
        "id": state.id,
        "who": state.who,
        "phase": state.phase.value,
        "result": None if state.result is None or state.phase is not Phase.OVER else state.result.value,
        "reason": state.reason,
        "recovered": state.recovered,
        "knobs": {write.knob.value: {"from": state.before[write.knob], "to": write.value} for write in state.writes},
        "run_after": state.run_after,
        "unmerge": state.unmerge,
        "began_seconds": state.began,
        "duration_seconds": None if state.ended is None else state.ended - state.began,
        "pages": {
            "merged": state.merged_pages,
            "expected": expected,
            **{name: None if name in state.uncounted else pages for name, pages in counts.items()},
            "remerged": state.remerged_pages,
            "size_bytes": page_size,
        },
        "batches": {"done": state.batch, "total": len(state.batches)},
        "home": {"before": _share(state.home_before), "after": _share(state.home_after)},
        "left": dict(state.left),
        "gone": {"processes": len(state.gone), "pages": state.gone_pages},
        "oom_kills": dict(state.killed),
        "forced": list(state.forced),
        "remerge_seconds": state.remerge_seconds,
    }


def _share(pages: tuple[int, int] | None) -> dict[str, object] | None:
    if pages is None:
        return None
    return {"pages": pages[0], "of": pages[1], "ratio": pages[0] / pages[1] if pages[1] else None}
