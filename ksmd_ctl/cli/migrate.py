# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl migrate``: move mergeable memory of a process or a unit to a node."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli.common import (
    Parsers,
    add_command,
    add_process,
    add_source,
    error_text,
    seconds,
    whole_number,
    write_json,
)
from ksmd_ctl.cli.source import Outcome, carry_out, change
from ksmd_ctl.cli.terminal import ProgressLine, count_or_unknown
from ksmd_ctl.errors import ExitCode, KsmdError
from ksmd_ctl.figures import bytes_text, plural
from ksmd_ctl.reports.document import number, part, parts, text

if TYPE_CHECKING:
    from ksmd_ctl.transactions.migration import MigrationOrder

_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "migrate", "move mergeable memory of a process or a unit to a node")
    add_source(parser)
    add_process(
        parser,
        "the process whose memory to move",
        "all processes of this systemd unit that have mergeable memory",
        required=True,
    )
    parser.add_argument("--to", type=whole_number(), metavar="N", required=True, help="the node to move it to")
    parser.add_argument(
        "--range",
        type=address_range,
        action="append",
        default=[],
        metavar="A-B",
        help="only these addresses, as in /proc/PID/maps; may be given more than once (default: all mergeable memory)",
    )
    parser.add_argument("--everything", action="store_true", help="also memory that is not mergeable")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be moved")
    parser.add_argument(
        "--latency",
        type=latency,
        metavar="SECONDS",
        help="the longest time that one call may stop a process (0.0005 to 1), or none for the highest speed (default: "
        "[limits] batch_latency, 0.01)",
    )


def latency(text: str) -> float:
    """A length of time in seconds; 0 for ``none``."""
    return 0.0 if text == "none" else seconds(1, 0.0005)(text)


def address_range(text: str) -> tuple[int, int]:
    """Two addresses in hexadecimal, with or without 0x, and a dash between."""
    start, _, end = text.partition("-")
    digits = start.removeprefix("0x"), end.removeprefix("0x")
    # Not int() alone: it takes "+1", " 1", "1_0" and the digits of other scripts.
    if not all(0 < len(one) <= 16 and set(one) <= _HEXADECIMAL for one in digits):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not of the form 7f0000000000-7f0000200000")
    found = int(digits[0], 16), int(digits[1], 16)
    if not found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"{text} ends where it begins, or before")
    return found


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.transactions.migration import MigrationOrder, exit_code

    order = MigrationOrder(
        to=args.to,
        pid=args.pid,
        unit=args.unit,
        ranges=tuple(args.range),
        everything=args.everything,
        dry_run=args.dry_run,
        latency_seconds=args.latency,
    )
    document, stopped = migrated(args, order)
    if args.json:
        write_json(document, out)
    else:
        for said in lines(document):
            out.write(f"{said}\n")
        _explain(document)
    return ExitCode.INTERRUPTED if stopped else exit_code(document)


def migrated(args: argparse.Namespace, order: MigrationOrder) -> Outcome:
    """Have the service, or this process, move memory.

    :raises KsmdError: it can't be moved
    """
    from ksmd_ctl.daemon.varlink_wire import AddressRange, MigrateParameters

    order.check()
    ranges = tuple(AddressRange(*addresses) for addresses in order.ranges)
    parameters = MigrateParameters(
        *(order.to, order.pid, order.unit or None, ranges, order.everything, order.dry_run, order.latency_seconds),
        keep=order.keep or None,
    )
    with ProgressLine(sys.stderr) as line:
        return change(args, "Migrate", "result", parameters, lambda: _here(args, order, line), line.tell)


def _here(args: argparse.Namespace, order: MigrationOrder, line: ProgressLine) -> Outcome:
    from ksmd_ctl.cli.change import local
    from ksmd_ctl.transactions.migration import Migration

    with local(
        args.host, args.root, getattr(args, "config", None), "ksmd-ctl migrate", change=not order.dry_run
    ) as here:
        limited = order.within(here.config.floor_bytes, here.config.batch_latency)
        came, stopped = carry_out(Migration(here.host, limited), line)
        return came.document(), stopped


# -- what people read --------------------------------------------------------------------------------------


def lines(document: Mapping[str, object]) -> Iterator[str]:
    """The lines for people of a migration's document (docs/json.md)."""
    to = number(document, "to")
    processes = parts(document, "processes")
    for item in processes:
        name = text(item, "name")
        yield f"process {number(item, 'pid')}{f' ({name})' if name else ''}: {_what(item, to)}"
        by_cause = part(item, "left")
        for cause in by_cause:
            yield f"  {count_or_unknown(number(by_cause, cause))} stay where they are: {cause}"
    if len(processes) > 1:
        totals = part(document, "totals")
        key, verb = ("would_move", "would be moved") if document.get("dry_run") else ("moved", "moved")
        counts = {name: plural(number(totals, name) or 0, "page") for name in (key, "already", "left")}
        yield f"in all: {counts[key]} {verb}, {counts['already']} on node {to} already, {counts['left']} left"
    if document.get("cancelled"):
        untouched = number(document, "untouched") or 0
        rest = f"; {plural(untouched, 'process', 'processes')} not looked at" if untouched else ""
        yield f"stopped early: pages that were moved stay on node {to}{rest}"


def _what(item: Mapping[str, object], to: int | float | None) -> str:
    error = part(item, "error")
    if error:
        return f"{text(error, 'what')}: {text(error, 'why')}"
    already = number(item, "already") or 0
    there = f"{count_or_unknown(already)} {'was' if already == 1 else 'were'} there already"
    if "would_move" not in item:
        return f"{plural(number(item, 'moved') or 0, 'page')} moved to node {to}, {there}"
    nodes = part(item, "would_move")
    pages = sum(number(nodes, node) or 0 for node in nodes)
    origin = ", ".join(f"{count_or_unknown(number(nodes, node))} from node {node}" for node in nodes)
    shared, room = number(item, "shared") or 0, number(item, "room_bytes")
    said = [f"{plural(pages, 'page')} would be moved to node {to}" + (f" ({origin})" if origin else "")]
    if shared:
        said.append(f"{count_or_unknown(shared)} of them shared with other mappings")
    said.append(there)
    if room is not None:
        said.append(f"{bytes_text(room)} free {text(item, 'room')} above the floor")
    return ", ".join(said)


def _explain(document: Mapping[str, object]) -> None:
    for item in parts(document, "processes"):
        error = part(item, "error")
        if text(error, "hint"):
            sys.stderr.write(error_text(KsmdError(text(error, "what"), text(error, "why"), hint=text(error, "hint"))))
            return
