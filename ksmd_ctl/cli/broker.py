# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl broker``: the privileged part, which systemd starts. Nobody calls it by hand, so no help shows it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ksmd_ctl.cli.common import Parsers

__all__ = ["add_parser", "run"]


def add_parser(parsers: Parsers) -> None:
    # Its options are its own, so that it does not depend on the command line's.
    parser: argparse.ArgumentParser = parsers.add_parser("broker", add_help=False, prefix_chars="\0")
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(debug=False)


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.kernel.broker import main

    return main(args.arguments)
