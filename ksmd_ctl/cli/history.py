# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl history``: what happened: knobs that others changed, transactions, decisions, starts and ends."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TextIO

from ksmd_ctl.cli.client import Conversation, HungUp, NoService, socket_path
from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, whole_number, write_json
from ksmd_ctl.cli.source import ask
from ksmd_ctl.cli.terminal import write_lines
from ksmd_ctl.cli.times import moment
from ksmd_ctl.errors import Absent, ExitCode, Unreachable, UsageError
from ksmd_ctl.history.model import KINDS, Kind, Query, history_path
from ksmd_ctl.host.sample import HostKind
from ksmd_ctl.render.summary import BAD, PLAIN, Line
from ksmd_ctl.reports.document import number, part, parts, text
from ksmd_ctl.reports.history import history_document

_LIMIT = 1000
_FOLLOW_LIMIT = 10
_MOST = 2000
# A service that has ended is asked for again so often.
_AGAIN_SECONDS = 1.0
_KIND_WIDTH = max(map(len, Kind))


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "history", "show what happened: changes by others, transactions, decisions, starts")
    add_source(parser)
    add_config(parser)
    when = "a length of time (10min, 2h, 1d), or a time ('2026-11-29 12:00', yesterday, '12:00 UTC')"
    parser.add_argument("--since", type=moment, metavar="T", help=f"events from then on: {when}")
    parser.add_argument("--until", type=moment, metavar="T", help="events before then")
    parser.add_argument(
        "--kind",
        action="append",
        choices=[kind.value for kind in Kind],
        help="only events of this kind; may be given several times: "
        + "; ".join(f"{kind}: {said}" for kind, said in KINDS.items()),
    )
    parser.add_argument(
        "--limit",
        type=whole_number(1, _MOST),
        metavar="N",
        help=f"only the latest N events (default: {_LIMIT}, with --follow {_FOLLOW_LIMIT})",
    )
    parser.add_argument("--follow", action="store_true", help="then show each event as it comes, until Ctrl-C")


def run(args: argparse.Namespace, out: TextIO) -> int:
    kinds = None if args.kind is None else frozenset(map(Kind, args.kind))
    if None not in (args.since, args.until) and args.since >= args.until:
        raise UsageError(
            "reading the command line", "--since is not before --until", hint="as in --since 2d --until 1d"
        )
    if args.follow and args.until is not None:
        raise UsageError(
            "reading the command line", "--follow shows what comes, --until what was", hint="leave out one of both"
        )
    query = Query(args.since, args.until, kinds, args.limit or (_FOLLOW_LIMIT if args.follow else _LIMIT))
    if args.follow:
        return _follow(args, query, out)
    answer = ask(args, "History", "history", _parameters(query), changes=False)
    document, lines = answer.result, []
    if not document:
        try:
            document, path = _look(args, query)
        except Absent as error:
            # The service that runs may have one.
            raise answer.denied or error from error
        lines = [Line("service", f"{answer.note.partition(':')[0]}: these events are from {path}", BAD)]
    if args.json:
        write_json(document, out)
        return ExitCode.DONE
    write_lines([*lines, *history_lines(document)], out)
    if not parts(document, "events"):
        write_lines([Line("none", "no such event is kept")], out)
    if document.get("more") and args.limit is None:
        write_lines(
            [Line("more", f"only the latest {len(parts(document, 'events'))}: --until shows earlier ones")], out
        )
    return ExitCode.DONE


def history_lines(document: Mapping[str, object]) -> Iterator[Line]:
    """A line for each event of a document (docs/json.md)."""
    for event in parts(document, "events"):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(number(event, "time_seconds") or 0))
        tone = PLAIN if text(event, "severity") == "info" else BAD
        yield Line(f"{when} {text(event, 'kind'):{_KIND_WIDTH}}", text(event, "text"), tone)


def _parameters(query: Query, *, follow: bool | None = None) -> object:
    from ksmd_ctl.daemon.varlink_wire import HistoryParameters

    kinds = None if query.kinds is None else tuple(sorted(query.kinds))
    return HistoryParameters(query.since_seconds, query.until_seconds, kinds, query.limit, follow)


def _follow(args: argparse.Namespace, query: Query, out: TextIO) -> int:
    # It finds the socket of a configuration that was named, and says what is wrong with the host.
    answer = ask(args)
    what = f"following the history of the service at {socket_path(args.socket)}"
    if not answer.result:
        raise Unreachable(what, answer.note.partition(":")[0], hint="without --follow, the file of the history is read")
    since, waits = time.time(), False
    while True:
        try:
            with Conversation(socket_path(args.socket), "History", _parameters(query, follow=True)) as conversation:
                while (said := conversation.answer()) is not None:
                    waits, document = False, part(said, "history")
                    _show_events(document, out, as_json=args.json)
                    since = max([since, *(number(event, "time_seconds") or 0 for event in parts(document, "events"))])
            break
        except (NoService, HungUp):
            if not waits and not args.json:
                write_lines([Line("service", "it has ended; waiting for the next one", BAD)], out)
                out.flush()
            waits = True
        # What the next one did meanwhile is asked for, too.
        query = replace(query, since_seconds=since + 1e-6, limit=_MOST)
        time.sleep(_AGAIN_SECONDS)
    raise Unreachable(what, "it has ended")


def _show_events(document: Mapping[str, object], out: TextIO, *, as_json: bool) -> None:
    if as_json:
        for event in parts(document, "events"):
            out.write(json.dumps(event, allow_nan=False) + "\n")
    else:
        write_lines(history_lines(document), out)
    out.flush()


def _look(args: argparse.Namespace, query: Query) -> tuple[Mapping[str, object], str]:
    """The document from the file, and which file that is.

    :raises KsmdError: there is none, or it can't be read
    """
    from ksmd_ctl.cli.host import folders
    from ksmd_ctl.history.reading import read_copy

    paths = [history_path(places.state, args.host or HostKind.KERNEL) for places in folders(args)]
    for path in paths:
        with suppress(Absent):
            return history_document(read_copy(path, query), query.limit), str(path)
    hint = "the service begins one: systemctl start ksmd-ctl; --config names one with another state_directory"
    raise Absent("reading the history", f"there is none ({_listed(map(str, paths))})", hint=hint)


def _listed(paths: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(paths)) or "no folder is known"
