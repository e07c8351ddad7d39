# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl status``: the state that is wanted and found, what merging saves, and what it costs."""

from __future__ import annotations

import argparse
from typing import TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_source, seconds, write_json
from ksmd_ctl.cli.source import ask, source_lines
from ksmd_ctl.cli.terminal import WIDTH, write_lines
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.render.summary import explanation, summary


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "status", "show wanted and actual knobs, merged pages, the saving, and other writers")
    add_source(parser)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the configuration of the service to ask (default: /etc/ksmd-ctl/ksmd-ctl.toml)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also show knobs with default values, and the policy's reasons and decisions",
    )
    parser.add_argument(
        "--interval",
        type=seconds(60),
        metavar="SECONDS",
        help="without a service: take two samples this far apart, so that rates are known (0.1 to 60)",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    answer = ask(args)
    report = answer.result
    if not report:
        # Only here: the modules behind cost more than asking a service does.
        from ksmd_ctl.cli.host import look

        report = look(args, args.interval, answer.left or None)
    if args.json:
        write_json(report, out)
        return ExitCode.DONE
    write_lines(source_lines(answer), out, most=WIDTH)
    write_lines(summary(report, everything=args.explain), out, most=WIDTH)
    if args.explain:
        out.write("\n")
        write_lines(explanation(report), out, most=WIDTH)
    return ExitCode.DONE
