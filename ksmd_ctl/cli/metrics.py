# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl metrics``: the metrics once, as node_exporter's textfile collector takes them."""

from __future__ import annotations

import argparse
from typing import TextIO

from ksmd_ctl.cli import source
from ksmd_ctl.cli.client import NoService, call, socket_path
from ksmd_ctl.cli.common import Parsers, add_command, add_source, write_json
from ksmd_ctl.errors import Denied, ExitCode, Unreachable


def add_parser(parsers: Parsers) -> None:
    add_source(add_command(parsers, "metrics", "print the metrics once, in Prometheus' text format"))


def run(args: argparse.Namespace, out: TextIO) -> int:
    text = _text(args)
    if args.json:
        write_json({"format": 1, "text": text}, out)
    else:
        out.write(text)
    return ExitCode.DONE


def _text(args: argparse.Namespace) -> str:
    # Which host the service runs on only its report says; nobody asks for that where no host was named.
    if args.host is None or source.from_service(args).document:
        path = socket_path(args.socket)
        try:
            found = call(path, "Metrics").get("text")
        except (NoService, Denied):
            pass
        else:
            if isinstance(found, str):
                return found
            raise Unreachable(f"asking the service at {path}", "its answer is no text", hint="are both of one version?")
    from ksmd_ctl.cli.host import look
    from ksmd_ctl.render.exposition import Exposition

    report = look(args, None)
    return Exposition(lambda: report).text()
