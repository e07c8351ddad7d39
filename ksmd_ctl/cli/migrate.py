# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl migrate``: move mergeable memory of a process or a unit to a node."""

from __future__ import annotations

import argparse
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, TextIO

from ksmd_ctl.cli import source
from ksmd_ctl.cli.client import Conversation, NoService, socket_path
from ksmd_ctl.cli.common import PROGRAM, add_command, add_socket, error_text, whole_number, write_json
from ksmd_ctl.cli.progress import ProgressLine
from ksmd_ctl.cli.table import count_or_unknown
from ksmd_ctl.control.document import number, part, parts, text
from ksmd_ctl.errors import ExitCode, KsmdError, Unreachable
from ksmd_ctl.metrics.figures import bytes_text, plural

if TYPE_CHECKING:
    from ksmd_ctl.cli.common import Parsers
    from ksmd_ctl.control.migration import Order

__all__ = ["add_parser", "address_range", "lines", "run"]

# How long an operation that has nothing to wait on rests between two steps.
_STEP_SECONDS = 0.001

_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "migrate", "move mergeable memory of a process or a unit to a node")
    add_socket(parser)
    source.add_arguments(parser)
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--pid", type=whole_number(1), metavar="P", help="the process whose memory is to be moved")
    whose.add_argument("--unit", metavar="U", help="all processes of this systemd unit that have mergeable memory")
    parser.add_argument("--to", type=whole_number(), metavar="N", required=True, help="the node to move it to")
    parser.add_argument(
        "--range",
        type=address_range,
        action="append",
        default=[],
        metavar="A-B",
        help="only these addresses, as in /proc/PID/maps; may be given more than once (default: all mergeable memory)",
    )
    parser.add_argument("--everything", action="store_true", help="also memory that is not mergeable")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be moved")


def address_range(text: str) -> tuple[int, int]:
    """Two addresses in hexadecimal, with or without 0x, and a dash between."""
    start, _, end = text.partition("-")
    digits = start.removeprefix("0x"), end.removeprefix("0x")
    # Not int() alone: it takes "+1", " 1", "1_0" and the digits of other scripts.
    if not all(0 < len(one) <= 16 and set(one) <= _HEXADECIMAL for one in digits):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not of the form 7f0000000000-7f0000200000")
    found = int(digits[0], 16), int(digits[1], 16)
    if not found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"{text} ends where it begins, or before")
    return found


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.control.migration import Order, exit_code

    order = Order(
        to=args.to,
        pid=args.pid,
        unit=args.unit or "",
        ranges=tuple(args.range),
        everything=args.everything,
        dry_run=args.dry_run,
    )
    order.check()
    with ExitStack() as stack:
        document, interrupted = _carry_out(_way(args, order, stack))
    if args.json:
        write_json(document, out)
    else:
        for line in lines(document):
            out.write(f"{line}\n")
        _explain(document)
    return ExitCode.INTERRUPTED if interrupted else exit_code(document)


class _Way(Protocol):
    """How it is carried out: by the service, or by this process."""

    def wait(self) -> tuple[Mapping[str, object], bool]:
        """How far it is and False, or what came of it and True."""

    def stop(self) -> None:
        """Stop it; what came of it until then is still told."""


def _way(args: argparse.Namespace, order: Order, stack: ExitStack) -> _Way:
    if source.serves(args):
        try:
            return _ByService(
                stack.enter_context(Conversation(socket_path(args.socket), "Migrate", _parameters(order)))
            )
        except NoService:
            pass
    return _ByItself(args, order, stack)


def _parameters(order: Order) -> object:
    from ksmd_ctl.daemon.varlink_wire import AddressRange, MigrateParameters

    ranges = tuple(AddressRange(*addresses) for addresses in order.ranges)
    return MigrateParameters(order.to, order.pid, order.unit or None, ranges, order.everything, order.dry_run)


class _ByService:
    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def wait(self) -> tuple[Mapping[str, object], bool]:
        answer = self._conversation.answer()
        if answer is None:
            raise Unreachable("moving memory", "the service ended without a result", hint="are both of one version?")
        result = part(answer, "result")
        return (result, True) if result else (part(answer, "progress"), False)

    def stop(self) -> None:
        self._conversation.stop()


