# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a command has its report from: the service, or the host itself where no service runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from ksmd_ctl.cli.client import NoService, call, socket_path
from ksmd_ctl.errors import Denied, Unreachable

__all__ = ["Found", "add_arguments", "document_from_service", "from_host", "from_service", "go_by_config", "serves"]


# Looking at every process of a large host takes a while, and somebody else's look may be under way.
_SURVEY_SECONDS = 180.0


class Found:
    """A report, and what has to be said about where it is from (empty where it is from the service).

    :ivar left: what a service left changed that ended without a stop (docs/json.md); empty for nothing
    """

    __slots__ = ("left", "note", "report")

    def __init__(self, report: Mapping[str, object], note: str = "", left: Mapping[str, object] | None = None) -> None:
        self.report = report
        self.note = note
        self.left = left or {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that look at the host themselves where no service runs."""
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)


def go_by_config(args: argparse.Namespace) -> None:
    """Take the socket from the configuration, if one was named and no socket was: its service listens there."""
    if args.config is not None and args.socket is None:
        from ksmd_ctl.config.loader import load

        args.socket = load(args.config).socket


def from_service(args: argparse.Namespace) -> Found:
    """What the service says; a report that is empty and a note where it can't be asked.

    :raises Unreachable: it is there and doesn't answer, or not with a report
    """
    path = socket_path(args.socket)
    try:
        report = call(path, "Status").get("report")
    except NoService:
        return _nobody(args, path)
    except Denied as error:
        return Found(
            {}, f"no permission to query the service ({error.why}): these figures are read from the kernel directly"
        )
    if not isinstance(report, dict) or not isinstance(report.get("host"), dict):
        raise Unreachable(f"asking the service at {path}", "its answer is no report", hint="are both of one version?")
    kind = report["host"].get("kind")
    if args.host not in (None, kind):
        return Found({}, f"the service runs on the {kind}: these figures are read from the {args.host} directly")
    return Found(report)


def _nobody(args: argparse.Namespace, path: str) -> Found:
    # Only here: the modules behind cost more than asking a service does.
    from ksmd_ctl.cli.state import left_by_service

    note = f"no service runs ({path}): these figures are read from the kernel directly"
    return Found({}, note, left_by_service(args))


def serves(args: argparse.Namespace) -> bool:
    """Whether a service answers that runs on the host that was asked for.

    :raises Unreachable: it is there and doesn't answer, or not with a report
    """
    return args.host is None or bool(from_service(args).report)


def document_from_service(args: argparse.Namespace, method: str, key: str) -> Found:
    """A document that the service makes, which may take a while; an empty one and a note where it can't be asked.

    :param key: what the document is called in the answer
    :raises Unreachable: it is there and doesn't answer, or not with a document
    """
    path = socket_path(args.socket)
    if not serves(args):
        return from_service(args)
    try:
        found = call(path, method, timeout_seconds=_SURVEY_SECONDS).get(key)
    except NoService:
        return _nobody(args, path)
    except Denied as error:
        return Found(
            {}, f"no permission to query the service ({error.why}): these figures are read from the kernel directly"
        )
    if not isinstance(found, dict) or not isinstance(found.get("host"), dict):
        raise Unreachable(f"asking the service at {path}", "its answer is no document", hint="are both of one version?")
    return Found(found)


def from_host(
    args: argparse.Namespace, interval_seconds: float | None, left: Mapping[str, object] | None = None
) -> Mapping[str, object]:
    """A report of the host, which this process looks at itself.

    :param left: what a service left changed
    :param interval_seconds: look twice, so long apart, so that rates are known; None for one look without rates
    :raises Absent: this kernel has no KSM
    """
    # Only here: the modules behind cost more than asking a service does.
    from ksmd_ctl.cli.host import look
    from ksmd_ctl.cli.state import folders

    return look(args.host, args.root, interval_seconds, folders(args), left)
