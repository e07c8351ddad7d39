# SPDX-License-Identifier: GPL-2.0-or-later
"""The lines for people of ``ksmd-ctl estimate``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ksmd_ctl.cli.terminal import WIDTH, Column, bytes_or_unknown, more, table
from ksmd_ctl.figures import bytes_text, plural, ratio_text, rough_seconds, seconds_text
from ksmd_ctl.reports.document import number, part, parts, text

_LIMIT: Final = 20
_NAMED: Final = 5
_OUTCOMES: Final = (
    Column("merge_across_nodes", right=True),
    Column("use_zero_pages", right=True),
    Column("frees", right=True),
    Column("records", right=True),
    Column("saves", right=True),
    Column("95 % interval"),
)
_GROUPS: Final = (
    Column("marked", right=True),
    Column("would save", right=True),
    Column("unmarked", right=True),
    Column("would save with it", right=True),
)
_DOMAINS: Final = (
    Column("domain", wraps=True),
    Column("marked", right=True),
    Column("would save", right=True),
    Column("if kept apart", right=True),
)


def interval_text(low: float | None, high: float | None) -> str:
    """A 95 % interval of bytes."""
    return "exact" if low == high else f"{bytes_or_unknown(low)} to {bytes_or_unknown(high)}"


def lines(document: Mapping[str, object], by: str = "unit", width: int = WIDTH) -> Iterator[str]:
    """The lines for people of a document (docs/json.md).

    :param by: `unit` or `process`: what is listed
    :param width: tables are made narrower for it
    """
    if part(document, "host").get("simulated"):
        yield "SIMULATED: these processes are not on this machine"
    yield from _summary(document)
    if number(document, "marked_bytes"):
        yield from _outcomes(document, "outcomes", width)
    if parts(document, "outcomes_with_unmarked"):
        unmarked = bytes_or_unknown(number(document, "unmarked_bytes"))
        yield f"with {unmarked} more that nobody has marked mergeable:"
        yield from _outcomes(document, "outcomes_with_unmarked", width)
    yield from _groups(document, "units" if by == "unit" else "processes", width)
    yield from _domains(document, width)
    yield from _notes(document)


def _now(document: Mapping[str, object], key: str = "outcomes") -> Mapping[str, object]:
    return next((one for one in parts(document, key) if one.get("current")), {})


def _summary(document: Mapping[str, object]) -> Iterator[str]:
    look, now = part(document, "look"), _now(document)
    whose = text(look, "only") or plural(number(look, "processes") or 0, "process", "processes")
    marked = bytes_or_unknown(number(document, "marked_bytes"))
    if not number(document, "marked_bytes"):
        if look.get("gone"):
            yield f"{whose}: nobody is left whose memory is marked mergeable"
            return
        hint = "" if parts(document, "outcomes_with_unmarked") else "; --all looks at memory that is not marked, too"
        yield f"{whose}: no memory is marked mergeable{hint}"
        return
    low, high = number(now, "saved_low_bytes"), number(now, "saved_high_bytes")
    said = f"merging would save {bytes_or_unknown(number(now, 'saved_bytes'))}"
    said += "" if low == high else f" ({interval_text(low, high)})"
    said += f" of {marked} that {'has' if text(look, 'only') else 'have'} been marked mergeable ({whose})"
    yield said
    if already := number(document, "freed_already_bytes"):
        yield f"{bytes_text(already)} of it is merged already"


def _outcomes(document: Mapping[str, object], key: str, width: int) -> Iterator[str]:
    rows = [
        [
            f"{'now ' if one.get('current') else ''}{number(one, 'merge_across_nodes')}",
            str(number(one, "use_zero_pages")),
            *(bytes_or_unknown(number(one, name)) for name in ("freed_bytes", "records_bytes", "saved_bytes")),
            interval_text(number(one, "saved_low_bytes"), number(one, "saved_high_bytes")),
        ]
        for one in parts(document, key)
    ]
    yield from table(_OUTCOMES, rows, width)


def _groups(document: Mapping[str, object], key: str, width: int) -> Iterator[str]:
    found = parts(document, key)
    if not found:
        if text(part(document, "look"), "stage") in ("sample", "reading"):
            yield "whose part it is, is known once everything was read"
        return
    unmarked = number(document, "unmarked_bytes") is not None
    names = ("marked_bytes", "saved_bytes", "unmarked_bytes", "saved_with_unmarked_bytes")[: None if unmarked else 2]
    rows = [[text(one, "group"), *(bytes_or_unknown(number(one, name)) for name in names)] for one in found[:_LIMIT]]
    head = Column("group" if key == "units" else "process", wraps=True)
    yield from table((head, *_GROUPS[: None if unmarked else 2]), rows, width)
    yield from more(len(found) - _LIMIT, *(("unit",) if key == "units" else ("process", "processes")))


def _domains(document: Mapping[str, object], width: int) -> Iterator[str]:
    names = ("marked_bytes", "saved_bytes", "saved_apart_bytes")
    rows = [
        [text(one, "domain"), *(bytes_or_unknown(number(one, name)) for name in names)]
        for one in parts(document, "domains")
    ]
    if rows:
        yield from table(_DOMAINS, rows, width)
        apart = sum(number(one, "saved_apart_bytes") or 0 for one in parts(document, "domains"))
        yield f"kept apart from one another, all domains together would save {bytes_text(apart)}"
    empty = [text(one, "domain") for one in parts(document, "domains") if number(one, "processes") == 0]
    if empty:
        yield f"no process that was looked at belongs to {', '.join(empty)} (docs/domains.md)"


def _notes(document: Mapping[str, object]) -> Iterator[str]:
    look, cost = part(document, "look"), part(document, "ksmd")
    first, scan = number(cost, "first_cpu_seconds") or 0.0, number(cost, "scan_cpu_seconds") or 0.0
    source = "as measured now" if cost.get("measured") else "by costs measured elsewhere"
    if first:
        yield (
            f"ksmd would take about {rough_seconds(first)} of CPU until all is merged, "
            f"then {rough_seconds(scan)} for a scan of every page ({source})"
        )
    left_out = parts(look, "left_out")
    if left_out:
        whose = ", ".join(f"pid {number(one, 'pid')} ({text(one, 'why')})" for one in left_out[:_NAMED])
        more = "; --json has all" if len(left_out) > _NAMED else ""
        yield f"{plural(len(left_out), 'process', 'processes')} could not be looked at: {whose}{more}"
    gone = look.get("gone")
    if isinstance(gone, list) and gone:
        pids = ", ".join(map(str, gone[:_NAMED]))
        if text(look, "stage") == "final":
            left = " and is left out" if len(gone) == 1 else " and are left out"
        else:
            left = f"; what was read of {'it' if len(gone) == 1 else 'them'} is counted"
        yield f"{plural(len(gone), 'process', 'processes')} ended meanwhile{left}: pid {pids}"
    yield _how(look)


def _how(look: Mapping[str, object]) -> str:
    stage, said = text(look, "stage"), list[str]()
    if look.get("interrupted"):
        said.append("interrupted")
    read = ratio_text(number(look, "read_share") or 0.0)
    if stage == "sample":
        said.append(f"from a sample of {read} of all pages")
    elif stage == "reading":
        said.append(f"{read} of all pages read")
    else:
        share = number(look, "content_share") or 1.0
        said.append("all pages read" + (f", {ratio_text(share)} of contents kept" if share < 1 else ""))
    unchanged = number(look, "unchanged_share")
    if stage == "read" and number(look, "processes"):
        said.append("looked at once: pages that change are in these figures")
    elif unchanged is not None and number(look, "interval_seconds"):
        after = seconds_text(number(look, "interval_seconds") or 0.0)
        changed = "nothing" if unchanged == 1 else f"{ratio_text(1 - unchanged)} of that"
        said.append(f"{changed} changed within {after}" + ("" if unchanged == 1 else " and is left out"))
    cpu = number(look, "cpu_seconds")
    if cpu:
        said.append(f"{rough_seconds(cpu)} of CPU in {rough_seconds(number(look, 'seconds') or 0.0)}")
    return ", ".join(said)
