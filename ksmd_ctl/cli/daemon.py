# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl daemon``: the service, in the foreground."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, write_json
from ksmd_ctl.errors import ConfigError, ExitCode


def add_parser(parsers: Parsers) -> None:
    parser = add_command(
        parsers, "daemon", "run the service in the foreground; SIGHUP reloads, SIGTERM and SIGINT stop it"
    )
    add_config(parser)
    parser.add_argument(
        "--metrics-listen",
        metavar="ADDRESS:PORT",
        help='serve the metrics here instead of where the configuration says; "" for nowhere',
    )
    parser.add_argument(
        "--check-config",
        action="store_true",
        help="check the configuration, report all mistakes and exit; with --host, also knobs that it lacks",
    )
    parser.add_argument(
        "--restore",
        action="store_true",
        help="restore the knobs to their values from before ksmd-ctl first changed them in this boot, and exit",
    )
    # For ExecStartPre=, as root; without a unit the service does it itself.
    parser.add_argument("--repair", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--unit", default="", help=argparse.SUPPRESS)
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.daemon.service import DaemonOptions
    from ksmd_ctl.daemon.service import run as serve
    from ksmd_ctl.host.sample import HostKind

    options = DaemonOptions(
        config=args.config,
        metrics_listen=args.metrics_listen,
        host=None if args.host is None else HostKind(args.host),
        check_config=args.check_config,
        restore=args.restore,
        repair=args.repair,
        unit=args.unit,
        root=Path(args.root),
    )
    if not (args.check_config and args.json):
        return serve(options)
    problems: list[object] = []
    code: int = ExitCode.DONE
    try:
        # What it says to people goes elsewhere, or the document would not be one.
        with contextlib.redirect_stdout(sys.stderr):
            code = serve(options)
    except ConfigError as error:
        problems = [{"path": item.path, "key": item.key, "text": item.text} for item in error.problems]
        code = error.exit_code
    write_json({"format": 1, "problems": problems}, out)
    return code
