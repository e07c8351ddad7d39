# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl unmerge``: un-merges one process, or one unit, gently."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_process, add_source, whole_number, write_json
from ksmd_ctl.cli.source import Outcome, carry_out, change
from ksmd_ctl.cli.terminal import ProgressLine, write_lines
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.figures import plural
from ksmd_ctl.render.summary import BAD, GOOD, Line
from ksmd_ctl.render.transaction import room_line
from ksmd_ctl.reports.document import number, part, parts, text

if TYPE_CHECKING:
    from ksmd_ctl.transactions.unmerging import UnmergeOrder

# With less than a page of room nothing can be un-merged.
_LEAST_PAGE_BYTES = 4096


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "unmerge", "un-merge one process or unit page by page; its contents do not change")
    add_source(parser)
    add_process(parser, "one process", "the processes of a systemd unit", required=True)
    parser.add_argument(
        "--to",
        type=_node,
        default=None,
        metavar="N|home",
        help="the node to put the pages on (default: their home node)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be un-merged")
    add_config(parser)


def _node(word: str) -> int | None:
    """The type of --to: a node's number, None for ``home``."""
    if word == "home":
        return None
    try:
        return whole_number()(word)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{word[:40]!r} is neither a node's number nor home") from error


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.transactions.unmerging import UnmergeOrder

    document, stopped = unmerged(args, UnmergeOrder(args.pid, args.unit, args.to, args.dry_run))
    if args.json:
        write_json(document, out)
    else:
        write_lines(lines(document), out)
    return ExitCode.INTERRUPTED if stopped else _exit_code(document)


def _exit_code(document: Mapping[str, object]) -> ExitCode:
    """The exit code that a document stands for; of a dry run the one that it would end with now."""
    processes, fits = parts(document, "processes"), document.get("fits")
    left = any(part(item, "left") for item in processes)
    if document.get("dry_run"):
        incomplete = left or not fits
        some = all((number(room, "free_bytes") or 0) >= _LEAST_PAGE_BYTES for room in parts(document, "room"))
    else:
        incomplete = left or document.get("cancelled") is True
        some = any(number(item, "unshared") for item in processes)
    if not incomplete:
        return ExitCode.DONE
    if not fits:
        return ExitCode.CHECK_FAILED if some else ExitCode.REFUSED
    return ExitCode.TIMED_OUT if document.get("cancelled") else ExitCode.CHECK_FAILED


def unmerged(args: argparse.Namespace, order: UnmergeOrder) -> Outcome:
    """Have the service, or this process, un-merge pages.

    :raises KsmdError: they can't be un-merged
    """
    from ksmd_ctl.daemon.varlink_wire import UnmergeParameters

    parameters = UnmergeParameters(order.pid, order.unit or None, order.to, order.dry_run, order.keep or None)
    with ProgressLine(sys.stderr) as line:
        return change(args, "Unmerge", "result", parameters, lambda: _here(args, order, line), line.tell)


def _here(args: argparse.Namespace, order: UnmergeOrder, line: ProgressLine) -> Outcome:
    from ksmd_ctl.cli.change import local
    from ksmd_ctl.transactions.unmerging import Unmerging

    with local(args.host, args.root, args.config, "ksmd-ctl unmerge", change=not order.dry_run) as here:
        came, stopped = carry_out(Unmerging(here.host, order, here.limits), line)
        return came.document(), stopped


def lines(document: Mapping[str, object]) -> Iterator[Line]:
    """The lines for people of a document (docs/json.md)."""
    dry, processes = bool(document.get("dry_run")), parts(document, "processes")
    for item in processes:
        whose = f"{text(item, 'name')} (pid {number(item, 'pid')})"
        merged, unshared = number(item, "merged") or 0, number(item, "unshared") or 0
        if dry:
            yield Line("would", f"un-merge {plural(merged, 'page')} of {whose}")
        else:
            yield Line("un-merged", f"{plural(unshared, 'page')} of {whose}, of {plural(merged, 'merged page')}", GOOD)
        left = part(item, "left")
        for cause in left:
            yield Line("left", f"{plural(number(left, cause) or 0, 'page')}: {cause}", BAD)
    if dry:
        for room in parts(document, "room"):
            yield room_line(room, number(document, "floor_bytes"))
        if not document.get("fits"):
            yield Line("verdict", "there is not enough room: un-merging would stop where it runs out", BAD)
    if document.get("cancelled"):
        yield Line("stopped", "what is un-merged so far stays un-merged until ksmd scans it again", BAD)
    if document.get("merges_again"):
        yield Line("note", "ksmd is running (run = 1) and will merge equal pages again", BAD)
    elif document.get("huge_pages_split") and not dry and any(number(item, "unshared") for item in processes):
        yield Line("note", "huge pages that merging split stay small pages: `ksmd-ctl collapse` makes them huge again")
