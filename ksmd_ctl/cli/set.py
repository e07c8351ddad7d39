# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl set``: one transaction that changes knobs, or with ``--dry-run`` the plan of it."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, seconds, write_json
from ksmd_ctl.cli.source import Outcome, Tell, change
from ksmd_ctl.cli.terminal import ProgressLine, write_lines
from ksmd_ctl.errors import ExitCode, UsageError
from ksmd_ctl.reports.document import part

if TYPE_CHECKING:
    from ksmd_ctl.host.knobs import Knob, KnobValue


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers,
        "set",
        "change knobs as one transaction; if it needs un-merging, that is done page by page, onto home nodes",
    )
    add_source(parser)
    parser.add_argument("words", nargs="*", metavar="KNOB=VALUE", help="for example merge_across_nodes=0")
    parser.add_argument("--dry-run", action="store_true", help="only print the plan: steps, room, pages, time")
    parser.add_argument(
        "--wait",
        type=seconds(86400, least=0),
        metavar="SECONDS",
        help="if there is too little room or too much memory pressure, wait up to this long for that to change",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="change the knobs although the plan finds too little room somewhere; the OOM killer may act there. A "
        "service that is not root refuses below 16 MiB free on the host or a node: stop it first",
    )
    parser.add_argument("--recover", action="store_true", help="only finish a transaction whose process was killed")
    add_config(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.transactions.change import parse_assignments

    if args.recover:
        if args.words or args.dry_run or args.force or args.wait is not None:
            raise UsageError(
                "reading the command line", "--recover takes no other option and no knob", hint="ksmd-ctl set --recover"
            )
        return _recover(args, out)
    wanted = parse_assignments(args.words)
    if any(str(knob) == "run" and value == 2 for knob, value in wanted.items()):
        _say(
            "warning: run = 2 un-merges everything and leaves ksmd stopped. To un-merge one process, use `ksmd-ctl "
            "unmerge`. To change a knob that needs un-merging, set that knob: ksmd merges again afterwards"
        )
    if args.dry_run:
        return _plan(args, wanted, out)
    return _change(args, wanted, out)


def _recover(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.cli.change import local

    with local(args.host, args.root, args.config, "ksmd-ctl set --recover", change=True) as here:
        with ProgressLine(sys.stderr) as line:
            state = here.recover(_teller(args, line))
        document = None if state is None else here.document(state)
    _print(args, document, out)
    return ExitCode.DONE


def _plan(args: argparse.Namespace, wanted: Mapping[Knob, KnobValue], out: TextIO) -> int:
    from ksmd_ctl.daemon.varlink_wire import PlanParameters
    from ksmd_ctl.render.transaction import plan_lines

    def here() -> Outcome:
        from ksmd_ctl.cli.change import local

        with local(args.host, args.root, args.config, "ksmd-ctl set --dry-run", change=False) as here:
            return here.plan_document(here.plan(wanted)), False

    document, _ = change(args, "Plan", "plan", PlanParameters(_named(wanted)), here)
    if args.json:
        write_json(document, out)
    else:
        write_lines(plan_lines(document), out)
    return ExitCode.DONE if document.get("fits") else ExitCode.REFUSED


def _change(args: argparse.Namespace, wanted: Mapping[Knob, KnobValue], out: TextIO) -> int:
    from ksmd_ctl.daemon.varlink_wire import SetParameters

    parameters = SetParameters(_named(wanted), args.wait, args.force)
    with ProgressLine(sys.stderr) as line:
        here = functools.partial(_change_here, args, wanted, line)
        document, _ = change(args, "Set", "transaction", parameters, here, _teller(args, line))
    _print(args, document, out)
    return _exit_code(document)


def _named(wanted: Mapping[Knob, KnobValue]) -> dict[str, object]:
    return {knob.value: value for knob, value in wanted.items()}


def _print(args: argparse.Namespace, document: Mapping[str, object] | None, out: TextIO) -> None:
    from ksmd_ctl.render.transaction import transaction_lines

    if args.json:
        write_json({"format": 1, "transaction": document}, out)
    elif document is None:
        out.write("nothing to recover: no transaction was interrupted\n")
    else:
        write_lines(transaction_lines(document), out)


def _change_here(args: argparse.Namespace, wanted: Mapping[Knob, KnobValue], line: ProgressLine) -> Outcome:
    from ksmd_ctl.cli.change import local
    from ksmd_ctl.render.transaction import transaction_lines

    who = f"ksmd-ctl set {' '.join(args.words)}"
    with local(args.host, args.root, args.config, who, change=True) as here:
        earlier = here.recover(_teller(args, line))
        if earlier is not None:
            line.clear()
            _say("first, an interrupted transaction was finished:")
            write_lines(transaction_lines(here.document(earlier)), sys.stderr)
        return here.document(here.change(wanted, args.wait, _teller(args, line), force=args.force)), False


def _exit_code(document: Mapping[str, object]) -> int:
    match document.get("result"):
        case "done":
            # The knobs are as they were asked for, and somebody's process may have paid for it.
            return ExitCode.CHECK_FAILED if document.get("oom_kills") else ExitCode.DONE
        case "rolled_back":
            return ExitCode.REFUSED
        case "abandoned" if document.get("reason") == "interrupted":
            return ExitCode.TIMED_OUT
        case _:
            return ExitCode.CHECK_FAILED


def _say(text: str) -> None:
    # A transaction has to come to its end, also where nobody listens any more: the terminal was closed.
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _teller(args: argparse.Namespace, line: ProgressLine) -> Tell:
    """Says what a transaction does, by its document: a line for each phase, and on a terminal how far it is."""
    from ksmd_ctl.render.transaction import progress_text

    # For programs that keep what is said, the result is enough.
    on = not args.json or sys.stderr.isatty()
    before = ""

    def tell(document: Mapping[str, object]) -> None:
        nonlocal before
        now = progress_text(document)
        if now and now != before and on:
            line.clear()
            _say(now)
        before = now
        line.tell(part(document, "progress"))

    return tell
