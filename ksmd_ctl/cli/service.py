# SPDX-License-Identifier: GPL-2.0-or-later
"""Has the service do something that takes a while, if there is one that works on the host that is meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

from ksmd_ctl.cli import source
from ksmd_ctl.cli.client import Conversation, socket_path
from ksmd_ctl.errors import Unreachable

__all__ = ["asked"]


def asked(
    args: argparse.Namespace,
    method: str,
    parameters: object,
    tell: Callable[[Mapping[str, object]], None] = lambda _: None,
) -> Mapping[str, object] | None:
    """The service's last answer; None where no service runs, or it works on another host.

    :param parameters: a dataclass of `ksmd_ctl.daemon.varlink_wire`
    :param tell: told what it says on the way
    :raises KsmdError: what the service says that failed, or it doesn't answer
    """
    source.go_by_config(args)
    found = source.from_service(args)
    if not found.report:
        _tell_left(found.left)
        return None
    path = socket_path(args.socket)
    last: Mapping[str, object] | None = None
    with Conversation(path, method, parameters) as conversation:
        while True:
            try:
                answer = conversation.answer()
            except KeyboardInterrupt:
                # What runs is abandoned, and its last word says what became of it.
                conversation.stop()
                continue
            if answer is None:
                break
            last = answer
            tell(answer)
    if last is None:
        raise Unreachable(f"asking the service at {path}", "it said nothing", hint="are both of one version?")
    return last


def _tell_left(left: Mapping[str, object]) -> None:
    if left:
        from ksmd_ctl.cli.render import write_lines
        from ksmd_ctl.metrics.left import left_lines

        write_lines(left_lines(left), sys.stderr)
