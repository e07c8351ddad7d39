# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl watch``: a live view for a terminal, or each report as a line of JSON."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NoReturn, TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_source, seconds
from ksmd_ctl.errors import Absent, ExitCode, UsageError

if TYPE_CHECKING:
    from rich.console import Console

_WHAT: Final = "showing a live view"
_INTERVAL_SECONDS: Final = 1.0
_SORTS: Final = ("saving", "cost", "sharing")


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "watch", "show in a terminal what is merged, saved and done, as it changes")
    add_source(parser)
    parser.add_argument(
        "--sort",
        choices=_SORTS,
        default=_SORTS[0],
        help="sort units by what they save, by what merging costs them, or by what they share (keys: s, c, h)",
    )
    parser.add_argument(
        "--interval",
        type=seconds(60),
        default=_INTERVAL_SECONDS,
        metavar="SECONDS",
        help=f"without a service: the time between two samples (0.1 to 60, default: {_INTERVAL_SECONDS:g})",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    console = None if args.json else _console(out)
    # Only here: the modules behind are many, and rich may not be installed.
    from ksmd_ctl.cli.feed import Feed

    with Feed(args, args.interval, listen=console is not None) as feed:
        # What fails before there is a report is said on the screen that was there.
        first = feed.next()
        if console is None:
            return _lines(first, feed.next, out)
        from ksmd_ctl.cli.live_terminal import LiveView
        from ksmd_ctl.render.live_figures import Sort

        LiveView(feed, console, Sort(args.sort), first).run()
    return ExitCode.DONE


def _lines(report: Mapping[str, object], following: Callable[[], Mapping[str, object]], out: TextIO) -> NoReturn:
    while True:
        json.dump(report, out, allow_nan=False)
        out.write("\n")
        out.flush()
        report = following()


def _console(out: TextIO) -> Console:
    """
    :raises UsageError: the output is no terminal, or none on which the cursor can be moved
    :raises Absent: the library is not installed
    """
    other = "ksmd-ctl status shows it once; ksmd-ctl watch --json prints each report as a line"
    if not out.isatty():
        raise UsageError(_WHAT, "the output is not a terminal", hint=other)
    try:
        from rich.console import Console
    except ImportError as error:
        hint = f"apt-get install python3-rich, or pip install 'ksmd-ctl[watch]'; {other}"
        raise Absent(_WHAT, "the Python package rich is not installed", hint=hint) from error
    if isinstance(out, io.TextIOWrapper):
        # Names come in every script, and terminals don't know all.
        out.reconfigure(errors="replace")
    console = Console(file=out, markup=False, emoji=False, highlight=False)
    if console.is_dumb_terminal:
        raise UsageError(_WHAT, f"this terminal can't show one (TERM={os.environ.get('TERM', '')})", hint=other)
    return console
