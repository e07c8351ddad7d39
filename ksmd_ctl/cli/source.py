# SPDX-License-Identifier: GPL-2.0-or-later
"""Who does what a command asks for: the service, or this process where no service runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TextIO, TypeVar

from ksmd_ctl.cli.client import Conversation, NoService, call, socket_path
from ksmd_ctl.cli.common import write_json
from ksmd_ctl.cli.terminal import WIDTH, ProgressLine, wrapped, write_lines
from ksmd_ctl.errors import Denied, ExitCode, Unreachable
from ksmd_ctl.figures import plural, seconds_text
from ksmd_ctl.render.summary import BAD, Line, left_lines
from ksmd_ctl.reports.document import number, part, text

if TYPE_CHECKING:
    from ksmd_ctl.host.operation import Operation

# Looking at every process of a large host takes a while, and somebody else's look may be under way.
_SURVEY_SECONDS = 180.0
_DIRECTLY = "these figures are read from the kernel directly"

T = TypeVar("T")
Tell = Callable[[Mapping[str, object]], None]


class Found:
    """A document, and what has to be said about where it is from (empty where it is from the service).

    :ivar left: what a service left changed that ended without a stop (docs/json.md); empty for nothing
    """

    __slots__ = ("document", "left", "note")

    def __init__(
        self, document: Mapping[str, object], note: str = "", left: Mapping[str, object] | None = None
    ) -> None:
        self.document = document
        self.note = note
        self.left = left or {}

    def lines(self) -> list[Line]:
        """Where the document is from, for people."""
        return [*([Line("service", self.note, BAD)] if self.note else []), *left_lines(self.left)]


def go_by_config(args: argparse.Namespace) -> None:
    """Take the socket from the configuration, if one was named and no socket was: its service listens there."""
    if getattr(args, "config", None) is not None and args.socket is None:
        from ksmd_ctl.config.loader import load

        args.socket = load(args.config).socket


def from_service(args: argparse.Namespace, method: str = "Status", key: str = "report") -> Found:
    """A document that the service makes; an empty one and a note where it can't be asked.

    :param key: what the document is called in the answer
    :raises Unreachable: it is there and doesn't answer, or not with a document
    """
    path = socket_path(args.socket)
    try:
        # A report is there at once; for the others the service may look at every process.
        answer = call(path, method) if method == "Status" else call(path, method, timeout_seconds=_SURVEY_SECONDS)
    except NoService:
        # Only here: the modules behind cost more than asking a service does.
        from ksmd_ctl.cli.host import left_by_service

        return Found({}, f"no service runs ({path}): {_DIRECTLY}", left_by_service(args))
    except Denied as error:
        return Found({}, f"no permission to query the service ({error.why}): {_DIRECTLY}")
    document = answer.get(key)
    host = document.get("host") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(host, dict):
        raise Unreachable(f"asking the service at {path}", "its answer is no document", hint="are both of one version?")
    kind = host.get("kind")
    if args.host not in (None, kind):
        return Found({}, f"the service runs on the {kind}: these figures are read from the {args.host} directly")
    return Found(document)


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
    found = from_service(args, method, key)
    document = chosen(found.document or look(args))
    if args.json:
        write_json(document, out)
        return ExitCode.DONE
    write_lines(found.lines(), out, most=WIDTH)
    for line in lines(document):
        for piece in wrapped(line, WIDTH, 2):
            out.write(f"{piece}\n")
    return ExitCode.DONE


def ask(
    args: argparse.Namespace, method: str, parameters: object, key: str, tell: Tell = lambda _: None
) -> tuple[dict[str, object] | None, bool]:
    """Have the service do something that takes a while; its result, and whether Ctrl-C stopped it.

    The first Ctrl-C stops what runs, and the result says what became of it; a second one does not wait for that.
    The result is None where no service runs, or it works on another host.

    :param parameters: a dataclass of `ksmd_ctl.daemon.varlink_wire`
    :param key: what the result is called in the last answer
    :param tell: told the progress that the service reports
    :raises KsmdError: what the service says that failed, or it doesn't answer
    """
    go_by_config(args)
    path = socket_path(args.socket)
    # Which host the service works on only its report says.
    if args.host is not None and not (found := from_service(args)).document:
        write_lines(left_lines(found.left), sys.stderr)
        return None, False
    try:
        conversation = Conversation(path, method, parameters)
    except NoService:
        from ksmd_ctl.cli.host import left_by_service

        write_lines(left_lines(left_by_service(args) or {}), sys.stderr)
        return None, False
    except Denied:
        return None, False
    result: object = None
    stopped = False
    with conversation:
        while True:
            try:
                answer = conversation.answer()
                if answer is None:
                    break
                result = answer.get(key)
                if progress := part(answer, "progress"):
                    tell(progress)
            except KeyboardInterrupt:
                if stopped:
                    raise
                stopped = True
                conversation.stop()
    if not isinstance(result, dict):
        raise Unreachable(f"asking the service at {path}", "it gave no result", hint="are both of one version?")
    return result, stopped


def carry_out(operation: Operation[T], line: ProgressLine) -> tuple[T, bool]:
    """Carry something out in this process; its result, and whether Ctrl-C stopped it, as `ask` has it.

    :raises KsmdError: it failed
    """
    from ksmd_ctl.host.operation import finish

    pressed = 0

    def stop(*_: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise KeyboardInterrupt
        operation.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        return finish(operation, tell=lambda at: line.at(at.done, at.total, at.unit)), bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def survey_text(document: Mapping[str, object]) -> str:
    """Of when a document's figures are, and how sure; empty where it doesn't say."""
    survey = part(document, "survey")
    age = number(survey, "age_seconds")
    if age is None:
        return ""
    said = ["surveyed just now" if age < 1 else f"surveyed {seconds_text(age)} ago"]
    lacking = text(survey, "lacking")
    if lacking:
        said.append(f"KSM pages could not be counted: {lacking}")
    elif survey.get("complete") is False:
        said.append("KSM pages estimated from a sample (95 % interval in brackets)")
    elif survey.get("complete"):
        said.append(f"all frames counted ({text(survey, 'witness')})")
    cpu = number(survey, "cpu_seconds")
    if cpu is not None:
        said.append(f"{plural(round(cpu * 1000), 'ms', 'ms')} of CPU")
    return ", ".join(said)
