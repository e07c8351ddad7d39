# SPDX-License-Identifier: GPL-2.0-or-later
"""``ksmd-ctl domains plan``: proposes nodes for domains, and prints what to set."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from ksmd_ctl.cli.common import Parsers, add_command, add_config, share, write_json
from ksmd_ctl.cli.terminal import Column, bytes_or_unknown, list_text, table
from ksmd_ctl.errors import ExitCode, UsageError, did_you_mean
from ksmd_ctl.figures import bytes_text, plural
from ksmd_ctl.reports.document import number, part

if TYPE_CHECKING:
    from ksmd_ctl.config.domains import Domains
    from ksmd_ctl.config.model import Config
    from ksmd_ctl.host.interface import Host

_BITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_COLUMNS = (
    Column("domain"),
    Column("nodes", wraps=True),
    Column("needs", right=True),
    Column("has room for", right=True),
    Column("to be moved", right=True),
)


def add_parser(parsers: Parsers) -> argparse.ArgumentParser:
    parser = add_command(parsers, "plan", "propose nodes for domains from their memory, and print what to set")
    parser.add_argument("--root", default="/", help=argparse.SUPPRESS)
    parser.add_argument(
        "--reserve",
        type=share(0, 99),
        default=0.25,
        metavar="SHARE",
        help="what each domain gets beyond the memory that it has now, as a share of that (default: 0.25)",
    )
    parser.add_argument(
        "--memory",
        type=memory_size,
        action="append",
        default=[],
        metavar="DOMAIN=SIZE",
        help="take a domain to have so much memory, as in gold=64G; may be given more than once",
    )
    add_config(parser)
    return parser


def memory_size(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"([^=]+)=(\d{1,9}(?:\.\d{1,3})?)([KMGT]?)(?:i?B)?", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not of the form gold=64G")
    return match[1], int(float(match[2]) * (1 << _BITS[match[3]]))


def configured(config: Config, names: Sequence[str] = ()) -> Domains:
    """The domains of a configuration.

    :param names: domains that have to be among them
    :raises UsageError: it has none, or not these
    """
    what = "looking for domains"
    if config.domains is None or not config.domains.domains:
        raise UsageError(what, "the configuration has none", hint="add a table [domains.NAME] to it (docs/domains.md)")
    known = [one.name for one in config.domains.domains]
    for name in names:
        if name not in known:
            why = f"there is no domain {name[:80]!r}{did_you_mean(name, known)}"
            raise UsageError(what, why, hint=f"there are {', '.join(known)}")
    return config.domains


def run(args: argparse.Namespace, out: TextIO) -> int:
    from ksmd_ctl.cli.host import open_host
    from ksmd_ctl.config.loader import load

    domains = configured(load(args.config), [name for name, _ in args.memory])
    with open_host(args.host, args.root) as host:
        document = _plan(host, domains, args.reserve, dict(args.memory))
    if args.json:
        write_json(document, out)
    else:
        out.writelines(f"{line}\n" for line in lines(document))
    return ExitCode.DONE


def _plan(host: Host, domains: Domains, reserve: float, memory: Mapping[str, int]) -> dict[str, object]:
    from ksmd_ctl.domains.members import domains_of
    from ksmd_ctl.domains.plan import Need, plan_document, propose
    from ksmd_ctl.host.operation import finish

    page, sample = host.identity.page_size_bytes, host.sample()
    needs, units = [], {}
    others = 0
    listed = finish(host.processes())
    for one in domains_of(domains, listed.processes):
        resident = sum(process.resident_bytes or 0 for process in one.processes)
        if one.domain is None:
            others += resident
            continue
        nodes: Counter[int] = Counter()
        for process in one.processes:
            nodes.update({node: pages * page for node, pages in process.resident_nodes.items()})
        swapped = sum(process.swapped_bytes or 0 for process in one.processes)
        needs.append(Need(one.name, memory.get(one.name, resident + swapped), nodes))
        units[one.name] = sorted({process.unit for process in one.processes if process.unit})
    used = (sample.number("mem_total_bytes") or 0) - (sample.number("mem_available_bytes") or 0)
    members = sum(sum(need.on_nodes.values()) for need in needs)
    plan = propose(needs, host.topology(), reserve, max(0, int(used) - members))
    left = f"nodes {list_text(plan.rest)} are left for these" if plan.rest else "no node is left for these"
    notes = []
    if others:
        notes.append(f"{bytes_text(others)} of mergeable memory is in processes that belong to no domain: {left}")
    if unread := len(listed.skipped) + len(listed.denied):
        who = plural(unread, "process", "processes")
        notes.append(f"{who} could not be looked at: what these need, whoever they belong to, is not in this plan")
    return {**plan_document(plan, units), "notes": notes}


def lines(document: Mapping[str, object]) -> Iterator[str]:
    """The lines for people of a plan's document (docs/json.md)."""
    domains, settings = part(document, "domains"), part(document, "settings")
    yield from table(_COLUMNS, [_row(name, part(domains, name)) for name in domains])
    if document.get("split"):
        yield f"these nodes are there once the kernel was started with {document.get('kernel_parameter')}"
    rest = document.get("rest")
    if isinstance(rest, list) and rest:
        yield f"for all else: nodes {list_text(rest)}"
    yield from (f"note: {line}" for line in _texts(document, "notes"))
    yield from (f"cost: {line}" for line in _texts(document, "costs"))
    yield "what to set (NODES: the nodes of the domain):"
    yield from (f"  {whom}: {line}" for whom in settings for line in _texts(settings, whom))


def _row(name: str, domain: Mapping[str, object]) -> list[str]:
    nodes = domain.get("nodes")
    figures = (bytes_or_unknown(number(domain, key)) for key in ("needed_bytes", "room_bytes", "moved_bytes"))
    return [name, list_text(nodes) if isinstance(nodes, list | tuple) else "?", *figures]


def _texts(document: Mapping[str, object], key: str) -> list[object]:
    found = document.get(key)
    return found if isinstance(found, list) else []
