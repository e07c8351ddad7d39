# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl metrics``: the metrics once, as node_exporter's textfile collector takes them."""

from __future__ import annotations

import argparse
from typing import TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_source, write_json
from ksmd_ctl.cli.source import ask
from ksmd_ctl.errors import ExitCode


def add_parser(parsers: Parsers) -> None:
    add_source(add_command(parsers, "metrics", "print the metrics once, in Prometheus' text format"))


def run(args: argparse.Namespace, out: TextIO) -> int:
    text = ask(args, "Metrics", "text").result or _own(args)
    if args.json:
        write_json({"format": 1, "text": text}, out)
    else:
        out.write(text)
    return ExitCode.DONE


def _own(args: argparse.Namespace) -> str:
    from ksmd_ctl.cli.host import look
    from ksmd_ctl.render.exposition import Exposition

    report = look(args, None)
    return Exposition(lambda: report).text()
