# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl processes``: who gains how much from merging, and of which class each process is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli import source
from ksmd_ctl.cli.common import add_command, add_socket, whole_number
from ksmd_ctl.cli.documents import show
from ksmd_ctl.cli.table import UNKNOWN, Column, bytes_or_unknown, count_or_unknown, survey_text, table
from ksmd_ctl.control.document import number, part, parts, text
from ksmd_ctl.errors import Refused, UsageError
from ksmd_ctl.metrics.figures import plural, ratio_text

if TYPE_CHECKING:
    from ksmd_ctl.cli.common import Parsers

__all__ = ["add_parser", "choose", "lines", "run"]

_COLUMNS = (
    Column("pid", right=True),
    Column("name"),
    Column("group"),
    Column("merged pages", right=True),
    Column("saved", right=True),
    Column("home"),
    Column("away from home", right=True),
    Column("on nodes"),
    Column("class"),
)
_GROUP = 2

# Marks a saving that says too much.
_FORKED = "*"


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "processes", "who gains how much from merging, and of which class each process is")
    add_socket(parser)
    source.add_arguments(parser)
    parser.add_argument("--sort", choices=tuple(_KEYS), help="the largest first, or by name (default: saved)")
    parser.add_argument("--top", type=whole_number(1), metavar="N", help="only the first N; the total is of all")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--pid", type=whole_number(1), metavar="P", help="only this process")
    whose.add_argument("--unit", metavar="U", help="only the processes of a systemd unit")


def _by(key: str) -> Callable[[Mapping[str, object]], tuple[float, str]]:
    return lambda process: (-(number(process, key) or 0), text(process, "name"))


_KEYS: dict[str, Callable[[Mapping[str, object]], tuple[float, str]]] = {
    "saved": _by("saved_bytes"),
    "merged": _by("merging_pages"),
    "name": lambda process: (0, text(process, "name")),
}


def run(args: argparse.Namespace, out: TextIO) -> int:
    def chosen(document: Mapping[str, object]) -> Mapping[str, object]:
        if not args.json:
            return choose(document, sort=args.sort or "saved", pid=args.pid, unit=args.unit)
        if (args.sort, args.pid, args.unit, args.top) == (None, None, None, None):
            return document
        found = choose(document, sort=args.sort, pid=args.pid, unit=args.unit)
        return {**found, "processes": parts(found, "processes")[: args.top]}

    return show(args, out, "Processes", "processes", _look, lambda found: lines(found, args.top), chosen)


def choose(
    document: Mapping[str, object], *, sort: str | None = None, pid: int | None = None, unit: str | None = None
) -> Mapping[str, object]:
    """A document with some of its processes, sorted where that is asked for.

    :raises UsageError: there is no such process
    :raises Refused: a unit has no process that could be shown
    """
    found = parts(document, "processes")
    if pid is not None:
        found = [process for process in found if number(process, "pid") == pid]
        if not found:
            why = f"process {pid} is not there, or has no mergeable memory"
            raise UsageError("looking for the process", why, hint="see `ksmd-ctl processes`")
    if unit is not None:
        from ksmd_ctl.control.migration import unit_name

        found = [process for process in found if text(process, "unit") == unit_name(unit)]
        if not found:
            why = f"no process of unit {unit_name(unit)} has mergeable memory"
            raise Refused("looking for the unit", why, hint="see `ksmd-ctl processes`")
    return {**document, "processes": list(found) if sort is None else sorted(found, key=_KEYS[sort])}


def _look(args: argparse.Namespace) -> Mapping[str, object]:
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.control.numa import processes_document
    from ksmd_ctl.host.operation import finish

    host = open_host(args.host, args.root)
    # No survey: who isn't root sees at least their own processes like this.
    return processes_document(host.identity, finish(host.processes()), host.clock())


def lines(document: Mapping[str, object], top: int | None = None) -> Iterator[str]:
    """The lines for people of a document (docs/json.md); of the first `top` processes, and the total of all."""
    if part(document, "host").get("simulated"):
        yield "SIMULATED: none of these is a process of this machine"
    processes = parts(document, "processes")
    if not processes:
        yield "no process has mergeable memory"
    else:
        rows = [_row(process) for process in processes[:top]]
        columns = list(_COLUMNS)
        if not any(row[_GROUP] for row in rows):
            # Each is what it is called.
            columns.pop(_GROUP)
            for row in rows:
                row.pop(_GROUP)
        yield from table(columns, rows)
        yield _total(processes)
    forked = [process for process in processes if number(process, "relatives") and number(process, "merging_pages")]
    if forked:
        pages = sum(int(number(process, "merging_pages") or 0) for process in forked)
        most = max(int(number(process, "merging_pages") or 0) for process in forked)
        yield (
            f"{_FORKED} {plural(len(forked), 'process', 'processes')} may be forks of one another. Their "
            f"{plural(pages, 'merged page')} may include pages that fork already shared; the real saving may be below "
            f"{plural(most, 'page')}."
        )
    for process in parts(document, "skipped"):
        yield f"left out: {text(process, 'name', UNKNOWN)} (pid {number(process, 'pid')}): {text(process, 'why')}"
    said = survey_text(document)
    if said:
        yield said


def _total(processes: Sequence[Mapping[str, object]]) -> str:
    merged, saved = (
        sum(number(process, key) or 0 for process in processes) for key in ("merging_pages", "saved_bytes")
    )
    said = f"total: {plural(len(processes), 'process', 'processes')}, {plural(merged, 'merged page')}"
    return f"{said}, {bytes_or_unknown(saved)} saved (docs/saving.md)"


def _row(process: Mapping[str, object]) -> list[str]:
    saved = bytes_or_unknown(number(process, "saved_bytes"))
    if number(process, "relatives") and number(process, "merging_pages"):
        saved += _FORKED
    home, remote, ratio = (number(process, key) for key in ("home", "remote_pages", "remote_ratio"))
    away = count_or_unknown(remote)
    if remote and ratio is not None:
        away += f" ({ratio_text(ratio)})"
    nodes = part(process, "nodes")
    name, group = text(process, "name", UNKNOWN), text(process, "group", UNKNOWN)
    return [
        count_or_unknown(number(process, "pid")).replace(",", ""),
        name,
        "" if group == name else group,
        count_or_unknown(number(process, "merging_pages")),
        saved,
        "-" if home is None else str(home),
        away,
        ", ".join(f"{node}: {count_or_unknown(number(nodes, node))}" for node in nodes) or "-",
        _class(process),
    ]


def _class(process: Mapping[str, object]) -> str:
    """Its class, and why, where that is another one than mergeable."""
    classes = process.get("classes")
    if not isinstance(classes, list):
        return UNKNOWN
    said = ", ".join(map(str, classes))
    reason = text(process, "reason")
    return said if classes == ["mergeable"] or not reason else f"{said} ({reason})"