class _ByItself:
    def __init__(self, args: argparse.Namespace, order: Order, stack: ExitStack) -> None:
        from pathlib import Path

        from ksmd_ctl.cli.host import open_host
        from ksmd_ctl.config.loader import load
        from ksmd_ctl.control.executor import Migration
        from ksmd_ctl.control.lock import LOCK, HostLock

        config = load()
        if not order.dry_run and args.host != "engine":
            stack.enter_context(HostLock(Path(config.runtime_directory) / LOCK, f"{PROGRAM} migrate"))
        limited = order.within(config.floor_bytes, config.batch_latency)
        self._migration = Migration(open_host(args.host, args.root), limited)

    def wait(self) -> tuple[Mapping[str, object], bool]:
        if self._migration.poll():
            return self._migration.result().document(), True
        at, descriptor = self._migration.progress, self._migration.fileno()
        ready = [] if descriptor < 0 else [descriptor]
        select.select(ready, [], [], 1.0 if ready else _STEP_SECONDS)
        return {"done": at.done, "total": at.total, "unit": at.unit}, False

    def stop(self) -> None:
        self._migration.cancel()


def _carry_out(way: _Way) -> tuple[Mapping[str, object], bool]:
    """What came of it, and whether somebody interrupted it. Who does so twice gets no result."""
    interrupted = False
    with ProgressLine(sys.stderr) as line:
        while True:
            try:
                found, over = way.wait()
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                way.stop()
                continue
            if over:
                return found, interrupted
            if not interrupted:
                line.at(number(found, "done") or 0, number(found, "total") or 0, text(found, "unit"))


# -- what people read --------------------------------------------------------------------------------------


def lines(document: Mapping[str, object]) -> Iterator[str]:
    """The lines for people of a migration's document (docs/json.md)."""
    to = number(document, "to")
    processes = parts(document, "processes")
    for item in processes:
        name = text(item, "name")
        yield f"process {number(item, 'pid')}{f' ({name})' if name else ''}: {_what(item, to)}"
        by_cause = part(item, "left")
        for cause in by_cause:
            yield f"  {count_or_unknown(number(by_cause, cause))} stay where they are: {cause}"
    if len(processes) > 1:
        totals = part(document, "totals")
        key, verb = ("would_move", "would be moved") if document.get("dry_run") else ("moved", "moved")
        counts = {name: plural(number(totals, name) or 0, "page") for name in (key, "already", "left")}
        yield f"in all: {counts[key]} {verb}, {counts['already']} on node {to} already, {counts['left']} left"
    if document.get("cancelled"):
        untouched = number(document, "untouched") or 0
        rest = f"; {plural(untouched, 'process', 'processes')} not looked at" if untouched else ""
        yield f"stopped before it was done: what was moved stays where it is now{rest}"


def _what(item: Mapping[str, object], to: int | float | None) -> str:
    error = part(item, "error")
    if error:
        return f"{text(error, 'what')}: {text(error, 'why')}"
    already = number(item, "already") or 0
    there = f"{count_or_unknown(already)} {'was' if already == 1 else 'were'} there already"
    if "would_move" not in item:
        return f"{plural(number(item, 'moved') or 0, 'page')} moved to node {to}, {there}"
    nodes = part(item, "would_move")
    pages = sum(number(nodes, node) or 0 for node in nodes)
    origin = ", ".join(f"{count_or_unknown(number(nodes, node))} from node {node}" for node in nodes)
    shared, room = number(item, "shared") or 0, number(item, "room_bytes")
    said = [f"{plural(pages, 'page')} would be moved to node {to}" + (f" ({origin})" if origin else "")]
    if shared:
        said.append(f"{count_or_unknown(shared)} of them for all who map them")
    said.append(there)
    if room is not None:
        said.append(f"{bytes_text(room)} free {text(item, 'room')} above the floor")
    return ", ".join(said)


def _explain(document: Mapping[str, object]) -> None:
    for item in parts(document, "processes"):
        error = part(item, "error")
        if text(error, "hint"):
            sys.stderr.write(error_text(KsmdError(text(error, "what"), text(error, "why"), hint=text(error, "hint"))))
            return
