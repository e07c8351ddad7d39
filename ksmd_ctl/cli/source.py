# SPDX-License-Identifier: GPL-2.0-or-later
"""Who does what a command asks for: the service, or this process where no service runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar

from ksmd_ctl.cli.client import Conversation, NoService, socket_path
from ksmd_ctl.cli.common import ENDING, handling, write_json
from ksmd_ctl.cli.terminal import WIDTH, ProgressLine, write_lines, write_wrapped
from ksmd_ctl.errors import Denied, ExitCode, Unreachable
from ksmd_ctl.figures import plural, seconds_text
from ksmd_ctl.render.summary import BAD, Line, left_lines
from ksmd_ctl.reports.document import number, part, text

if TYPE_CHECKING:
    from ksmd_ctl.host.operation import Operation

#: A report is there at once. For other documents the service may look at every process of a large host.
REPORT_SECONDS = 5.0
_SURVEY_SECONDS = 180.0

T = TypeVar("T")
Tell = Callable[[Mapping[str, object]], None]
#: What came of a change, as a document, and whether Ctrl-C stopped it.
Outcome = tuple[Mapping[str, object], bool]


class Answer(NamedTuple):
    """What the service answered.

    :ivar result: what was asked for; empty where no service works on the host that is meant, or it can't be asked
    :ivar note: why it is empty, for people
    :ivar denied: that this user may not ask it
    :ivar left: what a service left changed that ended without a stop (docs/json.md); empty for nothing
    :ivar stopped: Ctrl-C stopped what was asked for
    """

    # A document; of metrics, a text.
    result: Any
    note: str = ""
    left: Mapping[str, object] = {}
    stopped: bool = False
    denied: Denied | None = None


def ask(
    args: argparse.Namespace,
    method: str = "Status",
    key: str = "report",
    parameters: object = None,
    tell: Tell = lambda _: None,
    changes: bool | None = None,
) -> Answer:
    """Ask the service for a document, or, with parameters, for a change.

    The first Ctrl-C stops a change, and the result says what became of it; a second one does not wait for that.

    :param key: what the result is called in the answer
    :param parameters: a dataclass of `ksmd_ctl.daemon.varlink_wire`
    :param tell: told the progress that the service reports
    :param changes: whether a change is asked for; None for where there are parameters
    :raises Unreachable: it doesn't answer, or not with a result
    :raises Denied: a change, and this user may not connect
    :raises KsmdError: what the service says that failed
    """
    if getattr(args, "config", None) is not None and args.socket is None:
        from ksmd_ctl.config.loader import load

        args.socket = load(args.config).socket
    # Which host the service works on only its report says.
    if args.host is not None and method != "Status" and not (report := ask(args)).result:
        return report
    path = socket_path(args.socket)
    changes = parameters is not None if changes is None else changes
    directly = f"these figures are read from the {args.host or 'kernel'} directly"
    seconds = None if changes else REPORT_SECONDS if method == "Status" else _SURVEY_SECONDS
    try:
        conversation = Conversation(path, method, parameters, more=changes, timeout_seconds=seconds)
    except NoService:
        # Only here: the modules behind cost more than asking a service does.
        from ksmd_ctl.cli.host import left_by_service

        return Answer({}, f"no service runs ({path}): {directly}", left_by_service(args) or {})
    except Denied as error:
        if changes:
            # Without the service it would fail at the lock, which is not what is lacking.
            raise
        return Answer({}, f"no permission to query the service ({error.why}): {directly}", denied=error)
    result: Any = None
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
                if stopped or not changes:
                    raise
                stopped = True
                conversation.stop()
    form = str if method == "Metrics" else dict
    host = part({key: result}, key, "host")
    if not isinstance(result, form) or (method == "Status" and not host):
        raise Unreachable(f"asking the service at {path}", f"its answer has no {key}", hint="are both of one version?")
    if method == "Status" and args.host not in (None, host.get("kind")):
        return Answer({}, f"the service runs on the {text(host, 'kind')}: {directly}")
    return Answer(result, stopped=stopped)


def show(
    args: argparse.Namespace,
    out: TextIO,
    method: str,
    key: str,
    look: Callable[[argparse.Namespace], Mapping[str, object]],
    lines: Callable[[Mapping[str, object]], Iterable[str]],
    chosen: Callable[[Mapping[str, object]], Mapping[str, object]] = lambda document: document,
    parameters: object = None,
    code: Callable[[Mapping[str, object]], int] = lambda _: ExitCode.DONE,
) -> int:
    """Print a document as JSON or in lines.

    :param method: the service's method that makes it, and `key` what it is called in the answer
    :param look: makes it without a service
    :param chosen: what of it is to be shown
    :param parameters: of the method, a dataclass of `ksmd_ctl.daemon.varlink_wire`
    :param code: the exit code
    """
    answer = ask(args, method, key, parameters, changes=False)
    document = chosen(answer.result or look(args))
    if args.json:
        write_json(document, out)
        return code(document)
    write_lines([*source_lines(answer), *left_lines(answer.left)], out, most=WIDTH)
    write_wrapped(lines(document), WIDTH, out)
    return code(document)


def source_lines(answer: Answer) -> list[Line]:
    """Where a document is from, for people; none where it is from the service."""
    return [Line("service", answer.note, BAD)] if answer.note else []


def change(
    args: argparse.Namespace,
    method: str,
    key: str,
    parameters: object,
    here: Callable[[], Outcome],
    tell: Tell = lambda _: None,
) -> Outcome:
    """Have the service make a change, or make it here; parameters as those of `ask`.

    :param here: makes it in this process
    """
    answer = ask(args, method, key, parameters, tell)
    if answer.result:
        return answer.result, answer.stopped
    write_lines(left_lines(answer.left), sys.stderr)
    return here()


def carry_out(operation: Operation[T], line: ProgressLine) -> tuple[T, bool]:
    """Carry something out in this process; its result, and whether Ctrl-C or another end stopped it, as `ask` has it.

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

    # What nohup(1) has ignored goes on being so.
    with handling((one for one in ENDING if signal.getsignal(one) is not signal.SIG_IGN), stop):
        return finish(operation, tell=lambda at: line.at(at.done, at.total, at.unit)), bool(pressed)


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
        # Where nodes are not shown there are no brackets either.
        interval = " (95 % interval in brackets)" if part(document, "nodes") else ""
        said.append(f"KSM pages estimated from a sample{interval}")
    elif survey.get("complete"):
        said.append(f"all frames counted ({text(survey, 'detection')})")
    cpu = number(survey, "cpu_seconds")
    if cpu is not None:
        said.append(f"{plural(round(cpu * 1000), 'ms', 'ms')} of CPU")
    return ", ".join(said)
