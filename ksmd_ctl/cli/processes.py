# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl processes``: who gains how much from merging, and of which class each process is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli import source
from ksmd_ctl.cli.common import add_command, add_socket
from ksmd_ctl.cli.documents import show
from ksmd_ctl.cli.table import UNKNOWN, Column, bytes_or_unknown, count_or_unknown, survey_text, table
from ksmd_ctl.control.document import number, part, parts, text
from ksmd_ctl.metrics.figures import plural, ratio_text

if TYPE_CHECKING:
    from ksmd_ctl.cli.common import Parsers

__all__ = ["add_parser", "lines", "run"]

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
    Column("why"),
)

# Marks a saving that says too much.
_FORKED = "*"


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "processes", "who gains how much from merging, and of which class each process is")
    add_socket(parser)
    source.add_arguments(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    return show(args, out, "Processes", "processes", _look, lines)


def _look(args: argparse.Namespace) -> Mapping[str, object]:
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.control.numa import processes_document
    from ksmd_ctl.host.operation import finish

    host = open_host(args.host, args.root)
    # No survey: who isn't root sees at least their own processes like this.
    return processes_document(host.identity, finish(host.processes()), host.clock())


def lines(document: Mapping[str, object]) -> Iterator[str]:
    """The lines for people of a document (docs/json.md)."""
    if part(document, "host").get("simulated"):
        yield "SIMULATED: none of these is a process of this machine"
    processes = parts(document, "processes")
    if not processes:
        yield "no process has mergeable memory"
    else:
        yield from table(_COLUMNS, [_row(process) for process in processes])
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


def _row(process: Mapping[str, object]) -> list[str]:
    saved = bytes_or_unknown(number(process, "saved_bytes"))
    if number(process, "relatives") and number(process, "merging_pages"):
        saved += _FORKED
    home, remote, ratio = (number(process, key) for key in ("home", "remote_pages", "remote_ratio"))
    away = count_or_unknown(remote)
    if remote and ratio is not None:
        away += f" ({ratio_text(ratio)})"
    nodes = part(process, "nodes")
    classes = process.get("classes")
    return [
        count_or_unknown(number(process, "pid")).replace(",", ""),
        text(process, "name", UNKNOWN),
        text(process, "group", UNKNOWN),
        count_or_unknown(number(process, "merging_pages")),
        saved,
        "-" if home is None else str(home),
        away,
        ", ".join(f"{node}: {count_or_unknown(number(nodes, node))}" for node in nodes) or "-",
        ", ".join(map(str, classes)) if isinstance(classes, list) else UNKNOWN,
        text(process, "reason"),
    ]
