# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl nodes``: where KSM pages are, who maps them from where, and whether un-merging all of it would fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_source
from ksmd_ctl.cli.source import show, survey_text
from ksmd_ctl.cli.terminal import UNKNOWN, WIDTH, Column, bytes_or_unknown, count_or_unknown, list_text, table
from ksmd_ctl.figures import count_text, ratio_text
from ksmd_ctl.reports.document import number, part, parts, room_said

# Somebody waits for it and nothing else: it may take this much CPU time.
_BUDGET_CPU_SECONDS = 5.0

_COLUMNS = (
    Column("node"),
    Column("cpus", wraps=True),
    Column("memory", right=True),
    Column("free", right=True),
    Column("KSM pages", right=True),
    Column("mappings", right=True),
    Column("remote mappings", right=True),
    Column("distances", wraps=True),
)


def add_parser(parsers: Parsers) -> None:
    add_source(add_command(parsers, "nodes", "show which nodes KSM pages are on, and which nodes map them"))


def run(args: argparse.Namespace, out: TextIO) -> int:
    return show(args, out, "Nodes", "nodes", _look, lines)


def _look(args: argparse.Namespace) -> Mapping[str, object]:
    from ksmd_ctl.cli.host import floor_bytes, open_host
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.reports.numa import nodes_document

    with open_host(args.host, args.root) as host:
        survey = finish(host.survey(_BUDGET_CPU_SECONDS))
        return nodes_document(host.identity, host.sample(), survey, floor_bytes())


def lines(document: Mapping[str, object]) -> Iterator[str]:
    """The lines for people of a document (docs/json.md)."""
    if part(document, "host").get("simulated"):
        yield "SIMULATED: these figures are not about this machine"
    nodes = part(document, "nodes")
    yield from table(_COLUMNS, [_row(name, part(nodes, name)) for name in nodes], WIDTH)
    if document.get("numa") is False:
        yield "NUMA is not available: the kernel or libnuma lacks it"
    if document.get("going_offline"):
        yield "memory is being taken offline now"
    yield from _exposure(document)
    said = survey_text(document)
    if said:
        yield said


def _row(name: str, node: Mapping[str, object]) -> list[str]:
    pages, low, high = (number(node, key) for key in ("ksm_pages", "ksm_pages_low", "ksm_pages_high"))
    shown = count_or_unknown(pages)
    if pages is not None and low is not None and high is not None and low != high:
        shown += f" ({count_text(low)} to {count_text(high)})"
    mapped, remote = number(node, "mapped_pages"), number(node, "remote_pages")
    away = count_or_unknown(remote)
    if remote and mapped:
        away += f" ({ratio_text(remote / mapped)})"
    cpus = node.get("cpus")
    distances = part(node, "distances")
    return [
        name,
        list_text(cpu for cpu in cpus if isinstance(cpu, int)) if isinstance(cpus, list) else UNKNOWN,
        bytes_or_unknown(number(node, "total_bytes")),
        bytes_or_unknown(number(node, "free_bytes")),
        shown,
        count_or_unknown(mapped),
        away,
        " ".join(f"{other}: {distances[other]}" for other in distances),
    ]


def _exposure(document: Mapping[str, object]) -> Iterator[str]:
    places = parts(document, "exposure")
    if not places:
        return
    over = [item for item in places if number(item, "over_bytes")]
    if not over:
        yield "un-merging everything now would fit everywhere"
    for item in over:
        yield f"un-merging everything now: {room_said(item, number(document, 'floor_bytes'))}"
