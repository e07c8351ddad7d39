# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl domains``: who may share memory with whom, and whether that holds."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Final, TextIO

from ksmd_ctl.cli import domains_assign, domains_plan
from ksmd_ctl.cli.common import Parsers, add_command, add_config, add_source, share_options
from ksmd_ctl.cli.source import show
from ksmd_ctl.cli.terminal import UNKNOWN, WIDTH, Column, bytes_or_unknown, count_or_unknown, list_text, table
from ksmd_ctl.errors import ExitCode
from ksmd_ctl.figures import count_text, plural, ratio_text, seconds_text
from ksmd_ctl.reports.document import number, part, parts, text

# Somebody waits for it and nothing else: it may take this much CPU time.
_BUDGET_CPU_SECONDS: Final = 5.0
# Of those that no configuration names, and that share nothing, so many are shown.
_OTHERS: Final = 20
# With whom most is shared.
_PARTNERS: Final = 5

_COLUMNS: Final = (
    Column("domain", wraps=True),
    Column("nodes", wraps=True),
    Column("members", right=True),
    Column("memory", right=True),
    Column("merged", right=True),
    Column("saved", right=True),
    Column("elsewhere", right=True),
    Column("shared frames", right=True),
    Column("verdict", wraps=True),
)


def add_parser(parsers: Parsers) -> None:
    parser = add_command(parsers, "domains", "show whether trust domains are kept apart, and what they share")
    add_source(parser)
    add_config(parser)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", prog=parser.prog)
    for module in (domains_plan, domains_assign):
        share_options(parser, module.add_parser(actions))


def run(args: argparse.Namespace, out: TextIO) -> int:
    if args.action:
        return {"plan": domains_plan.run, "assign": domains_assign.run}[args.action](args, out)
    return show(args, out, "Domains", "domains", _look, lines, code=_code)


def _code(document: Mapping[str, object]) -> ExitCode:
    return ExitCode.DONE if document.get("isolated") else ExitCode.CHECK_FAILED


def _look(args: argparse.Namespace) -> Mapping[str, object]:
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.config.domains import Domains
    from ksmd_ctl.config.loader import load
    from ksmd_ctl.domains.audit import auditing
    from ksmd_ctl.domains.documents import domains_document
    from ksmd_ctl.host.operation import finish

    config = load(args.config).domains or Domains()
    with open_host(args.host, args.root, merged=True) as host:
        survey = finish(host.survey(_BUDGET_CPU_SECONDS))
        audit = finish(auditing(host, config, survey, _BUDGET_CPU_SECONDS))
        return domains_document(host.identity, audit, host.clock())


def lines(document: Mapping[str, object]) -> Iterator[str]:
    """The lines for people of a document (docs/json.md)."""
    if part(document, "host").get("simulated"):
        yield "SIMULATED: these figures are not about this machine"
    found = parts(document, "domains")
    named = [one for one in found if one.get("configured") or text(one, "verdict") == "not isolated"]
    others = sorted((one for one in found if one not in named), key=lambda one: -(number(one, "saved_bytes") or 0))
    shown = named + others[:_OTHERS]
    if shown:
        yield from table(_COLUMNS, [_row(one) for one in shown], WIDTH)
    else:
        yield "no process has mergeable memory"
    if len(others) > _OTHERS:
        yield f"{count_text(len(others) - _OTHERS)} more that are domains of their own share nothing now"
    for one in shown:
        for reason in parts(one, "reasons"):
            yield f"{text(one, 'domain')}: {text(reason, 'text')}"
        if shared := part(one, "shared_with"):
            largest = sorted(shared, key=lambda name: -(number(shared, name) or 0))[:_PARTNERS]
            said = ", ".join(f"{count_or_unknown(number(shared, name))} with {name}" for name in largest)
            yield f"{text(one, 'domain')}: merged frames shared: {said}"
        forked = number(one, "forked_frames")
        if forked:
            yield f"{text(one, 'domain')}: {plural(forked, 'frame')} shared by fork, which is no merging"
    yield _facts(document)


def _row(one: Mapping[str, object]) -> list[str]:
    nodes, low, high = one.get("nodes"), number(one, "shared_frames_low"), number(one, "shared_frames_high")
    shared = count_or_unknown(number(one, "shared_frames"))
    if low is not None and high is not None and low != high:
        shown = f"{shared} ({count_text(low)} to {count_text(high)})"
    else:
        shown = shared
    elsewhere = number(one, "elsewhere_bytes")
    return [
        text(one, "domain") or UNKNOWN,
        list_text(node for node in nodes if isinstance(node, int)) if isinstance(nodes, list | tuple) else UNKNOWN,
        count_or_unknown(number(one, "processes")),
        bytes_or_unknown(number(one, "resident_bytes")),
        count_or_unknown(number(one, "merged_pages")),
        bytes_or_unknown(number(one, "saved_bytes")),
        "-" if elsewhere is None else bytes_or_unknown(elsewhere),
        shown,
        text(one, "verdict") or UNKNOWN,
    ]


def _facts(document: Mapping[str, object]) -> str:
    age, share, cpu = (number(document, name) for name in ("age_seconds", "share", "cpu_seconds"))
    said = [f'mode "{text(document, "mode")}"']
    if age is not None:
        said.append("audited just now" if age < 1 else f"audited {seconds_text(age)} ago")
    if share is not None:
        counted = "all" if share >= 1 else f"{ratio_text(share)} of all"
        said.append(f"{counted} frames counted{'' if share >= 1 else ' (95 % intervals in brackets)'}")
    if uncounted := number(document, "uncounted_processes"):
        said.append(f"frames of {plural(uncounted, 'process', 'processes')} not counted")
    if cpu is not None:
        said.append(f"{plural(round(cpu * 1000), 'ms', 'ms')} of CPU")
    return ", ".join(said)
