# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl collapse``: gives a process or unit huge pages back that were split."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_process, add_source, whole_number, write_json
from ksmd_ctl.cli.source import Outcome, carry_out, change
from ksmd_ctl.cli.terminal import ProgressLine, write_lines
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.figures import LOW_YIELD_PAGES, bytes_text, plural
from ksmd_ctl.render.summary import BAD, GOOD, Line
from ksmd_ctl.reports.document import number, part, parts, text


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers, "collapse", "make huge pages again of memory whose huge pages were split; its contents do not change"
    )
    add_source(parser)
    add_process(parser, "one process", "the processes of a systemd unit", required=True)
    parser.add_argument(
        "--keep-pages",
        type=whole_number(1, 512),
        default=LOW_YIELD_PAGES,
        metavar="N",
        help=f"leave blocks alone where a huge page would take N pages or more (default: {LOW_YIELD_PAGES})",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would become huge pages")
    add_config(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.daemon.varlink_wire import CollapseParameters
    from ksmd_ctl.transactions.collapsing import exit_code

    parameters = CollapseParameters(args.pid, args.unit or None, args.keep_pages, args.dry_run)
    with ProgressLine(sys.stderr) as line:
        document, stopped = change(args, "Collapse", "result", parameters, lambda: _here(args, line), line.tell)
    if args.json:
        write_json(document, out)
    else:
        write_lines(_lines(document), out)
    return ExitCode.INTERRUPTED if stopped else exit_code(document)


def _here(args: argparse.Namespace, line: ProgressLine) -> Outcome:
    from ksmd_ctl.cli.change import local
    from ksmd_ctl.transactions.collapsing import CollapseOrder, Collapsing

    order = CollapseOrder(args.pid, args.unit, args.keep_pages, args.dry_run)
    with local(args.host, args.root, args.config, "ksmd-ctl collapse", change=not args.dry_run) as here:
        came, stopped = carry_out(Collapsing(here.host, order, here.limits), line)
        return came.document(), stopped


def _lines(document: Mapping[str, object]) -> Iterator[Line]:
    from ksmd_ctl.host.operation import KSMD_IS_RUNNING

    dry = bool(document.get("dry_run"))
    for item in parts(document, "processes"):
        whose = f"{text(item, 'name')} (pid {number(item, 'pid')})"
        blocks, taken = number(item, "blocks") or 0, number(item, "taken_bytes") or 0
        made = f"{plural(blocks, 'huge page')} of {whose}, which {'take' if dry else 'took'} {bytes_text(taken)}"
        yield Line("would", f"make {made}") if dry else Line("made", made, GOOD)
        yield Line("huge pages", f"{number(item, 'huge_before')} before, {number(item, 'huge_after')} after")
        if kept := number(item, "kept"):
            least = plural(number(document, "keep_pages") or 0, "page")
            yield Line("kept", f"{plural(kept, 'block')} of 2 MiB, where a huge page would take {least} or more")
        left = part(item, "left")
        for cause in left:
            yield Line("left", f"{plural(number(left, cause) or 0, 'block')}: {cause}", BAD)
        if KSMD_IS_RUNNING in left:
            hint = "leave the process out of merging (docs/huge-pages.md), or stop ksmd: `ksmd-ctl set run=0`"
            yield Line("to do", hint)
        if error := text(item, "error"):
            yield Line("left", f"{whose}: {error}", BAD)
    if stopped := text(document, "stopped"):
        yield Line("stopped", f"{stopped}; what became huge pages until then stays so", BAD)
