# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl sharing``: who shares merged memory with whom, and what it would cost if one of them left."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, seconds, whole_number
from ksmd_ctl.cli.source import show
from ksmd_ctl.cli.terminal import WIDTH, Column, bytes_or_unknown, count_or_unknown, more, table
from ksmd_ctl.figures import bytes_text, plural, ratio_text, seconds_text
from ksmd_ctl.reports.document import number, part, parts, text

_BUDGET_SECONDS = 5.0
_LIMIT = 20
# A line has no room for a matrix of more.
_MATRIX = 8

_GROUPS = (
    Column("group", wraps=True),
    Column("merged", right=True),
    Column("shared with others", right=True),
    Column("saved alone", right=True),
    Column("saved in all", right=True),
    Column("leaving costs", right=True),
    Column("shared by fork", right=True),
)
_PAIRS = (
    Column("group", wraps=True),
    Column("shares with", wraps=True),
    Column("merged", right=True),
    Column("frames", right=True),
    Column("frames by fork", right=True),
)


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "sharing", "show who shares merged memory with whom, and what it saves whom")
    add_source(parser)
    add_config(parser)
    parser.add_argument(
        "--by",
        choices=("unit", "process", "domain"),
        default="unit",
        help="whose memory is one group: a unit's or virtual machine's, a process's, a trust domain's (default: unit)",
    )
    parser.add_argument(
        "--limit",
        type=whole_number(1),
        metavar="N",
        help=f"show only the N groups and pairs that share most (default: {_LIMIT}, with --json all)",
    )
    parser.add_argument(
        "--budget",
        type=seconds(60),
        default=_BUDGET_SECONDS,
        metavar="SECONDS",
        help=f"about how much CPU time it may take; with more to do it counts a sample (default: {_BUDGET_SECONDS:g})",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.daemon.varlink_wire import SharingParameters

    def chosen(document: Mapping[str, object]) -> Mapping[str, object]:
        if not args.json or args.limit is None:
            return document
        return {**document, **{key: parts(document, key)[: args.limit] for key in ("groups", "pairs")}}

    def shown(document: Mapping[str, object]) -> Iterator[str]:
        return lines(document, args.limit or _LIMIT)

    return show(args, out, "Sharing", "sharing", _look, shown, chosen, SharingParameters(args.by, args.budget))


def _look(args: argparse.Namespace) -> Mapping[str, object]:
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.config.domains import Domains
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.domains.members import domain_of
    from ksmd_ctl.host.operation import finish
    from ksmd_ctl.reports.sharing import grouping, sharing_document

    with open_host(args.host, args.root, merged=True) as host:
        label = partial(domain_of, load(args.config).domains or Domains()) if args.by == "domain" else None
        groups = grouping(finish(host.processes()).processes, args.by, label)
        found = finish(host.sharing(groups.members, args.budget))
        return sharing_document(host.identity, groups, found, host.clock())


def lines(document: Mapping[str, object], limit: int = _LIMIT) -> Iterator[str]:
    """The lines for people of a document (docs/json.md).

    :param limit: groups and pairs that are shown
    """
    if part(document, "host").get("simulated"):
        yield "SIMULATED: these processes are not on this machine"
    groups, pairs = parts(document, "groups"), parts(document, "pairs")
    if not groups:
        yield "nobody has merged pages"
        return
    forked, complete = any(number(one, "forked_bytes") for one in groups), part(document, "look").get("complete")
    yield from table(_GROUPS[: None if forked else -1], [_group(one, forked) for one in groups[:limit]], WIDTH)
    yield from more(len(groups) - limit, "group")
    if not pairs:
        yield f"no {'two of them share a frame' if complete else 'frame was found that two of them share'}"
    elif len(groups) <= _MATRIX and complete:
        yield "memory that two of them share, and what only one maps:"
        yield from _matrix(document)
    else:
        forked = any(number(pair, "forked_frames") for pair in pairs)
        yield from table(_PAIRS[: None if forked else -1], [_pair(one, forked) for one in pairs[:limit]], WIDTH)
        yield from more(len(pairs) - limit + int(number(document, "pairs_left_out") or 0), "pair")
    yield from _notes(part(document, "look"))


def _group(group: Mapping[str, object], forked: bool) -> list[str]:
    keys = ("merged_bytes", "shared_bytes", "saved_alone_bytes", "saved_bytes", "leaving_costs_bytes", "forked_bytes")
    return [
        text(group, "group"),
        *(bytes_or_unknown(number(group, key)) for key in keys[: None if forked else -1]),
    ]


def _pair(pair: Mapping[str, object], forked: bool) -> list[str]:
    frames, low, high = (number(pair, key) for key in ("frames", "frames_low", "frames_high"))
    shown = count_or_unknown(frames)
    if low != high:
        shown += f" ({count_or_unknown(low)} to {count_or_unknown(high)})"
    found = [*_names(pair), bytes_or_unknown(number(pair, "shared_bytes")), shown]
    return [*found, count_or_unknown(number(pair, "forked_frames"))] if forked else found


def _names(pair: Mapping[str, object]) -> tuple[str, str]:
    found = pair.get("groups")
    one, other = found if isinstance(found, list | tuple) and len(found) == 2 else ("?", "?")
    return str(one), str(other)


def _matrix(document: Mapping[str, object]) -> Iterator[str]:
    groups, page = parts(document, "groups"), number(part(document, "host"), "page_size_bytes") or 0
    shared = {frozenset(_names(pair)): number(pair, "shared_bytes") or 0 for pair in parts(document, "pairs")}
    names = [text(group, "group") for group in groups]
    own = {name: (number(group, "own_frames") or 0) * page for name, group in zip(names, groups, strict=True)}
    columns = [Column("", wraps=True), *(Column(str(index), right=True) for index in range(1, len(names) + 1))]
    rows = [
        [
            f"{index} {name}",
            *(_short(own[name] if other == name else shared.get(frozenset({name, other}), 0)) for other in names),
        ]
        for index, name in enumerate(names, 1)
    ]
    yield from table(columns, rows, WIDTH)


def _short(size: float) -> str:
    """A size in at most eight characters."""
    head, _, unit = bytes_text(size).partition(" ")
    return "-" if not size else f"{float(head):.0f} {unit}" if len(head) > 4 else f"{head} {unit}"


def _notes(look: Mapping[str, object]) -> Iterator[str]:
    """What the figures leave out, and what they are of."""
    if unseen := number(look, "unseen_frames"):
        yield f"{plural(unseen, 'merged frame')} are also mapped by somebody who is not among these"
    unread = "could not be looked at, or there was no time (--budget)"
    for key, why in (("unread", unread), ("gone", "ended meanwhile")):
        pids = look.get(key)
        if isinstance(pids, list) and pids:
            yield f"{plural(len(pids), 'process', 'processes')} {why}: pid {', '.join(map(str, pids[:5]))}"
    if left_out := number(look, "left_out"):
        yield f"{plural(left_out, 'process', 'processes')} with few merged pages left out"
    share, age, cpu = (number(look, key) for key in ("share", "age_seconds", "cpu_seconds"))
    said = [f"looked {'just now' if not age or age < 1 else f'{seconds_text(age)} ago'}"]
    if share is not None and share < 1:
        said.append(f"estimated from {ratio_text(share)} of all frames (95 % interval in brackets)")
    else:
        said.append("all frames counted")
    if cpu:
        said.append(f"{plural(round(cpu * 1000), 'ms', 'ms')} of CPU")
    yield ", ".join(said)
