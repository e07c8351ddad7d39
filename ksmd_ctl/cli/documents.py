# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that show one document: the service's, or where no service runs that of a look at the host."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from ksmd_ctl.cli import source
from ksmd_ctl.cli.common import write_json
from ksmd_ctl.cli.render import WIDTH, wrapped, write_lines
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.metrics.summary import BAD, Line

__all__ = ["show"]


def show(
    args: argparse.Namespace,
    out: TextIO,
    method: str,
    key: str,
    look: Callable[[argparse.Namespace], Mapping[str, object]],
    lines: Callable[[Mapping[str, object]], Iterable[str]],
    chosen: Callable[[Mapping[str, object]], Mapping[str, object]] = lambda document: document,
) -> int:
    """Print a document as JSON or in lines.

    :param method: the service's method that makes it, and `key` what it is called in the answer
    :param look: makes it without a service
    :param chosen: what of it is to be shown
    """
    found = source.document_from_service(args, method, key)
    document = chosen(found.report or look(args))
    if args.json:
        write_json(document, out)
        return ExitCode.DONE
    if found.note:
        write_lines([Line("service", found.note, BAD)], out, most=WIDTH)
    if found.left:
        from ksmd_ctl.metrics.left import left_lines

        write_lines(left_lines(found.left), out, most=WIDTH)
    for line in lines(document):
        for part in wrapped(line, WIDTH, 2):
            out.write(f"{part}\n")
    return ExitCode.DONE
