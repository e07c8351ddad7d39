# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl metrics``: the exposition once, as node_exporter's textfile collector takes it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli import source
from ksmd_ctl.cli.client import NoService, call, socket_path
from ksmd_ctl.cli.common import add_command, add_socket, write_json
from ksmd_ctl.errors import Denied, ExitCode, Unreachable

if TYPE_CHECKING:
    from ksmd_ctl.cli.common import Parsers

__all__ = ["add_parser", "run"]


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "metrics", "the metrics once, in Prometheus' text format")
    add_socket(parser)
    source.add_arguments(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    text = _text(args)
    if args.json:
        write_json({"format": 1, "text": text}, out)
    else:
        out.write(text)
    return ExitCode.DONE


def _text(args: argparse.Namespace) -> str:
    path = socket_path(args.socket)
    # Which host the service runs on only its report says; nobody asks for that where no host was named.
    report = source.from_service(args).report if args.host is not None else {}
    if args.host is None or report:
        try:
            found = call(path, "Metrics").get("text")
        except (NoService, Denied):
            pass
        else:
            if isinstance(found, str):
                return found
            raise Unreachable(f"asking the service at {path}", "its answer is no text", hint="are both of one version?")
    from ksmd_ctl.metrics.exposition import Exposition

    looked = source.from_host(args, None)
    return Exposition(lambda: looked).text()
